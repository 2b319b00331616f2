// Matrices of a thread: views, and memory that is reused from call to call.

#pragma once

#include "kernels.h"

namespace {

// Rows of a matrix, `stride` entries apart.
template <class Entry>
struct MatrixView {
  Entry* entries;
  int64_t stride;

  Entry* row(int64_t index) const { return entries + index * stride; }
};

// What a thread's tile is for. A thread has one buffer per use and type of entries.
enum class Use {
  kWeights,
  kWeightPairs,
  kActivations,
  kProducts,
  kCenterProducts,
  kCenterSums,
  kLevels,
  kScales,
  kFactors,
  kDecoded,
};

// A matrix in memory that the thread keeps between calls: creating one costs nothing, and its
// contents are undefined. The next tile of the same use and type takes the same memory.
//
// Rows are aligned to a cache line if `width` is a multiple of one. They are 32 entries further
// apart than `width`: at a power of two, the same column of all rows would compete for the same few
// cache lines.
template <class Entry, Use kUse = Use::kWeights>
class Tile {
 public:
  Tile(int64_t rows, int64_t width) : stride_(width + 32) {
    thread_local std::vector<Entry> buffer;
    const size_t entries = rows * stride_ + 64 / sizeof(Entry);
    if (buffer.size() < entries) buffer.resize(entries);
    const auto address = reinterpret_cast<uintptr_t>(buffer.data());
    entries_ = reinterpret_cast<Entry*>((address + 63) / 64 * 64);
  }

  Entry* row(int64_t index) const { return entries_ + index * stride_; }
  int64_t stride() const { return stride_; }

  operator MatrixView<Entry>() const { return {entries_, stride_}; }
  operator MatrixView<const Entry>() const { return {entries_, stride_}; }

 private:
  int64_t stride_;
  Entry* entries_;
};

}  // namespace
