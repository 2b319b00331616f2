// Reading the rows of a design matrix from left to right, and restoring them.

#pragma once

#include "bitmap.h"
#include "quantized_rows.h"
#include "tile.h"

namespace {

// Reads one row from `first_column` on, a range of columns at a time: a centre's entries, a
// residual, or their sum. Quantised rows stay rotated.
//
// Along the way it prefetches the row `prefetch_rows` further down (0: none). A product reads only
// some columns of each row, so memory is read with gaps, and the processor's own prefetching loses
// track.
template <class Scalar>
class RowReader {
 public:
  RowReader() = default;
  RowReader(const Rows& rows, int64_t row, int64_t first_column, int64_t prefetch_rows)
      : pruned_(rows.bitmap != nullptr) {
    if (rows.is_quantized()) quantized_ = QuantizedReader(rows, row, first_column, prefetch_rows);
    if (rows.center) {
      center_ = static_cast<const Scalar*>(rows.center) + row * rows.center_stride + first_column;
      center_ahead_ = prefetch_rows * rows.center_stride;
    }
    if (pruned_) {
      const uint8_t* bitmap = rows.bitmap + row * rows.bitmap_stride;
      bits_ = BitReader(bitmap, rows.bitmap_stride, first_column);
      bitmap_ = bitmap + first_column / 8;
      bitmap_ahead_ = prefetch_rows * rows.bitmap_stride;
      values_ = static_cast<const Scalar*>(rows.values) + value_index(rows, row, first_column);
      values_ahead_ = rows.offset(row + prefetch_rows) - rows.offset(row);
      end_ = static_cast<const Scalar*>(rows.values) + rows.num_values;
    }
  }

  // Writes the next `columns` entries to `out`, then zeros up to `width`.
  void read(int64_t columns, int64_t width, Scalar* out) {
    if (quantized_.has_rows()) {
      quantized_.read(columns, out);
      std::memset(static_cast<void*>(out + columns), 0, (width - columns) * sizeof(Scalar));
      return;
    }
    if (center_ && center_ahead_) prefetch(center_ + center_ahead_, columns * sizeof(Scalar));
    if (!pruned_) {
      std::memcpy(out, center_, columns * sizeof(Scalar));
    } else {
      if (bitmap_ahead_) prefetch(bitmap_ + bitmap_ahead_, columns / 8);
      bitmap_ += columns / 8;
      const Scalar* from = values_;
      using P = Primitives<Scalar>;
      if (center_) {
        values_ = P::template expand<true>(bits_, from, end_, center_, columns, out);
      } else {
        values_ = P::template expand<false>(bits_, from, end_, nullptr, columns, out);
      }
      if (bitmap_ahead_) prefetch(from + values_ahead_, (values_ - from) * sizeof(Scalar));
    }
    if (center_) center_ += columns;
    std::memset(static_cast<void*>(out + columns), 0, (width - columns) * sizeof(Scalar));
  }

  // The next `columns` entries in place, without a copy. Only for a row without a residual.
  const Scalar* read_in_place(int64_t columns) {
    if (center_ahead_) prefetch(center_ + center_ahead_, columns * sizeof(Scalar));
    center_ += columns;
    return center_ - columns;
  }

  // Calls `process(FourRows&)` for four readers of one job, and moves them on by as many columns as
  // it returns. Returns that number, too.
  template <class Process>
  static int64_t process_four_rows(RowReader* readers, const Process& process) {
    FourRows<Scalar> rows;
    rows.end = readers[0].end_;
    for (int r = 0; r < 4; ++r) {
      rows.bits[r] = &readers[r].bits_;
      rows.values[r] = readers[r].values_;
      rows.center[r] = readers[r].center_;
    }
    const int64_t columns = process(rows);
    for (int r = 0; r < 4; ++r) {
      readers[r].values_ = rows.values[r];
      if (rows.center[r]) readers[r].center_ += columns;
    }
    return columns;
  }

 private:
  // A flag, because a residual may have no values at all.
  bool pruned_ = false;
  QuantizedReader quantized_;
  BitReader bits_;
  const uint8_t* bitmap_ = nullptr;  // follows bits_, for prefetching
  const Scalar* center_ = nullptr;
  const Scalar* values_ = nullptr;
  const Scalar* end_ = nullptr;
  // How far ahead to prefetch, in entries or bytes.
  int64_t center_ahead_ = 0;
  int64_t bitmap_ahead_ = 0;
  int64_t values_ahead_ = 0;
};

template <class Scalar>
void restore_rows(const Restore& work, int64_t begin, int64_t end) {
  if (work.rows.is_quantized()) return restore_quantized_rows<Scalar>(work, begin, end);
  for (int64_t row = begin; row < end; ++row) {
    Scalar* out = static_cast<Scalar*>(work.out) + row * work.out_stride;
    RowReader<Scalar> reader(work.rows, row, work.first_column, 0);
    if (work.stream) {
      const Tile<Scalar> tile(1, work.columns);
      reader.read(work.columns, work.columns, tile.row(0));
      Primitives<Scalar>::stream(tile.row(0), work.columns, out);
    } else {
      reader.read(work.columns, work.columns, out);
    }
  }
}

}  // namespace
