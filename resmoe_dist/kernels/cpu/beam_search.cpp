// A path through a bit-shift trellis under an error that has cross terms: `search_beam` in
// codecs/trellis.py says what it is.

#include <ATen/Functions.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdint>
#include <vector>

namespace resmoe {

namespace {

struct Candidate {
  float cost;
  int32_t parent;
  int32_t window;
};

struct Step {
  int32_t parent;
  int32_t window;
};

// What all rows have in common.
struct Beam {
  int64_t entries, coded, width;
  int bits, window_bits;
  const float* values;  // [1 << window_bits]
  const float* root;    // [entries, entries], upper triangular
};

class RowSearch {
 public:
  explicit RowSearch(const Beam& beam)
      : beam_(beam),
        corrections_(beam.width * beam.entries),
        next_corrections_(beam.width * beam.entries),
        steps_(beam.entries * beam.width),
        owner_(size_t{1} << beam.window_bits, -1) {}

  void run(const float* weights, const float* scales, int before, uint8_t* symbols, int32_t* first,
           int32_t* last) {
    std::vector<Candidate> paths;
    for (int64_t i = 0; i < beam_.entries; ++i) {
      extend(paths, i, weights[i], scales[i], before);
      keep_best();
      advance(i, weights[i], scales[i]);
      paths.swap(candidates_);
    }
    const auto best = std::min_element(paths.begin(), paths.end(), cheaper);
    trace(static_cast<int32_t>(best - paths.begin()), symbols, first, last);
  }

 private:
  static bool cheaper(const Candidate& a, const Candidate& b) { return a.cost < b.cost; }

  // All continuations of all paths; of those that end in the same window, the cheapest.
  void extend(const std::vector<Candidate>& paths, int64_t i, float weight, float scale,
              int before) {
    const int symbols = 1 << beam_.bits, prefix = beam_.window_bits - beam_.bits;
    const float unit = 1.0f / beam_.root[i * beam_.entries + i];
    candidates_.clear();
    if (i == 0) {
      const int windows = 1 << beam_.window_bits;
      for (int window = 0; window < windows; ++window) {
        if (before >= 0 && (window & ((1 << prefix) - 1)) != before >> beam_.bits) continue;
        const float error = (weight - scale * beam_.values[window]) * unit;
        candidates_.push_back({error * error, -1, window});
      }
      return;
    }
    for (size_t path = 0; path < paths.size(); ++path) {
      const float target = weight + corrections_[path * beam_.entries + i];
      for (int symbol = 0; symbol < symbols; ++symbol) {
        const int window = paths[path].window >> beam_.bits | symbol << prefix;
        const float error = (target - scale * beam_.values[window]) * unit;
        const Candidate found{paths[path].cost + error * error, static_cast<int32_t>(path), window};
        const int32_t other = owner_[window];
        if (other < 0) {
          owner_[window] = static_cast<int32_t>(candidates_.size());
          candidates_.push_back(found);
        } else if (found.cost < candidates_[other].cost) {
          candidates_[other] = found;
        }
      }
    }
    for (const auto& each : candidates_) owner_[each.window] = -1;
  }

  void keep_best() {
    if (static_cast<int64_t>(candidates_.size()) <= beam_.width) return;
    std::nth_element(candidates_.begin(), candidates_.begin() + beam_.width, candidates_.end(),
                     cheaper);
    candidates_.resize(beam_.width);
  }

  // The errors of the new entries change what the later ones should be.
  void advance(int64_t i, float weight, float scale) {
    const int64_t entries = beam_.entries;
    const float* root = beam_.root + i * entries;
    for (size_t path = 0; path < candidates_.size(); ++path) {
      const Candidate& found = candidates_[path];
      steps_[i * beam_.width + path] = {found.parent, found.window};
      float* __restrict to = next_corrections_.data() + path * entries;
      const float* __restrict from = corrections_.data() + std::max(found.parent, 0) * entries;
      const float corrected = found.parent < 0 ? weight : weight + from[i];
      const float error = (corrected - scale * beam_.values[found.window]) / root[i];
      if (found.parent < 0) {
        for (int64_t j = i + 1; j < entries; ++j) to[j] = -error * root[j];
      } else {
        for (int64_t j = i + 1; j < entries; ++j) to[j] = from[j] - error * root[j];
      }
    }
    corrections_.swap(next_corrections_);
  }

  void trace(int32_t path, uint8_t* symbols, int32_t* first, int32_t* last) const {
    for (int64_t i = beam_.entries - 1; i >= 0; --i) {
      const Step& step = steps_[i * beam_.width + path];
      if (i == beam_.coded - 1) *last = step.window;
      if (i < beam_.coded) {
        symbols[i] = static_cast<uint8_t>(step.window >> (beam_.window_bits - beam_.bits));
      }
      if (i == 0) *first = step.window;
      path = step.parent;
    }
  }

  const Beam& beam_;
  std::vector<float> corrections_, next_corrections_;
  std::vector<Step> steps_;
  std::vector<int32_t> owner_;
  std::vector<Candidate> candidates_;
};

// First windows [R], symbols [R, coded] and last windows [R].
std::tuple<at::Tensor, at::Tensor, at::Tensor> search_beam(
    const at::Tensor& weights_RC, const at::Tensor& scales_RC, const at::Tensor& root_CC,
    const at::Tensor& values_S, const at::Tensor& before_R, int64_t bits, int64_t coded,
    int64_t width) {
  const int64_t rows = weights_RC.size(0), entries = weights_RC.size(1);
  TORCH_CHECK(weights_RC.scalar_type() == at::kFloat && scales_RC.scalar_type() == at::kFloat &&
                  root_CC.scalar_type() == at::kFloat && values_S.scalar_type() == at::kFloat &&
                  before_R.scalar_type() == at::kInt,
              "weights, scales, root and values must be float32, windows int32");
  TORCH_CHECK(scales_RC.sizes() == weights_RC.sizes() && root_CC.size(0) == entries &&
                  root_CC.size(1) == entries && before_R.numel() == rows && coded >= 1 &&
                  coded <= entries && width >= 1 && bits >= 1 && bits <= 8,
              "shapes contradict each other");
  Beam beam{entries, coded, width, static_cast<int>(bits), 0, nullptr, nullptr};
  while ((int64_t{1} << beam.window_bits) < values_S.numel()) ++beam.window_bits;
  TORCH_CHECK((int64_t{1} << beam.window_bits) == values_S.numel() && beam.window_bits > bits,
              "the number of windows must be a power of two");
  const auto weights = weights_RC.contiguous(), scales = scales_RC.contiguous();
  const auto root = root_CC.contiguous(), values = values_S.contiguous();
  const auto before = before_R.contiguous();
  beam.values = values.data_ptr<float>();
  beam.root = root.data_ptr<float>();
  auto first = at::empty({rows}, at::kInt), last = at::empty({rows}, at::kInt);
  auto symbols = at::empty({rows, coded}, at::kByte);
  at::parallel_for(0, rows, 1, [&](int64_t begin, int64_t end) {
    RowSearch search(beam);
    for (int64_t row = begin; row < end; ++row) {
      search.run(weights.data_ptr<float>() + row * entries, scales.data_ptr<float>() + row * entries,
                 before.data_ptr<int32_t>()[row], symbols.data_ptr<uint8_t>() + row * coded,
                 first.data_ptr<int32_t>() + row, last.data_ptr<int32_t>() + row);
    }
  });
  return {first, symbols, last};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(resmoe, library) { library.def("search_beam", search_beam); }

}  // namespace resmoe
