// The operations that all kernels are made of, written with the vector types of GCC and clang.
//
// They are correct on any machine, and fast where the machine has registers of kWidth floats. An
// instruction set replaces those it can do faster: it derives `Primitives<Scalar>` from
// `VectorPrimitives` and hides some of its functions. Included after the target was chosen.
//
// What a reader must know:
// - Scalar is the type of weights, tokens and activations: BFloat16 or float. Sums are float.
// - A row of a design matrix is [inputs (1 or 2 times H) | output (H) | biases].
// - A pruned row is a bitmap, lowest bit first, and the packed values of its set bits.
// - `width` is always a multiple of kPadding, so no loop over it has a remainder. Rows of tiles and
//   of tokens are padded with zeros up to it.

#pragma once

#include "bitmap.h"
#include "vectors.h"

// Unrolls a loop completely. Only then can the compiler keep an array of sums in registers.
#define RESMOE_UNROLL _Pragma("GCC unroll 16")

namespace {

using namespace resmoe;

// Rows that `dot` multiplies at a time. The functions named `…four_rows` need it to be 4.
constexpr int64_t kDotRows = 4;

// Asks for `bytes` bytes to be brought into the second-level cache.
inline void prefetch(const void* from, int64_t bytes) {
  const char* first = static_cast<const char*>(from);
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(first + i, 0, 2);
}

// How far four rows of one job have been read.
template <class Scalar>
struct FourRows {
  BitReader* bits[4];
  const Scalar* values[4];  // the next packed value of each row
  const Scalar* end;        // end of the job's values; nothing at or past it may be read
  const Scalar* center[4];  // null if the rows have no centre
};

// kMaxDotTokens: how many tokens `dot` takes at a time. It needs kDotRows times as many registers.
template <class Scalar, int kWidth, int kMaxDotTokens>
struct VectorPrimitives {
  using Vec = Vector<kWidth>;
  using Floats = typename Vec::Floats;
  static constexpr int64_t kDotTokens = kMaxDotTokens;
  // How many tokens `accumulate` takes at a time: a power of two.
  static constexpr int64_t kAccumulateTokens = 4;
  // `multiply` has copies side by side in vectors of kLanes, and takes up to kMaxVectors of them.
  static constexpr int64_t kLanes = kWidth;
  static constexpr int kMaxVectors = 4;
  // From how many copies of a job on packing them pays.
  static constexpr int64_t kMinPackedCopies = 12;
  // How many products one step of `multiply` adds to each sum.
  static constexpr int64_t kDepthPerStep = 1;
  // How many rows `multiply` takes together with this many vectors. The sums fill 24 of 32
  // registers with AVX-512, 12 of 16 otherwise.
  static constexpr int rows_at_once(int vectors) {
    return std::min((kWidth == 16 ? 24 : 12) / vectors, 12);
  }

  // Writes the next `columns` entries of a pruned row to `out`: packed values where bits are set,
  // zeros elsewhere, plus the centre if the row has one. Where no bit is set, the centre is copied
  // exactly. Returns the next packed value. `end` is the end of the job's values: replacements of
  // this function that read whole registers must not read past it.
  template <bool kHasCenter>
  static const Scalar* expand(BitReader& bits, const Scalar* values, const Scalar* /*end*/,
                              const Scalar* center, int64_t columns, Scalar* out) {
    for (int64_t c = 0; c < columns; c += 32) {
      const int64_t count = columns - c < 32 ? columns - c : 32;
      const uint32_t mask = bits.next(count);
      for (int64_t i = 0; i < count; ++i) {
        const bool kept = mask >> i & 1;
        if constexpr (kHasCenter) {
          out[c + i] = center[c + i];
          if (kept) out[c + i] = round_to<Scalar>(to_float(center[c + i]) + to_float(*values));
        } else {
          out[c + i] = kept ? *values : Scalar{};
        }
        values += kept;
      }
    }
    return values;
  }

  // These three process the first columns of four rows at once, if the instruction set has a faster
  // way than row by row. They return how many columns they took; the caller does the rest.
  //
  // expand_four_rows: as `expand`, to rows of `out` that are `stride` apart.
  // dot_four_rows: sums[row] += row · x. Without a centre.
  // accumulate_four_rows: y += Σ h[row] · row. Without a centre.
  //
  // The last two multiply right after expanding, and take a multiple of kPadding columns.
  static int64_t expand_four_rows(FourRows<Scalar>&, int64_t /*columns*/, Scalar* /*out*/,
                                  int64_t /*stride*/) {
    return 0;
  }
  static int64_t dot_four_rows(FourRows<Scalar>&, int64_t /*columns*/, const Scalar* /*x*/,
                               float* /*sums*/) {
    return 0;
  }
  static int64_t accumulate_four_rows(FourRows<Scalar>&, int64_t /*columns*/, const Scalar* /*h*/,
                                      float* /*y*/) {
    return 0;
  }

