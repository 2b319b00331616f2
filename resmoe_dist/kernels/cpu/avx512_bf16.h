// Primitives of processors with AVX-512 and bfloat16 dot products (Cooper Lake's successors, Zen 4
// and later).
//
// Fast because of one instruction, `vdpbf16ps`: it multiplies 16 pairs of bfloat16 exactly and adds
// each pair's two products to a float. It rounds once per pair and treats denormal numbers as
// zeros. The two factors of a pair must be neighbours in memory, so products over rows or over
// packed copies first interleave two rows, or two steps of the depth.
//
// Included after the target was chosen.

#pragma once

#include "avx512.h"

namespace {

inline __m512bh load_pairs(const void* source) { return (__m512bh)_mm512_loadu_si512(source); }

// Two neighbouring entries in all pairs of a register.
inline __m512i broadcast_pair(const BFloat16* source) {
  int32_t pair;
  std::memcpy(&pair, source, 4);
  return _mm512_set1_epi32(pair);
}

// The sum of each of four registers. Interleaving adds up all four together, in fewer steps than
// one after the other.
inline __m128 horizontal_sums(__m512 a, __m512 b, __m512 c, __m512 d) {
  const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
  const __m512 abcd = _mm512_add_ps(
      _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd))),
      _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd))));
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(abcd), _mm512_extractf32x8_ps(abcd, 1));
  return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}

// Two rows' entries in pairs. `unpack` instructions work within 128 bits, so the pairs' columns are
// in another order: 0-3, 8-11, 16-19, 24-27 in `low`, the others in `high`.
struct RowPairs {
  __m512i low, high;

  RowPairs(__m512i first, __m512i second)
      : low(_mm512_unpacklo_epi16(first, second)), high(_mm512_unpackhi_epi16(first, second)) {}
};

// y += sums of 32 columns, whose order is that of RowPairs.
inline void add_in_column_order(__m512 low, __m512 high, float* y) {
  const __m512i front = _mm512_set_epi32(23, 22, 21, 20, 7, 6, 5, 4, 19, 18, 17, 16, 3, 2, 1, 0);
  const __m512i back =
      _mm512_set_epi32(31, 30, 29, 28, 15, 14, 13, 12, 27, 26, 25, 24, 11, 10, 9, 8);
  const __m512 first = _mm512_permutex2var_ps(low, front, high);
  const __m512 second = _mm512_permutex2var_ps(low, back, high);
  _mm512_storeu_ps(y, _mm512_add_ps(_mm512_loadu_ps(y), first));
  _mm512_storeu_ps(y + 16, _mm512_add_ps(_mm512_loadu_ps(y + 16), second));
}

// Stores two rows' pairs in the order of their columns: out[2 · column + row].
inline void store_in_column_order(__m512i first, __m512i second, BFloat16* out) {
  const __m512i front = _mm512_set_epi64(11, 10, 3, 2, 9, 8, 1, 0);
  const __m512i back = _mm512_set_epi64(15, 14, 7, 6, 13, 12, 5, 4);
  const RowPairs pairs(first, second);
  _mm512_storeu_si512(out, _mm512_permutex2var_epi64(pairs.low, front, pairs.high));
  _mm512_storeu_si512(out + 32, _mm512_permutex2var_epi64(pairs.low, back, pairs.high));
}

// Adds bfloat16 as dot products of pairs (a, b) with (1, 1), which takes fewer instructions than
// converting to float. Rounds to nearest, ties to even; treats denormal numbers as zeros.
struct DotProductAdder {
  static __m512i add(__m512i a, __m512i b) {
    const __m512bh ones = (__m512bh)_mm512_set1_epi16(0x3F80);
    const auto sums = [&](__m512i pairs) {
      return _mm512_dpbf16_ps(_mm512_setzero_ps(), (__m512bh)pairs, ones);
    };
    const RowPairs pairs(a, b);
    const __m512 low = sums(pairs.low), high = sums(pairs.high);
    const __m512i in_order = _mm512_set_epi64(7, 3, 6, 2, 5, 1, 4, 0);
    return _mm512_permutexvar_epi64(in_order, (__m512i)_mm512_cvtne2ps_pbh(high, low));
  }
};

struct DotProductPrimitives : Avx512BFloat16<DotProductAdder, 6> {
  static constexpr int64_t kAccumulateTokens = 8;
  static constexpr int64_t kDepthPerStep = 2;
  // Vectors are half a register, so that fewer lanes are padding.
  static constexpr int64_t kLanes = 8;
  static constexpr int kMaxVectors = 8;
  static constexpr int rows_at_once(int vectors) {
    return vectors <= 4 ? 12 : 24 / ((vectors + 1) / 2);
  }

