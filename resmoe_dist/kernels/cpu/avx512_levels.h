// Operations on levels with AVX-512.
//
// Fast because of these instructions, each for 32 entries. `vpmultishiftqb` takes bytes from any bits
// of a word of 64 bits, so it finds windows. `vpermw` looks up the level of a window in a register.
// `vpmullw` and `vpmaddubsw` multiply a window and add up the bytes of the product. `vpdpwssd`
// multiplies levels with tokens.
//
// Included after the target was chosen.

#pragma once

#include "levels.h"

namespace {

struct alignas(64) Bytes {
  uint8_t at[64];
};

// value(i) for each of 64 bytes.
template <class Value>
constexpr Bytes bytes_of(Value value) {
  Bytes bytes{};
  for (int i = 0; i < 64; ++i) bytes.at[i] = static_cast<uint8_t>(value(i));
  return bytes;
}

struct Avx512Levels {
  using Vec = Vector<16>;
  using Floats = __m512;
  using Sums = __m512i;
  using Levels = __m512i;
  static constexpr int64_t kLevels = 32;

  static Levels load(const int16_t* from) { return _mm512_loadu_si512(from); }
  static void store(Levels levels, int16_t* to) { _mm512_storeu_si512(to, levels); }
  static Sums dot(Sums sums, Levels a, Levels b) { return _mm512_dpwssd_epi32(sums, a, b); }
  static Levels broadcast(int32_t pair) { return _mm512_set1_epi32(pair); }

  // Columns 0-3, 8-11, 16-19, 24-27 in `low`, the others in `high`.
  static void interleave(Levels first, Levels second, Levels& low, Levels& high) {
    low = _mm512_unpacklo_epi16(first, second);
    high = _mm512_unpackhi_epi16(first, second);
  }
  static void add_columns(Floats low, Floats high, float* y) {
    const __m512i front = _mm512_set_epi32(23, 22, 21, 20, 7, 6, 5, 4, 19, 18, 17, 16, 3, 2, 1, 0);
    const __m512i back =
        _mm512_set_epi32(31, 30, 29, 28, 15, 14, 13, 12, 27, 26, 25, 24, 11, 10, 9, 8);
    const __m512 first = _mm512_permutex2var_ps(low, front, high);
    const __m512 second = _mm512_permutex2var_ps(low, back, high);
    _mm512_storeu_ps(y, _mm512_add_ps(_mm512_loadu_ps(y), first));
    _mm512_storeu_ps(y + 16, _mm512_add_ps(_mm512_loadu_ps(y + 16), second));
  }

  static Floats to_floats(Sums sums) { return _mm512_cvtepi32_ps(sums); }
  static float sum(Floats values) { return _mm512_reduce_add_ps(values); }

  static void scale(Levels levels, float factor, float* out, bool add) {
    const auto put = [&](__m256i half, float* to) {
      const __m512 value = _mm512_cvtepi32_ps(_mm512_cvtepi16_epi32(half));
      const __m512 old = add ? _mm512_loadu_ps(to) : _mm512_setzero_ps();
      _mm512_storeu_ps(to, _mm512_fmadd_ps(value, _mm512_set1_ps(factor), old));
    };
    put(_mm512_castsi512_si256(levels), out);
    put(_mm512_extracti64x4_epi64(levels, 1), out + 16);
  }

