// Products of copies with rows of a design matrix: on the way in, on the way out.
//
// A product expands a block of rows into a tile that stays in the cache, then multiplies the tile
// with the copies. For one copy the extra step costs little, because such a product waits for
// memory anyway. For many copies it turns a sparse product into a dense one.

#pragma once

#include "primitives.h"
#include "row_block.h"

namespace {

// Up to this many copies, a product waits for memory, and a small tile that fits the first-level
// cache is best. With more copies, each further row of a tile saves reading the copies again.
constexpr int64_t kFewCopies = 6;
constexpr int64_t kInBlockRows = 16;
constexpr int64_t kMaxOutBlockRows = 256;
inline int64_t out_block_rows(int64_t copies) {
  return copies <= kFewCopies ? 16 : copies <= 32 ? 64 : kMaxOutBlockRows;
}
// How many rows ahead a product on the way in prefetches.
constexpr int64_t kPrefetchRows = 4;
// Bytes of a row multiplied at a time on the way in, so that the same part of several copies stays
// in the first-level cache.
constexpr int64_t kDotBytes = 4096;
// Columns of the output computed at a time.
constexpr int64_t kPanelColumns = 1024;

// Copies by the numbers of their tokens.
struct Copies {
  const int64_t* token;
  int64_t count;
  bool distinct;  // no token occurs twice
};

inline Copies copies_of(const Job& job, const int64_t* token_N) {
  return {token_N + job.first_copy, job.copies, job.distinct};
}

// Primitives::dot for `tokens` ≤ kDotTokens: picks the instance for that number.
template <class Scalar, int kTokens = Primitives<Scalar>::kDotTokens>
inline void dot(int64_t tokens, const Scalar* tile, int64_t stride, const Scalar* const* x,
                int64_t width, float* products) {
  if constexpr (kTokens > 1) {
    if (tokens < kTokens) {
      return dot<Scalar, kTokens - 1>(tokens, tile, stride, x, width, products);
    }
  }
  Primitives<Scalar>::template dot<kTokens>(tile, stride, x, width, products);
}

// Primitives::accumulate for a power of two of tokens ≤ kAccumulateTokens.
template <class Scalar, int kTokens = Primitives<Scalar>::kAccumulateTokens>
inline void accumulate(int64_t tokens, MatrixView<const Scalar> tile, int64_t rows, const Scalar* h,
                       int64_t h_stride, float* const* y, int64_t width) {
  if constexpr (kTokens > 1) {
    if (tokens < kTokens) {
      return accumulate<Scalar, kTokens / 2>(tokens, tile, rows, h, h_stride, y, width);
    }
  }
  Primitives<Scalar>::template accumulate<kTokens>(tile.entries, tile.stride, rows, h, h_stride, y,
                                                   width);
}

// The largest of max_tokens, max_tokens / 2, … 1 that is at most `left`.
inline int64_t tokens_at_once(int64_t max_tokens, int64_t left) {
  while (max_tokens > left) max_tokens /= 2;
  return max_tokens;
}

// sums[row] = row · x, over the next `columns` of four rows from `first` on. For one copy, writing
// a tile and reading it once would be wasted, so as many columns as possible are multiplied right
// after expanding.
template <class Scalar>
void dot_four_rows(RowBlock<Scalar>& block, int64_t first, int64_t columns, const Scalar* x,
                   float* sums) {
  std::fill(sums, sums + kDotRows, 0.0f);
  const int64_t taken = block.dot_four_rows(first, columns, x, sums);
  if (taken == columns) return;
  const int64_t width = padded(columns - taken);
  const auto tile = block.next_tile(first, kDotRows, columns - taken, width);
  float rest[kDotRows];
  const Scalar* x_rest = x + taken;
  Primitives<Scalar>::template dot<1>(tile.entries, tile.stride, &x_rest, width, rest);
  for (int64_t r = 0; r < kDotRows; ++r) sums[r] += rest[r];
}

// y += Σ h[row] · row, over the next `columns` of four rows from `first` on. See dot_four_rows.
template <class Scalar>
void accumulate_four_rows(RowBlock<Scalar>& block, int64_t first, int64_t columns, const Scalar* h,
                          float* y) {
  const int64_t taken = block.accumulate_four_rows(first, columns, h, y);
  if (taken == columns) return;
  const int64_t width = padded(columns - taken);
  const auto tile = block.next_tile(first, kDotRows, columns - taken, width);
  float* y_rest = y + taken;
  Primitives<Scalar>::template accumulate<1>(tile.entries, tile.stride, kDotRows, h, kDotRows,
                                             &y_rest, width);
}

// The way in: multiplies the block's next inputs · hidden columns with the copies.
// products.row(copy)[input · input_stride + row] = x[token of copy] · (row's columns of the input).
template <class Scalar>
void multiply_in(RowBlock<Scalar>& block, int64_t hidden, int64_t inputs,
                 MatrixView<const Scalar> x_TH, Copies copies, int64_t input_stride,
                 MatrixView<float> products) {
  const int64_t width = padded(hidden);
  constexpr int64_t kTokens = Primitives<Scalar>::kDotTokens;
  const bool few = copies.count <= kFewCopies;
  const int64_t tile_rows = few ? kDotRows : kInBlockRows;
  const int64_t chunk = few ? width : kDotBytes / sizeof(Scalar);
  for (int64_t first = 0; first < block.rows(); first += tile_rows) {
    const int64_t rows = std::min(tile_rows, block.rows() - first);
    for (int64_t input = 0; input < inputs; ++input) {
      if (copies.count == 1 && rows == kDotRows) {
        dot_four_rows(block, first, hidden, x_TH.row(copies.token[0]),
                      products.entries + input * input_stride + first);
        continue;
      }
      const MatrixView<const Scalar> tile = block.next_tile(first, rows, hidden, width);
      float* out = products.entries + input * input_stride + first;
      for (int64_t column = 0; column < width; column += chunk) {
        const int64_t columns = std::min(chunk, width - column);
        for (int64_t t = 0; t < copies.count; t += kTokens) {
          const int64_t tokens = std::min(kTokens, copies.count - t);
          const Scalar* x[kTokens];
          for (int64_t i = 0; i < tokens; ++i) x[i] = x_TH.row(copies.token[t + i]) + column;
          for (int64_t r = 0; r < rows; r += kDotRows) {
            float sums[kDotRows * kTokens];
            dot<Scalar>(tokens, tile.row(r) + column, tile.stride, x, columns, sums);
            for (int64_t i = 0; i < tokens; ++i) {
              float* sum = out + (t + i) * products.stride + r;
              // Rows past the last one hold anything; their sums are dropped.
              for (int64_t q = 0; q < std::min(kDotRows, rows - r); ++q) {
                sum[q] = sums[i * kDotRows + q] + (column ? sum[q] : 0);
              }
            }
          }
        }
      }
    }
  }
}

// The way out: adds h times the block's rows to columns [first, end) of the tokens' outputs. The
// block must be at the row's column of output column `first`. h: a row per copy, with a zero after
// the last entry if the block has an odd number of rows.
template <class Scalar>
void multiply_out(RowBlock<Scalar>& block, int64_t first, int64_t end, MatrixView<const Scalar> h,
                  Copies copies, MatrixView<float> y_TH) {
  constexpr int64_t kTokens = Primitives<Scalar>::kAccumulateTokens;
  if (copies.count == 1 && block.rows() % kDotRows == 0) {
    for (int64_t r = 0; r < block.rows(); r += kDotRows) {
      accumulate_four_rows(block, r, end - first, h.row(0) + r, y_TH.row(copies.token[0]) + first);
    }
    return;
  }
  const int64_t rows = block.rows() + block.rows() % 2;
  for (int64_t panel = first; panel < end; panel += kPanelColumns) {
    const int64_t columns = std::min(kPanelColumns, end - panel);
    const int64_t width = padded(columns);
    const MatrixView<const Scalar> tile = block.next_tile(0, block.rows(), columns, width);
    for (int64_t t = 0; t < copies.count;) {
      // The output of a token must not be read and written twice at the same time.
      const int64_t tokens = copies.distinct ? tokens_at_once(kTokens, copies.count - t) : 1;
      float* y[kTokens];
      for (int64_t i = 0; i < tokens; ++i) y[i] = y_TH.row(copies.token[t + i]) + panel;
      accumulate<Scalar>(tokens, tile, rows, h.row(t), h.stride, y, width);
      t += tokens;
    }
  }
}

// Whether the jobs share a centre. Then all jobs take the same few rows before any takes the next,
// so that the centre is read from memory once. Otherwise each job takes all rows, because long
// uninterrupted reads are fastest.
inline bool share_a_center(const Job* jobs, int64_t num_jobs) {
  return num_jobs > 1 && jobs[0].rows.center && jobs[0].rows.center == jobs[1].rows.center;
}

template <class Scalar>
void project_in_rows(const ProjectIn& work, int64_t begin, int64_t end) {
  thread_local RowBlock<Scalar> block;
  const MatrixView<const Scalar> x_TH = {static_cast<const Scalar*>(work.x_TH), work.x_stride};
  const bool shared = share_a_center(work.jobs, work.num_jobs);
  const int64_t stretch = shared ? kInBlockRows : std::max<int64_t>(end - begin, 1);
  for (int64_t from = begin; from < end; from += stretch) {
    const int64_t to = std::min(from + stretch, end);
    for (int64_t j = 0; j < work.num_jobs; ++j) {
      const Job& job = work.jobs[j];
      if (!job.copies) continue;
      // The products of a copy are contiguous here; in the output they would be pages apart.
      const Tile<float, Use::kProducts> products(job.copies, work.inputs * kInBlockRows);
      for (int64_t first = from; first < to; first += kInBlockRows) {
        const int64_t rows = std::min(kInBlockRows, to - first);
        block.start(job.rows, first, rows, 0, std::min(kPrefetchRows, end - first - rows));
        multiply_in<Scalar>(block, work.hidden, work.inputs, x_TH, copies_of(job, work.token_N),
                            kInBlockRows, products);
        for (int64_t n = 0; n < job.copies; ++n) {
          float* out = work.out_NC + (job.first_copy + n) * work.inputs * work.num_rows + first;
          for (int64_t i = 0; i < work.inputs; ++i) {
            const float* of_input = products.row(n) + i * kInBlockRows;
            std::copy(of_input, of_input + rows, out + i * work.num_rows);
          }
        }
      }
    }
  }
}

template <class Scalar>
void project_out_share(const ProjectOut& work, const OutShare& share) {
  thread_local RowBlock<Scalar> block;
  const Scalar* h_NS = static_cast<const Scalar*>(work.h_NS);
  const MatrixView<float> y_TH = {share.y_TH, padded(work.hidden)};
  const int64_t first_column = work.inputs * work.hidden + share.first_column;
  const bool shared = share_a_center(work.jobs, work.num_jobs);
  const int64_t all_rows = std::max<int64_t>(share.end_row - share.first_row, 1);
  const int64_t stretch = shared ? kMaxOutBlockRows : all_rows;
  for (int64_t from = share.first_row; from < share.end_row; from += stretch) {
    const int64_t to = std::min(from + stretch, share.end_row);
    for (int64_t j = 0; j < work.num_jobs; ++j) {
      const Job& job = work.jobs[j];
      const int64_t block_rows = out_block_rows(job.copies);
      for (int64_t first = from; first < to && job.copies; first += block_rows) {
        const int64_t rows = std::min(block_rows, to - first);
        const int64_t prefetch_rows = std::min(rows, share.end_row - first - rows);
        block.start(job.rows, first, rows, first_column, prefetch_rows);
        const Tile<Scalar, Use::kActivations> h(job.copies, kMaxOutBlockRows);
        for (int64_t n = 0; n < job.copies; ++n) {
          const Scalar* h_S = h_NS + (job.first_copy + n) * work.num_rows + first;
          std::copy(h_S, h_S + rows, h.row(n));
          if (rows % 2) h.row(n)[rows] = Scalar{};
        }
        multiply_out<Scalar>(block, share.first_column, share.end_column, h,
                             copies_of(job, work.token_N), y_TH);
      }
    }
  }
}

}  // namespace
