// Products of few copies with rows of a quantised matrix, in whole numbers.
//
// Levels are multiplied as they are decoded, in registers. Sums of products of whole numbers are
// exact, and the scale of a group multiplies its sum once, not each of its entries.
//
// On the way in, the other factor is a token as a LevelVector. On the way out it is, for each group
// of each row, the activation times the scale. A block of rows shares a scale per group for those:
// see `OutFactors`.

#pragma once

#include "levels.h"
#include "primitives.h"
#include "tile.h"

namespace {

// Copies that are multiplied with levels in registers. Jobs with more copies keep the decoded
// levels in the first-level cache.
template <int kPlanes>
constexpr int64_t kLevelCopies = kPlanes == 1 ? 8 : 4;

// Calls visit with the number of copies that a product is compiled for, as a type: the least one
// from `copies` on.
template <int kPlanes, class Visit>
inline void with_copies(int64_t copies, const Visit& visit) {
  if (copies <= 1) return visit(std::integral_constant<int, 1>());
  if (copies <= 2) return visit(std::integral_constant<int, 2>());
  if constexpr (kPlanes == 1) {
    if (copies <= 3) return visit(std::integral_constant<int, 3>());
    if (copies > 6) return visit(std::integral_constant<int, 8>());
    if (copies > 4) return visit(std::integral_constant<int, 6>());
  }
  visit(std::integral_constant<int, 4>());
}

// Calls visit(decoder) with the decoder of a matrix from entry `first` on.
template <class Visit>
inline void with_decoder(const QuantizedMatrix& matrix, int64_t first, const Visit& visit) {
  using L = LevelPrimitives;
  if (matrix.coder == Coder::kScalar) {
    switch (matrix.bits) {
      case 1: return visit(L::Decoder<Coder::kScalar, 1>(matrix, first));
      case 2: return visit(L::Decoder<Coder::kScalar, 2>(matrix, first));
      case 3: return visit(L::Decoder<Coder::kScalar, 3>(matrix, first));
      case 4: return visit(L::Decoder<Coder::kScalar, 4>(matrix, first));
      default: return visit(L::Decoder<Coder::kScalar, 8>(matrix, first));
    }
  }
  switch (matrix.bits) {
    case 1: return visit(L::Decoder<Coder::kTrellis, 1>(matrix, first));
    case 2: return visit(L::Decoder<Coder::kTrellis, 2>(matrix, first));
    case 3: return visit(L::Decoder<Coder::kTrellis, 3>(matrix, first));
    default: return visit(L::Decoder<Coder::kTrellis, 4>(matrix, first));
  }
}

// Levels that were decoded before: the "row" is their address.
struct DecodedLevels {
  LevelPrimitives::Levels read(const uint8_t* row, int64_t chunk) const {
    return LevelPrimitives::load(reinterpret_cast<const int16_t*>(row) +
                                 chunk * LevelPrimitives::kLevels);
  }
};

// The sum of planes' sums, in units of the first plane.
template <int kPlanes>
inline LevelPrimitives::Floats join_planes(const LevelPrimitives::Floats* of_planes) {
  if constexpr (kPlanes == 1) return of_planes[0];
  return of_planes[0] + of_planes[1] * 0x1p-15f;
}

// The way in for kRows rows and kTokens copies: out[token · kRows + row].
//
// rows: the bytes of each. scales: of each row's groups. groups of group_size of the `columns`.
template <int kRows, int kTokens, int kPlanes, class Decoder>
void dot_levels(const Decoder& decoder, const uint8_t* const* rows, const float* const* scales,
                const LevelVector* const* x, int64_t columns, int64_t group_size, float* out) {
  using L = LevelPrimitives;
  using Floats = L::Floats;
  constexpr int64_t kMaxColumns = kMaxDots * L::kLevels;
  Floats totals[kRows][kTokens][kPlanes] = {};
  const int16_t* planes[kTokens][kPlanes];
  for (int t = 0; t < kTokens; ++t) std::copy_n(x[t]->planes, kPlanes, planes[t]);
  for (int64_t first = 0, g = 0; first < columns; ++g) {
    const int64_t group_end = std::min(columns, first + group_size);
    while (first < group_end) {
      const int64_t end = std::min(group_end, first + kMaxColumns);
      L::Sums sums[kRows][kTokens][kPlanes] = {};
      const int64_t end_chunk = (end + L::kLevels - 1) / L::kLevels;
      for (int64_t chunk = first / L::kLevels; chunk < end_chunk; ++chunk) {
        L::Levels levels[kRows];
        RESMOE_UNROLL
        for (int r = 0; r < kRows; ++r) levels[r] = decoder.read(rows[r], chunk);
        RESMOE_UNROLL
        for (int t = 0; t < kTokens; ++t) {
          RESMOE_UNROLL
          for (int p = 0; p < kPlanes; ++p) {
            const L::Levels token = L::load(planes[t][p] + chunk * L::kLevels);
            RESMOE_UNROLL
            for (int r = 0; r < kRows; ++r) sums[r][t][p] = L::dot(sums[r][t][p], levels[r], token);
          }
        }
      }
      RESMOE_UNROLL
      for (int r = 0; r < kRows; ++r) {
        const Floats scale = Floats{} + scales[r][g];
        RESMOE_UNROLL
        for (int t = 0; t < kTokens; ++t) {
          RESMOE_UNROLL
          for (int p = 0; p < kPlanes; ++p) {
            totals[r][t][p] += L::to_floats(sums[r][t][p]) * scale;
          }
        }
      }
      first = end;
    }
  }
  RESMOE_UNROLL
  for (int t = 0; t < kTokens; ++t) {
    RESMOE_UNROLL
    for (int r = 0; r < kRows; ++r) {
      out[t * kRows + r] = x[t]->scale * L::sum(join_planes<kPlanes>(totals[r][t]));
    }
  }
}

// dot_levels for two rows and `copies` ≤ kLevelCopies: sums[row][copy].
template <int kPlanes, class Decoder>
void dot_two_rows(int64_t copies, const Decoder& decoder, const uint8_t* const* rows,
                  const float* const* scales, const LevelVector* const* x, int64_t columns,
                  int64_t group_size, float (*sums)[kLevelCopies<1>]) {
  with_copies<kPlanes>(copies, [&](auto count) {
    constexpr int kTokens = decltype(count)::value;
    // The last copies may be the first one again.
    const LevelVector* tokens[kTokens];
    for (int t = 0; t < kTokens; ++t) tokens[t] = x[t < copies ? t : 0];
    if constexpr (kTokens <= 4) {
      float out[kTokens][2];
      dot_levels<2, kTokens, kPlanes>(decoder, rows, scales, tokens, columns, group_size, out[0]);
      for (int t = 0; t < kTokens; ++t) {
        for (int r = 0; r < 2; ++r) sums[r][t] = out[t][r];
      }
    } else {
      // Two rows would need more registers than there are.
      for (int r = 0; r < 2; ++r) {
        dot_levels<1, kTokens, kPlanes>(decoder, rows + r, scales + r, tokens, columns, group_size,
                                        sums[r]);
      }
    }
  });
}

// Decodes `columns` entries, rounded up to whole chunks.
template <class Decoder>
void decode_levels(const Decoder& decoder, const uint8_t* row, int64_t columns, int16_t* out) {
  using L = LevelPrimitives;
  for (int64_t chunk = 0; chunk * L::kLevels < columns; ++chunk) {
    L::store(decoder.read(row, chunk), out + chunk * L::kLevels);
  }
}

// How many rows ahead the way in prefetches. Memory is read with gaps (see RowReader).
constexpr int64_t kPrefetchLevelRows = 4;

// The way in: products.row(copy)[input · input_stride + i] = x of copy · row first + i, or plus the
// old value. x: of each copy.
template <int kPlanes>
void levels_in(const QuantizedMatrix& matrix, int64_t first, int64_t rows, int64_t inputs,
               const LevelVector* const* x, int64_t copies, int64_t input_stride,
               MatrixView<float> products, bool add) {
  using L = LevelPrimitives;
  const int64_t hidden = matrix.hidden, groups = matrix.groups;
  const int64_t block_bytes = hidden * matrix.bits / 8;
  const Tile<float, Use::kScales> scales(2, round_up(groups, 16));
  const Tile<int16_t, Use::kLevels> decoded(2, round_up(hidden, kLevelStep));
  const float* const row_scales[2] = {scales.row(0), scales.row(1)};
  for (int64_t input = 0; input < inputs; ++input) {
    with_decoder(matrix, input * hidden, [&](const auto& decoder) {
      for (int64_t r = 0; r < rows; r += 2) {
        const uint8_t* bytes[2];
        for (int i = 0; i < 2; ++i) {
          // The last of an odd number of rows is multiplied twice.
          const int64_t row = first + std::min(r + i, rows - 1);
          bytes[i] = matrix.codes.row(row);
          const int64_t ahead = first + std::min(r + i + kPrefetchLevelRows, rows - 1);
          prefetch(matrix.codes.row(ahead) + input * block_bytes, block_bytes);
          // The way out reads a few columns of all rows at a time.
          if (input + 1 == inputs) prefetch(bytes[i] + inputs * block_bytes, block_bytes);
          L::read_scales(matrix, matrix.scales.row(row) + input * groups, groups, scales.row(i));
        }
        const auto multiply = [&](const auto& source) {
          for (int64_t t = 0; t < copies; t += kLevelCopies<kPlanes>) {
            const int64_t tokens = std::min(kLevelCopies<kPlanes>, copies - t);
            float sums[2][kLevelCopies<1>];
            dot_two_rows<kPlanes>(tokens, source, bytes, row_scales, x + t, hidden,
                                  matrix.group_size, sums);
            for (int64_t i = 0; i < tokens; ++i) {
              float* out = products.row(t + i) + input * input_stride + r;
              for (int64_t k = 0; k < std::min<int64_t>(2, rows - r); ++k) {
                out[k] = sums[k][i] + (add ? out[k] : 0.0f);
              }
            }
          }
        };
        if (copies <= kLevelCopies<kPlanes>) {
          multiply(decoder);
        } else {
          for (int i = 0; i < 2; ++i) {
            decode_levels(decoder, bytes[i], hidden, decoded.row(i));
            bytes[i] = reinterpret_cast<const uint8_t*>(decoded.row(i));
          }
          multiply(DecodedLevels());
        }
      }
    });
  }
}

// x as whole numbers. See LevelVector; out has space for planes of a multiple of kLevelStep.
template <int kPlanes>
void to_levels(const float* x, int64_t columns, LevelVector& out) {
  float largest = 0, not_finite = 0;
  for (int64_t i = 0; i < columns; ++i) {
    const float magnitude = x[i] < 0 ? -x[i] : x[i];
    largest = magnitude > largest ? magnitude : largest;
    not_finite += x[i] * 0.0f;
  }
  // Below this, only zeros.
  const float inverse = largest > 0x1p-112f ? 32767 / largest : 0.0f;
  out.scale = largest / 32767 + not_finite;
  const int64_t padded_columns = round_up(columns, kLevelStep);
  const auto whole = [](float value) {
    return static_cast<int32_t>(value + (value < 0 ? -0.5f : 0.5f));
  };
  const bool finite = not_finite == 0;
  for (int64_t i = 0; i < padded_columns; ++i) {
    const float value = i < columns && finite ? x[i] * inverse : 0.0f;
    const int32_t level = whole(value);
    out.planes[0][i] = level;
    if constexpr (kPlanes == 2) out.planes[1][i] = whole((value - level) * 0x1p15f);
  }
}

}  // namespace
