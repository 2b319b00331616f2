// The path through a bit-shift trellis that is closest to given entries: `search_path` in
// codecs/trellis.py says what it is.

#include <ATen/Functions.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#include "search_levels.h"
#include "target.h"

namespace resmoe {

namespace {

RESMOE_ROUND_ALIKE
#define RESMOE_SEARCH PortableSearch
#include "trellis_search.h"
#undef RESMOE_SEARCH

#ifdef __x86_64__
RESMOE_TARGET("avx2,fma")
#define RESMOE_SEARCH Avx2Search
#include "trellis_search.h"
#undef RESMOE_SEARCH
RESMOE_TARGET_END

RESMOE_TARGET("avx512f,avx512bw,avx512dq,avx512vl,fma,prefer-vector-width=512")
#define RESMOE_SEARCH Avx512Search
#include "trellis_search.h"
#undef RESMOE_SEARCH
RESMOE_TARGET_END
#endif
RESMOE_ROUND_ALIKE_END

using Search = decltype(&PortableSearch<1>::run);

template <int bits>
Search search_with(int64_t lanes) {
#ifdef __x86_64__
  if (lanes == 16) return Avx512Search<bits>::run;
  if (lanes == 8) return Avx2Search<bits>::run;
#endif
  return PortableSearch<bits>::run;
}

Search search_of(int64_t bits, int64_t lanes) {
  switch (bits) {
    case 1: return search_with<1>(lanes);
    case 2: return search_with<2>(lanes);
    case 3: return search_with<3>(lanes);
    case 4: return search_with<4>(lanes);
  }
  TORCH_CHECK(false, "no search for ", bits, " bits");
}

// Windows [R, coded]. lanes: see `choose_lanes`.
at::Tensor search_path(const at::Tensor& target_RC, const at::Tensor& values_S,
                       const at::Tensor& before_R, int64_t bits, int64_t coded, int64_t lanes) {
  TORCH_CHECK(target_RC.dim() == 2 && target_RC.scalar_type() == at::kFloat &&
                  values_S.scalar_type() == at::kFloat && before_R.scalar_type() == at::kInt,
              "targets and values must be float32, windows int32");
  const int64_t rows = target_RC.size(0), entries = target_RC.size(1);
  TORCH_CHECK(before_R.numel() == rows && coded >= 1 && coded <= entries, "no such entries");
  int window_bits = 0;
  while ((int64_t{1} << window_bits) < values_S.numel()) ++window_bits;
  TORCH_CHECK((int64_t{1} << window_bits) == values_S.numel() && window_bits > bits,
              "the number of windows must be a power of two");
  const auto target = target_RC.contiguous(), values = values_S.contiguous();
  const auto before = before_R.contiguous();
  auto path = at::empty({rows, coded}, at::kInt);
  const Search run = search_of(bits, choose_lanes(lanes));
  at::parallel_for(0, rows, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> floats;
    std::vector<uint8_t> bytes;
    for (int64_t row = begin; row < end; ++row) {
      run(target.data_ptr<float>() + row * entries, entries, values.data_ptr<float>(), window_bits,
          before.data_ptr<int32_t>()[row], coded, path.data_ptr<int32_t>() + row * coded, floats,
          bytes);
    }
  });
  return path;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(resmoe, library) { library.def("search_path", search_path); }

}  // namespace resmoe
