// Kernels for any machine: vectors of four floats, which the compiler maps to what the machine has.

#include "target.h"

#include "levels.h"
#include "primitives.h"

namespace {

template <class Scalar>
struct Primitives : VectorPrimitives<Scalar, 4, 2> {};

bool always() { return true; }

using LevelPrimitives = VectorLevels<4>;

}  // namespace

#include "algorithms.h"

const resmoe::InstructionSet resmoe::kPortable = instruction_set("portable", always);
