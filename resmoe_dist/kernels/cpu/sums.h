// Sums of the parts that several ranks computed of the same numbers.

#pragma once

#include "vectors.h"

namespace {

// Added in floats, in the order of the parts, and rounded once.
template <class Scalar>
void add_parts(const AddParts& work, int64_t begin, int64_t end) {
  using Vec = Vector<16>;
  constexpr int64_t kLanes = 16;
  const auto* parts = static_cast<const Scalar*>(work.parts);
  auto* out = static_cast<Scalar*>(work.out);
  int64_t i = begin;
  for (; i + kLanes <= end; i += kLanes) {
    auto sum = Vec::load(parts + i);
    for (int64_t p = 1; p < work.num_parts; ++p) sum += Vec::load(parts + p * work.size + i);
    Vec::store(sum, out + i);
  }
  for (; i < end; ++i) {
    float sum = to_float(parts[i]);
    for (int64_t p = 1; p < work.num_parts; ++p) sum += to_float(parts[p * work.size + i]);
    out[i] = round_to<Scalar>(sum);
  }
}

}  // namespace
