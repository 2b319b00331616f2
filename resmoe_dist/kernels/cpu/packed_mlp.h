// MLPs for many copies per job.
//
// Fast because copies are packed: they are side by side in vector registers, a copy per lane, and
// each weight is broadcast. No sum ever runs across the lanes of a register, so products come close
// to the peak speed of the multipliers. Rows are expanded once for all copies of a job.
//
// Each block of rows goes in, through the activation, and out. The threads share the block's rows
// on the way in and the columns of the output on the way out, so they need no separate sums. All
// jobs take the same few rows before any takes the next, so a common centre is read from memory
// once.
//
// Layout. The copies of a job are split into chunks of up to kMaxVectors vectors (`Chunks`). A
// chunk of x, h or y is a matrix [depth][lanes]; depth is the columns of x, the rows of h, the
// columns of y. In x and h, kDepthPerStep entries of the depth are side by side: [depth /
// 2][lanes][2] if 2.

#pragma once

#include "activations.h"
#include "primitives.h"
#include "row_block.h"

namespace {

// Rows per tile on the way in and on the way out: tiles stay in the second-level cache.
constexpr int64_t kPackedInRows = 48;
constexpr int64_t kPackedOutRows = 96;
// The output's columns per tile at most.
constexpr int64_t kPackedPanelColumns = 1152;
// Entries of the depth multiplied at a time on the way in: that part of a chunk stays in the
// first-level cache.
constexpr int64_t kPackedDepth = 256;

template <class Scalar>
constexpr LaneLayout packed_layout() {
  using P = Primitives<Scalar>;
  return {P::kLanes, P::kMaxVectors, P::kMinPackedCopies};
}

inline int64_t divide_up(int64_t value, int64_t by) { return (value + by - 1) / by; }

// Primitives::multiply for all rows of one chunk: out[row][lane], plus the old values if `add`.
// Computes whole groups of rows, so possibly more than `rows`.
template <class Scalar, int kVectors = Primitives<Scalar>::kMaxVectors>
void multiply_chunk(int64_t vectors, const Scalar* weights, int64_t row_stride, int64_t step_stride,
                    const Scalar* packed, int64_t steps, int64_t rows, float* out, bool add) {
  if constexpr (kVectors > 1) {
    if (vectors < kVectors) {
      return multiply_chunk<Scalar, kVectors - 1>(vectors, weights, row_stride, step_stride, packed,
                                                  steps, rows, out, add);
    }
  }
  using P = Primitives<Scalar>;
  constexpr int kRows = P::rows_at_once(kVectors);
  static_assert(kPackedInRows % kRows == 0 && kPackedColumnMultiple % kRows == 0,
                "tiles have memory for whole groups of rows");
  for (int64_t r = 0; r < rows; r += kRows) {
    P::template multiply<kRows, kVectors>(weights + r * row_stride, row_stride, step_stride, packed,
                                          steps, out + r * kVectors * P::kLanes, add);
  }
}

// Step 1: packs columns [begin, end) of the copies' tokens. `begin` is even.
template <class Scalar>
void pack_columns(const PackedMlp& work, int64_t begin, int64_t end) {
  constexpr int64_t kDepthPerStep = Primitives<Scalar>::kDepthPerStep;
  const Scalar* x_TH = static_cast<const Scalar*>(work.x_TH);
  for (int64_t j = 0; j < work.num_jobs; ++j) {
    const PackedJob& job = work.jobs[j];
    const Chunks chunks(job.copies, packed_layout<Scalar>());
    for (int64_t c = 0; c < chunks.count; ++c) {
      const int64_t first = chunks.first_lane(c), lanes = chunks.lanes(c);
      Scalar* packed = static_cast<Scalar*>(job.x) + first * padded(work.hidden);
      // A few columns at a time: the cache lines that a lane writes to stay in the first-level
      // cache for the next lane.
      for (int64_t column = begin; column < end; column += 32) {
        for (int64_t lane = 0; lane < lanes; ++lane) {
          const bool is_copy = first + lane < job.copies;  // otherwise padding
          const Scalar* x = is_copy ? x_TH + job.token_n[first + lane] * work.x_stride : nullptr;
          for (int64_t k = column; k < std::min(column + 32, end); k += kDepthPerStep) {
            for (int64_t i = 0; i < kDepthPerStep; ++i) {
              packed[k * lanes + lane * kDepthPerStep + i] = is_copy ? x[k + i] : Scalar{};
            }
          }
        }
      }
    }
  }
}

// Weighted activations of one chunk: from products [inputs][kPackedInRows][lanes] to packed h.
template <class Scalar>
void activate_chunk(const PackedMlp& work, int64_t rows, int64_t lanes, const float* weight_l,
                    const float* products, Scalar* h) {
  constexpr int64_t kWidth = Primitives<Scalar>::kLanes;
  constexpr int64_t kDepthPerStep = Primitives<Scalar>::kDepthPerStep;
  using Vec = Vector<kWidth>;
  const auto value = [&](int64_t row, int64_t lane) {
    const float* in = products + row * lanes + lane;
    auto result = activate<Vec>(work.activation, Vec::load(in)) * Vec::load(weight_l + lane);
    if (work.inputs == 2) result *= Vec::load(in + kPackedInRows * lanes);
    return result;
  };
  for (int64_t r = 0; r < rows; r += kDepthPerStep) {
    for (int64_t lane = 0; lane < lanes; lane += kWidth) {
      Scalar* out = h + r * lanes + lane * kDepthPerStep;
      if constexpr (kDepthPerStep == 1) {
        Vec::store(value(r, lane), out);
      } else {
        // The last of an odd number of rows is paired with zeros.
        const auto second = r + 1 < rows ? value(r + 1, lane) : typename Vec::Floats{};
        Vec::store_pairs(value(r, lane), second, out);
      }
    }
  }
}

// Step 2, the way in: rows [begin, end) of the current block, from packed x to packed h. `begin` is
// even.
template <class Scalar>
void mlp_packed_in(const PackedMlp& work, int64_t begin, int64_t end) {
  using P = Primitives<Scalar>;
  const int64_t hidden = work.hidden, inputs = work.inputs, width = padded(hidden);
  thread_local RowBlock<Scalar> block;
  for (int64_t first = begin; first < end; first += kPackedInRows) {
    const int64_t rows = std::min(kPackedInRows, end - first);
    for (int64_t j = 0; j < work.num_jobs; ++j) {
      const PackedJob& job = work.jobs[j];
      const Chunks chunks(job.copies, packed_layout<Scalar>());
      // [chunk][inputs][kPackedInRows][lanes of the chunk]
      const Tile<float, Use::kProducts> products(1, inputs * kPackedInRows * chunks.lanes());
      block.start(job.rows, work.first_row + first, rows, 0, 0);
      for (int64_t input = 0; input < inputs; ++input) {
        const auto tile = block.next_tile(0, rows, hidden, width, kPackedInRows);
        for (int64_t k = 0; k < hidden; k += kPackedDepth) {
          const int64_t steps = divide_up(std::min(kPackedDepth, hidden - k), P::kDepthPerStep);
          for (int64_t c = 0; c < chunks.count; ++c) {
            const int64_t lane = chunks.first_lane(c), lanes = chunks.lanes(c);
            const Scalar* x = static_cast<const Scalar*>(job.x) + lane * width + k * lanes;
            float* out = products.row(0) + (inputs * lane + input * lanes) * kPackedInRows;
            multiply_chunk<Scalar>(lanes / P::kLanes, tile.entries + k, tile.stride,
                                   P::kDepthPerStep, x, steps, rows, out, k > 0);
          }
        }
      }
      for (int64_t c = 0; c < chunks.count; ++c) {
        const int64_t lane = chunks.first_lane(c), lanes = chunks.lanes(c);
        activate_chunk(work, rows, lanes, job.weight_l + lane,
                       products.row(0) + inputs * lane * kPackedInRows,
                       static_cast<Scalar*>(job.h) + lane * work.block_rows + first * lanes);
      }
    }
  }
}

// Step 3, the way out: adds to columns [begin, end) of packed y, from the current block's packed h.
// `begin` is a multiple of kPackedColumnMultiple. The first block overwrites y.
//
// The roles of rows and columns are swapped: here a column of the tile is a "row" of `multiply`,
// and the tile's rows are its depth.
template <class Scalar>
void mlp_packed_out(const PackedMlp& work, int64_t begin, int64_t end) {
  using P = Primitives<Scalar>;
  constexpr int64_t kDepthPerStep = P::kDepthPerStep;
  thread_local RowBlock<Scalar> block;
  // Panels of equal width.
  const int64_t panels = std::max<int64_t>(divide_up(end - begin, kPackedPanelColumns), 1);
  const int64_t panel_columns = packed_columns(divide_up(end - begin, panels));
  for (int64_t j = 0; j < work.num_jobs; ++j) {
    const PackedJob& job = work.jobs[j];
    const Chunks chunks(job.copies, packed_layout<Scalar>());
    for (int64_t first = 0; first < work.rows; first += kPackedOutRows) {
      const int64_t rows = std::min(kPackedOutRows, work.rows - first);
      const int64_t steps = divide_up(rows, kDepthPerStep);
      block.start(job.rows, work.first_row + first, rows, work.inputs * work.hidden + begin, 0);
      for (int64_t panel = begin; panel < end; panel += panel_columns) {
        const int64_t columns = std::min(panel_columns, end - panel);
        const int64_t out_columns = packed_columns(columns);
        const int64_t width = round_up(out_columns, 32);
        MatrixView<const Scalar> tile;
        if constexpr (kDepthPerStep == 2) {
          tile = block.next_tile_of_row_pairs(columns, width);
        } else {
          tile = block.next_tile(0, rows, columns, width);
        }
        for (int64_t c = 0; c < chunks.count; ++c) {
          const int64_t lane = chunks.first_lane(c), lanes = chunks.lanes(c);
          const Scalar* h =
              static_cast<const Scalar*>(job.h) + lane * work.block_rows + first * lanes;
          float* y = job.y + lane * packed_columns(work.hidden) + panel * lanes;
          multiply_chunk<Scalar>(lanes / P::kLanes, tile.entries, kDepthPerStep, tile.stride, h,
                                 steps, out_columns, y, work.first_row + first > 0);
        }
      }
    }
  }
}

// Step 4, after all blocks: adds columns [begin, end) of packed y to the tokens' outputs.
template <class Scalar>
void add_packed_columns(const PackedMlp& work, int64_t begin, int64_t end) {
  // A few columns at a time, as in pack_columns.
  constexpr int64_t kColumns = 16;
  for (int64_t j = 0; j < work.num_jobs; ++j) {
    const PackedJob& job = work.jobs[j];
    const Chunks chunks(job.copies, packed_layout<Scalar>());
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
