// AVX-512 with VBMI2 (Ice Lake and later, Zen 4 and later).

#include <algorithm>
#include <cstring>
#include <vector>

#include "kernels.h"

#ifdef __x86_64__
#include "target.h"
RESMOE_TARGET("avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi2,avx512vpopcntdq,bmi2,popcnt,fma")
#include <immintrin.h>

#include "avx512.h"

namespace {
template <class V>
struct Primitives;
template <>
struct Primitives<BFloat16> : Avx512BFloat16<4> {};
template <>
struct Primitives<float> : Avx512Float<4> {};

bool has_vbmi2() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512vbmi2") && __builtin_cpu_supports("avx512vpopcntdq");
}
}  // namespace

#include "algorithms.h"

const resmoe::InstructionSet resmoe::kAvx512 = {
    "avx512", has_vbmi2, kernels_of<BFloat16>(), kernels_of<float>()};
RESMOE_TARGET_END
#else
const resmoe::InstructionSet resmoe::kAvx512 = {};
#endif
