// A beam search for one row, compiled once per instruction set: see beam_search.cpp.
//
// No include guard: each instruction set has a namespace. RESMOE_LANES is the number of floats in a
// vector.

#include "cheapest_costs.h"

// A search for codes of `bits` bits; its buffers serve one row after the other.
//
// The errors of a path change what its later entries should be. A row is searched in stretches of
// kNear entries, and changes are kept in two parts. `near`, of each path: all changes of entries in
// this stretch, and what errors in this stretch change in the next one. `far`: what errors before
// the last stretch change from this stretch on. Paths that were the same when the last stretch began
// share a far part, so there are few of those.
template <int bits>
class BeamSearch : CheapestCosts {
 public:
  explicit BeamSearch(const Beam& beam)
      : beam_(beam),
        prefix_(beam.window_bits - bits),
        most_(std::max(beam.width, 1 << prefix_)),
        table_(size_t{1} << beam.window_bits),
        all_(most_ * kStep + kPadding),
        costs_(all_.size()),
        kept_(all_.size()),
        kept_costs_(all_.size()),
        target_(most_),
        parent_(most_),
        entry_(most_),
        owner_(table_.size()),
        now_(most_),
        next_(most_),
        far_of_(most_),
        far_of_origin_(most_),
        far_(static_cast<size_t>(beam.width) * beam.stride),
        next_far_(far_.size()),
        steps_(static_cast<size_t>(beam.width) * beam.entries) {
    for (int window = 0; window < 1 << beam.window_bits; ++window) {
      table_[(window & ((1 << prefix_) - 1)) << bits | window >> prefix_] = beam.values[window];
    }
    for (size_t i = 0; i < all_.size(); ++i) all_[i] = static_cast<int32_t>(i);
  }

  // path: the windows of the first `coded` entries.
  void run(const float* weights, const float* scales, int before, int32_t* path) {
    start(before);
    for (int i = 0; i < beam_.entries; ++i) {
      if (i > 0 && i % kNear == 0) start_stretch(i);
      const float unit = beam_.units[i], scale = scales[i] * unit;
      for (int k = 0; k < now_.count; ++k) {
        target_[k] = (weights[i] + now_.near[k].changes[i % kNear]) * unit;
      }
      extend(now_, target_.data(), table_.data(), scale, costs_.data());
      merge(keep_cheapest(now_.count * kStep));
      advance(i, scale);
      std::swap(now_, next_);
    }
    trace(path);
  }

 private:
  static constexpr int kStep = 1 << bits;  // continuations of a path
  static constexpr int kNear = 8;
  static constexpr int kGroup = kStep > 4 ? kStep / 4 : 1;  // see `keep_cheapest`
  static constexpr int kFew = kStep < kLanes ? kStep : kLanes;
  static constexpr int kVectors = 2 * kNear / kLanes;

  using Floats = typename VectorTypes<kLanes>::Floats;
  using FewFloats = typename VectorTypes<kFew>::Floats;
  using NearFloats = typename VectorTypes<kNear>::Floats;

  struct alignas(64) Near {
    float changes[2 * kNear];
  };

  struct Paths {
    explicit Paths(int most) : cost(most), window(most), origin(most), near(most) {}

    int count = 0;
    std::vector<float> cost;
    std::vector<int32_t> window;
    std::vector<int32_t> origin;  // the path's number when the stretch began
    std::vector<Near> near;
  };

  // One path for each end of a window that may come before the first entry.
  void start(int before) {
    now_.count = before < 0 ? 1 << prefix_ : 1;
    for (int path = 0; path < now_.count; ++path) {
      now_.cost[path] = 0;
      now_.window[path] = before < 0 ? path << bits : before;
      now_.origin[path] = 0;
      now_.near[path] = {};
    }
    far_of_[0] = 0;
    std::fill_n(far_.begin(), beam_.stride, 0.0f);
    limit_ = 0;
    stamp_ = 0;
    std::fill(owner_.begin(), owner_.end(), -1);
  }

