// The kernels of one instruction set, made from its primitives.
//
// Each instruction set's .cpp file includes this once, after it chose its target (target.h) and
// defined `Primitives<Scalar>` and `LevelPrimitives`. Everything here has internal linkage: each .cpp file compiles the
// same code for another target, and the linker must not merge the results.

#pragma once

#include "mlp.h"
#include "packed_mlp.h"
#include "products.h"
#include "quantized_mlp.h"
#include "rotation.h"
#include "rows.h"
#include "sums.h"

namespace {

template <class Scalar>
constexpr Kernels kernels_of() {
  constexpr int kPlanes = sizeof(Scalar) == 4 ? 2 : 1;
  return {restore_rows<Scalar>,
          project_in_rows<Scalar>,
          project_out_share<Scalar>,
          mlp_rows<Scalar>,
          quantized_mlp_rows<kPlanes>,
          rotate_tokens,
          tokens_to_levels<kPlanes>,
          add_parts<Scalar>,
          pack_columns<Scalar>,
          mlp_packed_in<Scalar>,
          mlp_packed_out<Scalar>,
          add_packed_columns<Scalar>,
          packed_layout<Scalar>()};
}

constexpr InstructionSet instruction_set(const char* name, bool (*supported)()) {
  return {name, supported, kernels_of<BFloat16>(), kernels_of<float>()};
}

}  // namespace
