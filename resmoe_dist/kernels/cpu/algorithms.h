// The kernels over the primitives of an instruction set. Included once per set, after its target
// was chosen and its `Primitives<V>` defined. All of it has internal linkage: the same code compiled
// for two targets must never be merged by the linker.

#pragma once

#include "mlp.h"
#include "packed_mlp.h"
#include "products.h"
#include "rows.h"

namespace {

template <class V>
constexpr Kernels kernels_of() {
  return {restore_rows<V>,
          project_in_rows<V>,
          project_out_share<V>,
          mlp_rows<V>,
          pack_columns<V>,
          mlp_packed_in<V>,
          mlp_packed_out<V>,
          add_packed_columns<V>,
          lanes_of<V>()};
}

}  // namespace