  // The costs of all continuations of all paths.
  static void extend(const Paths& paths, const float* target, const float* table, float scale,
                     float* costs) {
    const float* cost = paths.cost.data();
    const int32_t* window = paths.window.data();
    for (int path = 0; path < paths.count; ++path) {
      const float* values = table + (window[path] & -kStep);
      for (int symbol = 0; symbol < kStep; symbol += kFew) {
        const FewFloats error = target[path] - scale * load<FewFloats>(values + symbol);
        store(cost[path] + error * error, costs + path * kStep + symbol);
      }
    }
  }

  // The numbers of the `width` cheapest of so many continuations, the first ones of equals, in
  // order, in `kept_`, and their costs in `kept_costs_`. Returns how many they are.
  int keep_cheapest(int count) {
    const int width = beam_.width;
    fill_up(costs_.data() + count);
    if (count <= width) return keep(costs_.data(), all_.data(), count, kAny);
    // A rough limit leaves few costs to find the exact one in. If there are many, it is found from
    // the least of each few. The last entry's limit is a good guess.
    const float* some = costs_.data();
    int found = count;
    if (kGroup > 1 && count >= 2 * width * kGroup) {
      found = least_of_groups<kGroup>(some, count, kept_costs_.data());
      some = kept_costs_.data();
    }
    const auto range = range_of(some, found);
    const int32_t guess = std::max(range.least, std::min(limit_, range.most));
    limit_ = limit_for(some, found, range, guess, width, width + width / 2);
    found = keep(costs_.data(), all_.data(), count, limit_);
    limit_ = limit_for(kept_costs_.data(), found, {range.least, limit_}, -1, width, width);
    found = keep(kept_costs_.data(), kept_.data(), found, limit_);
    if (found <= width) return found;
    return drop_last_equals(kept_costs_.data(), kept_.data(), found, limit_, width);
  }

  int keep(const float* costs, const int32_t* numbers, int count, int32_t limit) {
    return keep_up_to(limit, costs, numbers, count, kept_costs_.data(), kept_.data());
  }

  // The new paths: of continuations with the same window, the cheapest, the first one of equals.
  void merge(int found) {
    const int32_t* __restrict kept = kept_.data();
    const int32_t* __restrict windows = now_.window.data();
    const float* __restrict costs = kept_costs_.data();
    int32_t* __restrict owners = owner_.data();
    int32_t* __restrict parents = parent_.data();
    int32_t* __restrict entries = entry_.data();
    float* __restrict next_costs = next_.cost.data();
    int32_t* __restrict next_windows = next_.window.data();
    int count = 0;
    for (int k = 0; k < found; ++k) {
      const int parent = kept[k] >> bits, symbol = kept[k] & (kStep - 1);
      const int window = windows[parent] >> bits | symbol << prefix_;
      const int other = owners[window] - stamp_;
      if (other >= 0) {
        if (next_costs[other] <= costs[k]) continue;
        next_costs[other] = std::numeric_limits<float>::infinity();
      }
      owners[window] = stamp_ + count;
      parents[count] = parent;
      entries[count] = (windows[parent] & -kStep) | symbol;
      next_costs[count] = costs[k];
      next_windows[count] = window;
      ++count;
    }
    next_.count = count;
    stamp_ += count;
  }

