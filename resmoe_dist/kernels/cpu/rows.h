// Reading rows of a design matrix into tiles, and restoring them. Included after `Primitives<V>`.

#pragma once

namespace {

using namespace resmoe;

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

// Where in `values` column `first` of a row begins: counted from the row's start or from its end,
// whichever is nearer. Bits past the last column are zero.
inline int64_t place_of(const Rows& rows, int64_t row, int64_t first) {
  const uint8_t* bitmap = rows.bitmap + row * rows.bitmap_stride;
  const int64_t bytes = rows.bitmap_stride;
  const int64_t whole = first / 8;
  const uint32_t before = first % 8 ? bitmap[whole] & ((1u << first % 8) - 1) : 0;
  const int64_t partial = __builtin_popcount(before);
  if (2 * whole < bytes) return rows.offset(row) + count_bits(bitmap, whole) + partial;
  return rows.offset(row + 1) - count_bits(bitmap + whole, bytes - whole) + partial;
}

inline void prefetch(const void* from, int64_t bytes) {
  const char* first = static_cast<const char*>(from);
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(first + i, 0, 2);
}

// Reads a row from column `first` on, segment after segment, and has the row `ahead` of it brought
// into the caches: what lies between (a product takes only some of the columns) breaks the pattern
// that the processor would follow by itself.
template <class V>
class RowReader {
 public:
  RowReader() = default;
  RowReader(const Rows& rows, int64_t row, int64_t first, int64_t ahead)
      : pruned_(rows.bitmap != nullptr) {
    if (rows.center) {
      center_ = static_cast<const V*>(rows.center) + row * rows.center_stride + first;
      center_ahead_ = ahead * rows.center_stride;
    }
    if (pruned_) {
      const uint8_t* bitmap = rows.bitmap + row * rows.bitmap_stride;
      bits_ = Bits(bitmap, rows.bitmap_stride, first);
      bitmap_ = bitmap + first / 8;
      bitmap_ahead_ = ahead * rows.bitmap_stride;
      values_ = static_cast<const V*>(rows.values) + place_of(rows, row, first);
      values_ahead_ = rows.offset(row + ahead) - rows.offset(row);
      end_ = static_cast<const V*>(rows.values) + rows.num_values;
    }
  }

  // The next `columns` entries into `out`, then zeros up to `width`.
  void read(int64_t columns, int64_t width, V* out) {
    if (center_ && center_ahead_) prefetch(center_ + center_ahead_, columns * sizeof(V));
    if (!pruned_) {
      std::memcpy(out, center_, columns * sizeof(V));
    } else {
      if (bitmap_ahead_) prefetch(bitmap_ + bitmap_ahead_, columns / 8);
      bitmap_ += columns / 8;
      const V* from = values_;
      if (center_) {
        values_ = Primitives<V>::template expand<true>(bits_, from, end_, center_, columns, out);
      } else {
        values_ = Primitives<V>::template expand<false>(bits_, from, end_, nullptr, columns, out);
      }
      if (bitmap_ahead_) prefetch(from + values_ahead_, (values_ - from) * sizeof(V));
    }
    if (center_) center_ += columns;
    std::memset(static_cast<void*>(out + columns), 0, (width - columns) * sizeof(V));
  }

  // work(bits, values, ends, centers) takes some columns of four rows of a job, and says how many.
  template <class Work>
  static int64_t take_four(RowReader* readers, const Work& work) {
    Bits* bits[4];
    const V *values[4], *ends[4], *centers[4];
    for (int r = 0; r < 4; ++r) {
      centers[r] = readers[r].center_;
      bits[r] = &readers[r].bits_;
      values[r] = readers[r].values_;
      ends[r] = readers[r].end_;
    }
    const int64_t taken = work(bits, values, ends, centers);
    for (int r = 0; r < 4; ++r) {
      readers[r].values_ = values[r];
      if (centers[r]) readers[r].center_ += taken;
    }
    return taken;
  }

  // The next `columns` entries where they lie, for a row that is nothing but a centre's.
  const V* skip(int64_t columns) {
    if (center_ahead_) prefetch(center_ + center_ahead_, columns * sizeof(V));
    center_ += columns;
    return center_ - columns;
  }

 private:
  // Not whether there are values: a residual may hold none.
  bool pruned_ = false;
  Bits bits_;
  const uint8_t* bitmap_ = nullptr;
  const V* center_ = nullptr;
  const V* values_ = nullptr;
  const V* end_ = nullptr;
  int64_t center_ahead_ = 0;
  int64_t bitmap_ahead_ = 0;
  int64_t values_ahead_ = 0;
};

// A thread's own matrix, in memory that it keeps: rows of `width` entries, a little further apart,
// as at a power of two the same column of all rows would compete for the same few cache lines.
// One of each kind at a time.
enum Kind { kWeights, kActivations, kProducts, kOfCenters, kSums, kPairs };

template <class V, Kind kKind = kWeights>
class Tile {
 public:
  Tile(int64_t rows, int64_t width) : stride_(width + 32) {
    thread_local std::vector<V> buffer;
    const size_t entries = rows * stride_ + 64 / sizeof(V);
    if (buffer.size() < entries) buffer.resize(entries);
    const auto address = reinterpret_cast<uintptr_t>(buffer.data());
    entries_ = reinterpret_cast<V*>((address + 63) / 64 * 64);
  }

