// Operations on levels (quantized.h), written with the vector types of GCC and clang.
//
// Levels are whole numbers of 16 bits, and so are the vectors they are multiplied with. Sums of
// products are exact in 32 bits: see kMaxDots. An instruction set replaces `VectorLevels` by a type
// with the same members. Included after the target was chosen.

#pragma once

#include "quantized.h"
#include "vectors.h"

namespace {

using namespace resmoe;

// Products of pairs that may be added to a sum: 16 · 2 products of a level, at most 512 in
// magnitude, with a number below 2^15 are less than 2^30.
constexpr int64_t kMaxDots = 16;

inline uint32_t window_mask(const QuantizedMatrix& matrix) {
  return (uint32_t{1} << matrix.window_bits) - 1;
}

template <int kWidth>
struct VectorLevels {
  using Vec = Vector<kWidth>;
  using Floats = typename Vec::Floats;
  using Sums = typename Vec::Ints;
  // 2 · kWidth levels, in pairs: the first of each pair in the lower half of a word.
  using Levels = typename Vec::Ints;
  static constexpr int64_t kLevels = 2 * kWidth;

  static Levels load(const int16_t* from) {
    Levels result;
    std::memcpy(&result, from, sizeof result);
    return result;
  }
  static void store(Levels levels, int16_t* to) { std::memcpy(to, &levels, sizeof levels); }

  static Levels even(Levels levels) { return levels << 16 >> 16; }
  static Levels odd(Levels levels) { return levels >> 16; }

  // sums[i] += the product of pair i of `a` with pair i of `b`.
  static Sums dot(Sums sums, Levels a, Levels b) {
    return sums + even(a) * even(b) + odd(a) * odd(b);
  }
  // The same pair in all places.
  static Levels broadcast(int32_t pair) { return Levels{} + pair; }

  // Two rows' levels side by side: pair i of the results is of one column. `add_columns` knows the
  // order of the columns.
  static void interleave(Levels first, Levels second, Levels& low, Levels& high) {
    low = (first & 0xFFFF) | second << 16;
    high = (odd(first) & 0xFFFF) | (second & static_cast<int32_t>(0xFFFF0000));
  }
  // y += low and high, in the order of the columns.
  static void add_columns(Floats low, Floats high, float* y) {
    for (int i = 0; i < kWidth; ++i) {
      y[2 * i] += low[i];
      y[2 * i + 1] += high[i];
    }
  }

  static Floats to_floats(Sums sums) { return __builtin_convertvector(sums, Floats); }
  static float sum(Floats values) { return Vec::sum(values); }

  // out = factor · levels, or plus the old values.
  static void scale(Levels levels, float factor, float* out, bool add) {
    const Floats low = __builtin_convertvector(even(levels), Floats) * factor;
    const Floats high = __builtin_convertvector(odd(levels), Floats) * factor;
    for (int i = 0; i < kWidth; ++i) {
      out[2 * i] = low[i] + (add ? out[2 * i] : 0.0f);
      out[2 * i + 1] = high[i] + (add ? out[2 * i + 1] : 0.0f);
    }
  }

  // The scales of consecutive groups. `out` has space for a multiple of 16.
  static void read_scales(const QuantizedMatrix& matrix, const uint8_t* from, int64_t groups,
                          float* out) {
    for (int64_t g = 0; g < groups; ++g) out[g] = matrix.scale_of[from[g]];
  }

  // Reads kLevels entries at a time. The bits of eight windows are in one word of 64 bits.
  template <Coder kCoder, int kBits>
  class Decoder {
   public:
    // `first` is the entry where chunk 0 begins.
    Decoder(const QuantizedMatrix& matrix, int64_t first)
        : byte_(first * kBits / 8),
          phase_(first * kBits % 8),
          mask_(window_mask(matrix)),
          mark_(matrix.mark),
          factors_{matrix.factors[0], matrix.factors[1]} {}

    Levels read(const uint8_t* row, int64_t chunk) const {
      int16_t levels[kLevels];
      const uint8_t* from = row + byte_ + chunk * kLevels / 8 * kBits;
      for (int64_t i = 0; i < kLevels; i += 8) {
        uint64_t word;
        std::memcpy(&word, from + i / 8 * kBits, 8);
        for (int j = 0; j < 8; ++j) {
          const uint32_t window = word >> (phase_ + j * kBits) & mask_;
          levels[i + j] = level(window);
        }
      }
      return load(levels);
    }

   private:
    int16_t level(uint32_t window) const {
      if constexpr (kCoder == Coder::kScalar) return 2 * window - ((1 << kBits) - 1);
      int level = 0;
      for (const uint32_t factor : factors_) {
        const uint32_t product = (window | mark_) * factor;
        level += static_cast<int8_t>(product) + static_cast<int8_t>(product >> 8);
      }
      return level;
    }

    int64_t byte_;
    int phase_;
    uint32_t mask_, mark_, factors_[2];
  };
};

}  // namespace
