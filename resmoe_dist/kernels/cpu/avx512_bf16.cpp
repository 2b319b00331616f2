// AVX-512 with VBMI2 and bfloat16 dot products (Cooper Lake's successors, Zen 4 and later).
//
// `dpbf16` multiplies pairs of bfloat16 exactly and adds them to a float32; it rounds once per pair
// and takes denormal numbers for zeros.

#include <algorithm>
#include <cstring>
#include <vector>

#include "kernels.h"

#ifdef __x86_64__
#include "target.h"
RESMOE_TARGET(
    "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi2,avx512vpopcntdq,avx512bf16,bmi2,popcnt,fma")
#include <immintrin.h>

#define RESMOE_BF16
#include "avx512.h"

namespace {

inline __m512bh load_pairs(const void* source) {
  return (__m512bh)_mm512_loadu_si512(source);
}

// The sums of four registers, together.
inline __m128 totals(__m512 a, __m512 b, __m512 c, __m512 d) {
  const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
  const __m512 abcd = _mm512_add_ps(
      _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd))),
      _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd))));
  const __m256 half =
      _mm256_add_ps(_mm512_castps512_ps256(abcd), _mm512_extractf32x8_ps(abcd, 1));
  return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}

// y += sums of columns in the order in which interleaving two rows leaves them.
inline void add_interleaved(__m512 low, __m512 high, float* y) {
  const __m512i front = _mm512_set_epi32(23, 22, 21, 20, 7, 6, 5, 4, 19, 18, 17, 16, 3, 2, 1, 0);
  const __m512i back =
      _mm512_set_epi32(31, 30, 29, 28, 15, 14, 13, 12, 27, 26, 25, 24, 11, 10, 9, 8);
  const __m512 first = _mm512_permutex2var_ps(low, front, high);
  const __m512 second = _mm512_permutex2var_ps(low, back, high);
  _mm512_storeu_ps(y, _mm512_add_ps(_mm512_loadu_ps(y), first));
  _mm512_storeu_ps(y + 16, _mm512_add_ps(_mm512_loadu_ps(y + 16), second));
}

struct PairPrimitives : Avx512BFloat16<6> {
  static constexpr int64_t kOutTokens = 8;
  static constexpr int64_t kPair = 2;
  // Vectors are half registers, so that fewer lanes are padding.
  static constexpr int64_t kLanes = 8;
  static constexpr int kMostVectors = 8;
  static constexpr int rows_at_once(int M) { return M <= 4 ? 12 : 24 / ((M + 1) / 2); }

  template <int NT>
  static void dot(const BFloat16* tile, int64_t stride, const BFloat16* const* x, int64_t width,
                  float* products) {
    // Enough sums that one is not waited for before the next.
    constexpr int kUnroll = NT == 1 ? 2 : 1;
    __m512 sums[kUnroll][kDotRows][NT];
    RESMOE_UNROLL
    for (auto& of_step : sums) {
      RESMOE_UNROLL
      for (auto& of_row : of_step) {
        RESMOE_UNROLL
        for (auto& sum : of_row) sum = _mm512_setzero_ps();
      }
    }
    for (int64_t k = 0; k < width; k += 32 * kUnroll) {
      RESMOE_UNROLL
      for (int u = 0; u < kUnroll; ++u) {
        __m512bh rows[kDotRows];
        RESMOE_UNROLL
        for (int r = 0; r < kDotRows; ++r) rows[r] = load_pairs(tile + r * stride + k + 32 * u);
        RESMOE_UNROLL
        for (int t = 0; t < NT; ++t) {
          const __m512bh token = load_pairs(x[t] + k + 32 * u);
          RESMOE_UNROLL
          for (int r = 0; r < kDotRows; ++r) {
            sums[u][r][t] = _mm512_dpbf16_ps(sums[u][r][t], rows[r], token);
          }
        }
      }
    }
    RESMOE_UNROLL
    for (int t = 0; t < NT; ++t) {
      if constexpr (kUnroll == 2) {
        RESMOE_UNROLL
        for (int r = 0; r < kDotRows; ++r) {
          sums[0][r][t] = _mm512_add_ps(sums[0][r][t], sums[1][r][t]);
        }
      }
      _mm_storeu_ps(products + t * kDotRows,
                    totals(sums[0][0][t], sums[0][1][t], sums[0][2][t], sums[0][3][t]));
    }
  }

