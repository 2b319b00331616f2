// The three kernels over the primitives of an instruction set. Included once per set, after its
// target was chosen and its `Primitives<V>` defined. All of it has internal linkage: the same code
// compiled for two targets must never be merged by the linker.
//
// A product expands a block of rows into a tile that stays in the caches, and multiplies the tile
// by the copies. For one token the detour costs little, as memory is what it waits for; for many
// it makes a sparse product a dense one.

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
enum Kind { kWeights, kActivations, kProducts };

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

// With so few copies a product waits for memory, and a tile is small for the first-level cache;
// with more, each row of a tile saves going through the copies again.
constexpr int64_t kFewCopies = 6;
constexpr int64_t kInBlock = 16;
constexpr int64_t kMostOutRows = 256;
inline int64_t out_block(int64_t copies) {
  return copies <= kFewCopies ? 16 : copies <= 32 ? 64 : kMostOutRows;
}
// How many rows ahead one is asked for.
constexpr int64_t kRowsAhead = 4;
// Bytes of a row multiplied at a time: those of a few copies stay in the first-level cache.
constexpr int64_t kDotBytes = 4096;
// Columns of the output multiplied at a time.
constexpr int64_t kPanel = 1024;

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

// dot for a number of tokens only known now: as many at a time as there are registers for.
template <class V, int NT = Primitives<V>::kTokens>
inline void dot(int64_t tokens, const V* tile, int64_t stride, const V* const* x, int64_t width,
                float* products) {
  if constexpr (NT > 1) {
    if (tokens < NT) return dot<V, NT - 1>(tokens, tile, stride, x, width, products);
  }
  Primitives<V>::template dot<NT>(tile, stride, x, width, products);
}

// Rows [first, first + rows) of one job: expanded, and multiplied with all its copies.
template <class V>
void project_in_block(const ProjectIn& work, const Job& job, int64_t first, int64_t rows,
                      int64_t end, const Tile<V>& tile) {
  const int64_t width = padded(work.hidden);
  const int64_t inputs = work.inputs;
  const V* x_TH = static_cast<const V*>(work.x_TH);
  constexpr int64_t kTokens = Primitives<V>::kTokens;
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t row = first + r;
    RowReader<V> reader(job.rows, row, 0, std::min(kRowsAhead, end - 1 - row));
    for (int64_t i = 0; i < inputs; ++i) {
      reader.read(work.hidden, width, tile.row(r * inputs + i));
    }
  }
  // Products of a copy lie together here, where those of the output are pages apart.
  const Tile<float, kProducts> products(job.copies, kInBlock * inputs + kDotRows);
  const int64_t chunk = job.copies <= kFewCopies ? width : kDotBytes / sizeof(V);
  for (int64_t column = 0; column < width; column += chunk) {
    const int64_t columns = std::min(chunk, width - column);
    for (int64_t t = 0; t < job.copies; t += kTokens) {
      const int64_t tokens = std::min(kTokens, job.copies - t);
      const V* x[kTokens];
      for (int64_t i = 0; i < tokens; ++i) {
        x[i] = x_TH + work.token_N[job.first_copy + t + i] * work.x_stride + column;
      }
      for (int64_t q = 0; q < rows * inputs; q += kDotRows) {
        float of_block[kDotRows * kTokens];
        dot<V>(tokens, tile.row(q) + column, tile.stride(), x, columns, of_block);
        for (int64_t i = 0; i < tokens; ++i) {
          for (int64_t r = 0; r < kDotRows; ++r) {
            float& sum = products.row(t + i)[q + r];
            sum = of_block[i * kDotRows + r] + (column ? sum : 0);
          }
        }
      }
    }
  }
  // What the last rows of a tile have left over from before is not taken.
  for (int64_t n = 0; n < job.copies; ++n) {
    float* out = work.out_NC + (job.first_copy + n) * inputs * work.num_rows + first;
    for (int64_t i = 0; i < inputs; ++i) {
      for (int64_t r = 0; r < rows; ++r) {
        out[i * work.num_rows + r] = products.row(n)[r * inputs + i];
      }
    }
  }
}

// Whether jobs share a centre, which then should be read once for all of them.
inline bool share_a_center(const Job* jobs, int64_t num_jobs) {
  return num_jobs > 1 && jobs[0].rows.center && jobs[0].rows.center == jobs[1].rows.center;
}