  V* row(int64_t index) const { return entries_ + index * stride_; }
  int64_t stride() const { return stride_; }

 private:
  int64_t stride_;
  V* entries_;
};

// The tokens' or the weights' vectors, `stride` entries apart.
template <class V>
struct Vectors {
  V* entries;
  int64_t stride;

  V* row(int64_t index) const { return entries + index * stride; }
};

// Some rows of one job, each read from left to right.
template <class V>
class Strip {
 public:
  // Rows [first, first + rows) from a column on, each with the one `ahead` of it asked for.
  void start(const Rows& source, int64_t first, int64_t rows, int64_t column, int64_t ahead) {
    dense_ = !source.bitmap;
    residual_only_ = !source.center;
    center_stride_ = source.center_stride;
    readers_.resize(rows);
    for (int64_t r = 0; r < rows; ++r) {
      readers_[r] = RowReader<V>(source, first + r, column, ahead);
    }
  }

  int64_t rows() const { return readers_.size(); }

  // Products of the next columns of four rows with one vector, added to sums[row]: as many
  // multiples of kPadding columns as the instruction set has a fast way for. Returns how many.
  int64_t dot_four(int64_t first, int64_t columns, const V* x, float* sums) {
    if (!residual_only_) return 0;
    return take_four(first, [&](auto bits, auto values, auto ends, auto) {
      return Primitives<V>::dot_four(bits, values, ends, columns, x, sums);
    });
  }

  // y += Σ h[row] · row over the next `columns` of four rows, in the same way.
  int64_t accumulate_four(int64_t first, int64_t columns, const V* h, float* y) {
    if (!residual_only_) return 0;
    return take_four(first, [&](auto bits, auto values, auto ends, auto) {
      return Primitives<V>::accumulate_four(bits, values, ends, columns, h, y);
    });
  }

  // The next `columns` of rows [first, first + rows) and zeros up to `width`: a tile, which the
  // next call overwrites, or a centre where it lies. After rows of odd number comes one of zeros;
  // other rows, up to a multiple of `multiple`, hold anything.
  Vectors<const V> next(int64_t first, int64_t rows, int64_t columns, int64_t width,
                        int64_t multiple = kDotRows) {
    if (dense_ && columns == width && rows % multiple == 0) {
      const V* entries = readers_[first].skip(columns);
      for (int64_t r = 1; r < rows; ++r) readers_[first + r].skip(columns);
      return {entries, center_stride_};
    }
    const Tile<V> tile(rows + multiple, width);
    int64_t r = 0;
    for (; !dense_ && r + 4 <= rows; r += 4) {
      const int64_t taken = take_four(first + r, [&](auto... row) {
        return Primitives<V>::expand_four(row..., columns, tile.row(r), tile.stride());
      });
      for (int i = 0; i < 4; ++i) {
        readers_[first + r + i].read(columns - taken, width - taken, tile.row(r + i) + taken);
      }
    }
    for (; r < rows; ++r) readers_[first + r].read(columns, width, tile.row(r));
    if (rows % 2) std::fill(tile.row(rows), tile.row(rows) + width, V{});
    return {tile.row(0), tile.stride()};
  }

  // `next` of all rows with the entries of two rows side by side: rows of 2·width, half as many.
  Vectors<const V> next_pairs(int64_t columns, int64_t width) {
    const Tile<V, kPairs> pairs((rows() + 1) / 2, 2 * width);
    for (int64_t r = 0; r < rows(); r += 4) {
      const int64_t some = std::min<int64_t>(4, rows() - r);
      int64_t taken = 0;
      if (!dense_ && some == 4) {
        taken = take_four(r, [&](auto... row) {
          return Primitives<V>::expand_pairs(row..., columns, pairs.row(r / 2), pairs.stride());
        });
      }
      if (taken == width) continue;
      const auto tile = next(r, some, columns - taken, width - taken);
      for (int64_t i = 0; i < some; i += 2) {
        Primitives<V>::interleave(tile.row(i), tile.row(i + 1), width - taken,
                                  pairs.row((r + i) / 2) + 2 * taken);
      }
    }
    return {pairs.row(0), pairs.stride()};
  }

 private:
  template <class Work>
  int64_t take_four(int64_t first, const Work& work) {
    return RowReader<V>::take_four(&readers_[first], work);
  }

  std::vector<RowReader<V>> readers_;
  bool dense_ = false;
  bool residual_only_ = false;
  int64_t center_stride_ = 0;
};

template <class V>
void restore_rows(const Restore& work, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    V* out = static_cast<V*>(work.out) + row * work.out_stride;
    RowReader<V> reader(work.rows, row, work.first_column, 0);
    if (work.stream) {
      const Tile<V> tile(1, work.columns);
      reader.read(work.columns, work.columns, tile.row(0));
      Primitives<V>::stream(tile.row(0), work.columns, out);
    } else {
      reader.read(work.columns, work.columns, out);
    }
  }
}

}  // namespace
