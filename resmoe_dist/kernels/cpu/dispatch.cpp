#include "dispatch.h"

namespace resmoe {

namespace {

// Fastest first.
const InstructionSet* const kSets[] = {&kAmx, &kAvx512Bf16, &kAvx512, &kAvx2, &kPortable};

const InstructionSet* chosen = nullptr;

const InstructionSet& instruction_set() {
  if (!chosen) {
    for (const auto* set : kSets) {
      if (!chosen && set->name && set->supported()) chosen = set;
    }
  }
  return *chosen;
}

}  // namespace

std::vector<std::string> instruction_sets() {
  std::vector<std::string> names;
  for (const auto* set : kSets) {
    if (set->name && set->supported()) names.emplace_back(set->name);
  }
  return names;
}

void use_instruction_set(const std::string& name) {
  for (const auto* set : kSets) {
    if (set->name && name == set->name && set->supported()) {
      chosen = set;
      return;
    }
  }
  TORCH_CHECK(false, "this machine does not support instruction set ", name);
}

const Kernels& kernels_for(at::ScalarType dtype) {
  if (dtype == at::kBFloat16) return instruction_set().bfloat16;
  TORCH_CHECK(dtype == at::kFloat, "no kernels for ", dtype);
  return instruction_set().float32;
}

}  // namespace resmoe
