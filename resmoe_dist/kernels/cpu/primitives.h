// Primitives in terms of GCC's and clang's vector types, W floats wide: right on any machine, and
// fast wherever the compiler has such registers. Included after the target was chosen.
//
// A tile's rows and all vectors multiplied with them are whole multiples of kPadding entries.

#pragma once

#include "kernels.h"

// Loops over arrays that are to live in registers, which they do only when there is no loop left.
#define RESMOE_UNROLL _Pragma("GCC unroll 16")

namespace {

using namespace resmoe;

// A bfloat16 as it lies in memory.
struct BFloat16 {
  uint16_t bits;
};

constexpr int64_t kDotRows = 4;

inline float to_float(float value) { return value; }
inline float to_float(BFloat16 value) {
  const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
  float result;
  std::memcpy(&result, &bits, 4);
  return result;
}

// To nearest, ties to even; a NaN stays one.
inline BFloat16 round_to(float value, BFloat16) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  if (value != value) return {static_cast<uint16_t>(bits >> 16 | 0x40)};
  return {static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16)};
}
inline float round_to(float value, float) { return value; }

// The bits of a row from some column on.
class Bits {
 public:
  Bits() = default;
  Bits(const uint8_t* row, int64_t row_bytes, int64_t first)
      : row_(row), row_bytes_(row_bytes), bit_(first) {}

  // The next 32 bits, which must be there.
  uint32_t next_32() {
    const uint8_t* byte = row_ + (bit_ >> 3);
    uint32_t word;
    std::memcpy(&word, byte, 4);
    if (const int shift = bit_ & 7) word = word >> shift | uint32_t{byte[4]} << (32 - shift);
    bit_ += 32;
    return word;
  }

  // The next `count` ≤ 32 bits, lowest first. No byte past the row is read.
  uint32_t next(int64_t count) {
    const int64_t byte = bit_ >> 3;
    const int64_t left = row_bytes_ - byte;
    uint64_t word = 0;
    if (left >= 8) {
      std::memcpy(&word, row_ + byte, 8);
    } else {
      std::memcpy(&word, row_ + byte, left);
    }
    word >>= bit_ & 7;
    bit_ += count;
    return static_cast<uint32_t>(word & ((uint64_t{1} << count) - 1));
  }

 private:
  const uint8_t* row_ = nullptr;
  int64_t row_bytes_ = 0;
  int64_t bit_ = 0;
};

// The vector types of W entries. (GCC takes no size that depends on a template's argument.)
template <int W>
struct Types;
#define RESMOE_TYPES(W)                                             \
  template <>                                                       \
  struct Types<W> {                                                 \
    typedef float Floats __attribute__((vector_size(4 * W)));       \
    typedef uint32_t Words __attribute__((vector_size(4 * W)));     \
    typedef uint16_t Halves __attribute__((vector_size(2 * W)));    \
  };
RESMOE_TYPES(4)
RESMOE_TYPES(8)
RESMOE_TYPES(16)
#undef RESMOE_TYPES

template <int W>
struct Vector {
  using Floats = typename Types<W>::Floats;
  using Words = typename Types<W>::Words;
  using Halves = typename Types<W>::Halves;

  static Floats load(const float* source) {
    Floats result;
    std::memcpy(&result, source, sizeof result);
    return result;
  }
  static Floats load(const BFloat16* source) {
    Halves halves;
    std::memcpy(&halves, source, sizeof halves);
    return reinterpret_cast<Floats>(__builtin_convertvector(halves, Words) << 16);
  }
  static void store(Floats value, float* target) { std::memcpy(target, &value, sizeof value); }
  static void store(Floats value, BFloat16* target) {
    const Halves halves = __builtin_convertvector(rounded(value) >> 16, Halves);
    std::memcpy(target, &halves, sizeof halves);
  }
  // first[0], second[0], first[1], …
  static void store_pairs(Floats first, Floats second, BFloat16* target) {
    const Words pairs = rounded(first) >> 16 | (rounded(second) & 0xFFFF0000);
    std::memcpy(target, &pairs, sizeof pairs);
  }
  static float sum(Floats value) {
    float total = 0;
    for (int i = 0; i < W; ++i) total += value[i];
    return total;
  }

 private:
  // A bfloat16 in the upper halves: to nearest, ties to even; a NaN stays one.
  static Words rounded(Floats value) {
    const Words bits = reinterpret_cast<Words>(value);
    const Words up = bits + 0x7FFF + (bits >> 16 & 1);
    const Words nan = reinterpret_cast<Words>(value != value);
    return (up & ~nan) | ((bits | 0x400000) & nan);
  }
};

// TOKENS: how many copies a product takes at once (kDotRows times as many registers are needed).
template <class V, int W, int TOKENS>
struct VectorPrimitives {
  using X = Vector<W>;
  using Floats = typename X::Floats;
  static constexpr int64_t kTokens = TOKENS;
  static constexpr int64_t kOutTokens = 4;
  static constexpr int64_t kLanes = W;
  // How many entries of the depth a product of packed copies takes at a time.
  static constexpr int64_t kPair = 1;
  // Packed copies: vectors of kLanes, of which a product takes up to kMostVectors at once, and with
  // M of them so many rows as there are registers for sums.
  static constexpr int kMostVectors = 4;
  static constexpr int rows_at_once(int M) { return std::min((W == 16 ? 24 : 12) / M, 12); }

