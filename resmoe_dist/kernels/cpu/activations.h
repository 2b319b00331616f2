// What lies between an expert's products on the way in and out, W floats at a time.

#pragma once

#include "primitives.h"

namespace {

// eˣ with 2 units in the last place: x is split into n·ln 2 and a rest within ±ln 2 / 2, whose
// exponential is its Taylor polynomial. Beyond ±87 it stays where it is there.
template <class X>
inline typename X::Floats exponential(typename X::Floats x) {
  using Floats = typename X::Floats;
  using Words = typename X::Words;
  const Floats most = Floats{} + 87.0f;
  x = x > most ? most : x;
  x = x < -most ? -most : x;
  // Adding this leaves the nearest whole number in the lowest bits.
  const Floats magic = Floats{} + 12582912.0f;
  const Floats shifted = x * 1.44269504088896341f + magic;
  const Floats n = shifted - magic;
  const Floats rest = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  Floats sum = Floats{} + 1.0f / 720;
  sum = sum * rest + 1.0f / 120;
  sum = sum * rest + 1.0f / 24;
  sum = sum * rest + 1.0f / 6;
  sum = sum * rest + 0.5f;
  sum = sum * rest + 1.0f;
  sum = sum * rest + 1.0f;
  const Words exponent = (reinterpret_cast<Words>(shifted) + (127 - 0x4B400000)) << 23;
  return sum * reinterpret_cast<Floats>(exponent);
}

template <class X>
inline typename X::Floats activate(Activation activation, typename X::Floats x) {
  using Floats = typename X::Floats;
  switch (activation) {
    case Activation::kSilu:
      return x / (exponential<X>(-x) + 1.0f);
    case Activation::kGeluTanh: {
      // x/2 · (1 + tanh z) = x / (1 + e^(-2z)), z = √(2/π) · (x + 0.044715 x³).
      const Floats twice = 1.5957691216057308f * (x + 0.044715f * x * x * x);
      return x / (exponential<X>(-twice) + 1.0f);
    }
    case Activation::kRelu:
      break;
  }
  return x < Floats{} ? Floats{} : x;
}

}  // namespace
