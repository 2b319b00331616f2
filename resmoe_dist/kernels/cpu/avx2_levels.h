// Operations on levels with AVX2. Included after the target was chosen.

#pragma once

#include "levels.h"

namespace {

struct Avx2Levels {
  using Vec = Vector<8>;
  using Floats = __m256;
  using Sums = __m256i;
  using Levels = __m256i;
  static constexpr int64_t kLevels = 16;

  static Levels load(const int16_t* from) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  }
  static void store(Levels levels, int16_t* to) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), levels);
  }
  static Sums dot(Sums sums, Levels a, Levels b) {
    return _mm256_add_epi32(sums, _mm256_madd_epi16(a, b));
  }
  static Levels broadcast(int32_t pair) { return _mm256_set1_epi32(pair); }

  // Columns 0-3 and 8-11 in `low`, the others in `high`.
  static void interleave(Levels first, Levels second, Levels& low, Levels& high) {
    low = _mm256_unpacklo_epi16(first, second);
    high = _mm256_unpackhi_epi16(first, second);
  }
  static void add_columns(Floats low, Floats high, float* y) {
    const __m256 first = _mm256_permute2f128_ps(low, high, 0x20);
    const __m256 second = _mm256_permute2f128_ps(low, high, 0x31);
    _mm256_storeu_ps(y, _mm256_add_ps(_mm256_loadu_ps(y), first));
    _mm256_storeu_ps(y + 8, _mm256_add_ps(_mm256_loadu_ps(y + 8), second));
  }

  static Floats to_floats(Sums sums) { return _mm256_cvtepi32_ps(sums); }
  static float sum(Floats values) {
    const __m128 four =
        _mm_add_ps(_mm256_castps256_ps128(values), _mm256_extractf128_ps(values, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
  }

  static void scale(Levels levels, float factor, float* out, bool add) {
    const auto put = [&](__m128i half, float* to) {
      const __m256 value = _mm256_cvtepi32_ps(_mm256_cvtepi16_epi32(half));
      const __m256 old = add ? _mm256_loadu_ps(to) : _mm256_setzero_ps();
      _mm256_storeu_ps(to, _mm256_fmadd_ps(value, _mm256_set1_ps(factor), old));
    };
    put(_mm256_castsi256_si128(levels), out);
    put(_mm256_extracti128_si256(levels, 1), out + 8);
  }

  static void read_scales(const QuantizedMatrix& matrix, const uint8_t* from, int64_t groups,
                          float* out) {
    VectorLevels<8>::read_scales(matrix, from, groups, out);
  }

  // Windows in words of 32 bits, in two registers, in the order that `vpackusdw` undoes: windows
  // 0-3 and 8-11 in the first.
  template <Coder kCoder, int kBits>
  class Decoder {
   public:
    Decoder(const QuantizedMatrix& matrix, int64_t first)
        : byte_(first * kBits / 8),
          mask_(_mm256_set1_epi32(window_mask(matrix))),
          mark_(_mm256_set1_epi16(matrix.mark)),
          factors_{_mm256_set1_epi16(matrix.factors[0]), _mm256_set1_epi16(matrix.factors[1])} {
      // The bit of each window, of which the bytes are taken from the lower one on.
      const __m256i window = _mm256_set_epi32(11, 10, 9, 8, 3, 2, 1, 0);
      for (int half = 0; half < 2; ++half) {
        const __m256i bit = _mm256_add_epi32(
            _mm256_mullo_epi32(_mm256_add_epi32(window, _mm256_set1_epi32(4 * half)),
                               _mm256_set1_epi32(kBits)),
            _mm256_set1_epi32(first * kBits % 8));
        const __m256i byte = _mm256_srli_epi32(bit, 3);
        bytes_[half] = _mm256_add_epi32(_mm256_mullo_epi32(byte, _mm256_set1_epi32(0x01010101)),
                                        _mm256_set1_epi32(0x03020100));
        shifts_[half] = _mm256_and_si256(bit, _mm256_set1_epi32(7));
      }
    }

    Levels read(const uint8_t* row, int64_t chunk) const {
      const auto* from = reinterpret_cast<const __m128i*>(row + byte_ + chunk * 2 * kBits);
      if constexpr (kBits == 8) return scalar_levels(_mm256_cvtepu8_epi16(_mm_loadu_si128(from)));
      const __m256i stream = _mm256_broadcastsi128_si256(_mm_loadu_si128(from));
      const __m256i windows = _mm256_packus_epi32(of_half(stream, 0), of_half(stream, 1));
      return kCoder == Coder::kScalar ? scalar_levels(windows) : trellis_levels(windows);
    }

   private:
    static Levels scalar_levels(__m256i windows) {
      return _mm256_sub_epi16(_mm256_add_epi16(windows, windows),
                              _mm256_set1_epi16((1 << kBits) - 1));
    }

    Levels trellis_levels(__m256i windows) const {
      const __m256i marked = _mm256_or_si256(windows, mark_);
      const auto byte_sums = [&](__m256i factor) {
        return _mm256_maddubs_epi16(_mm256_set1_epi8(1), _mm256_mullo_epi16(marked, factor));
      };
      return _mm256_add_epi16(byte_sums(factors_[0]), byte_sums(factors_[1]));
    }

    // Eight windows.
    __m256i of_half(__m256i stream, int half) const {
      const __m256i words = _mm256_shuffle_epi8(stream, bytes_[half]);
      return _mm256_and_si256(_mm256_srlv_epi32(words, shifts_[half]), mask_);
    }

    int64_t byte_;
    __m256i bytes_[2], shifts_[2], mask_, mark_, factors_[2];
  };
};

}  // namespace
