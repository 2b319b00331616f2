// Finding the cheapest of many, compiled once per instruction set: see beam_search.cpp.
//
// No include guard: each instruction set has a namespace. RESMOE_LANES is the number of floats in a
// vector.

// Costs are not negative, so they order like their bits, and limits are integers. After the last of
// an array of costs is space for kPadding more, which `fill_up` sets to more than any limit.
struct CheapestCosts {
  static constexpr int kLanes = RESMOE_LANES;
  static constexpr int kPadding = 4 * kLanes;
  static constexpr int32_t kAny = 0x7F7F7F7E;

  using Ints = typename VectorTypes<kLanes>::Ints;

  struct Range {
    int32_t least, most;
  };

  template <class Vector, class Number>
  static Vector load(const Number* from) {
    Vector vector;
    std::memcpy(&vector, from, sizeof vector);
    return vector;
  }

  template <class Vector, class Number>
  static void store(Vector vector, Number* to) {
    std::memcpy(to, &vector, sizeof vector);
  }

  static void fill_up(float* end) { std::memset(end, 0x7F, kPadding * sizeof *end); }

  static Range range_of(const float* costs, int count) {
    Ints least = Ints{} + kAny, most{};
    for (int k = 0; k < count; k += kLanes) {
      const Ints some = load<Ints>(costs + k);
      least = some < least ? some : least;
      most = (some > most) & (some <= kAny) ? some : most;
    }
    Range range{least[0], most[0]};
    for (int lane = 1; lane < kLanes; ++lane) {
      range.least = std::min<int32_t>(range.least, least[lane]);
      range.most = std::max<int32_t>(range.most, most[lane]);
    }
    return range;
  }

  // The least of each `group` costs. Returns how many there are, a multiple of kLanes.
  template <int group>
  static int least_of_groups(const float* costs, int count, float* least_costs) {
    int groups = 0;
    for (int k = 0; k < count; k += group * kLanes, groups += kLanes) {
      Ints least = load<Ints>(costs + k);
      for (int other = 1; other < group; ++other) {
        const Ints some = load<Ints>(costs + k + other * kLanes);
        least = some < least ? some : least;
      }
      store(least, least_costs + groups);
    }
    return groups;
  }

  static int count_up_to(int32_t limit, const float* costs, int count) {
    Ints found{};
    for (int k = 0; k < count; k += kLanes) found -= load<Ints>(costs + k) <= limit;
    int32_t lanes[kLanes], sum = 0;
    store(found, lanes);
    for (const int32_t lane : lanes) sum += lane;
    return sum;
  }

  // A limit for costs in a range that at least `wanted` of them do not exceed, and at most `enough`
  // if they are different. guess: a limit to try first, or negative.
  static int32_t limit_for(const float* costs, int count, Range range, int32_t guess, int wanted,
                           int enough) {
    int64_t low = range.least, high = range.most;
    int below = 0, up_to = count;
    for (int pass = guess < 0; low < high && up_to > enough; ++pass) {
      int64_t limit = guess;
      if (pass % 4) {
        limit = low + (high - low) * ((wanted + enough) / 2 - below) / (up_to - below);
      } else if (pass) {
        limit = (low + high) >> 1;
      }
      const int found = count_up_to(static_cast<int32_t>(limit), costs, count);
      if (found < wanted) {
        low = limit + 1;
        below = found;
      } else {
        high = limit;
        up_to = found;
      }
    }
    return static_cast<int32_t>(high);
  }

  // Keeps costs up to a limit and their numbers, in order. Returns how many there are. May work in
  // place.
  static int keep_up_to(int32_t limit, const float* costs, const int32_t* numbers, int count,
                        float* kept_costs, int32_t* kept) {
    int found = 0;
#if RESMOE_LANES == 16
    for (int k = 0; k < count; k += kLanes) {
      const __m512i some = _mm512_loadu_si512(costs + k);
      const __m512i names = _mm512_loadu_si512(numbers + k);
      const __mmask16 mask = _mm512_cmple_epi32_mask(some, _mm512_set1_epi32(limit));
      _mm512_storeu_si512(kept_costs + found, _mm512_maskz_compress_epi32(mask, some));
      _mm512_storeu_si512(kept + found, _mm512_maskz_compress_epi32(mask, names));
      found += __builtin_popcount(mask);
    }
#elif RESMOE_LANES == 8
    for (int k = 0; k < count; k += kLanes) {
      const auto some = load<__m256i>(costs + k), names = load<__m256i>(numbers + k);
      const __m256i above = _mm256_cmpgt_epi32(some, _mm256_set1_epi32(limit));
      const int mask = ~_mm256_movemask_ps(_mm256_castsi256_ps(above)) & 0xFF;
      const __m256i order =
          _mm256_cvtepu8_epi32(_mm_cvtsi64_si128(load<int64_t>(kPacking.places[mask])));
      store(_mm256_permutevar8x32_epi32(some, order), kept_costs + found);
      store(_mm256_permutevar8x32_epi32(names, order), kept + found);
      found += __builtin_popcount(mask);
    }
#else
    for (int k = 0; k < count; ++k) {
      int32_t cost;
      std::memcpy(&cost, costs + k, sizeof cost);
      std::memcpy(kept_costs + found, &cost, sizeof cost);
      kept[found] = numbers[k];
      found += cost <= limit;
    }
#endif
    fill_up(kept_costs + found);
    return found;
  }

  // Of costs up to a limit, drops the last ones that are equal to it until so many are left.
  static int drop_last_equals(float* costs, int32_t* numbers, int count, int32_t limit, int left) {
    int equals = left - count_up_to(limit - 1, costs, count), found = 0;
    for (int k = 0; k < count; ++k) {
      int32_t cost;
      std::memcpy(&cost, costs + k, sizeof cost);
      if (cost == limit && equals-- <= 0) continue;
      costs[found] = costs[k];
      numbers[found++] = numbers[k];
    }
    return found;
  }
};