  // A scale is one of 16 fractions of an octave, and a power of two.
  static void read_scales(const QuantizedMatrix& matrix, const uint8_t* from, int64_t groups,
                          float* out) {
    const __m512 fractions = _mm512_loadu_ps(matrix.scale_of + 240);
    for (int64_t g = 0; g < groups; g += 16) {
      const __m512i byte = _mm512_cvtepu8_epi32(
          _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + g)));
      const __m512i octave = _mm512_sub_epi32(_mm512_srli_epi32(byte, 4), _mm512_set1_epi32(15));
      const __mmask16 nonzero = _mm512_test_epi32_mask(byte, byte);
      const __m512 fraction = _mm512_permutexvar_ps(byte, fractions);
      _mm512_storeu_ps(out + g, _mm512_maskz_scalef_ps(nonzero, fraction,
                                                       _mm512_cvtepi32_ps(octave)));
    }
  }

  // 32 words of 16 bits that begin with the windows of 32 entries; what follows a window is above
  // it.
  template <int kBits>
  class Windows {
   public:
    explicit Windows(int64_t first)
        : byte_(first * kBits / 8),
          bytes_(_mm512_load_si512(&kBytes)),
          bits_(_mm512_add_epi8(_mm512_load_si512(&kFirstBits),
                                _mm512_set1_epi8(first * kBits % 8))) {}

    __m512i read(const uint8_t* row, int64_t chunk) const {
      const auto* from = reinterpret_cast<const __m256i*>(row + byte_ + chunk * 4 * kBits);
      const __m512i stream = _mm512_castsi256_si512(_mm256_loadu_si256(from));
      return _mm512_multishift_epi64_epi8(bits_, _mm512_permutexvar_epi8(bytes_, stream));
    }

   private:
    // Word 4q + m of 16 bits is in quadword q, which gets the bytes from bit 4q · kBits on.
    static constexpr Bytes kBytes =
        bytes_of([](int i) { return i / 8 * 4 * kBits / 8 + i % 8; });
    static constexpr Bytes kFirstBits = bytes_of(
        [](int i) { return i / 8 * 4 * kBits % 8 + i % 8 / 2 * kBits + i % 2 * 8; });

    int64_t byte_;
    __m512i bytes_, bits_;
  };

  template <Coder kCoder, int kBits>
  class Decoder;

  // Windows in words of 16 bits, whose levels are in a register.
  template <int kBits>
    requires(kBits <= 4)
  class Decoder<Coder::kScalar, kBits> {
   public:
    Decoder(const QuantizedMatrix&, int64_t first) : windows_(first) {
      alignas(64) int16_t levels[32];
      constexpr int kHighest = (1 << kBits) - 1;
      for (int i = 0; i < 32; ++i) levels[i] = 2 * (i & kHighest) - kHighest;
      levels_ = _mm512_load_si512(levels);
    }

    Levels read(const uint8_t* row, int64_t chunk) const {
      // Only the lowest bits of a word are looked at.
      return _mm512_permutexvar_epi16(windows_.read(row, chunk), levels_);
    }

   private:
    Windows<kBits> windows_;
    __m512i levels_;
  };

  template <int kBits>
    requires(kBits == 8)
  class Decoder<Coder::kScalar, kBits> {
   public:
    Decoder(const QuantizedMatrix&, int64_t first) : first_(first) {}

    Levels read(const uint8_t* row, int64_t chunk) const {
      const auto* from = reinterpret_cast<const __m256i*>(row + first_ + chunk * 32);
      const __m512i windows = _mm512_cvtepu8_epi16(_mm256_loadu_si256(from));
      return _mm512_sub_epi16(_mm512_add_epi16(windows, windows), _mm512_set1_epi16(255));
    }

   private:
    int64_t first_;
  };

  // Windows in words of 16 bits.
  template <int kBits>
  class Decoder<Coder::kTrellis, kBits> {
   public:
    Decoder(const QuantizedMatrix& matrix, int64_t first)
        : windows_(first),
          mask_(_mm512_set1_epi16(window_mask(matrix))),
          mark_(_mm512_set1_epi16(matrix.mark)),
          factors_{_mm512_set1_epi16(matrix.factors[0]), _mm512_set1_epi16(matrix.factors[1])} {}

    Levels read(const uint8_t* row, int64_t chunk) const {
      constexpr int kAndOr = 0xEA;
      const __m512i marked =
          _mm512_ternarylogic_epi32(windows_.read(row, chunk), mask_, mark_, kAndOr);
      return _mm512_add_epi16(byte_sums(marked, factors_[0]), byte_sums(marked, factors_[1]));
    }

   private:
    static __m512i byte_sums(__m512i marked, __m512i factor) {
      return _mm512_maddubs_epi16(_mm512_set1_epi8(1), _mm512_mullo_epi16(marked, factor));
    }

    Windows<kBits> windows_;
    __m512i mask_, mark_, factors_[2];
  };
};

}  // namespace
