// AVX-512 kernels for processors with VBMI2 (Ice Lake and later, Zen 4 and later).

#include "target.h"

#include "kernels.h"

#ifdef __x86_64__
RESMOE_TARGET(
    "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vbmi2,avx512vnni,avx512vpopcntdq,bmi2,"
    "popcnt,fma")
#include <immintrin.h>

#include "avx512.h"
#include "avx512_levels.h"

namespace {

// Adds bfloat16 as floats. Rounds to nearest, ties to even; NaN stays NaN.
struct FloatAdder {
  // Entries of even and of odd number are added separately, because each of them becomes a float in
  // one instruction: a shift for the lower halves of words, a mask for the upper ones.
  static __m512i add(__m512i a, __m512i b) {
    const __m512i upper = _mm512_set1_epi32(0xFFFF0000);
    const auto even = [](__m512i v) { return _mm512_castsi512_ps(_mm512_slli_epi32(v, 16)); };
    const auto odd = [&](__m512i v) { return _mm512_castsi512_ps(_mm512_and_si512(v, upper)); };
    const auto rounded = [](__m512 sum) {
      const __m512i bits = _mm512_castps_si512(sum);
      const __m512i last = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
      const __m512i up = _mm512_add_epi32(last, _mm512_set1_epi32(0x7FFF));
      // Setting the highest bit of the fraction keeps a NaN from turning into infinity.
      const __mmask16 nan = _mm512_cmp_ps_mask(sum, sum, _CMP_UNORD_Q);
      return _mm512_mask_or_epi32(_mm512_add_epi32(bits, up), nan, bits,
                                  _mm512_set1_epi32(0x400000));
    };
    return _mm512_mask_blend_epi16(0xAAAAAAAA,
                                   _mm512_srli_epi32(rounded(_mm512_add_ps(even(a), even(b))), 16),
                                   rounded(_mm512_add_ps(odd(a), odd(b))));
  }
};

template <class Scalar>
struct Primitives;
template <>
struct Primitives<BFloat16> : Avx512BFloat16<FloatAdder, 4> {};
template <>
struct Primitives<float> : Avx512Float<4> {};

using LevelPrimitives = Avx512Levels;

}  // namespace

#include "algorithms.h"

const resmoe::InstructionSet resmoe::kAvx512 = instruction_set("avx512", has_avx512_vbmi2);
RESMOE_TARGET_END
#else
const resmoe::InstructionSet resmoe::kAvx512 = {};
#endif
