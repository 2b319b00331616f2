// Quantised matrices as the kernels read them. codecs/quantized.py has the format.
//
// A row is one stream of bits, lowest bit first. Entry i has the window of `window_bits` bits from
// bit i · bits on. A window stands for an integer, its *level*; an entry is its level times the
// scale of its group. Matrices may be rotated: a row is then multiplied with rotated tokens.
//
// Legend: R rows, H hidden, B blocks of H columns, P bytes of a row's stream, G scales of a row.

#pragma once

#include <cstdint>

namespace resmoe {

// scalar: level = 2 · window − (2^bits − 1). trellis: the sum of the four bytes of two products of
// 16 bits, (window | mark) · factors[0] and (window | mark) · factors[1], as signed numbers.
enum class Coder { kScalar, kTrellis };

// Kernels read up to this many bytes from any byte of a row on.
constexpr int64_t kOverRead = 64;

// Rows of bytes of which kernels may read a little more than there is: the last rows are read from
// a copy with padding.
struct ByteRows {
  const uint8_t* bytes = nullptr;
  int64_t stride = 0;
  const uint8_t* last = nullptr;  // the copy
  int64_t first_last = 0;         // its first row

  const uint8_t* row(int64_t index) const {
    return index < first_last ? bytes + index * stride : last + (index - first_last) * stride;
  }
};

struct QuantizedMatrix {
  Coder coder;
  int bits;
  int window_bits;
  uint16_t factors[2];
  uint16_t mark;
  int64_t hidden;      // H
  int64_t group_size;  // a multiple of kLevelStep, or at least H
  int64_t groups;      // of one block: G = B · groups
  ByteRows codes;      // [R, P]
  ByteRows scales;     // [R, G]
  float scale_of[256];
};

// Groups are whole steps, and no instruction set takes more levels at a time.
constexpr int64_t kLevelStep = 32;

// Q x = Hadamard(signs · x) / √size for every `size` entries of x. signs: null for no rotation.
struct Rotation {
  const float* signs = nullptr;  // [H]
  int64_t size = 1;              // a power of two from 16 on that divides H
};

// A vector as whole numbers: x = scale · (planes[0] + planes[1] / 2^15). bfloat16 layers use one
// plane, which is more exact than bfloat16. Planes are padded with zeros to a multiple of
// kLevelStep. The scale is NaN if an entry is not finite.
struct LevelVector {
  int16_t* planes[2];
  float scale;
};

}  // namespace resmoe