  template <int NT>
  static void accumulate(const BFloat16* tile, int64_t stride, int64_t rows, const BFloat16* h,
                         int64_t h_stride, float* const* y, int64_t width) {
    constexpr int kColumns = NT >= 4 ? 8 / NT : 4;
    for (int64_t k = 0; k < width; k += 32 * kColumns) {
      __m512 sums[NT][kColumns][2];
      RESMOE_UNROLL
      for (auto& of_token : sums) {
        RESMOE_UNROLL
        for (auto& of_column : of_token) of_column[0] = of_column[1] = _mm512_setzero_ps();
      }
      for (int64_t r = 0; r < rows; r += 2) {
        __m512bh pairs[kColumns][2];
        RESMOE_UNROLL
        for (int c = 0; c < kColumns; ++c) {
          const BFloat16* entries = tile + r * stride + k + 32 * c;
          const __m512i even = _mm512_loadu_si512(entries);
          const __m512i odd = _mm512_loadu_si512(entries + stride);
          pairs[c][0] = (__m512bh)_mm512_unpacklo_epi16(even, odd);
          pairs[c][1] = (__m512bh)_mm512_unpackhi_epi16(even, odd);
        }
        RESMOE_UNROLL
        for (int t = 0; t < NT; ++t) {
          int32_t both;
          std::memcpy(&both, h + t * h_stride + r, 4);
          const __m512bh factor = (__m512bh)_mm512_set1_epi32(both);
          RESMOE_UNROLL
          for (int c = 0; c < kColumns; ++c) {
            sums[t][c][0] = _mm512_dpbf16_ps(sums[t][c][0], pairs[c][0], factor);
            sums[t][c][1] = _mm512_dpbf16_ps(sums[t][c][1], pairs[c][1], factor);
          }
        }
      }
      RESMOE_UNROLL
      for (int t = 0; t < NT; ++t) {
        RESMOE_UNROLL
        for (int c = 0; c < kColumns; ++c) {
          add_interleaved(sums[t][c][0], sums[t][c][1], y[t] + k + 32 * c);
        }
      }
    }
  }

  template <int R, int M>
  static void multiply(const BFloat16* weights, int64_t row_step, int64_t depth_step,
                       const BFloat16* packed, int64_t depth, float* out, bool add) {
    constexpr int kWhole = M / 2;
    constexpr bool kHalf = M % 2;
    __m512 sums[R][kWhole + 1];
    __m256 halves[R];
    RESMOE_UNROLL
    for (int r = 0; r < R; ++r) {
      const float* of_row = out + r * M * 8;
      RESMOE_UNROLL
      for (int m = 0; m < kWhole; ++m) {
        sums[r][m] = add ? _mm512_loadu_ps(of_row + 16 * m) : _mm512_setzero_ps();
      }
      if constexpr (kHalf) {
        halves[r] = add ? _mm256_loadu_ps(of_row + 16 * kWhole) : _mm256_setzero_ps();
      }
    }
    for (int64_t k = 0; k < depth; ++k) {
      const BFloat16* of_step = packed + k * M * 16;
      __m512bh copies[kWhole + 1];
      __m256bh half;
      RESMOE_UNROLL
      for (int m = 0; m < kWhole; ++m) copies[m] = load_pairs(of_step + 32 * m);
      if constexpr (kHalf) {
        half = (__m256bh)_mm256_loadu_si256(
            reinterpret_cast<const __m256i*>(of_step + 32 * kWhole));
      }
      RESMOE_UNROLL
      for (int r = 0; r < R; ++r) {
        int32_t pair;
        std::memcpy(&pair, weights + r * row_step + k * depth_step, 4);
        const __m512i weight = _mm512_set1_epi32(pair);
        RESMOE_UNROLL
        for (int m = 0; m < kWhole; ++m) {
          sums[r][m] = _mm512_dpbf16_ps(sums[r][m], copies[m], (__m512bh)weight);
        }
        if constexpr (kHalf) {
          halves[r] =
              _mm256_dpbf16_ps(halves[r], half, (__m256bh)_mm512_castsi512_si256(weight));
        }
      }
    }
    RESMOE_UNROLL
    for (int r = 0; r < R; ++r) {
      float* of_row = out + r * M * 8;
      RESMOE_UNROLL
      for (int m = 0; m < kWhole; ++m) _mm512_storeu_ps(of_row + 16 * m, sums[r][m]);
      if constexpr (kHalf) _mm256_storeu_ps(of_row + 16 * kWhole, halves[r]);
    }
  }

