// The instruction sets that searches are compiled for.

#pragma once

namespace resmoe {

// The floats in the widest vectors that this machine has and searches are compiled for.
inline int widest_lanes() {
#ifdef __x86_64__
  if (__builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq")) {
    return 16;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return 8;
#endif
  return 4;
}

}  // namespace resmoe
