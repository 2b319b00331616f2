// Products of copies with rows, on the way in and on the way out. Included after `Primitives<V>`.
//
// A product expands a block of rows into a tile that stays in the caches, and multiplies the tile
// by the copies. For one token the detour costs little, as memory is what it waits for; for many
// it makes a sparse product a dense one.

#pragma once

#include "rows.h"

namespace {

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

// What some copies are: the numbers of their tokens.
struct Copies {
  const int64_t* token;
  int64_t count;
  bool distinct;  // no token twice
};

// dot for a number of tokens only known now: as many at a time as there are registers for.
template <class V, int NT = Primitives<V>::kTokens>
inline void dot(int64_t tokens, const V* tile, int64_t stride, const V* const* x, int64_t width,
                float* products) {
  if constexpr (NT > 1) {
    if (tokens < NT) return dot<V, NT - 1>(tokens, tile, stride, x, width, products);
  }
  Primitives<V>::template dot<NT>(tile, stride, x, width, products);
}

// multiply_in and multiply_out for one copy and four rows: a tile would only be written and read.
template <class V>
void dot_four(Strip<V>& strip, int64_t first, int64_t columns, const V* x, float* sums) {
  std::fill(sums, sums + kDotRows, 0.0f);
  const int64_t taken = strip.dot_four(first, columns, x, sums);
  if (taken == columns) return;
  const int64_t width = padded(columns - taken);
  const auto tile = strip.next(first, kDotRows, columns - taken, width);
  float rest[kDotRows];
  const V* from = x + taken;
  Primitives<V>::template dot<1>(tile.entries, tile.stride, &from, width, rest);
  for (int64_t r = 0; r < kDotRows; ++r) sums[r] += rest[r];
}

template <class V>
void accumulate_four(Strip<V>& strip, int64_t first, int64_t columns, const V* h, float* y) {
  const int64_t taken = strip.accumulate_four(first, columns, h, y);
  if (taken == columns) return;
  const int64_t width = padded(columns - taken);
  const auto tile = strip.next(first, kDotRows, columns - taken, width);
  float* from = y + taken;
  Primitives<V>::template accumulate<1>(tile.entries, tile.stride, kDotRows, h, kDotRows, &from,
                                        width);
}

// Products with the next `inputs` times `hidden` columns of a strip's rows:
// products.row(copy)[input · most + row].
template <class V>
void multiply_in(Strip<V>& strip, int64_t hidden, int64_t inputs, Vectors<const V> x,
                 Copies copies, int64_t most, Vectors<float> products) {
  const int64_t width = padded(hidden);
  constexpr int64_t kTokens = Primitives<V>::kTokens;
  const bool few = copies.count <= kFewCopies;
  const int64_t group = few ? kDotRows : kInBlock;
  const int64_t chunk = few ? width : kDotBytes / sizeof(V);
  for (int64_t first = 0; first < strip.rows(); first += group) {
    const int64_t rows = std::min(group, strip.rows() - first);
    for (int64_t input = 0; input < inputs; ++input) {
      if (copies.count == 1 && rows == kDotRows) {
        dot_four(strip, first, hidden, x.row(copies.token[0]),
                 products.entries + input * most + first);
        continue;
      }
      const Vectors<const V> block = strip.next(first, rows, hidden, width);
      float* out = products.entries + input * most + first;
      for (int64_t column = 0; column < width; column += chunk) {
        const int64_t columns = std::min(chunk, width - column);
        for (int64_t t = 0; t < copies.count; t += kTokens) {
          const int64_t tokens = std::min(kTokens, copies.count - t);
          const V* of_token[kTokens];
          for (int64_t i = 0; i < tokens; ++i) {
            of_token[i] = x.row(copies.token[t + i]) + column;
          }
          for (int64_t r = 0; r < rows; r += kDotRows) {
            float sums[kDotRows * kTokens];
            dot<V>(tokens, block.row(r) + column, block.stride, of_token, columns, sums);
            for (int64_t i = 0; i < tokens; ++i) {
              float* sum = out + (t + i) * products.stride + r;
              // What the rows past the last of a tile have left over is not taken.
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

// accumulate for a number of tokens only known now; see `tokens_at_once`.
template <class V, int NT = Primitives<V>::kOutTokens>
inline void accumulate(int64_t tokens, Vectors<const V> tile, int64_t rows, const V* h,
                       int64_t h_stride, float* const* y, int64_t width) {
  if constexpr (NT > 1) {
    if (tokens < NT) return accumulate<V, NT / 2>(tokens, tile, rows, h, h_stride, y, width);
  }
  Primitives<V>::template accumulate<NT>(tile.entries, tile.stride, rows, h, h_stride, y, width);
}

// The most of `most`, half of it, … 1 tokens that are left.
inline int64_t tokens_at_once(int64_t most, int64_t left) {
  while (most > left) most /= 2;
  return most;
}

// Adds to y the products with columns [first, end) of the output, at which the strip's rows are.
// h: a row per copy; where the strip's rows are odd in number, a zero follows.
template <class V>
void multiply_out(Strip<V>& strip, int64_t first, int64_t end, Vectors<const V> h, Copies copies,
                  Vectors<float> y_TH) {
  constexpr int64_t kTokens = Primitives<V>::kOutTokens;
  if (copies.count == 1 && strip.rows() % kDotRows == 0) {
    for (int64_t r = 0; r < strip.rows(); r += kDotRows) {
      accumulate_four(strip, r, end - first, h.row(0) + r, y_TH.row(copies.token[0]) + first);
    }
    return;
  }
  const int64_t rows = strip.rows() + strip.rows() % 2;
  for (int64_t panel = first; panel < end; panel += kPanel) {
    const int64_t columns = std::min(kPanel, end - panel);
    const int64_t width = padded(columns);
    const Vectors<const V> tile = strip.next(0, strip.rows(), columns, width);
    for (int64_t t = 0; t < copies.count;) {
      const int64_t tokens = copies.distinct ? tokens_at_once(kTokens, copies.count - t) : 1;
      float* y[kTokens];
      for (int64_t i = 0; i < tokens; ++i) y[i] = y_TH.row(copies.token[t + i]) + panel;
      accumulate<V>(tokens, tile, rows, h.row(t), h.stride, y, width);
      t += tokens;
    }
  }
}

// Whether jobs share a centre, which then should be read once for all of them.
inline bool share_a_center(const Job* jobs, int64_t num_jobs) {
  return num_jobs > 1 && jobs[0].rows.center && jobs[0].rows.center == jobs[1].rows.center;
}

template <class V>
void project_in_rows(const ProjectIn& work, int64_t begin, int64_t end) {
  thread_local Strip<V> strip;
  const Vectors<const V> x = {static_cast<const V*>(work.x_TH), work.x_stride};
  // Rows that all jobs take before the next: all of them (the longest streams from memory), unless
  // a centre's rows had better stay in the caches for the next job.
  const bool together = share_a_center(work.jobs, work.num_jobs);
  const int64_t stretch = together ? kInBlock : std::max<int64_t>(end - begin, 1);
  for (int64_t from = begin; from < end; from += stretch) {
    const int64_t to = std::min(from + stretch, end);
    for (int64_t j = 0; j < work.num_jobs; ++j) {
      const Job& job = work.jobs[j];
      if (!job.copies) continue;
      const Copies copies = {work.token_N + job.first_copy, job.copies, job.distinct};
      // Products of a copy lie together here, where those of the output are pages apart.
      const Tile<float, kProducts> products(job.copies, work.inputs * kInBlock);
      for (int64_t first = from; first < to; first += kInBlock) {
        const int64_t rows = std::min(kInBlock, to - first);
        strip.start(job.rows, first, rows, 0, std::min(kRowsAhead, end - first - rows));
        multiply_in(strip, work.hidden, work.inputs, x, copies, kInBlock,
                    {products.row(0), products.stride()});
        for (int64_t n = 0; n < job.copies; ++n) {
          float* out = work.out_NC + (job.first_copy + n) * work.inputs * work.num_rows + first;
          for (int64_t i = 0; i < work.inputs; ++i) {
            const float* of_input = products.row(n) + i * kInBlock;
            std::copy(of_input, of_input + rows, out + i * work.num_rows);
          }
        }
      }
    }
  }
}

template <class V>
void project_out_share(const ProjectOut& work, const OutShare& share) {
  thread_local Strip<V> strip;
  const V* h_NS = static_cast<const V*>(work.h_NS);
  const Vectors<float> y_TH = {share.y_TH, padded(work.hidden)};
  const int64_t first_column = work.inputs * work.hidden + share.first_column;
  const bool together = share_a_center(work.jobs, work.num_jobs);
  const int64_t all = std::max<int64_t>(share.end_row - share.first_row, 1);
  const int64_t stretch = together ? kMostOutRows : all;
  for (int64_t from = share.first_row; from < share.end_row; from += stretch) {
    const int64_t to = std::min(from + stretch, share.end_row);
    for (int64_t j = 0; j < work.num_jobs; ++j) {
      const Job& job = work.jobs[j];
      const Copies copies = {work.token_N + job.first_copy, job.copies, job.distinct};
      const int64_t block = out_block(job.copies);
      for (int64_t first = from; first < to && job.copies; first += block) {
        const int64_t rows = std::min(block, to - first);
        const int64_t ahead = std::min(rows, share.end_row - first - rows);
        strip.start(job.rows, first, rows, first_column, ahead);
        const Tile<V, kActivations> h(job.copies, kMostOutRows);
        for (int64_t n = 0; n < job.copies; ++n) {
          const V* h_S = h_NS + (job.first_copy + n) * work.num_rows + first;
          std::copy(h_S, h_S + rows, h.row(n));
          if (rows % 2) h.row(n)[rows] = V{};
        }
        multiply_out(strip, share.first_column, share.end_column,
                     {h.row(0), h.stride()}, copies, y_TH);
      }
    }
  }
}

}  // namespace