  // Rounds floats.
  static void round(const float* entries, int64_t columns, Scalar* out) {
    int64_t i = 0;
    for (; i + kWidth <= columns; i += kWidth) Vec::store(Vec::load(entries + i), out + i);
    for (; i < columns; ++i) out[i] = round_to<Scalar>(entries[i]);
  }

  // Copies a row to `out`, past the caches if the instruction set can.
  static void stream(const Scalar* row, int64_t columns, Scalar* out) {
    std::memcpy(out, row, columns * sizeof(Scalar));
  }

  // Products of kDotRows rows of a tile with kTokens vectors: products[token · kDotRows + row].
  template <int kTokens>
  static void dot(const Scalar* tile, int64_t stride, const Scalar* const* x, int64_t width,
                  float* products) {
    Floats sums[kDotRows][kTokens] = {};
    for (int64_t k = 0; k < width; k += kWidth) {
      Floats rows[kDotRows];
      RESMOE_UNROLL
      for (int r = 0; r < kDotRows; ++r) rows[r] = Vec::load(tile + r * stride + k);
      RESMOE_UNROLL
      for (int t = 0; t < kTokens; ++t) {
        const Floats token = Vec::load(x[t] + k);
        RESMOE_UNROLL
        for (int r = 0; r < kDotRows; ++r) sums[r][t] += rows[r] * token;
      }
    }
    RESMOE_UNROLL
    for (int r = 0; r < kDotRows; ++r) {
      RESMOE_UNROLL
      for (int t = 0; t < kTokens; ++t) products[t * kDotRows + r] = Vec::sum(sums[r][t]);
    }
  }

  // y[token] += Σ_row h[token · h_stride + row] · tile[row], over an even number of rows.
  template <int kTokens>
  static void accumulate(const Scalar* tile, int64_t stride, int64_t rows, const Scalar* h,
                         int64_t h_stride, float* const* y, int64_t width) {
    constexpr int kVectors = 8 / kTokens;
    for (int64_t k = 0; k < width; k += kVectors * kWidth) {
      Floats sums[kTokens][kVectors];
      RESMOE_UNROLL
      for (int t = 0; t < kTokens; ++t) {
        RESMOE_UNROLL
        for (int v = 0; v < kVectors; ++v) sums[t][v] = Vec::load(y[t] + k + v * kWidth);
      }
      for (int64_t r = 0; r < rows; ++r) {
        RESMOE_UNROLL
        for (int v = 0; v < kVectors; ++v) {
          const Floats row = Vec::load(tile + r * stride + k + v * kWidth);
          RESMOE_UNROLL
          for (int t = 0; t < kTokens; ++t) sums[t][v] += to_float(h[t * h_stride + r]) * row;
        }
      }
      RESMOE_UNROLL
      for (int t = 0; t < kTokens; ++t) {
        RESMOE_UNROLL
        for (int v = 0; v < kVectors; ++v) Vec::store(sums[t][v], y[t] + k + v * kWidth);
      }
    }
  }

  // Multiplies kRows rows of weights with kVectors vectors of copies, which are side by side:
  // out[row][lane] = Σ_step weights[row · row_stride + step · step_stride] · packed[step][lane],
  // plus the old out[row][lane] if `add`. Each weight is broadcast to a whole register, so no sum
  // ever runs across the lanes of one.
  template <int kRows, int kVectors>
  static void multiply(const Scalar* weights, int64_t row_stride, int64_t step_stride,
                       const Scalar* packed, int64_t steps, float* out, bool add) {
    Floats sums[kRows][kVectors];
    RESMOE_UNROLL
    for (int r = 0; r < kRows; ++r) {
      RESMOE_UNROLL
      for (int v = 0; v < kVectors; ++v) {
        sums[r][v] = add ? Vec::load(out + (r * kVectors + v) * kWidth) : Floats{};
      }
    }
    for (int64_t k = 0; k < steps; ++k) {
      Floats copies[kVectors];
      RESMOE_UNROLL
      for (int v = 0; v < kVectors; ++v) {
        copies[v] = Vec::load(packed + (k * kVectors + v) * kWidth);
      }
      RESMOE_UNROLL
      for (int r = 0; r < kRows; ++r) {
        const float weight = to_float(weights[r * row_stride + k * step_stride]);
        RESMOE_UNROLL
        for (int v = 0; v < kVectors; ++v) sums[r][v] += copies[v] * weight;
      }
    }
    RESMOE_UNROLL
    for (int r = 0; r < kRows; ++r) {
      RESMOE_UNROLL
      for (int v = 0; v < kVectors; ++v) {
        Vec::store(sums[r][v], out + (r * kVectors + v) * kWidth);
      }
    }
  }
};

}  // namespace
