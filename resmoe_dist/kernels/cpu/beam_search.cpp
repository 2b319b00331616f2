// A path through a bit-shift trellis under an error that has cross terms: `search_beam` in
// codecs/trellis.py says what it is.

#include <ATen/Functions.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <limits>

#include "search_levels.h"
#include "target.h"
#include "vectors.h"

namespace resmoe {

namespace {

// What all rows have in common.
struct Beam {
  int entries, coded, width, window_bits;
  const float* values;  // [1 << window_bits]
  const float* root;    // [entries, stride], upper triangular, then zeros
  const float* units;   // [entries]: one over the diagonal
  int64_t stride;       // a multiple of 16, at least `entries` + 16
};

// Pointers to the first of all rows.
struct Rows {
  const float *weights, *scales;
  const int32_t* before;
  int32_t* paths;  // windows
};

// The entry of a path at one place of a row.
struct Step {
  uint16_t parent, window;
  float error;
};

// For each mask of eight bits, the places of the bits that are set.
struct Packing {
  alignas(8) uint8_t places[256][8];
};

constexpr Packing make_packing() {
  Packing packing{};
  for (int mask = 0; mask < 256; ++mask) {
    int next = 0;
    for (int bit = 0; bit < 8; ++bit) {
      if (mask >> bit & 1) packing.places[mask][next++] = static_cast<uint8_t>(bit);
    }
  }
  return packing;
}

constexpr Packing kPacking = make_packing();

RESMOE_ROUND_ALIKE
namespace portable {
#define RESMOE_LANES 4
#include "beam_row.h"
#undef RESMOE_LANES
}  // namespace portable

#ifdef __x86_64__
RESMOE_TARGET("avx2,fma,popcnt")
#include <immintrin.h>
namespace avx2 {
#define RESMOE_LANES 8
#include "beam_row.h"
#undef RESMOE_LANES
}  // namespace avx2
RESMOE_TARGET_END

RESMOE_TARGET("avx512f,avx512bw,avx512dq,avx512vl,fma,popcnt,prefer-vector-width=512")
namespace avx512 {
#define RESMOE_LANES 16
#include "beam_row.h"
#undef RESMOE_LANES
}  // namespace avx512
RESMOE_TARGET_END
#endif
RESMOE_ROUND_ALIKE_END

template <class Search>
void search_rows(const Beam& beam, const Rows& rows, int64_t begin, int64_t end) {
  Search search(beam);
  for (int64_t row = begin; row < end; ++row) {
    search.run(rows.weights + row * beam.entries, rows.scales + row * beam.entries,
               rows.before[row], rows.paths + row * beam.coded);
  }
}

template <template <int> class Search>
auto search_of(int64_t bits) {
  switch (bits) {
    case 1: return search_rows<Search<1>>;
    case 2: return search_rows<Search<2>>;
    case 3: return search_rows<Search<3>>;
    case 4: return search_rows<Search<4>>;
  }
  TORCH_CHECK(false, "no search for ", bits, " bits");
}

auto search_for(int64_t bits, int64_t lanes) {
#ifdef __x86_64__
  if (lanes == 16) return search_of<avx512::BeamSearch>(bits);
  if (lanes == 8) return search_of<avx2::BeamSearch>(bits);
#endif
  return search_of<portable::BeamSearch>(bits);
}

// Windows [R, coded]. lanes: see `choose_lanes`.
at::Tensor search_beam(const at::Tensor& weights_RC, const at::Tensor& scales_RC,
                       const at::Tensor& root_CC, const at::Tensor& values_S,
                       const at::Tensor& before_R, int64_t bits, int64_t coded, int64_t width,
                       int64_t lanes) {
  TORCH_CHECK(weights_RC.scalar_type() == at::kFloat && scales_RC.scalar_type() == at::kFloat &&
                  root_CC.scalar_type() == at::kFloat && values_S.scalar_type() == at::kFloat &&
                  before_R.scalar_type() == at::kInt,
              "weights, scales, root and values must be float32, windows int32");
  TORCH_CHECK(weights_RC.dim() == 2, "weights must be a matrix");
  const int64_t rows = weights_RC.size(0), entries = weights_RC.size(1);
  TORCH_CHECK(scales_RC.sizes() == weights_RC.sizes() && root_CC.dim() == 2 &&
                  root_CC.size(0) == entries && root_CC.size(1) == entries &&
                  before_R.numel() == rows && coded >= 1 && coded <= entries,
              "shapes contradict each other");
  // Paths and windows have 16 bits, and numbers of all continuations 31.
  TORCH_CHECK(width >= 1 && width < 1 << 16 && entries * width < int64_t{1} << 31,
              "too many paths: ", width);
  int window_bits = 0;
  while ((int64_t{1} << window_bits) < values_S.numel()) ++window_bits;
  TORCH_CHECK((int64_t{1} << window_bits) == values_S.numel() && window_bits > bits &&
                  window_bits <= 16,
              "the number of windows must be a power of two");
  const auto weights = weights_RC.contiguous(), scales = scales_RC.contiguous();
  const auto values = values_S.contiguous(), before = before_R.contiguous();
  const int64_t stride = (entries + 31) / 16 * 16;
  const auto root = at::zeros({entries, stride}, at::kFloat);
  root.narrow(1, 0, entries).copy_(root_CC);
  const auto units = root_CC.diagonal().reciprocal();
  const auto paths = at::empty({rows, coded}, at::kInt);
  const Beam beam{static_cast<int>(entries), static_cast<int>(coded), static_cast<int>(width),
                  window_bits, values.data_ptr<float>(), root.data_ptr<float>(),
                  units.data_ptr<float>(), stride};
  const Rows all{weights.data_ptr<float>(), scales.data_ptr<float>(), before.data_ptr<int32_t>(),
                 paths.data_ptr<int32_t>()};
  const auto run = search_for(bits, choose_lanes(lanes));
  at::parallel_for(0, rows, 1,
                   [&](int64_t begin, int64_t end) { run(beam, all, begin, end); });
  return paths;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(resmoe, library) { library.def("search_beam", search_beam); }

}  // namespace resmoe
