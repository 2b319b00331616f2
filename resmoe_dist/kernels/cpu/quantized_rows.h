// Quantised rows as numbers: read from left to right, and restored.

#pragma once

#include "quantized_products.h"
#include "rotation.h"

namespace {

// out = entries [first, first + columns) of one block of a row, or plus the old values. Scales are
// those of the block.
inline void decode_block(const QuantizedMatrix& matrix, int64_t row, int64_t block, int64_t first,
                         int64_t columns, float* out, bool add) {
  using L = LevelPrimitives;
  const uint8_t* codes = matrix.codes.row(row);
  const uint8_t* scales = matrix.scales.row(row) + block * matrix.groups;
  const int64_t end = first + columns;
  with_decoder(matrix, block * matrix.hidden, [&](const auto& decoder) {
    for (int64_t c = first / L::kLevels * L::kLevels; c < end; c += L::kLevels) {
      const float scale = matrix.scale_of[scales[c / matrix.group_size]];
      const L::Levels levels = decoder.read(codes, c / L::kLevels);
      if (c >= first && c + L::kLevels <= end) {
        L::scale(levels, scale, out + c - first, add);
        continue;
      }
      float chunk[L::kLevels];
      L::scale(levels, scale, chunk, false);
      for (int64_t i = std::max(c, first); i < std::min(c + L::kLevels, end); ++i) {
        out[i - first] = chunk[i - c] + (add ? out[i - first] : 0.0f);
      }
    }
  });
}

// Reads one row of a centre, a residual, or their sum from `first_column` on.
class QuantizedReader {
 public:
  QuantizedReader() = default;
  QuantizedReader(const Rows& rows, int64_t row, int64_t first_column, int64_t prefetch_rows)
      : parts_{rows.quantized_center, rows.quantized},
        row_(rows.first_row + row),
        column_(first_column),
        prefetch_rows_(prefetch_rows) {}

  bool has_rows() const { return parts_[0] || parts_[1]; }

  // Writes the next `columns` entries, which must be of one block, each rounded once.
  template <class Scalar>
  void read(int64_t columns, Scalar* out) {
    const Tile<float, Use::kDecoded> entries(1, round_up(columns, kLevelStep));
    bool add = false;
    for (const QuantizedMatrix* part : parts_) {
      if (!part || !columns) continue;
      const int64_t block = column_ / part->hidden;
      decode_block(*part, row_, block, column_ - block * part->hidden, columns, entries.row(0),
                   add);
      add = true;
      if (prefetch_rows_) {
        prefetch(part->codes.row(row_ + prefetch_rows_) + column_ * part->bits / 8,
                 columns * part->bits / 8);
      }
    }
    Primitives<Scalar>::round(entries.row(0), columns, out);
    column_ += columns;
  }

 private:
  const QuantizedMatrix* parts_[2] = {nullptr, nullptr};
  int64_t row_ = 0;
  int64_t column_ = 0;
  int64_t prefetch_rows_ = 0;
};

// restore_rows for quantised rows: whole blocks are decoded, and rotated back.
template <class Scalar>
void restore_quantized_rows(const Restore& work, int64_t begin, int64_t end) {
  const Rows& rows = work.rows;
  const QuantizedMatrix* parts[] = {rows.quantized_center, rows.quantized};
  const int64_t hidden = (rows.quantized ? rows.quantized : rows.quantized_center)->hidden;
  const int64_t last_column = work.first_column + work.columns;
  const Tile<float, Use::kDecoded> entries(1, round_up(hidden, kLevelStep));
  const Tile<Scalar> rounded(1, work.columns);
  for (int64_t row = begin; row < end; ++row) {
    Scalar* const out = static_cast<Scalar*>(work.out) + row * work.out_stride;
    Scalar* const target = work.stream ? rounded.row(0) : out;
    for (int64_t column = work.first_column; column < last_column;) {
      const int64_t block = column / hidden, first = column - block * hidden;
      const int64_t columns = std::min(hidden - first, last_column - column);
      bool add = false;
      for (const QuantizedMatrix* part : parts) {
        if (!part) continue;
        decode_block(*part, rows.first_row + row, block, 0, hidden, entries.row(0), add);
        add = true;
      }
      rotate_vector(work.rotation, true, hidden, entries.row(0));
      Primitives<Scalar>::round(entries.row(0) + first, columns,
                                target + column - work.first_column);
      column += columns;
    }
    if (work.stream) Primitives<Scalar>::stream(target, work.columns, out);
  }
}

}  // namespace
