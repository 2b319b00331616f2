// Reading the bitmap of a pruned row: one bit per column, lowest bit of each byte first. A set bit
// means that the entry has a packed value.

#pragma once

#include "kernels.h"

namespace {

using namespace resmoe;

// Reads the bitmap of a row from a given column on, lowest bit first.
class BitReader {
 public:
  BitReader() = default;
  BitReader(const uint8_t* row, int64_t row_bytes, int64_t first_column)
      : row_(row), row_bytes_(row_bytes), bit_(first_column) {}

  // The next 32 bits. The row must have that many left.
  uint32_t next_32() {
    const uint8_t* byte = row_ + (bit_ >> 3);
    uint32_t word;
    std::memcpy(&word, byte, 4);
    if (const int shift = bit_ & 7) word = word >> shift | uint32_t{byte[4]} << (32 - shift);
    bit_ += 32;
    return word;
  }

  // The next `count` ≤ 32 bits. Reads no byte past the end of the row.
  uint32_t next(int64_t count) {
    const int64_t byte = bit_ >> 3;
    const int64_t bytes_left = row_bytes_ - byte;
    uint64_t word = 0;
    if (bytes_left >= 8) {
      std::memcpy(&word, row_ + byte, 8);
    } else {
      std::memcpy(&word, row_ + byte, bytes_left);
    }
    word >>= bit_ & 7;
    bit_ += count;
    return static_cast<uint32_t>(word & ((uint64_t{1} << count) - 1));
  }

 private:
  const uint8_t* row_ = nullptr;
  int64_t row_bytes_ = 0;
  int64_t bit_ = 0;
};

// How many bits are set in `bytes` bytes.
inline int64_t count_bits(const uint8_t* bitmap, int64_t bytes) {
  int64_t total = 0;
  for (int64_t i = 0; i < bytes / 8; ++i) {
    uint64_t word;
    std::memcpy(&word, bitmap + 8 * i, 8);
    total += __builtin_popcountll(word);
  }
  for (int64_t byte = bytes / 8 * 8; byte < bytes; ++byte) {
    total += __builtin_popcount(bitmap[byte]);
  }
  return total;
}

// The index in `values` of a row's first packed value at or after `column`. Counts the bits from
// the row's start or from its end, whichever is nearer. Bits past the last column are zero.
inline int64_t value_index(const Rows& rows, int64_t row, int64_t column) {
  const uint8_t* bitmap = rows.bitmap + row * rows.bitmap_stride;
  const int64_t bytes = rows.bitmap_stride;
  const int64_t whole = column / 8;
  const uint32_t before = column % 8 ? bitmap[whole] & ((1u << column % 8) - 1) : 0;
  const int64_t partial = __builtin_popcount(before);
  if (2 * whole < bytes) return rows.offset(row) + count_bits(bitmap, whole) + partial;
  return rows.offset(row + 1) - count_bits(bitmap + whole, bytes - whole) + partial;
}

}  // namespace