  // The errors of the new entries, and what they change.
  void advance(int i, float scale) {
    const int32_t* __restrict parents = parent_.data();
    const int32_t* __restrict entries = entry_.data();
    const float* __restrict target = target_.data();
    const float* __restrict table = table_.data();
    const int32_t* __restrict origins = now_.origin.data();
    const int32_t* __restrict next_windows = next_.window.data();
    int32_t* __restrict next_origins = next_.origin.data();
    Step* __restrict steps = steps_.data() + i * beam_.width;
    const float* root = beam_.root + i * beam_.stride + i / kNear * kNear;
    Floats factors[kVectors];
    for (int k = 0; k < kVectors; ++k) factors[k] = load<Floats>(root + k * kLanes);
    for (int path = 0; path < next_.count; ++path) {
      const int parent = parents[path];
      const float error = target[parent] - scale * table[entries[path]];
      next_origins[path] = origins[parent];
      steps[path] = {static_cast<uint16_t>(parent), static_cast<uint16_t>(next_windows[path]),
                     error};
      const float* from = now_.near[parent].changes;
      float* to = next_.near[path].changes;
      for (int k = 0; k < kVectors; ++k) {
        store(load<Floats>(from + k * kLanes) - error * factors[k], to + k * kLanes);
      }
    }
  }

  // Entry i begins a stretch: far parts get the errors of the stretch before the last one, and near
  // parts the far changes of this stretch.
  void start_stretch(int i) {
    std::fill_n(far_of_origin_.begin(), beam_.width, -1);
    int fars = 0;
    for (int path = 0; path < now_.count; ++path) {
      int& far = far_of_origin_[now_.origin[path]];
      if (far < 0) {
        far = fars++;
        add_far(i, now_.origin[path], next_far_.data() + far * beam_.stride);
      }
      float* near = now_.near[path].changes;
      const float* changes = next_far_.data() + far * beam_.stride + i;
      store(load<NearFloats>(near + kNear) + load<NearFloats>(changes), near);
      store(NearFloats{}, near + kNear);
    }
    for (int path = 0; path < now_.count; ++path) {
      far_of_[path] = far_of_origin_[now_.origin[path]];
      now_.origin[path] = path;
    }
    std::swap(far_, next_far_);
  }

  // The new far part of a path that was there when the last stretch began.
  void add_far(int i, int path, float* to) const {
    const float* from = far_.data() + far_of_[path] * beam_.stride;
    const int begin = std::max(i - 2 * kNear, 0);
    float errors[kNear] = {};
    for (int j = i - kNear - 1; j >= begin; --j) {
      const Step& step = steps_[j * beam_.width + path];
      errors[j - begin] = step.error;
      path = step.parent;
    }
    for (int j = i / kLanes * kLanes; j < beam_.stride; j += kLanes) {
      Floats changes = load<Floats>(from + j);
      const float* root = beam_.root + begin * beam_.stride + j;
      for (int k = 0; k < kNear; ++k) changes -= errors[k] * load<Floats>(root + k * beam_.stride);
      store(changes, to + j);
    }
  }

  void trace(int32_t* windows) const {
    const auto* costs = now_.cost.data();
    auto path = static_cast<int>(std::min_element(costs, costs + now_.count) - costs);
    for (int i = beam_.entries - 1; i >= 0; --i) {
      const Step& step = steps_[i * beam_.width + path];
      if (i < beam_.coded) windows[i] = step.window;
      path = step.parent;
    }
  }

  const Beam& beam_;
  const int prefix_;  // bits that a window shares with the next
  const int most_;    // paths, at most
  std::vector<float> table_;  // values of windows; continuations of a path are neighbours
  std::vector<int32_t> all_;  // 0, 1, 2, …
  std::vector<float> costs_;  // of continuation path << bits | symbol
  std::vector<int32_t> kept_;
  std::vector<float> kept_costs_;
  std::vector<float> target_;            // of each path, in units of the errors
  std::vector<int32_t> parent_, entry_;  // of each next path; entry: its place in `table_`
  std::vector<int32_t> owner_;           // of a window: stamp_ + the next path that ends in it
  Paths now_, next_;
  std::vector<int32_t> far_of_;  // far part of each path that was there when the stretch began
  std::vector<int32_t> far_of_origin_;
  std::vector<float> far_, next_far_;  // [parts, stride]
  std::vector<Step> steps_;
  int32_t limit_ = 0;
  int32_t stamp_ = 0;
};
