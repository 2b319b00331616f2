// Any machine: what the compiler makes of four floats at a time.

#include <algorithm>
#include <cstring>
#include <vector>

#include "primitives.h"

namespace {
template <class V>
struct Primitives : VectorPrimitives<V, 4, 2> {};
bool always() { return true; }
}  // namespace

#include "algorithms.h"

const resmoe::InstructionSet resmoe::kPortable = {
    "portable", always, kernels_of<BFloat16>(), kernels_of<float>()};
