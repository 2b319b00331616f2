// The activation functions between an expert's projections, on a vector of floats at a time.
//
// `Vec` is a `Vector<kWidth>` of primitives.h. Written with vector types, so no call to a scalar
// `expf` breaks up the loops.

#pragma once

#include "primitives.h"

namespace {

// e^x, within 2 units in the last place. Inputs are clamped to ±87, where e^x still is a normal
// float.
//
// x = n·ln 2 + remainder with a whole number n, so e^x = 2^n · e^remainder. The remainder is at
// most ln 2 / 2 in magnitude; a Taylor polynomial of degree 6 is exact enough there.
template <class Vec>
inline typename Vec::Floats exponential(typename Vec::Floats x) {
  using Floats = typename Vec::Floats;
  using Words = typename Vec::Words;
  const Floats limit = Floats{} + 87.0f;
  x = x > limit ? limit : x;
  x = x < -limit ? -limit : x;
  // A float of this size (1.5 · 2^23) has no bits for fractions. Adding it rounds to the nearest
  // whole number and leaves that number in the lowest bits.
  const Floats round_magic = Floats{} + 12582912.0f;
  constexpr uint32_t kRoundMagicBits = 0x4B400000;
  const Floats shifted = x * 1.44269504088896341f + round_magic;
  const Floats n = shifted - round_magic;
  // ln 2 in two parts. The first has few bits, so its product with n is exact.
  const Floats remainder = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  Floats sum = Floats{} + 1.0f / 720;
  sum = sum * remainder + 1.0f / 120;
  sum = sum * remainder + 1.0f / 24;
  sum = sum * remainder + 1.0f / 6;
  sum = sum * remainder + 0.5f;
  sum = sum * remainder + 1.0f;
  sum = sum * remainder + 1.0f;
  // 2^n: the exponent of a float is stored plus 127, above 23 bits of fraction.
  const Words power = (reinterpret_cast<Words>(shifted) + (127 - kRoundMagicBits)) << 23;
  return sum * reinterpret_cast<Floats>(power);
}

template <class Vec>
inline typename Vec::Floats activate(Activation activation, typename Vec::Floats x) {
  using Floats = typename Vec::Floats;
  switch (activation) {
    case Activation::kSilu:
      return x / (exponential<Vec>(-x) + 1.0f);
    case Activation::kGeluTanh: {
      // x/2 · (1 + tanh z) = x / (1 + e^(-2z)), z = √(2/π) · (x + 0.044715 x³).
      const Floats two_z = 1.5957691216057308f * (x + 0.044715f * x * x * x);
      return x / (exponential<Vec>(-two_z) + 1.0f);
    }
    case Activation::kRelu:
      break;
  }
  return x < Floats{} ? Floats{} : x;
}

}  // namespace
