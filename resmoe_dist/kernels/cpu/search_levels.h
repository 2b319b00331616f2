// The instruction sets that searches are compiled for.

#pragma once

#include <c10/util/Exception.h>

namespace resmoe {

// Floats in the widest vectors that this machine has and searches are compiled for.
inline int64_t widest_lanes() {
#ifdef __x86_64__
  if (__builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq")) {
    return 16;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return 8;
#endif
  return 4;
}

// The floats in a vector that a caller asks for: 4, 8 or 16, or 0 for the most.
inline int64_t choose_lanes(int64_t wanted) {
  if (wanted == 0) return widest_lanes();
  TORCH_CHECK((wanted == 4 || wanted == 8 || wanted == 16) && wanted <= widest_lanes(),
              "this machine does not have vectors of ", wanted, " floats");
  return wanted;
}

}  // namespace resmoe
