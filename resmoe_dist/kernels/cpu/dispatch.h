// The choice of an instruction set, and sharing work among threads.

#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include <string>
#include <vector>

#include "kernels.h"

namespace resmoe {

// Instruction sets that this machine supports, fastest first.
std::vector<std::string> instruction_sets();

// Forces one of them, for tests and benchmarks.
void use_instruction_set(const std::string& name);

// The kernels for values of a dtype, in the chosen instruction set.
const Kernels& kernels_for(at::ScalarType dtype);

// Runs work(part, begin, end) on equal shares of [0, count), one share per thread. The shares depend
// only on the number of threads, and so do the results.
template <class Work>
void share(int64_t count, int64_t parts, const Work& work) {
  at::parallel_for(0, parts, 1, [&](int64_t first, int64_t last) {
    for (int64_t part = first; part < last; ++part) {
      work(part, part * count / parts, (part + 1) * count / parts);
    }
  });
}

}  // namespace resmoe
