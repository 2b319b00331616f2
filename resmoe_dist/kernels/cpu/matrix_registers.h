// Products by matrix instructions (Intel AMX). Included after the target was chosen.
//
// A thread has eight matrix registers, each of up to 16 rows of 64 bytes. `tdpbf16ps` multiplies a
// left factor [16][32] of bfloat16 with a right factor [32][16] and adds the product to a register
// [16][16] of float. The right factor has the entries of two rows side by side, as packed copies
// and pairs of weight rows have. It rounds after each entry of a pair, and treats denormal numbers
// as zeros.

#pragma once

#include "primitives.h"

namespace {

// Rows and columns of one product, and its depth.
constexpr int64_t kMatrixSide = 16;
constexpr int64_t kMatrixDepth = 32;

// Configures the thread's matrix registers. Other libraries (oneDNN) use them too, between calls.
class MatrixRegisters {
 public:
  MatrixRegisters() {
    struct alignas(64) Layout {
      uint8_t palette = 1;
      uint8_t start_row = 0;
      uint8_t reserved[14] = {};
      uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    };
    const Layout layout;
    _tile_loadconfig(&layout);
  }
  ~MatrixRegisters() { _tile_release(); }
  MatrixRegisters(const MatrixRegisters&) = delete;
  MatrixRegisters& operator=(const MatrixRegisters&) = delete;
};

// The instructions name their registers, so each register is a case. Callers unroll their loops, and
// one case remains. Registers 0 to 5 hold products, 6 the left factor, 7 the right one.
#define RESMOE_REGISTER_CASES(instruction) \
  switch (index) {                         \
    case 0: instruction(0); break;         \
    case 1: instruction(1); break;         \
    case 2: instruction(2); break;         \
    case 3: instruction(3); break;         \
    case 4: instruction(4); break;         \
    default: instruction(5); break;        \
  }

[[gnu::always_inline]] inline void clear_product(int index) {
  RESMOE_REGISTER_CASES(_tile_zero)
}

[[gnu::always_inline]] inline void load_product(int index, const float* from, int64_t stride) {
#define RESMOE_LOAD(number) _tile_loadd(number, from, stride * 4)
  RESMOE_REGISTER_CASES(RESMOE_LOAD)
#undef RESMOE_LOAD
}

[[gnu::always_inline]] inline void store_product(int index, float* to, int64_t stride) {
#define RESMOE_STORE(number) _tile_stored(number, to, stride * 4)
  RESMOE_REGISTER_CASES(RESMOE_STORE)
#undef RESMOE_STORE
}

// Adds the product of the two factors' registers.
[[gnu::always_inline]] inline void add_product(int index) {
#define RESMOE_MULTIPLY(number) _tile_dpbf16ps(number, 6, 7)
  RESMOE_REGISTER_CASES(RESMOE_MULTIPLY)
#undef RESMOE_MULTIPLY
}

// out [16·kM][16·kN] = left [16·kM][depth] · right [depth][16·kN], plus the old `out` if `add`.
//
// left: rows `left_stride` entries apart. right: pairs of rows, `right_stride` entries apart. depth:
// a multiple of kMatrixDepth. At most six products are in registers at a time: kM · kN ≤ 6.
template <int kM, int kN>
void multiply_matrices(const BFloat16* left, int64_t left_stride, const BFloat16* right,
                       int64_t right_stride, int64_t depth, float* out, int64_t out_stride,
                       bool add) {
  static_assert(kM * kN <= 6);
  const auto of_product = [&](int m, int n) {
    return out + kMatrixSide * (m * out_stride + n);
  };
  RESMOE_UNROLL
  for (int m = 0; m < kM; ++m) {
    RESMOE_UNROLL
    for (int n = 0; n < kN; ++n) {
      if (add) {
        load_product(m * kN + n, of_product(m, n), out_stride);
      } else {
        clear_product(m * kN + n);
      }
    }
  }
  for (int64_t k = 0; k < depth; k += kMatrixDepth) {
    const auto load_left = [&](int m) {
      _tile_loadd(6, left + m * kMatrixSide * left_stride + k, left_stride * 2);
    };
    const auto load_right = [&](int n) {
      _tile_loadd(7, right + k / 2 * right_stride + n * 2 * kMatrixSide, right_stride * 2);
    };
    // The factor with fewer registers' worth is the outer loop: it is loaded once.
    if constexpr (kM >= kN) {
      RESMOE_UNROLL
      for (int n = 0; n < kN; ++n) {
        load_right(n);
        RESMOE_UNROLL
        for (int m = 0; m < kM; ++m) {
          load_left(m);
          add_product(m * kN + n);
        }
      }
    } else {
      RESMOE_UNROLL
      for (int m = 0; m < kM; ++m) {
        load_left(m);
        RESMOE_UNROLL
        for (int n = 0; n < kN; ++n) {
          load_right(n);
          add_product(m * kN + n);
        }
      }
    }
  }
  RESMOE_UNROLL
  for (int m = 0; m < kM; ++m) {
    RESMOE_UNROLL
    for (int n = 0; n < kN; ++n) store_product(m * kN + n, of_product(m, n), out_stride);
  }
}

}  // namespace
