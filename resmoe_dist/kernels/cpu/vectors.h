// The types that kernels compute with: bfloat16, and vectors of floats as GCC and clang have them.

#pragma once

#include "kernels.h"

namespace {

using namespace resmoe;

// A bfloat16 as it is stored in memory: the upper half of a float.
struct BFloat16 {
  uint16_t bits;
};

inline float to_float(float value) { return value; }
inline float to_float(BFloat16 value) {
  const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
  float result;
  std::memcpy(&result, &bits, 4);
  return result;
}

// Rounds to nearest, ties to even; NaN stays NaN.
template <class Scalar>
inline Scalar round_to(float value);
template <>
inline float round_to<float>(float value) {
  return value;
}
template <>
inline BFloat16 round_to<BFloat16>(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  if (value != value) return {static_cast<uint16_t>(bits >> 16 | 0x40)};
  return {static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16)};
}

// The vector types of kWidth entries. GCC allows no vector size that depends on a template
// argument.
template <int kWidth>
struct VectorTypes;
#define RESMOE_VECTOR_TYPES(kWidth)                                   \
  template <>                                                         \
  struct VectorTypes<kWidth> {                                        \
    typedef float Floats __attribute__((vector_size(4 * kWidth)));    \
    typedef uint32_t Words __attribute__((vector_size(4 * kWidth)));  \
    typedef int32_t Ints __attribute__((vector_size(4 * kWidth)));    \
    typedef uint16_t Halves __attribute__((vector_size(2 * kWidth))); \
  };
RESMOE_VECTOR_TYPES(2)
RESMOE_VECTOR_TYPES(4)
RESMOE_VECTOR_TYPES(8)
RESMOE_VECTOR_TYPES(16)
#undef RESMOE_VECTOR_TYPES

// Loads, stores and sums of kWidth floats.
template <int kWidth>
struct Vector {
  using Floats = typename VectorTypes<kWidth>::Floats;
  using Words = typename VectorTypes<kWidth>::Words;
  using Ints = typename VectorTypes<kWidth>::Ints;
  using Halves = typename VectorTypes<kWidth>::Halves;

  static Floats load(const float* source) {
    Floats result;
    std::memcpy(&result, source, sizeof result);
    return result;
  }
  static Floats load(const BFloat16* source) {
    Halves halves;
    std::memcpy(&halves, source, sizeof halves);
    return reinterpret_cast<Floats>(__builtin_convertvector(halves, Words) << 16);
  }
  static void store(Floats value, float* target) { std::memcpy(target, &value, sizeof value); }
  static void store(Floats value, BFloat16* target) {
    const Halves halves = __builtin_convertvector(rounded(value) >> 16, Halves);
    std::memcpy(target, &halves, sizeof halves);
  }
  // Stores first[0], second[0], first[1], second[1], …
  static void store_pairs(Floats first, Floats second, BFloat16* target) {
    const Words pairs = rounded(first) >> 16 | (rounded(second) & 0xFFFF0000);
    std::memcpy(target, &pairs, sizeof pairs);
  }
  static float sum(Floats value) {
    float total = 0;
    for (int i = 0; i < kWidth; ++i) total += value[i];
    return total;
  }

 private:
  // The bits of bfloat16s in the upper halves of words; see `round_to`. The lower halves hold
  // anything.
  static Words rounded(Floats value) {
    const Words bits = reinterpret_cast<Words>(value);
    const Words up = bits + 0x7FFF + (bits >> 16 & 1);
    const Words nan = reinterpret_cast<Words>(value != value);
    return (up & ~nan) | ((bits | 0x400000) & nan);
  }
};

}  // namespace
