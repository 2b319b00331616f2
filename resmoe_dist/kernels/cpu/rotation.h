// Rotations of vectors: Hadamard transforms with signs (codecs/rotation.py).

#pragma once

#include "primitives.h"

namespace {

constexpr int kHadamardWidth = 16;

#ifdef __clang__
#define RESMOE_SHUFFLE(x, ...) __builtin_shufflevector(x, x, __VA_ARGS__)
#else
#define RESMOE_SHUFFLE(x, ...) __builtin_shuffle(x, VectorTypes<16>::Ints{__VA_ARGS__})
#endif

// A Hadamard transform of 16 entries, in one vector. Each of the four steps adds to an entry the one
// whose index differs in one bit, or subtracts it from that.
inline VectorTypes<16>::Floats hadamard_16(VectorTypes<16>::Floats x) {
  using Floats = VectorTypes<16>::Floats;
  x = RESMOE_SHUFFLE(x, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14) +
      x * Floats{1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1};
  x = RESMOE_SHUFFLE(x, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13) +
      x * Floats{1, 1, -1, -1, 1, 1, -1, -1, 1, 1, -1, -1, 1, 1, -1, -1};
  x = RESMOE_SHUFFLE(x, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11) +
      x * Floats{1, 1, 1, 1, -1, -1, -1, -1, 1, 1, 1, 1, -1, -1, -1, -1};
  return RESMOE_SHUFFLE(x, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7) +
         x * Floats{1, 1, 1, 1, 1, 1, 1, 1, -1, -1, -1, -1, -1, -1, -1, -1};
}

// x = Hadamard(x), of `size` entries, a power of two from 16 on. Not scaled.
inline void hadamard(float* x, int64_t size) {
  using Vec = Vector<kHadamardWidth>;
  for (int64_t i = 0; i < size; i += kHadamardWidth) Vec::store(hadamard_16(Vec::load(x + i)), x + i);
  int64_t half = kHadamardWidth;
  // Two steps at a time read and write memory once for both.
  for (; 4 * half <= size; half *= 4) {
    for (int64_t first = 0; first < size; first += 4 * half) {
      for (int64_t i = first; i < first + half; i += kHadamardWidth) {
        const auto a = Vec::load(x + i), b = Vec::load(x + i + half);
        const auto c = Vec::load(x + i + 2 * half), d = Vec::load(x + i + 3 * half);
        Vec::store((a + b) + (c + d), x + i);
        Vec::store((a - b) + (c - d), x + i + half);
        Vec::store((a + b) - (c + d), x + i + 2 * half);
        Vec::store((a - b) - (c - d), x + i + 3 * half);
      }
    }
  }
  if (half < size) {
    for (int64_t i = 0; i < half; i += kHadamardWidth) {
      const auto a = Vec::load(x + i), b = Vec::load(x + i + half);
      Vec::store(a + b, x + i);
      Vec::store(a - b, x + i + half);
    }
  }
}

// x = Q x, or Qᵀ x if `back`.
inline void rotate_vector(const Rotation& rotation, bool back, int64_t hidden, float* x) {
  using Vec = Vector<kHadamardWidth>;
  if (!rotation.signs) return;
  const float scale = 1 / __builtin_sqrtf(static_cast<float>(rotation.size));
  const auto multiply_signs = [&](float factor) {
    for (int64_t i = 0; i < hidden; i += kHadamardWidth) {
      Vec::store(Vec::load(x + i) * Vec::load(rotation.signs + i) * factor, x + i);
    }
  };
  if (!back) multiply_signs(scale);
  for (int64_t first = 0; first < hidden; first += rotation.size) {
    hadamard(x + first, rotation.size);
  }
  if (back) multiply_signs(scale);
}

inline void rotate_tokens(const Rotate& work, int64_t begin, int64_t end) {
  for (int64_t t = begin; t < end; ++t) {
    rotate_vector(work.rotation, work.back, work.hidden, work.x_TH + t * work.x_stride);
  }
}

}  // namespace