template <class V>
void project_in_rows(const ProjectIn& work, int64_t begin, int64_t end) {
  const Tile<V> tile(kInBlock * work.inputs + kDotRows, padded(work.hidden));
  // Rows that all jobs take before the next: all of them (the longest streams from memory), unless
  // a centre's rows had better stay in the caches for the next job.
  const bool together = share_a_center(work.jobs, work.num_jobs);
  const int64_t stretch = together ? kInBlock : std::max<int64_t>(end - begin, 1);
  for (int64_t from = begin; from < end; from += stretch) {
    const int64_t to = std::min(from + stretch, end);
    for (int64_t j = 0; j < work.num_jobs; ++j) {
      const Job& job = work.jobs[j];
      const int64_t block = job.copies <= kFewCopies ? kDotRows / work.inputs : kInBlock;
      for (int64_t first = from; first < to && job.copies; first += block) {
        project_in_block(work, job, first, std::min(block, to - first), end, tile);
      }
    }
  }
}

// accumulate for a number of tokens only known now; see `tokens_at_once`.
template <class V, int NT = Primitives<V>::kOutTokens>
inline void accumulate(int64_t tokens, const Tile<V>& tile, int64_t rows, const V* h,
                       int64_t h_stride, float* const* y, int64_t width) {
  if constexpr (NT > 1) {
    if (tokens < NT) return accumulate<V, NT / 2>(tokens, tile, rows, h, h_stride, y, width);
  }
  Primitives<V>::template accumulate<NT>(tile.row(0), tile.stride(), rows, h, h_stride, y, width);
}

// The most of `most`, half of it, … 1 tokens that are left.
inline int64_t tokens_at_once(int64_t most, int64_t left) {
  while (most > left) most /= 2;
  return most;
}

// Rows [first, first + rows) of one job: expanded panel by panel, multiplied with all its copies.
template <class V>
void project_out_block(const ProjectOut& work, const OutShare& share, const Job& job,
                       int64_t first, int64_t rows, const Tile<V>& tile) {
  const int64_t width = padded(work.hidden);
  const V* h_NS = static_cast<const V*>(work.h_NS);
  constexpr int64_t kTokens = Primitives<V>::kOutTokens;
  // Rows are multiplied in pairs: the last may need a partner of zeros.
  const int64_t even_rows = rows + rows % 2;
  const int64_t begin = work.inputs * work.hidden + share.first_column;
  thread_local std::vector<RowReader<V>> readers(kMostOutRows);
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t ahead = std::min(rows, share.end_row - 1 - first - r);
    readers[r] = RowReader<V>(job.rows, first + r, begin, ahead);
  }
  const Tile<V, kActivations> h(job.copies, kMostOutRows);
  for (int64_t n = 0; n < job.copies; ++n) {
    const V* h_S = h_NS + (job.first_copy + n) * work.num_rows + first;
    std::copy(h_S, h_S + rows, h.row(n));
    if (rows % 2) h.row(n)[rows] = V{};
  }
  for (int64_t panel = share.first_column; panel < share.end_column; panel += kPanel) {
    const int64_t columns = std::min(kPanel, share.end_column - panel);
    const int64_t panel_width = padded(columns);
    for (int64_t r = 0; r < rows; ++r) readers[r].read(columns, panel_width, tile.row(r));
    if (rows % 2) std::fill(tile.row(rows), tile.row(rows) + panel_width, V{});
    for (int64_t t = 0; t < job.copies;) {
      const int64_t tokens = job.distinct ? tokens_at_once(kTokens, job.copies - t) : 1;
      float* y[kTokens];
      for (int64_t i = 0; i < tokens; ++i) {
        y[i] = share.y_TH + work.token_N[job.first_copy + t + i] * width + panel;
      }
      accumulate<V>(tokens, tile, even_rows, h.row(t), h.stride(), y, panel_width);
      t += tokens;
    }
  }
}

template <class V>
void project_out_share(const ProjectOut& work, const OutShare& share) {
  const Tile<V> tile(kMostOutRows + 1, kPanel);
  const bool together = share_a_center(work.jobs, work.num_jobs);
  const int64_t all = std::max<int64_t>(share.end_row - share.first_row, 1);
  const int64_t stretch = together ? kMostOutRows : all;
  for (int64_t from = share.first_row; from < share.end_row; from += stretch) {
    const int64_t to = std::min(from + stretch, share.end_row);
    for (int64_t j = 0; j < work.num_jobs; ++j) {
      const Job& job = work.jobs[j];
      const int64_t block = out_block(job.copies);
      for (int64_t first = from; first < to && job.copies; first += block) {
        project_out_block(work, share, job, first, std::min(block, to - first), tile);
      }
    }
  }
}

template <class V>
constexpr Kernels kernels_of() {
  return {restore_rows<V>, project_in_rows<V>, project_out_share<V>};
}

}  // namespace
