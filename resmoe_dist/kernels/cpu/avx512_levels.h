// Operations on levels with AVX-512.
//
// Fast because of three instructions. `vpmultishiftqb` takes bytes from any bits of a word of 64
// bits, so one of it finds the windows of 32 entries. `vpermw` looks up the level of a window in a
// register. `vpdpwssd` multiplies 32 levels with 32 numbers. `vpdpbusd` adds up the bytes of a hash.
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

  template <Coder kCoder, int kBits>
  class Decoder;

  // Windows in words of 16 bits, whose levels are in a register.
  template <int kBits>
    requires(kBits <= 4)
  class Decoder<Coder::kScalar, kBits> {
   public:
    Decoder(const QuantizedMatrix&, int64_t first)
        : byte_(first * kBits / 8),
          bytes_(_mm512_load_si512(&kBytes)),
          bits_(_mm512_add_epi8(_mm512_load_si512(&kFirstBits),
                                _mm512_set1_epi8(first * kBits % 8))) {
      alignas(64) int16_t levels[32];
      constexpr int kHighest = (1 << kBits) - 1;
      for (int i = 0; i < 32; ++i) levels[i] = 2 * (i & kHighest) - kHighest;
      levels_ = _mm512_load_si512(levels);
    }

    Levels read(const uint8_t* row, int64_t chunk) const {
      const auto* from = reinterpret_cast<const __m256i*>(row + byte_ + chunk * 4 * kBits);
      const __m512i stream = _mm512_castsi256_si512(_mm256_loadu_si256(from));
      const __m512i windows =
          _mm512_multishift_epi64_epi8(bits_, _mm512_permutexvar_epi8(bytes_, stream));
      return _mm512_permutexvar_epi16(windows, levels_);
    }

   private:
    // Word 4q + m of 16 bits is in quadword q, which gets the bytes from bit 4q · kBits on. Only the
    // lowest bits of a word are looked at.
    static constexpr Bytes kBytes =
        bytes_of([](int i) { return i / 8 * 4 * kBits / 8 + i % 8; });
    static constexpr Bytes kFirstBits =
        bytes_of([](int i) { return i / 8 * 4 * kBits % 8 + i % 8 / 2 * kBits; });

    int64_t byte_;
    __m512i bytes_, bits_, levels_;
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

  // Windows in words of 32 bits, in two registers, in the order that `vpackssdw` undoes: windows
  // 0-3, 8-11, 16-19 and 24-27 in the first.
  template <int kBits>
  class Decoder<Coder::kTrellis, kBits> {
   public:
    Decoder(const QuantizedMatrix& matrix, int64_t first)
        : byte_(first * kBits / 8),
          mask_(_mm512_set1_epi32(window_mask(matrix))),
          multiplier_(_mm512_set1_epi32(matrix.multiplier)),
          increment_(_mm512_set1_epi32(matrix.increment)) {
      const __m512i phase = _mm512_set1_epi8(first * kBits % 8);
      bytes_ = _mm512_load_si512(&kBytes);
      first_bits_ = _mm512_add_epi8(_mm512_load_si512(&kFirstBits), phase);
      second_bits_ = _mm512_add_epi8(first_bits_, _mm512_set1_epi8(4 * kBits));
    }

    Levels read(const uint8_t* row, int64_t chunk) const {
      const auto* from = reinterpret_cast<const __m256i*>(row + byte_ + chunk * 4 * kBits);
      const __m512i stream = _mm512_castsi256_si512(_mm256_loadu_si256(from));
      const __m512i bytes = _mm512_permutexvar_epi8(bytes_, stream);
      return _mm512_packs_epi32(levels(_mm512_multishift_epi64_epi8(first_bits_, bytes)),
                                levels(_mm512_multishift_epi64_epi8(second_bits_, bytes)));
    }

   private:
    // Both quadwords of 128 bits get the bytes from the first of their eight windows on.
    static constexpr Bytes kBytes = bytes_of([](int i) { return i / 16 * kBits + i % 8; });
    static constexpr Bytes kFirstBits =
        bytes_of([](int i) { return i % 16 / 4 * kBits + i % 4 * 8; });

    __m512i levels(__m512i windows) const {
      const __m512i product =
          _mm512_mullo_epi32(_mm512_and_si512(windows, mask_), multiplier_);
      return _mm512_dpbusd_epi32(_mm512_set1_epi32(-510),
                                 _mm512_add_epi32(product, increment_), _mm512_set1_epi8(1));
    }

    int64_t byte_;
    __m512i bytes_, first_bits_, second_bits_, mask_, multiplier_, increment_;
  };
};

}  // namespace
