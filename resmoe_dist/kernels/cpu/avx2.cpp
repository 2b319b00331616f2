// AVX2 kernels.
//
// AVX2 has no instruction that spreads packed values over the set bits of a mask. A byte of bitmap
// looks up a shuffle in a table instead: for each of eight entries, the packed value it takes.

#include "target.h"

#include "kernels.h"

#ifdef __x86_64__
RESMOE_TARGET("avx2,fma,bmi2,popcnt")
#include <immintrin.h>

#include "avx2_levels.h"
#include "primitives.h"

namespace {

// A shuffle for each byte of bitmap. Entry i takes packed value number (set bits below bit i), or
// zero if bit i is clear; 0x80 stands for zero, and its top bit also marks entries to leave alone.
struct Shuffles {
  alignas(16) uint8_t bytes[256][16];  // for bfloat16: byte numbers, two per entry
  alignas(8) uint8_t floats[256][8];   // for float: value numbers
};

constexpr Shuffles make_shuffles() {
  Shuffles shuffles{};
  for (int byte = 0; byte < 256; ++byte) {
    int next = 0;
    for (int i = 0; i < 8; ++i) {
      const bool kept = byte >> i & 1;
      shuffles.bytes[byte][2 * i] = kept ? 2 * next : 0x80;
      shuffles.bytes[byte][2 * i + 1] = kept ? 2 * next + 1 : 0x80;
      shuffles.floats[byte][i] = kept ? next++ : 0x80;
    }
  }
  return shuffles;
}

constexpr Shuffles kShuffles = make_shuffles();

inline __m128i byte_shuffle(uint32_t mask) {
  return _mm_load_si128(reinterpret_cast<const __m128i*>(kShuffles.bytes[mask]));
}

// Negative where the mask's bit is clear.
inline __m256i float_shuffle(uint32_t mask) {
  const auto* shuffle = reinterpret_cast<const __m128i*>(kShuffles.floats[mask]);
  return _mm256_cvtepi8_epi32(_mm_loadl_epi64(shuffle));
}

// Spreads packed values over the set bits of the mask; zeros elsewhere.
inline __m128i spread(uint32_t mask, const BFloat16* values) {
  const __m128i packed = _mm_loadu_si128(reinterpret_cast<const __m128i*>(values));
  return _mm_shuffle_epi8(packed, byte_shuffle(mask));
}

inline __m256 spread(uint32_t mask, const float* values) {
  const __m256i shuffle = float_shuffle(mask);
  const __m256 shuffled = _mm256_permutevar8x32_ps(_mm256_loadu_ps(values), shuffle);
  return _mm256_andnot_ps(_mm256_castsi256_ps(_mm256_srai_epi32(shuffle, 31)), shuffled);
}

inline __m256 to_floats(__m128i bfloat16s) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bfloat16s), 16));
}

// center + residual where the mask has bits, the unchanged centre elsewhere. Rounds to nearest,
// ties to even; NaN stays NaN.
inline __m128i add_where(uint32_t mask, const BFloat16* center, __m128i residual) {
  const __m128i base = _mm_loadu_si128(reinterpret_cast<const __m128i*>(center));
  const __m256 sum = _mm256_add_ps(to_floats(base), to_floats(residual));
  const __m256i bits = _mm256_castps_si256(sum);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF)));
  // Setting the highest bit of the fraction keeps a NaN from turning into infinity.
  const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(sum, sum, _CMP_UNORD_Q));
  const __m256i high = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, nan), 16);
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(high, high), 0x08);
  return _mm_blendv_epi8(_mm256_castsi256_si128(packed), base, byte_shuffle(mask));
}

inline __m256 add_where(uint32_t mask, const float* center, __m256 residual) {
  const __m256 base = _mm256_loadu_ps(center);
  const __m256 unchanged = _mm256_castsi256_ps(float_shuffle(mask));
  return _mm256_blendv_ps(_mm256_add_ps(base, residual), base, unchanged);
}

template <class Scalar>
struct Primitives : VectorPrimitives<Scalar, 8, 2> {
  template <bool kHasCenter>
  static const Scalar* expand(BitReader& bits, const Scalar* values, const Scalar* end,
                              const Scalar* center, int64_t columns, Scalar* out) {
    int64_t c = 0;
    for (; c + 8 <= columns; c += 8) {
      const uint32_t mask = bits.next(8);
      const int kept = __builtin_popcount(mask);
      // `spread` reads eight values. If fewer remain, it reads them from a copy.
      Scalar last[8] = {};
      const Scalar* source = values;
      if (end - values < 8) {
        std::memcpy(last, values, kept * sizeof(Scalar));
        source = last;
      }
      auto entries = spread(mask, source);
      if constexpr (kHasCenter) entries = add_where(mask, center + c, entries);
      std::memcpy(out + c, &entries, sizeof entries);
      values += kept;
    }
    return VectorPrimitives<Scalar, 8, 2>::template expand<kHasCenter>(
        bits, values, end, kHasCenter ? center + c : nullptr, columns - c, out + c);
  }
};

bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("popcnt");
}

using LevelPrimitives = Avx2Levels;

}  // namespace

#include "algorithms.h"

const resmoe::InstructionSet resmoe::kAvx2 = instruction_set("avx2", has_avx2);
RESMOE_TARGET_END
#else
const resmoe::InstructionSet resmoe::kAvx2 = {};
#endif
