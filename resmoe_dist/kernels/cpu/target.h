// Compiles part of a file for another instruction set than the rest of the program:
//
//     #include "target.h"
//     RESMOE_TARGET("avx2,fma")
//     ... code that may use AVX2 ...
//     RESMOE_TARGET_END
//
// RESMOE_ROUND_ALIKE … RESMOE_ROUND_ALIKE_END around it: products and sums stay two operations, so
// that all instruction sets round alike.
//
// Include standard headers here, before the target changes. The linker merges their inline functions
// with those of the rest of the program, so they must run on any machine.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#define RESMOE_PRAGMA(text) _Pragma(#text)
#ifdef __clang__
#define RESMOE_TARGET(features) \
  RESMOE_PRAGMA(clang attribute push(__attribute__((target(features))), apply_to = function))
#define RESMOE_TARGET_END RESMOE_PRAGMA(clang attribute pop)
#define RESMOE_ROUND_ALIKE RESMOE_PRAGMA(STDC FP_CONTRACT OFF)
#define RESMOE_ROUND_ALIKE_END RESMOE_PRAGMA(STDC FP_CONTRACT DEFAULT)
#else
#define RESMOE_TARGET(features) RESMOE_PRAGMA(GCC push_options) RESMOE_PRAGMA(GCC target(features))
#define RESMOE_TARGET_END RESMOE_PRAGMA(GCC pop_options)
#define RESMOE_ROUND_ALIKE \
  RESMOE_PRAGMA(GCC push_options) RESMOE_PRAGMA(GCC optimize("fp-contract=off"))
#define RESMOE_ROUND_ALIKE_END RESMOE_PRAGMA(GCC pop_options)
#endif
