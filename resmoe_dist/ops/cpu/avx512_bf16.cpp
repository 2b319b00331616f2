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

struct PairPrimitives : Avx512BFloat16<6> {
  static constexpr int64_t kOutTokens = 8;

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
    // Interleaving two rows leaves a register's columns in this order, low and high part.
    const __m512i low =
        _mm512_set_epi32(23, 22, 21, 20, 7, 6, 5, 4, 19, 18, 17, 16, 3, 2, 1, 0);
    const __m512i high =
        _mm512_set_epi32(31, 30, 29, 28, 15, 14, 13, 12, 27, 26, 25, 24, 11, 10, 9, 8);
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
          float* out = y[t] + k + 32 * c;
          const __m512 first = _mm512_permutex2var_ps(sums[t][c][0], low, sums[t][c][1]);
          const __m512 second = _mm512_permutex2var_ps(sums[t][c][0], high, sums[t][c][1]);
          _mm512_storeu_ps(out, _mm512_add_ps(_mm512_loadu_ps(out), first));
          _mm512_storeu_ps(out + 16, _mm512_add_ps(_mm512_loadu_ps(out + 16), second));
        }
      }
    }
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
