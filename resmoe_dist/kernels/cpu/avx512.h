// What both AVX-512 instruction sets share: expanding pruned rows.
//
// A word of bitmap is a mask register, and one instruction (`vpexpandw`, `vexpandps`) spreads
// packed values over its set bits. Included after the target was chosen.

#pragma once

#include "primitives.h"

namespace {

// bfloat16 in registers of 32. Adder::add(a, b) is the sum of two such registers.
template <class Adder>
struct BFloat16Register {
  using Scalar = BFloat16;
  static constexpr int64_t kEntries = 32;

  static __m512i load(const BFloat16* source, __mmask32 mask) {
    return _mm512_maskz_loadu_epi16(mask, source);
  }
  static void store(__m512i entries, __mmask32 mask, BFloat16* target) {
    _mm512_mask_storeu_epi16(target, mask, entries);
  }
  // Spreads packed values over the set bits of the mask; zeros elsewhere.
  static __m512i spread(__mmask32 mask, __m512i values) {
    // Loads the values into a register first. The instruction can read memory, but is several times
    // as slow then on some processors.
    asm("" : "+v"(values));
    return _mm512_maskz_expand_epi16(mask, values);
  }
  // center + residual where the mask has bits, the unchanged centre elsewhere.
  static __m512i add_where(__mmask32 mask, __m512i center, __m512i residual) {
    return _mm512_mask_mov_epi16(center, mask, Adder::add(center, residual));
  }
};

// The same for float, in registers of 16.
struct FloatRegister {
  using Scalar = float;
  static constexpr int64_t kEntries = 16;

  static __m512 load(const float* source, __mmask16 mask) {
    return _mm512_maskz_loadu_ps(mask, source);
  }
  static void store(__m512 entries, __mmask16 mask, float* target) {
    _mm512_mask_storeu_ps(target, mask, entries);
  }
  static __m512 spread(__mmask16 mask, __m512 values) {
    return _mm512_maskz_expand_ps(mask, values);
  }
  static __m512 add_where(__mmask16 mask, __m512 center, __m512 residual) {
    return _mm512_mask_add_ps(center, mask, center, residual);
  }
};

// Primitives::expand for any number of columns. Masked loads read no more values than there are.
template <class Register, bool kHasCenter>
inline const typename Register::Scalar* expand_masked(BitReader& bits,
                                                      const typename Register::Scalar* values,
                                                      const typename Register::Scalar* center,
                                                      int64_t columns,
                                                      typename Register::Scalar* out) {
  for (int64_t c = 0; c < columns; c += Register::kEntries) {
    const int64_t count = columns - c < Register::kEntries ? columns - c : Register::kEntries;
    const uint32_t mask = bits.next(count);
    const int kept = __builtin_popcount(mask);
    const uint32_t all = _bzhi_u32(~0u, count);
    auto entries = Register::spread(mask, Register::load(values, _bzhi_u32(~0u, kept)));
    if constexpr (kHasCenter) {
      entries = Register::add_where(mask, Register::load(center + c, all), entries);
    }
    Register::store(entries, all, out + c);
    values += kept;
  }
  return values;
}

// Copies past the caches if the target is aligned; such stores need whole cache lines.
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

template <class Adder, int kMaxDotTokens>
struct Avx512BFloat16 : VectorPrimitives<BFloat16, 16, kMaxDotTokens> {
  using Register = BFloat16Register<Adder>;

