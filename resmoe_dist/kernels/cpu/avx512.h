// Expanding with AVX-512: a bitmap word is the mask that spreads packed values over a register.
// Included after the target was chosen.

#pragma once

#include "primitives.h"

namespace {

// The values of a register in the places of the mask's bits, zeros in all others.
inline __m512i spread(__mmask32 mask, __m512i values) {
  // In a register first: from memory the instruction is several times as slow on some processors.
  asm("" : "+v"(values));
  return _mm512_maskz_expand_epi16(mask, values);
}

#ifdef RESMOE_BF16
// bfloat16 a + b, to nearest, ties to even; denormal numbers are taken for zeros. The instructions
// for products add pairs up in fewer steps than there are in making floats of them.
inline __m512i add_bfloat16(__m512i a, __m512i b) {
  const __m512bh ones = (__m512bh)_mm512_set1_epi16(0x3F80);
  const auto sums = [&](__m512i pairs) {
    return _mm512_dpbf16_ps(_mm512_setzero_ps(), (__m512bh)pairs, ones);
  };
  const __m512 low = sums(_mm512_unpacklo_epi16(a, b));
  const __m512 high = sums(_mm512_unpackhi_epi16(a, b));
  // Of each eight entries, the first four are in `low`.
  const __m512i in_order = _mm512_set_epi64(7, 3, 6, 2, 5, 1, 4, 0);
  return _mm512_permutexvar_epi64(in_order, (__m512i)_mm512_cvtne2ps_pbh(high, low));
}
#else
// bfloat16 a + b, to nearest, ties to even. Entries of even and odd number apart, as each is then
// one instruction away from being a float.
inline __m512i add_bfloat16(__m512i a, __m512i b) {
  const __m512i upper = _mm512_set1_epi32(0xFFFF0000);
  const auto even = [](__m512i v) { return _mm512_castsi512_ps(_mm512_slli_epi32(v, 16)); };
  const auto odd = [&](__m512i v) { return _mm512_castsi512_ps(_mm512_and_si512(v, upper)); };
  const auto rounded = [](__m512 sum) {
    const __m512i bits = _mm512_castps_si512(sum);
    const __m512i last = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i up = _mm512_add_epi32(last, _mm512_set1_epi32(0x7FFF));
    // A NaN must stay one.
    const __mmask16 nan = _mm512_cmp_ps_mask(sum, sum, _CMP_UNORD_Q);
    return _mm512_mask_or_epi32(_mm512_add_epi32(bits, up), nan, bits,
                                _mm512_set1_epi32(0x400000));
  };
  return _mm512_mask_blend_epi16(
      0xAAAAAAAA, _mm512_srli_epi32(rounded(_mm512_add_ps(even(a), even(b))), 16),
      rounded(_mm512_add_ps(odd(a), odd(b))));
}
#endif

// Past the caches where the target is aligned, as only an aligned line can be.
inline void stream_bytes(const void* source, int64_t bytes, void* target) {
  if (reinterpret_cast<uintptr_t>(target) % 64) {
    std::memcpy(target, source, bytes);
    return;
  }
  const char* from = static_cast<const char*>(source);
  char* to = static_cast<char*>(target);
  int64_t i = 0;
  for (; i + 64 <= bytes; i += 64) {
    _mm512_stream_si512(reinterpret_cast<__m512i*>(to + i), _mm512_loadu_si512(from + i));
  }
  std::memcpy(to + i, from + i, bytes - i);
}

template <int TOKENS>
struct Avx512BFloat16 : VectorPrimitives<BFloat16, 16, TOKENS> {
  // take(column, entries of four rows, their masks), 32 columns at a time, for as many multiples of
  // kStep columns as values can be read for in whole registers; returns how many. Side by side,
  // more of the rows are on their way from memory at a time.
  template <int64_t kStep, class Take>
  static int64_t for_each_of_four(Bits* const* bits, const BFloat16** values,
                                  const BFloat16* const* ends, int64_t columns, const Take& take) {
    const BFloat16* from[4] = {values[0], values[1], values[2], values[3]};
    Bits of_row[4] = {*bits[0], *bits[1], *bits[2], *bits[3]};
    const auto whole = [&](int row) { return ends[row] - from[row] >= kStep; };
    int64_t c = 0;
    while (c + kStep <= columns && whole(0) && whole(1) && whole(2) && whole(3)) {
      for (const int64_t end = c + kStep; c < end; c += 32) {
        __m512i entries[4];
        uint32_t masks[4];
        RESMOE_UNROLL
        for (int r = 0; r < 4; ++r) {
          masks[r] = of_row[r].next_32();
          entries[r] = spread(masks[r], _mm512_loadu_si512(from[r]));
          from[r] += __builtin_popcount(masks[r]);
        }
        take(c, entries, masks);
      }
    }
    for (int r = 0; r < 4; ++r) {
      values[r] = from[r];
      *bits[r] = of_row[r];
    }
    return c;
  }

