// The instruction set of what follows, whatever the rest of the program is compiled for.

#pragma once

#define RESMOE_PRAGMA(text) _Pragma(#text)
#ifdef __clang__
#define RESMOE_TARGET(features) \
  RESMOE_PRAGMA(clang attribute push(__attribute__((target(features))), apply_to = function))
#define RESMOE_TARGET_END RESMOE_PRAGMA(clang attribute pop)
#else
#define RESMOE_TARGET(features) RESMOE_PRAGMA(GCC push_options) RESMOE_PRAGMA(GCC target(features))
#define RESMOE_TARGET_END RESMOE_PRAGMA(GCC pop_options)
#endif