  // Expands four rows without their centre, 32 columns at a time, and calls process(column, entries
  // of the four rows, their masks). Stops where less than kStep columns are left, or less than
  // kStep values of the job: that many can be read without masks. Returns how many columns it took.
  //
  // Four rows at once keep more reads from memory under way than one row after the other.
  template <int64_t kStep, class Process>
  static int64_t for_each_of_four_rows(FourRows<BFloat16>& rows, int64_t columns,
                                       const Process& process) {
    // Local copies, which the compiler can keep in registers.
    const BFloat16* values[4] = {rows.values[0], rows.values[1], rows.values[2], rows.values[3]};
    BitReader bits[4] = {*rows.bits[0], *rows.bits[1], *rows.bits[2], *rows.bits[3]};
    const BFloat16* const values_end = rows.end;
    const auto enough = [&](int row) { return values_end - values[row] >= kStep; };
    int64_t c = 0;
    while (c + kStep <= columns && enough(0) && enough(1) && enough(2) && enough(3)) {
      for (const int64_t end = c + kStep; c < end; c += 32) {
        __m512i entries[4];
        uint32_t masks[4];
        RESMOE_UNROLL
        for (int r = 0; r < 4; ++r) {
          masks[r] = bits[r].next_32();
          entries[r] = Register::spread(masks[r], _mm512_loadu_si512(values[r]));
          values[r] += __builtin_popcount(masks[r]);
        }
        process(c, entries, masks);
      }
    }
    for (int r = 0; r < 4; ++r) {
      rows.values[r] = values[r];
      *rows.bits[r] = bits[r];
    }
    return c;
  }

  // Expands four rows, adds their centres if they have any, and calls store(column, entries of the
  // four rows). Returns how many columns it took, a multiple of 32.
  template <class Store>
  static int64_t expand_four_rows_to(FourRows<BFloat16>& rows, int64_t columns,
                                     const Store& store) {
    if (!rows.center[0]) {
      return for_each_of_four_rows<32>(
          rows, columns,
          [&](int64_t c, const __m512i* entries, const uint32_t*) { store(c, entries); });
    }
    return for_each_of_four_rows<32>(
        rows, columns, [&](int64_t c, const __m512i* entries, const uint32_t* masks) {
          __m512i sums[4];
          RESMOE_UNROLL
          for (int r = 0; r < 4; ++r) {
            const __m512i center = _mm512_loadu_si512(rows.center[r] + c);
            sums[r] = Register::add_where(masks[r], center, entries[r]);
          }
          store(c, sums);
        });
  }

  static int64_t expand_four_rows(FourRows<BFloat16>& rows, int64_t columns, BFloat16* out,
                                  int64_t stride) {
    return expand_four_rows_to(rows, columns, [&](int64_t c, const __m512i* entries) {
      RESMOE_UNROLL
      for (int r = 0; r < 4; ++r) _mm512_storeu_si512(out + r * stride + c, entries[r]);
    });
  }

  template <bool kHasCenter>
  static const BFloat16* expand(BitReader& bits, const BFloat16* values, const BFloat16* end,
                                const BFloat16* center, int64_t columns, BFloat16* out) {
    int64_t c = 0;
    // Without masks, as long as whole registers can be read and written.
    for (; c + 32 <= columns && end - values >= 32; c += 32) {
      const uint32_t mask = bits.next_32();
      __m512i entries = Register::spread(mask, _mm512_loadu_si512(values));
      if constexpr (kHasCenter) {
        entries = Register::add_where(mask, _mm512_loadu_si512(center + c), entries);
      }
      _mm512_storeu_si512(out + c, entries);
      values += __builtin_popcount(mask);
    }
    return expand_masked<Register, kHasCenter>(bits, values, kHasCenter ? center + c : nullptr,
                                               columns - c, out + c);
  }

  static void stream(const BFloat16* row, int64_t columns, BFloat16* out) {
    stream_bytes(row, columns * sizeof(BFloat16), out);
  }
};

template <int kMaxDotTokens>
struct Avx512Float : VectorPrimitives<float, 16, kMaxDotTokens> {
  template <bool kHasCenter>
  static const float* expand(BitReader& bits, const float* values, const float* /*end*/,
                             const float* center, int64_t columns, float* out) {
    return expand_masked<FloatRegister, kHasCenter>(bits, values, center, columns, out);
  }

  static void stream(const float* row, int64_t columns, float* out) {
    stream_bytes(row, columns * sizeof(float), out);
  }
};

inline bool has_avx512_vbmi2() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vbmi2") &&
         __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vpopcntdq");
}

}  // namespace
