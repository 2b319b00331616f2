// AVX2: a byte of bitmap looks up where each of eight entries finds its value.

#include <algorithm>
#include <array>
#include <cstring>
#include <vector>

#include "kernels.h"

#ifdef __x86_64__
#include "target.h"
RESMOE_TARGET("avx2,fma,bmi2,popcnt")
#include <immintrin.h>

#include "primitives.h"

namespace {

// For each byte of bitmap: which packed value entry i takes, of bytes as a shuffle of 16 bytes
// wants it (bfloat16), and of floats; for a clear bit a number whose top bit is set, for zero.
struct Places {
  alignas(16) uint8_t of_halves[256][16];
  alignas(8) uint8_t of_floats[256][8];
};

constexpr Places make_places() {
  Places places{};
  for (int byte = 0; byte < 256; ++byte) {
    int next = 0;
    for (int i = 0; i < 8; ++i) {
      const bool kept = byte >> i & 1;
      places.of_halves[byte][2 * i] = kept ? 2 * next : 0x80;
      places.of_halves[byte][2 * i + 1] = kept ? 2 * next + 1 : 0x80;
      places.of_floats[byte][i] = kept ? next++ : 0x80;
    }
  }
  return places;
}

constexpr Places kPlaces = make_places();

inline __m128i spread(uint32_t mask, const BFloat16* values) {
  const __m128i all = _mm_loadu_si128(reinterpret_cast<const __m128i*>(values));
  const auto* places = reinterpret_cast<const __m128i*>(kPlaces.of_halves[mask]);
  return _mm_shuffle_epi8(all, _mm_load_si128(places));
}

inline __m256 spread(uint32_t mask, const float* values) {
  const auto* places = reinterpret_cast<const __m128i*>(kPlaces.of_floats[mask]);
  const __m256i wide = _mm256_cvtepi8_epi32(_mm_loadl_epi64(places));
  const __m256 all = _mm256_permutevar8x32_ps(_mm256_loadu_ps(values), wide);
  return _mm256_andnot_ps(_mm256_castsi256_ps(_mm256_srai_epi32(wide, 31)), all);
}

inline __m256 to_floats(__m128i halves) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
}

// base + entries where the mask has bits, to nearest, ties to even, a NaN stays one; else base.
inline __m128i add(uint32_t mask, const BFloat16* base, __m128i entries) {
  const __m128i from = _mm_loadu_si128(reinterpret_cast<const __m128i*>(base));
  const __m256 sum = _mm256_add_ps(to_floats(from), to_floats(entries));
  const __m256i bits = _mm256_castps_si256(sum);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF)));
  const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(sum, sum, _CMP_UNORD_Q));
  const __m256i high = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, nan), 16);
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(high, high), 0x08);
  const auto* places = reinterpret_cast<const __m128i*>(kPlaces.of_halves[mask]);
  // A clear bit's place has its top bit set.
  return _mm_blendv_epi8(_mm256_castsi256_si128(packed), from, _mm_load_si128(places));
}

inline __m256 add(uint32_t mask, const float* base, __m256 entries) {
  const __m256 from = _mm256_loadu_ps(base);
  const auto* places = reinterpret_cast<const __m128i*>(kPlaces.of_floats[mask]);
  const __m256i wide = _mm256_cvtepi8_epi32(_mm_loadl_epi64(places));
  return _mm256_blendv_ps(_mm256_add_ps(from, entries), from, _mm256_castsi256_ps(wide));
}

template <class V>
struct Primitives : VectorPrimitives<V, 8, 2> {
  template <bool kCenter>
  static const V* expand(Bits& bits, const V* values, const V* end, const V* center,
                         int64_t columns, V* out) {
    int64_t c = 0;
    for (; c + 8 <= columns; c += 8) {
      const uint32_t mask = bits.next(8);
      const int kept = __builtin_popcount(mask);
      // Eight values are read at a time: near the end, from a copy that has as many.
      V last[8] = {};
      const V* source = values;
      if (end - values < 8) {
        std::memcpy(last, values, kept * sizeof(V));
        source = last;
      }
      auto entries = spread(mask, source);
      if constexpr (kCenter) entries = add(mask, center + c, entries);
      std::memcpy(out + c, &entries, sizeof entries);
      values += kept;
    }
    return VectorPrimitives<V, 8, 2>::template expand<kCenter>(
        bits, values, end, kCenter ? center + c : nullptr, columns - c, out + c);
  }
};

bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("popcnt");
}
}  // namespace

#include "algorithms.h"

const resmoe::InstructionSet resmoe::kAvx2 = {
    "avx2", has_avx2, kernels_of<BFloat16>(), kernels_of<float>()};
RESMOE_TARGET_END
#else
const resmoe::InstructionSet resmoe::kAvx2 = {};
#endif