  template <int kTokens>
  static void dot(const BFloat16* tile, int64_t stride, const BFloat16* const* x, int64_t width,
                  float* products) {
    // A sum must wait for the previous addition to it. For one token, twice as many sums keep the
    // multipliers busy in the meantime.
    constexpr int kSteps = kTokens == 1 ? 2 : 1;
    __m512 sums[kSteps][kDotRows][kTokens] = {};
    for (int64_t k = 0; k < width; k += 32 * kSteps) {
      RESMOE_UNROLL
      for (int s = 0; s < kSteps; ++s) {
        __m512bh rows[kDotRows];
        RESMOE_UNROLL
        for (int r = 0; r < kDotRows; ++r) rows[r] = load_pairs(tile + r * stride + k + 32 * s);
        RESMOE_UNROLL
        for (int t = 0; t < kTokens; ++t) {
          const __m512bh token = load_pairs(x[t] + k + 32 * s);
          RESMOE_UNROLL
          for (int r = 0; r < kDotRows; ++r) {
            sums[s][r][t] = _mm512_dpbf16_ps(sums[s][r][t], rows[r], token);
          }
        }
      }
    }
    RESMOE_UNROLL
    for (int t = 0; t < kTokens; ++t) {
      if constexpr (kSteps == 2) {
        RESMOE_UNROLL
        for (int r = 0; r < kDotRows; ++r) {
          sums[0][r][t] = _mm512_add_ps(sums[0][r][t], sums[1][r][t]);
        }
      }
      _mm_storeu_ps(products + t * kDotRows,
                    horizontal_sums(sums[0][0][t], sums[0][1][t], sums[0][2][t], sums[0][3][t]));
    }
  }

  template <int kTokens>
  static void accumulate(const BFloat16* tile, int64_t stride, int64_t rows, const BFloat16* h,
                         int64_t h_stride, float* const* y, int64_t width) {
    // Registers' worth of columns at a time. Each needs two registers for sums per token.
    constexpr int kColumns = kTokens >= 4 ? 8 / kTokens : 4;
    for (int64_t k = 0; k < width; k += 32 * kColumns) {
      __m512 low[kTokens][kColumns] = {}, high[kTokens][kColumns] = {};
      for (int64_t r = 0; r < rows; r += 2) {
        __m512bh pairs_low[kColumns], pairs_high[kColumns];
        RESMOE_UNROLL
        for (int c = 0; c < kColumns; ++c) {
          const BFloat16* entries = tile + r * stride + k + 32 * c;
          const RowPairs pairs(_mm512_loadu_si512(entries), _mm512_loadu_si512(entries + stride));
          pairs_low[c] = (__m512bh)pairs.low;
          pairs_high[c] = (__m512bh)pairs.high;
        }
        RESMOE_UNROLL
        for (int t = 0; t < kTokens; ++t) {
          const __m512bh factors = (__m512bh)broadcast_pair(h + t * h_stride + r);
          RESMOE_UNROLL
          for (int c = 0; c < kColumns; ++c) {
            low[t][c] = _mm512_dpbf16_ps(low[t][c], pairs_low[c], factors);
            high[t][c] = _mm512_dpbf16_ps(high[t][c], pairs_high[c], factors);
          }
        }
      }
      RESMOE_UNROLL
      for (int t = 0; t < kTokens; ++t) {
        RESMOE_UNROLL
        for (int c = 0; c < kColumns; ++c) {
          add_in_column_order(low[t][c], high[t][c], y[t] + k + 32 * c);
        }
      }
    }
  }