  // expand_four, and at once the products with one vector, added to sums[row].
  static int64_t dot_four(Bits* const* bits, const BFloat16** values, const BFloat16* const* ends,
                          int64_t columns, const BFloat16* x, float* sums) {
    __m512 of_row[4];
    RESMOE_UNROLL
    for (auto& sum : of_row) sum = _mm512_setzero_ps();
    const auto multiply = [&](int64_t c, const __m512i* entries, const uint32_t*) {
      const __m512bh token = load_pairs(x + c);
      RESMOE_UNROLL
      for (int r = 0; r < 4; ++r) {
        of_row[r] = _mm512_dpbf16_ps(of_row[r], (__m512bh)entries[r], token);
      }
    };
    const int64_t done = for_each_of_four<kPadding>(bits, values, ends, columns, multiply);
    const __m128 total = totals(of_row[0], of_row[1], of_row[2], of_row[3]);
    _mm_storeu_ps(sums, _mm_add_ps(_mm_loadu_ps(sums), total));
    return done;
  }

  // expand_four, and at once y += Σ h[row] · row.
  static int64_t accumulate_four(Bits* const* bits, const BFloat16** values,
                                 const BFloat16* const* ends, int64_t columns, const BFloat16* h,
                                 float* y) {
    int32_t pairs[2];
    std::memcpy(pairs, h, 8);
    const __m512bh first = (__m512bh)_mm512_set1_epi32(pairs[0]);
    const __m512bh second = (__m512bh)_mm512_set1_epi32(pairs[1]);
    const auto add = [&](int64_t c, const __m512i* entries, const uint32_t*) {
      __m512 low = _mm512_dpbf16_ps(
          _mm512_setzero_ps(), (__m512bh)_mm512_unpacklo_epi16(entries[0], entries[1]), first);
      __m512 high = _mm512_dpbf16_ps(
          _mm512_setzero_ps(), (__m512bh)_mm512_unpackhi_epi16(entries[0], entries[1]), first);
      low = _mm512_dpbf16_ps(low, (__m512bh)_mm512_unpacklo_epi16(entries[2], entries[3]), second);
      high =
          _mm512_dpbf16_ps(high, (__m512bh)_mm512_unpackhi_epi16(entries[2], entries[3]), second);
      add_interleaved(low, high, y + c);
    };
    return for_each_of_four<kPadding>(bits, values, ends, columns, add);
  }

  // Pairs of two rows' entries: out[2·column + row].
  static void interleave(const BFloat16* first, const BFloat16* second, int64_t width,
                         BFloat16* out) {
    for (int64_t k = 0; k < width; k += 32) {
      store_interleaved(_mm512_loadu_si512(first + k), _mm512_loadu_si512(second + k), out + 2 * k);
    }
  }

  static void store_interleaved(__m512i first, __m512i second, BFloat16* out) {
    const __m512i low = _mm512_set_epi64(11, 10, 3, 2, 9, 8, 1, 0);
    const __m512i high = _mm512_set_epi64(15, 14, 7, 6, 13, 12, 5, 4);
    const __m512i a = _mm512_unpacklo_epi16(first, second);
    const __m512i b = _mm512_unpackhi_epi16(first, second);
    _mm512_storeu_si512(out, _mm512_permutex2var_epi64(a, low, b));
    _mm512_storeu_si512(out + 32, _mm512_permutex2var_epi64(a, high, b));
  }

  // expand_four to pairs of rows, `stride` apart.
  static int64_t expand_pairs(Bits* const* bits, const BFloat16** values,
                              const BFloat16* const* ends, const BFloat16* const* centers,
                              int64_t columns, BFloat16* out, int64_t stride) {
    return for_each_of_four<32>(
        bits, values, ends, columns,
        [&](int64_t c, const __m512i* entries, const uint32_t* masks) {
          __m512i sums[4];
          RESMOE_UNROLL
          for (int r = 0; r < 4; ++r) {
            sums[r] = centers[0] ? with_center(centers[r] + c, masks[r], entries[r]) : entries[r];
          }
          store_interleaved(sums[0], sums[1], out + 2 * c);
          store_interleaved(sums[2], sums[3], out + stride + 2 * c);
        });
  }
};

template <class V>
struct Primitives;
template <>
struct Primitives<BFloat16> : PairPrimitives {};
template <>
struct Primitives<float> : Avx512Float<6> {};

bool has_bf16() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512vbmi2") && __builtin_cpu_supports("avx512vpopcntdq") &&
         __builtin_cpu_supports("avx512bf16");
}
}  // namespace

#include "algorithms.h"

const resmoe::InstructionSet resmoe::kAvx512Bf16 = {
    "avx512_bf16", has_bf16, kernels_of<BFloat16>(), kernels_of<float>()};
RESMOE_TARGET_END
#else
const resmoe::InstructionSet resmoe::kAvx512Bf16 = {};
#endif
