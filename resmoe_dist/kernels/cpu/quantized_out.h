// The way out through quantised rows: see quantized_products.h.

#pragma once

#include "quantized_products.h"

namespace {

// The factors of a block of rows: activation times scale of the group, as whole numbers.
//
// scale_of_copy.row(t)[g]: what one unit is worth. pairs.row((t · row pairs + i) · planes + p)[g]:
// the factors of rows 2i and 2i + 1, side by side in a word.
struct OutFactors {
  MatrixView<int32_t> pairs;
  MatrixView<float> scale_of_copy;
  int64_t row_pairs;
};

// h.row(copy)[row]: activations. The factors of a row past an odd number of rows are zeros.
template <int kPlanes>
OutFactors out_factors(const QuantizedMatrix& matrix, int64_t first, int64_t rows, int64_t inputs,
                       MatrixView<const float> h, int64_t copies) {
  using L = LevelPrimitives;
  using Vec = L::Vec;
  using Floats = typename Vec::Floats;
  using Ints = typename Vec::Ints;
  constexpr int64_t kWidth = L::kLevels / 2;
  const int64_t groups = matrix.groups, width = round_up(groups, 16), row_pairs = (rows + 1) / 2;
  const Tile<float, Use::kScales> scales(rows, width);
  for (int64_t r = 0; r < rows; ++r) {
    // What is read past the last group must not be infinite.
    std::fill(scales.row(r) + width - 16, scales.row(r) + width, 0.0f);
    L::read_scales(matrix, matrix.scales.row(first + r) + inputs * groups, groups, scales.row(r));
  }
  const Tile<int32_t, Use::kFactors> pairs(copies * row_pairs * kPlanes, width);
  const Tile<float, Use::kFactors> scale_of_copy(copies, width);
  const float round_magic = 12582912.0f;  // see activations.h
  const auto whole = [&](Floats value) {
    return reinterpret_cast<Ints>(value + round_magic) - 0x4B400000;
  };
  for (int64_t t = 0; t < copies; ++t) {
    for (int64_t g = 0; g < width; g += kWidth) {
      Floats largest = {}, not_finite = {};
      for (int64_t r = 0; r < rows; ++r) {
        const Floats value = Vec::load(scales.row(r) + g) * h.row(t)[r];
        const Floats magnitude = value < 0.0f ? -value : value;
        largest = magnitude > largest ? magnitude : largest;
        not_finite += value * 0.0f;
      }
      // Below this, only zeros.
      const Floats least = Floats{} + 0x1p-112f;
      const Floats inverse = largest > least ? 32767.0f / largest : Floats{};
      Vec::store(largest * (1 / 32767.0f) + not_finite, scale_of_copy.row(t) + g);
      for (int64_t r = 0; r < rows; r += 2) {
        const Floats first_factor = Vec::load(scales.row(r) + g) * h.row(t)[r] * inverse;
        Floats second_factor = {};
        if (r + 1 < rows) {
          second_factor = Vec::load(scales.row(r + 1) + g) * h.row(t)[r + 1] * inverse;
        }
        Ints a = whole(first_factor), b = whole(second_factor);
        for (int p = 0;; ++p) {
          const Ints pair = (a & 0xFFFF) | b << 16;
          std::memcpy(pairs.row((t * row_pairs + r / 2) * kPlanes + p) + g, &pair, sizeof pair);
          if (p + 1 == kPlanes) break;
          a = whole((first_factor - __builtin_convertvector(a, Floats)) * 0x1p15f);
          b = whole((second_factor - __builtin_convertvector(b, Floats)) * 0x1p15f);
        }
      }
    }
  }
  return {pairs, scale_of_copy, row_pairs};
}

// y += factors · levels for one chunk of columns in group g, and `copies` ≤ kTokens copies from `t`
// on. read(pair, low, high): the interleaved levels of two rows.
template <int kTokens, int kPlanes, class Read>
void add_chunk(int64_t copies, const Read& read, const OutFactors& factors, int64_t t, int64_t g,
               float* const* y) {
  using L = LevelPrimitives;
  L::Sums low_sums[kTokens][kPlanes] = {}, high_sums[kTokens][kPlanes] = {};
  const int32_t* of_token[kTokens];
  for (int i = 0; i < kTokens; ++i) {
    // The last copies may be the first one again.
    const int64_t copy = t + (i < copies ? i : 0);
    of_token[i] = factors.pairs.row(copy * factors.row_pairs * kPlanes) + g;
  }
  for (int64_t pair = 0; pair < factors.row_pairs; ++pair) {
    L::Levels low, high;
    read(pair, low, high);
    RESMOE_UNROLL
    for (int i = 0; i < kTokens; ++i) {
      RESMOE_UNROLL
      for (int p = 0; p < kPlanes; ++p) {
        const L::Levels factor =
            L::broadcast(of_token[i][(pair * kPlanes + p) * factors.pairs.stride]);
        low_sums[i][p] = L::dot(low_sums[i][p], low, factor);
        high_sums[i][p] = L::dot(high_sums[i][p], high, factor);
      }
    }
  }
  RESMOE_UNROLL
  for (int i = 0; i < kTokens; ++i) {
    if (i >= copies) break;
    L::Floats low[kPlanes], high[kPlanes];
    RESMOE_UNROLL
    for (int p = 0; p < kPlanes; ++p) {
      low[p] = L::to_floats(low_sums[i][p]);
      high[p] = L::to_floats(high_sums[i][p]);
    }
    const L::Floats scale = L::Floats{} + factors.scale_of_copy.row(t + i)[g];
    L::add_columns(join_planes<kPlanes>(low) * scale, join_planes<kPlanes>(high) * scale, y[i]);
  }
}

// add_chunk for `copies` ≤ kLevelCopies.
template <int kPlanes, class Read>
void add_chunk_of(int64_t copies, const Read& read, const OutFactors& factors, int64_t t, int64_t g,
                  float* const* y) {
  with_copies<kPlanes>(copies, [&](auto count) {
    add_chunk<decltype(count)::value, kPlanes>(copies, read, factors, t, g, y);
  });
}

// The way out: adds h times rows [first, first + rows), at most 2 · kMaxDots, to the tokens'
// outputs. y_TH: rows of padded(hidden). distinct: no token occurs twice.
template <int kPlanes>
void levels_out(const QuantizedMatrix& matrix, int64_t first, int64_t rows, int64_t inputs,
                MatrixView<const float> h, const int64_t* token, int64_t copies, bool distinct,
                MatrixView<float> y_TH) {
  using L = LevelPrimitives;
  const int64_t hidden = matrix.hidden;
  const OutFactors factors = out_factors<kPlanes>(matrix, first, rows, inputs, h, copies);
  const int64_t max_tokens = distinct ? kLevelCopies<kPlanes> : 1;
  const Tile<const uint8_t*, Use::kFactors> bytes(1, 2 * factors.row_pairs);
  for (int64_t r = 0; r < 2 * factors.row_pairs; ++r) {
    bytes.row(0)[r] = matrix.codes.row(first + std::min(r, rows - 1));
  }
  const Tile<int16_t, Use::kLevels> decoded(2 * factors.row_pairs, L::kLevels);
  with_decoder(matrix, inputs * hidden, [&](const auto& decoder) {
    const uint8_t* const* const row = bytes.row(0);
    for (int64_t column = 0, g = 0; column < hidden; ++g) {
      const int64_t group_end = std::min(hidden, column + matrix.group_size);
      for (; column < group_end; column += L::kLevels) {
        const auto decode = [&](int64_t pair, L::Levels& low, L::Levels& high) {
          const int64_t chunk = column / L::kLevels;
          L::interleave(decoder.read(row[2 * pair], chunk), decoder.read(row[2 * pair + 1], chunk),
                        low, high);
        };
        const auto load = [&](int64_t pair, L::Levels& low, L::Levels& high) {
          low = L::load(decoded.row(2 * pair));
          high = L::load(decoded.row(2 * pair + 1));
        };
        const bool in_registers = copies <= max_tokens;
        for (int64_t pair = 0; !in_registers && pair < factors.row_pairs; ++pair) {
          L::Levels low, high;
          decode(pair, low, high);
          L::store(low, decoded.row(2 * pair));
          L::store(high, decoded.row(2 * pair + 1));
        }
        for (int64_t t = 0; t < copies; t += max_tokens) {
          const int64_t tokens = std::min(max_tokens, copies - t);
          float* y[kLevelCopies<1>];
          for (int64_t i = 0; i < tokens; ++i) y[i] = y_TH.row(token[t + i]) + column;
          if (in_registers) {
            add_chunk_of<kPlanes>(tokens, decode, factors, t, g, y);
          } else {
            add_chunk_of<kPlanes>(tokens, load, factors, t, g, y);
          }
        }
      }
    }
  });
}

}  // namespace
