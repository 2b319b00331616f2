// Whole MLPs of many copies per job. Included after `Primitives<V>`.
//
// Copies lie side by side in registers and weights are broadcast, so that no sum is ever over the
// lanes of a register: products run at nearly the speed of the multipliers, and what they share is
// expanding the rows, once for all copies of a job.
//
// Threads share a block of rows on the way in and the columns of the output on the way out, so that
// no output is added up twice. All jobs take the same few rows before the next: a centre is read
// from memory once for all of them.

#pragma once

#include "activations.h"
#include "rows.h"

namespace {

// Rows multiplied with the copies at a time on the way in, and on the way out: their tiles stay in
// the second-level cache. A multiple of all numbers of rows that products take at once.
constexpr int64_t kPackedIn = 48;
constexpr int64_t kPackedOut = 96;
// At most so many columns of the output at a time.
constexpr int64_t kPackedPanel = 1152;
// Entries of the depth at a time: those of a chunk's copies stay in the first-level cache.
constexpr int64_t kPackedDepth = 256;

template <class V>
constexpr Lanes lanes_of() {
  return {Primitives<V>::kLanes, Primitives<V>::kMostVectors};
}

// out[row][lane] of one chunk: whole groups of rows, at least `rows`.
template <class V, int M = Primitives<V>::kMostVectors>
void multiply_chunk(int64_t vectors, const V* weights, int64_t row_step, int64_t depth_step,
                    const V* packed, int64_t depth, int64_t rows, float* out, bool add) {
  if constexpr (M > 1) {
    if (vectors < M) {
      return multiply_chunk<V, M - 1>(vectors, weights, row_step, depth_step, packed, depth, rows,
                                      out, add);
    }
  }
  using P = Primitives<V>;
  constexpr int R = P::rows_at_once(M);
  for (int64_t r = 0; r < rows; r += R) {
    P::template multiply<R, M>(weights + r * row_step, row_step, depth_step, packed, depth,
                               out + r * M * P::kLanes, add);
  }
}

// Columns [begin, end) of the copies' tokens, from an even one on, to packed x.
template <class V>
void pack_columns(const PackedMlp& work, int64_t begin, int64_t end) {
  constexpr int64_t kPair = Primitives<V>::kPair;
  const V* x_TH = static_cast<const V*>(work.x_TH);
  for (int64_t j = 0; j < work.num_jobs; ++j) {
    const PackedJob& job = work.jobs[j];
    const Chunks chunks(job.copies, lanes_of<V>());
    for (int64_t c = 0; c < chunks.count; ++c) {
      const int64_t first = chunks.first_lane(c), lanes = chunks.lanes(c);
      V* packed = static_cast<V*>(job.x) + first * padded(work.hidden);
      // A few columns at a time: their lines stay in the first-level cache for the next lanes.
      for (int64_t some = begin; some < end; some += 32) {
        for (int64_t lane = 0; lane < lanes; ++lane) {
          const bool a_copy = first + lane < job.copies;
          const V* x = a_copy ? x_TH + job.token_n[first + lane] * work.x_stride : nullptr;
          for (int64_t k = some; k < std::min(some + 32, end); k += kPair) {
            for (int64_t i = 0; i < kPair; ++i) {
              packed[k * lanes + lane * kPair + i] = a_copy ? x[k + i] : V{};
            }
          }
        }
      }
    }
  }
}

// Weighted activations of some rows, from products to packed h.
template <class V>
void activate_chunk(const PackedMlp& work, int64_t rows, int64_t lanes, const float* weight_l,
                    const float* products, V* h) {
  constexpr int64_t W = Primitives<V>::kLanes, kPair = Primitives<V>::kPair;
  using X = Vector<W>;
  const auto value = [&](int64_t row, int64_t lane) {
    const float* in = products + row * lanes + lane;
    auto result = activate<X>(work.activation, X::load(in)) * X::load(weight_l + lane);
    if (work.inputs == 2) result *= X::load(in + kPackedIn * lanes);
    return result;
  };
  for (int64_t r = 0; r < rows; r += kPair) {
    for (int64_t lane = 0; lane < lanes; lane += W) {
      V* out = h + r * lanes + lane * kPair;
      if constexpr (kPair == 1) {
        X::store(value(r, lane), out);
      } else {
        // What follows the last of an odd number of rows counts nothing.
        X::store_pairs(value(r, lane), r + 1 < rows ? value(r + 1, lane) : typename X::Floats{},
                       out);
      }
    }
  }
}

// Rows [begin, end) of the block, from an even one on: from packed x to packed h.
template <class V>
void mlp_packed_in(const PackedMlp& work, int64_t begin, int64_t end) {
  using P = Primitives<V>;
  const int64_t hidden = work.hidden, inputs = work.inputs, width = padded(hidden);
  thread_local Strip<V> strip;
  for (int64_t first = begin; first < end; first += kPackedIn) {
    const int64_t rows = std::min(kPackedIn, end - first);
    for (int64_t j = 0; j < work.num_jobs; ++j) {
      const PackedJob& job = work.jobs[j];
      const Chunks chunks(job.copies, lanes_of<V>());
      const Tile<float, kProducts> products(1, inputs * kPackedIn * chunks.lanes());
      strip.start(job.rows, work.first_row + first, rows, 0, 0);
      for (int64_t input = 0; input < inputs; ++input) {
        const auto tile = strip.next(0, rows, hidden, width, kPackedIn);
        for (int64_t k = 0; k < hidden; k += kPackedDepth) {
          const int64_t depth = (std::min(kPackedDepth, hidden - k) + P::kPair - 1) / P::kPair;
          for (int64_t c = 0; c < chunks.count; ++c) {
            const int64_t lane = chunks.first_lane(c), lanes = chunks.lanes(c);
            multiply_chunk<V>(lanes / P::kLanes, tile.entries + k, tile.stride, P::kPair,
                              static_cast<const V*>(job.x) + lane * width + k * lanes, depth, rows,
                              products.row(0) + (inputs * lane + input * lanes) * kPackedIn, k > 0);
          }
        }
      }
      for (int64_t c = 0; c < chunks.count; ++c) {
        const int64_t lane = chunks.first_lane(c), lanes = chunks.lanes(c);
        activate_chunk(work, rows, lanes, job.weight_l + lane,
                       products.row(0) + inputs * lane * kPackedIn,
                       static_cast<V*>(job.h) + lane * work.most_rows + first * lanes);
      }
    }
  }
}

// Columns [begin, end) of the output, from a multiple of kPackedColumns on: from the block's packed
// h to packed y.
template <class V>
void mlp_packed_out(const PackedMlp& work, int64_t begin, int64_t end) {
  using P = Primitives<V>;
  constexpr int64_t kPair = P::kPair;
  thread_local Strip<V> strip;
  // Panels of equal width.
  const int64_t panels = std::max<int64_t>((end - begin + kPackedPanel - 1) / kPackedPanel, 1);
  const int64_t most = packed_columns((end - begin + panels - 1) / panels);
  for (int64_t j = 0; j < work.num_jobs; ++j) {
    const PackedJob& job = work.jobs[j];
    const Chunks chunks(job.copies, lanes_of<V>());
    for (int64_t first = 0; first < work.rows; first += kPackedOut) {
      const int64_t rows = std::min(kPackedOut, work.rows - first);
      strip.start(job.rows, work.first_row + first, rows, work.inputs * work.hidden + begin, 0);
      for (int64_t panel = begin; panel < end; panel += most) {
        const int64_t columns = std::min(most, end - panel);
        const int64_t in_panel = packed_columns(columns), width = up_to_multiple(in_panel, 32);
        Vectors<const V> tile;
        if constexpr (kPair == 2) {
          tile = strip.next_pairs(columns, width);
        } else {
          tile = strip.next(0, rows, columns, width);
        }
        for (int64_t c = 0; c < chunks.count; ++c) {
          const int64_t lane = chunks.first_lane(c), lanes = chunks.lanes(c);
          multiply_chunk<V>(lanes / P::kLanes, tile.entries, kPair, tile.stride,
                            static_cast<const V*>(job.h) + lane * work.most_rows + first * lanes,
                            (rows + kPair - 1) / kPair, in_panel,
                            job.y + lane * packed_columns(work.hidden) + panel * lanes,
                            work.first_row + first > 0);
        }
      }
    }
  }
}

// Columns [begin, end) of packed y, to the tokens' y.
template <class V>
void add_packed_columns(const PackedMlp& work, int64_t begin, int64_t end) {
  constexpr int64_t kColumns = 16;
  for (int64_t j = 0; j < work.num_jobs; ++j) {
    const PackedJob& job = work.jobs[j];
    const Chunks chunks(job.copies, lanes_of<V>());
    for (int64_t c = 0; c < chunks.count; ++c) {
      const int64_t first = chunks.first_lane(c), lanes = chunks.lanes(c);
      const float* y = job.y + first * packed_columns(work.hidden);
      for (int64_t column = begin; column < end; column += kColumns) {
        for (int64_t lane = 0; lane < std::min(lanes, job.copies - first); ++lane) {
          float* out = work.y_TH + job.token_n[first + lane] * padded(work.hidden);
          for (int64_t i = column; i < std::min(column + kColumns, end); ++i) {
            out[i] += y[i * lanes + lane];
          }
        }
      }
    }
  }
}

}  // namespace
