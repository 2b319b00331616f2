// The AVX-512 kernels with bfloat16 dot products.

#include "target.h"

#include "kernels.h"

#ifdef __x86_64__
RESMOE_TARGET(
    "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vbmi2,avx512vnni,avx512vpopcntdq,"
    "avx512bf16,bmi2,popcnt,fma")
#include <immintrin.h>

#include "avx512_bf16.h"
#include "avx512_levels.h"

namespace {

template <class Scalar>
struct Primitives;
template <>
struct Primitives<BFloat16> : DotProductPrimitives {};
template <>
struct Primitives<float> : Avx512Float<6> {};

using LevelPrimitives = Avx512Levels;

}  // namespace

#include "algorithms.h"

const resmoe::InstructionSet resmoe::kAvx512Bf16 = instruction_set("avx512_bf16", has_avx512_bf16);
RESMOE_TARGET_END
#else
const resmoe::InstructionSet resmoe::kAvx512Bf16 = {};
#endif