  // `columns` entries into `out`: values where bits are set, plus the centre. Returns the place
  // after the last value taken. None is read at `end` (the third argument) or past it.
  template <bool kCenter>
  static const V* expand(Bits& bits, const V* values, const V*, const V* center, int64_t columns,
                         V* out) {
    for (int64_t c = 0; c < columns; c += 32) {
      const int64_t count = columns - c < 32 ? columns - c : 32;
      const uint32_t mask = bits.next(count);
      for (int64_t i = 0; i < count; ++i) {
        const bool kept = mask >> i & 1;
        if constexpr (kCenter) {
          out[c + i] = center[c + i];
          if (kept) out[c + i] = round_to(to_float(center[c + i]) + to_float(*values), V{});
        } else {
          out[c + i] = kept ? *values : V{};
        }
        values += kept;
      }
    }
    return values;
  }

  // Some columns of four rows at once, where that is faster than one row after the other: how many
  // were taken, a multiple of kPadding. `dot_four` and `accumulate_four` multiply them right away,
  // by one vector.
  static int64_t expand_four(Bits* const*, const V**, const V* const*, const V* const*, int64_t,
                             V*, int64_t) {
    return 0;
  }
  static int64_t dot_four(Bits* const*, const V**, const V* const*, int64_t, const V*, float*) {
    return 0;
  }
  static int64_t accumulate_four(Bits* const*, const V**, const V* const*, int64_t, const V*,
                                 float*) {
    return 0;
  }

  static void stream(const V* row, int64_t columns, V* out) {
    std::memcpy(out, row, columns * sizeof(V));
  }

  // Products of kDotRows rows of a tile with NT vectors: products[token · kDotRows + row].
  template <int NT>
  static void dot(const V* tile, int64_t stride, const V* const* x, int64_t width,
                  float* products) {
    Floats sums[kDotRows][NT] = {};
    for (int64_t k = 0; k < width; k += W) {
      Floats rows[kDotRows];
      RESMOE_UNROLL
      for (int r = 0; r < kDotRows; ++r) rows[r] = X::load(tile + r * stride + k);
      RESMOE_UNROLL
      for (int t = 0; t < NT; ++t) {
        const Floats token = X::load(x[t] + k);
        RESMOE_UNROLL
        for (int r = 0; r < kDotRows; ++r) sums[r][t] += rows[r] * token;
      }
    }
    RESMOE_UNROLL
    for (int r = 0; r < kDotRows; ++r) {
      RESMOE_UNROLL
      for (int t = 0; t < NT; ++t) products[t * kDotRows + r] = X::sum(sums[r][t]);
    }
  }

  // y[token] += Σ over an even number of rows of h[token · h_stride + row] · tile[row].
  template <int NT>
  static void accumulate(const V* tile, int64_t stride, int64_t rows, const V* h, int64_t h_stride,
                         float* const* y, int64_t width) {
    constexpr int kColumns = 8 / NT;
    for (int64_t k = 0; k < width; k += kColumns * W) {
      Floats sums[NT][kColumns];
      RESMOE_UNROLL
      for (int t = 0; t < NT; ++t) {
        RESMOE_UNROLL
        for (int c = 0; c < kColumns; ++c) sums[t][c] = X::load(y[t] + k + c * W);
      }
      for (int64_t r = 0; r < rows; ++r) {
        RESMOE_UNROLL
        for (int c = 0; c < kColumns; ++c) {
          const Floats row = X::load(tile + r * stride + k + c * W);
          RESMOE_UNROLL
          for (int t = 0; t < NT; ++t) sums[t][c] += to_float(h[t * h_stride + r]) * row;
        }
      }
      RESMOE_UNROLL
      for (int t = 0; t < NT; ++t) {
        RESMOE_UNROLL
        for (int c = 0; c < kColumns; ++c) X::store(sums[t][c], y[t] + k + c * W);
      }
    }
  }

  // Sums over `depth` steps of R weights, row_step apart, times M vectors of packed copies:
  // out[row][lane], in addition to what is there if `add`.
  template <int R, int M>
  static void multiply(const V* weights, int64_t row_step, int64_t depth_step, const V* packed,
                       int64_t depth, float* out, bool add) {
    Floats sums[R][M];
    RESMOE_UNROLL
    for (int r = 0; r < R; ++r) {
      RESMOE_UNROLL
      for (int m = 0; m < M; ++m) sums[r][m] = add ? X::load(out + (r * M + m) * W) : Floats{};
    }
    for (int64_t k = 0; k < depth; ++k) {
      Floats copies[M];
      RESMOE_UNROLL
      for (int m = 0; m < M; ++m) copies[m] = X::load(packed + (k * M + m) * W);
      RESMOE_UNROLL
      for (int r = 0; r < R; ++r) {
        const float weight = to_float(weights[r * row_step + k * depth_step]);
        RESMOE_UNROLL
        for (int m = 0; m < M; ++m) sums[r][m] += copies[m] * weight;
      }
    }
    RESMOE_UNROLL
    for (int r = 0; r < R; ++r) {
      RESMOE_UNROLL
      for (int m = 0; m < M; ++m) X::store(sums[r][m], out + (r * M + m) * W);
    }
  }
};

}  // namespace