  static int64_t expand_four(Bits* const* bits, const BFloat16** values,
                             const BFloat16* const* ends, const BFloat16* const* centers,
                             int64_t columns, BFloat16* out, int64_t stride) {
    if (!centers[0]) {
      return for_each_of_four<32>(
          bits, values, ends, columns, [&](int64_t c, const __m512i* entries, const uint32_t*) {
            RESMOE_UNROLL
            for (int r = 0; r < 4; ++r) _mm512_storeu_si512(out + r * stride + c, entries[r]);
          });
    }
    return for_each_of_four<32>(
        bits, values, ends, columns,
        [&](int64_t c, const __m512i* entries, const uint32_t* masks) {
          RESMOE_UNROLL
          for (int r = 0; r < 4; ++r) {
            const __m512i sum = with_center(centers[r] + c, masks[r], entries[r]);
            _mm512_storeu_si512(out + r * stride + c, sum);
          }
        });
  }

  // Where nothing was kept the centre stays as it is, to the bit.
  static __m512i with_center(const BFloat16* center, uint32_t mask, __m512i entries) {
    const __m512i base = _mm512_loadu_si512(center);
    return _mm512_mask_mov_epi16(base, mask, add_bfloat16(base, entries));
  }

  template <bool kCenter>
  static const BFloat16* expand(Bits& bits, const BFloat16* values, const BFloat16* end,
                                const BFloat16* center, int64_t columns, BFloat16* out) {
    int64_t c = 0;
    // As long as a whole register can be read and written.
    for (; c + 32 <= columns && end - values >= 32; c += 32) {
      const uint32_t mask = bits.next_32();
      __m512i entries = spread(mask, _mm512_loadu_si512(values));
      if constexpr (kCenter) entries = with_center(center + c, mask, entries);
      _mm512_storeu_si512(out + c, entries);
      values += __builtin_popcount(mask);
    }
    for (; c < columns; c += 32) {
      const int64_t count = columns - c < 32 ? columns - c : 32;
      const uint32_t mask = bits.next(count);
      const int kept = __builtin_popcount(mask);
      const __mmask32 whole = _bzhi_u32(~0u, count);
      __m512i entries = _mm512_maskz_loadu_epi16(_bzhi_u32(~0u, kept), values);
      entries = spread(mask, entries);
      if constexpr (kCenter) {
        const __m512i base = _mm512_maskz_loadu_epi16(whole, center + c);
        entries = _mm512_mask_mov_epi16(base, mask, add_bfloat16(base, entries));
      }
      _mm512_mask_storeu_epi16(out + c, whole, entries);
      values += kept;
    }
    return values;
  }

  static void stream(const BFloat16* row, int64_t columns, BFloat16* out) {
    stream_bytes(row, columns * 2, out);
  }
};

template <int TOKENS>
struct Avx512Float : VectorPrimitives<float, 16, TOKENS> {
  template <bool kCenter>
  static const float* expand(Bits& bits, const float* values, const float*, const float* center,
                             int64_t columns, float* out) {
    for (int64_t c = 0; c < columns; c += 16) {
      const int64_t count = columns - c < 16 ? columns - c : 16;
      const uint32_t mask = bits.next(count);
      const int kept = __builtin_popcount(mask);
      const __mmask16 whole = _bzhi_u32(~0u, count);
      __m512 entries = _mm512_maskz_loadu_ps(_bzhi_u32(~0u, kept), values);
      entries = _mm512_maskz_expand_ps(mask, entries);
      if constexpr (kCenter) {
        const __m512 base = _mm512_maskz_loadu_ps(whole, center + c);
        entries = _mm512_mask_add_ps(base, mask, base, entries);
      }
      _mm512_mask_storeu_ps(out + c, whole, entries);
      values += kept;
    }
    return values;
  }

  static void stream(const float* row, int64_t columns, float* out) {
    stream_bytes(row, columns * 4, out);
  }
};

}  // namespace
