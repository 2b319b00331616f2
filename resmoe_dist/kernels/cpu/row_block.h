// Reading a block of rows into tiles, a range of columns at a time.

#pragma once

#include "rows.h"

namespace {

// Reads a block of rows of one job from left to right.
template <class Scalar>
class RowBlock {
 public:
  // Starts at rows [first, first + rows) and at `column`. See RowReader for `prefetch_rows`.
  void start(const Rows& source, int64_t first, int64_t rows, int64_t column,
             int64_t prefetch_rows) {
    dense_ = !source.bitmap && !source.is_quantized();
    pruned_ = source.bitmap;
    residual_only_ = pruned_ && !source.center;
    center_stride_ = source.center_stride;
    readers_.resize(rows);
    for (int64_t r = 0; r < rows; ++r) {
      readers_[r] = RowReader<Scalar>(source, first + r, column, prefetch_rows);
    }
  }

  int64_t rows() const { return readers_.size(); }

  // sums[row] += row · x, over the next columns of four rows from `first` on. Returns how many of
  // the `columns` it took: a multiple of kPadding, 0 if there is no fast way.
  int64_t dot_four_rows(int64_t first, int64_t columns, const Scalar* x, float* sums) {
    if (!residual_only_) return 0;
    return process_four_rows(first, [&](FourRows<Scalar>& rows) {
      return Primitives<Scalar>::dot_four_rows(rows, columns, x, sums);
    });
  }

  // y += Σ h[row] · row, over the next columns of four rows from `first` on. Returns how many of
  // the `columns` it took, as dot_four_rows does.
  int64_t accumulate_four_rows(int64_t first, int64_t columns, const Scalar* h, float* y) {
    if (!residual_only_) return 0;
    return process_four_rows(first, [&](FourRows<Scalar>& rows) {
      return Primitives<Scalar>::accumulate_four_rows(rows, columns, h, y);
    });
  }

  // The next `columns` entries of rows [first, first + rows), then zeros up to `width`. The tile is
  // valid until the next call; rows of a centre alone are not copied. An odd number of rows is
  // followed by one row of zeros. The tile has memory for a multiple of `row_multiple` rows; the
  // contents of further rows are undefined.
  MatrixView<const Scalar> next_tile(int64_t first, int64_t rows, int64_t columns, int64_t width,
                                     int64_t row_multiple = kDotRows) {
    if (dense_ && columns == width && rows % row_multiple == 0) {
      const Scalar* entries = readers_[first].read_in_place(columns);
      for (int64_t r = 1; r < rows; ++r) readers_[first + r].read_in_place(columns);
      return {entries, center_stride_};
    }
    const Tile<Scalar> tile(rows + row_multiple, width);
    int64_t r = 0;
    for (; pruned_ && r + 4 <= rows; r += 4) {
      const int64_t taken = process_four_rows(first + r, [&](FourRows<Scalar>& four) {
        return Primitives<Scalar>::expand_four_rows(four, columns, tile.row(r), tile.stride());
      });
      for (int i = 0; i < 4; ++i) {
        readers_[first + r + i].read(columns - taken, width - taken, tile.row(r + i) + taken);
      }
    }
    for (; r < rows; ++r) readers_[first + r].read(columns, width, tile.row(r));
    if (rows % 2) std::fill(tile.row(rows), tile.row(rows) + width, Scalar{});
    return tile;
  }

  // As next_tile, of all rows, with the entries of two rows side by side: row p of the result is
  // [row 2p column 0, row 2p+1 column 0, row 2p column 1, …], of 2 · width entries. Rows of zeros
  // follow, up to a multiple of `row_multiple`.
  MatrixView<const Scalar> next_tile_of_row_pairs(int64_t columns, int64_t width,
                                                  int64_t row_multiple = 2) {
    using P = Primitives<Scalar>;
    const int64_t num_pairs = round_up(rows(), row_multiple) / 2;
    const Tile<Scalar, Use::kWeightPairs> pairs(num_pairs, 2 * width);
    for (int64_t p = (rows() + 1) / 2; p < num_pairs; ++p) {
      std::fill(pairs.row(p), pairs.row(p) + 2 * width, Scalar{});
    }
    for (int64_t r = 0; r < rows(); r += 4) {
      const int64_t count = std::min<int64_t>(4, rows() - r);
      int64_t taken = 0;
      if (pruned_ && count == 4) {
        taken = process_four_rows(r, [&](FourRows<Scalar>& four) {
          return P::expand_four_rows_to_pairs(four, columns, pairs.row(r / 2), pairs.stride());
        });
      }
      if (taken == width) continue;
      const auto tile = next_tile(r, count, columns - taken, width - taken);
      for (int64_t i = 0; i < count; i += 2) {
        P::interleave(tile.row(i), tile.row(i + 1), width - taken,
                      pairs.row((r + i) / 2) + 2 * taken);
      }
    }
    return pairs;
  }

 private:
  template <class Process>
  int64_t process_four_rows(int64_t first, const Process& process) {
    return RowReader<Scalar>::process_four_rows(&readers_[first], process);
  }

  std::vector<RowReader<Scalar>> readers_;
  bool dense_ = false;
  bool pruned_ = false;
  bool residual_only_ = false;
  int64_t center_stride_ = 0;
};

}  // namespace