  // kVectors vectors are kVectors / 2 whole registers, and half a one if kVectors is odd.
  template <int kRows, int kVectors>
  static void multiply(const BFloat16* weights, int64_t row_stride, int64_t step_stride,
                       const BFloat16* packed, int64_t steps, float* out, bool add) {
    constexpr int kWhole = kVectors / 2;
    constexpr bool kHalf = kVectors % 2;
    __m512 sums[kRows][kWhole + 1];
    __m256 half_sums[kRows];
    RESMOE_UNROLL
    for (int r = 0; r < kRows; ++r) {
      const float* of_row = out + r * kVectors * kLanes;
      RESMOE_UNROLL
      for (int v = 0; v < kWhole; ++v) {
        sums[r][v] = add ? _mm512_loadu_ps(of_row + 16 * v) : _mm512_setzero_ps();
      }
      if constexpr (kHalf) {
        half_sums[r] = add ? _mm256_loadu_ps(of_row + 16 * kWhole) : _mm256_setzero_ps();
      }
    }
    for (int64_t k = 0; k < steps; ++k) {
      const BFloat16* of_step = packed + k * kVectors * kLanes * kDepthPerStep;
      __m512bh copies[kWhole + 1];
      __m256bh half_copies;
      RESMOE_UNROLL
      for (int v = 0; v < kWhole; ++v) copies[v] = load_pairs(of_step + 32 * v);
      if constexpr (kHalf) {
        half_copies =
            (__m256bh)_mm256_loadu_si256(reinterpret_cast<const __m256i*>(of_step + 32 * kWhole));
      }
      RESMOE_UNROLL
      for (int r = 0; r < kRows; ++r) {
        const __m512i weight = broadcast_pair(weights + r * row_stride + k * step_stride);
        RESMOE_UNROLL
        for (int v = 0; v < kWhole; ++v) {
          sums[r][v] = _mm512_dpbf16_ps(sums[r][v], copies[v], (__m512bh)weight);
        }
        if constexpr (kHalf) {
          half_sums[r] =
              _mm256_dpbf16_ps(half_sums[r], half_copies, (__m256bh)_mm512_castsi512_si256(weight));
        }
      }
    }
    RESMOE_UNROLL
    for (int r = 0; r < kRows; ++r) {
      float* of_row = out + r * kVectors * kLanes;
      RESMOE_UNROLL
      for (int v = 0; v < kWhole; ++v) _mm512_storeu_ps(of_row + 16 * v, sums[r][v]);
      if constexpr (kHalf) _mm256_storeu_ps(of_row + 16 * kWhole, half_sums[r]);
    }
  }

  static int64_t dot_four_rows(FourRows<BFloat16>& rows, int64_t columns, const BFloat16* x,
                               float* sums) {
    __m512 of_row[4] = {};
    const auto multiply = [&](int64_t c, const __m512i* entries, const uint32_t*) {
      const __m512bh token = load_pairs(x + c);
      RESMOE_UNROLL
      for (int r = 0; r < 4; ++r) {
        of_row[r] = _mm512_dpbf16_ps(of_row[r], (__m512bh)entries[r], token);
      }
    };
    const int64_t taken = for_each_of_four_rows<kPadding>(rows, columns, multiply);
    const __m128 total = horizontal_sums(of_row[0], of_row[1], of_row[2], of_row[3]);
    _mm_storeu_ps(sums, _mm_add_ps(_mm_loadu_ps(sums), total));
    return taken;
  }

  static int64_t accumulate_four_rows(FourRows<BFloat16>& rows, int64_t columns, const BFloat16* h,
                                      float* y) {
    const __m512bh factors_01 = (__m512bh)broadcast_pair(h);
    const __m512bh factors_23 = (__m512bh)broadcast_pair(h + 2);
    const auto sum = [&](__m512i pairs_01, __m512i pairs_23) {
      const __m512 first = _mm512_dpbf16_ps(_mm512_setzero_ps(), (__m512bh)pairs_01, factors_01);
      return _mm512_dpbf16_ps(first, (__m512bh)pairs_23, factors_23);
    };
    const auto add = [&](int64_t c, const __m512i* entries, const uint32_t*) {
      const RowPairs rows_01(entries[0], entries[1]), rows_23(entries[2], entries[3]);
      add_in_column_order(sum(rows_01.low, rows_23.low), sum(rows_01.high, rows_23.high), y + c);
    };
    return for_each_of_four_rows<kPadding>(rows, columns, add);
  }

  // As expand_four_rows, with two rows' entries in pairs: see store_in_column_order. The two rows
  // of pairs are `stride` apart.
  static int64_t expand_four_rows_to_pairs(FourRows<BFloat16>& rows, int64_t columns, BFloat16* out,
                                           int64_t stride) {
    return expand_four_rows_to(rows, columns, [&](int64_t c, const __m512i* entries) {
      store_in_column_order(entries[0], entries[1], out + 2 * c);
      store_in_column_order(entries[2], entries[3], out + stride + 2 * c);
    });
  }

  // Treats denormal numbers as zeros.
  static void round(const float* entries, int64_t columns, BFloat16* out) {
    int64_t i = 0;
    for (; i + 32 <= columns; i += 32) {
      const __m512bh rounded =
          _mm512_cvtne2ps_pbh(_mm512_loadu_ps(entries + i + 16), _mm512_loadu_ps(entries + i));
      _mm512_storeu_si512(out + i, (__m512i)rounded);
    }
    for (; i < columns; ++i) out[i] = round_to<BFloat16>(entries[i]);
  }

  static void interleave(const BFloat16* first, const BFloat16* second, int64_t width,
                         BFloat16* out) {
    for (int64_t k = 0; k < width; k += 32) {
      store_in_column_order(_mm512_loadu_si512(first + k), _mm512_loadu_si512(second + k),
                            out + 2 * k);
    }
  }
};

inline bool has_avx512_bf16() {
  return has_avx512_vbmi2() && __builtin_cpu_supports("avx512bf16");
}

}  // namespace
