// Viterbi's search for one row, compiled once per instruction set: see trellis_search.cpp.
//
// No include guard: RESMOE_SEARCH names the class template that this file defines.

// A search for codes of `bits` bits; its buffers serve one row after the other.
template <int bits>
struct RESMOE_SEARCH {
  static constexpr int kStep = 1 << bits;  // predecessors of a window

  // target[0, entries): what the values of the path should be close to. values[0, 1 << window_bits):
  // of each window. before: the window before the row, or negative. path: the windows of the first
  // `coded` entries.
  static void run(const float* target, int64_t entries, const float* values, int window_bits,
                  int before, int64_t coded, int32_t* path, std::vector<float>& floats,
                  std::vector<uint8_t>& bytes) {
    const int windows = 1 << window_bits, kept = windows >> bits;
    floats.resize(windows + kept);
    bytes.resize(static_cast<size_t>(entries) * kept);
    float* __restrict cost = floats.data();     // least error of a path that ends in each window
    float* __restrict least = cost + windows;   // the same before its new bits are chosen
    start(target[0], values, window_bits, before, cost);
    for (int64_t i = 1; i < entries; ++i) {
      uint8_t* __restrict from = bytes.data() + i * kept;
      choose(cost, kept, least, from);
      // Subtracting the smallest keeps the costs exact enough.
      const float base = i % 16 ? 0.0f : *std::min_element(least, least + kept);
      for (int symbol = 0; symbol < kStep; ++symbol) {
        extend(target[i], values + symbol * kept, least, base, kept, cost + symbol * kept);
      }
    }
    int window = static_cast<int>(std::min_element(cost, cost + windows) - cost);
    for (int64_t i = entries - 1; i >= 0; --i) {
      if (i < coded) path[i] = window;
      if (i == 0) break;
      const int remains = window & (kept - 1);
      window = remains << bits | bytes[i * kept + remains];
    }
  }

  static void start(float target, const float* values, int window_bits, int before, float* cost) {
    const int windows = 1 << window_bits, kept = windows >> bits;
    for (int window = 0; window < windows; ++window) {
      const bool follows = before < 0 || (window & (kept - 1)) == before >> bits;
      const float error = target - values[window];
      cost[window] = follows ? error * error : 1e9f;
    }
  }

  // The best of the kStep windows that leave each `remains`. Costs are positive, so they order like
  // their bits; the number of the window replaces the lowest ones.
  static void choose(const float* __restrict cost, int kept, float* __restrict least,
                     uint8_t* __restrict from) {
    const auto* __restrict in = reinterpret_cast<const int32_t*>(cost);
    auto* __restrict out = reinterpret_cast<int32_t*>(least);
    for (int remains = 0; remains < kept; ++remains) {
      int32_t best = in[remains * kStep] & ~(kStep - 1);
      for (int j = 1; j < kStep; ++j) {
        best = std::min(best, (in[remains * kStep + j] & ~(kStep - 1)) | j);
      }
      out[remains] = best;
    }
    for (int remains = 0; remains < kept; ++remains) {
      from[remains] = static_cast<uint8_t>(out[remains] & (kStep - 1));
    }
  }

  static void extend(float target, const float* __restrict values, const float* __restrict least,
                     float base, int kept, float* __restrict cost) {
    for (int i = 0; i < kept; ++i) {
      const float error = target - values[i];
      cost[i] = std::max(least[i] - base, 0.0f) + error * error;
    }
  }
};
