// Whole MLPs in one kernel: input products, activation, output product and weighted sum.
//
// Two kinds of kernels share the work. Jobs with few copies go through `mlp.h`: one pass over the
// rows for all jobs, every thread a range of rows. Jobs with many copies go through `packed_mlp.h`:
// the copies fill the lanes of vector registers, and a block of rows is expanded once for all. Few
// copies of quantised rows are multiplied in whole numbers: see `quantized_mlp.h`.

#include <ATen/Functions.h>

#include <algorithm>
#include <vector>

#include "dispatch.h"
#include "layer.h"

namespace resmoe {

namespace {

using at::Tensor;

// Upper bound of the per-thread sums, all threads together.
constexpr int64_t kMaxSummedBytes = 64 << 20;

// Rows per thread in a block of packed products.
constexpr int64_t kPackedRows = 256;

// Jobs of quantised rows with fewer copies are multiplied in whole numbers: decoding rows to the
// layer's dtype pays only for more copies than expanding pruned rows does.
constexpr int64_t kMinPackedQuantized = 24;

// Copies packed at a time: most of it stays in the last-level cache.
constexpr int64_t kPackedBytes = 32 << 20;

// Adds the outputs of jobs with few copies to y [T, padded(H)]. run(begin, end, y): adds those of a
// range of rows.
template <class Run>
void add_mlp(int64_t rows, const Tensor& y, const Run& run) {
  const int64_t parts = at::get_num_threads(), size = y.numel();
  const Tensor sums = at::empty({parts, size}, y.options());
  float* of_parts = sums.data_ptr<float>();
  share(rows, parts, [&](int64_t part, int64_t begin, int64_t end) {
    float* of_part = of_parts + part * size;
    std::fill(of_part, of_part + size, 0.0f);
    run(begin, end, of_part);
  });
  float* total = y.data_ptr<float>();
  at::parallel_for(0, size, 1 << 14, [&](int64_t begin, int64_t end) {
    for (int64_t part = 0; part < parts; ++part) {
      const float* of_part = of_parts + part * size;
      for (int64_t i = begin; i < end; ++i) total[i] += of_part[i];
    }
  });
}

// Rotated tokens as whole numbers, in one plane for bfloat16 and two for float32.
struct TokenLevels {
  Tensor planes;  // int16 [T, planes, columns]
  std::vector<LevelVector> of_token;

  TokenLevels(const Tensor& x_TH, const Layer& layer) : of_token(x_TH.size(0)) {
    const int64_t tokens = x_TH.size(0), columns = round_up(layer.hidden, kLevelStep);
    const int64_t count = layer.dtype == at::kFloat ? 2 : 1;
    planes = at::empty({tokens, count, columns}, x_TH.options().dtype(at::kShort));
    int16_t* first = planes.data_ptr<int16_t>();
    for (int64_t t = 0; t < tokens; ++t) {
      of_token[t].planes[0] = first + t * count * columns;
      of_token[t].planes[1] = of_token[t].planes[0] + (count - 1) * columns;
    }
    const ToLevels work = {x_TH.const_data_ptr<float>(), layer.hidden, layer.hidden,
                           of_token.data()};
    const auto run = kernels_for(layer.dtype).to_levels;
    at::parallel_for(0, tokens, 1, [&](int64_t begin, int64_t end) { run(work, begin, end); });
  }
};

// Adds the outputs of jobs with many copies to y.
void add_packed_mlp(std::vector<PackedJob> jobs, PackedMlp work, int64_t rows,
                    const Kernels& kernels, const at::TensorOptions& options) {
  const int64_t parts = at::get_num_threads(), hidden = work.hidden;
  // Blocks of equal size; all but the last have an even number of rows.
  const int64_t blocks = (rows + parts * kPackedRows - 1) / (parts * kPackedRows);
  work.block_rows = round_up((rows + blocks - 1) / blocks, 2);
  int64_t lanes = 0;
  for (const PackedJob& job : jobs) lanes += Chunks(job.copies, kernels.lane_layout).lanes();
  const Tensor x = at::empty({lanes, padded(hidden)}, options);
  const Tensor h = at::empty({lanes, work.block_rows}, options);
  const Tensor y = at::empty({lanes, packed_columns(hidden)}, options.dtype(at::kFloat));
  const Tensor weight = at::zeros({lanes}, y.options());
  lanes = 0;
  for (PackedJob& job : jobs) {
    float* weight_l = weight.data_ptr<float>() + lanes;
    std::copy(job.weight_l, job.weight_l + job.copies, weight_l);
    job.weight_l = weight_l;
    job.x = x[lanes].data_ptr();
    job.h = h[lanes].data_ptr();
    job.y = y[lanes].data_ptr<float>();
    lanes += Chunks(job.copies, kernels.lane_layout).lanes();
  }
  work.jobs = jobs.data();
  work.num_jobs = jobs.size();
  const auto in_shares = [&](int64_t count, int64_t unit, auto kernel) {
    share((count + unit - 1) / unit, parts, [&](int64_t, int64_t begin, int64_t end) {
      kernel(work, begin * unit, std::min(end * unit, count));
    });
  };
  in_shares(padded(hidden), 32, kernels.pack);
  for (; work.first_row < rows; work.first_row += work.block_rows) {
    work.rows = std::min(work.block_rows, rows - work.first_row);
    in_shares(work.rows, 2, kernels.mlp_packed_in);
    in_shares(hidden, kPackedColumnMultiple, kernels.mlp_packed_out);
  }
  in_shares(hidden, 16, kernels.add_packed);
}

// The same in several passes, each with at most kPackedBytes of packed copies.
void add_packed_mlp_in_turn(const std::vector<Job>& jobs, const PackedMlp& work, int64_t rows,
                            const int64_t* token_N, const float* weight_N, const Kernels& kernels,
                            const at::TensorOptions& options) {
  const int64_t lane_bytes = padded(work.hidden) * 2 * sizeof(float);
  const int64_t chunk = kernels.lane_layout.max_vectors * kernels.lane_layout.vector_lanes;
  const int64_t most = std::max<int64_t>(kPackedBytes / lane_bytes / chunk, 1) * chunk;
  std::vector<PackedJob> now;
  int64_t lanes = 0;
  const auto run = [&] {
    if (!now.empty()) add_packed_mlp(std::move(now), work, rows, kernels, options);
    now.clear();
    lanes = 0;
  };
  for (const Job& job : jobs) {
    const int64_t passes = (job.copies + most - 1) / most;
    for (int64_t pass = 0; pass < passes; ++pass) {
      const int64_t first = job.first_copy + pass * job.copies / passes;
      const int64_t copies = job.first_copy + (pass + 1) * job.copies / passes - first;
      const int64_t more = Chunks(copies, kernels.lane_layout).lanes();
      if (lanes + more > most) run();
      now.push_back({job.rows, token_N + first, copies, weight_N + first});
      lanes += more;
    }
  }
  run();
}

}  // namespace

Tensor fused_mlp(const c10::intrusive_ptr<Layer>& layer, const Tensor& x_TH, const Tensor& token_N,
                 const Tensor& weight_N, const Tensor& offsets_L,
                 const std::optional<Tensor>& center_token_C,
                 const std::optional<Tensor>& center_offsets_G,
                 const std::optional<Tensor>& center_index_N) {
  TORCH_CHECK(x_TH.dim() == 2 && x_TH.size(1) == layer->hidden &&
                  x_TH.scalar_type() == layer->dtype,
              "tokens of another shape or dtype than the layer");
  TORCH_CHECK(layer->activation, "this layer has no activation that kernels know");
  TORCH_CHECK(weight_N.sizes() == token_N.sizes() && weight_N.is_contiguous() &&
                  weight_N.scalar_type() == at::kFloat,
              "weights must be a contiguous float32 vector, one per copy");
  const int64_t tokens = x_TH.size(0), hidden = layer->hidden, rows = layer->rows();
  const Kernels& kernels = kernels_for(layer->dtype);
  const int64_t parts = at::get_num_threads();
  const Tensor y = at::zeros({tokens, padded(hidden)}, x_TH.options().dtype(at::kFloat));
  // With many tokens a shared centre saves nothing: every job adds it to its residual.
  const bool many_tokens = parts * static_cast<int64_t>(y.nbytes()) > kMaxSummedBytes;
  const bool shares = center_token_C.has_value() && !many_tokens;
  const std::vector<Job> jobs =
      layer->jobs(shares ? Part::kResidual : Part::kWhole, {token_N, offsets_L, tokens});
  const int64_t min_packed =
      layer->is_quantized() ? kMinPackedQuantized : kernels.lane_layout.min_copies;
  std::vector<Job> few, many;
  for (size_t k = 0; k < jobs.size(); ++k) {
    if (!jobs[k].copies) continue;
    const bool shared = shares && layer->center_of[k] >= 0;
    const bool packed = many_tokens || (!shared && jobs[k].copies >= min_packed);
    (packed ? many : few).push_back(jobs[k]);
  }
  // Weights, tokens and outputs of quantised layers are rotated.
  const Tensor x_rotated = layer->is_quantized() ? rotated(*layer, x_TH, false) : Tensor();
  const auto padded_tokens = [&] {
    return with_padding(layer->is_quantized() ? x_rotated.to(layer->dtype) : x_TH);
  };
  const int64_t* token = token_N.const_data_ptr<int64_t>();
  const float* weight = weight_N.const_data_ptr<float>();
  if (!few.empty()) {
    std::vector<SharedCenter> centers;
    const int64_t *token_C = nullptr, *index_N = nullptr;
    int64_t num_C = 0;
    if (shares) {
      TORCH_CHECK(center_offsets_G && center_index_N, "centres without offsets or indices");
      num_C = center_token_C->size(0);
      for (const Job& job : layer->jobs(Part::kCenter, {*center_token_C, *center_offsets_G, tokens})) {
        if (job.copies) centers.push_back({job.rows, job.first_copy, job.copies});
      }
      TORCH_CHECK(center_index_N->sizes() == token_N.sizes() && center_index_N->is_contiguous() &&
                      center_index_N->scalar_type() == at::kLong,
                  "centre indices must be a contiguous int64 vector, one per copy");
      token_C = center_token_C->const_data_ptr<int64_t>();
      index_N = center_index_N->const_data_ptr<int64_t>();
      for (const Job& job : few) {
        for (int64_t n = job.first_copy; n < job.first_copy + job.copies; ++n) {
          TORCH_CHECK(index_N[n] >= -1 && index_N[n] < num_C, "no centre row ", index_N[n]);
        }
      }
    }
    // Without sharing no copy has a centre row.
    std::vector<int64_t> no_index;
    if (!index_N) {
      no_index.assign(token_N.size(0), -1);
      index_N = no_index.data();
    }
    const Tensor x = layer->is_quantized() ? x_rotated : padded_tokens();
    const RoutedInput input = {few.data(),  static_cast<int64_t>(few.size()),
                               token,       x.data_ptr(),
                               x.stride(0), hidden,
                               layer->inputs};
    const Mlp work = {input,   weight, centers.data(), static_cast<int64_t>(centers.size()),
                      token_C, num_C,  index_N,        *layer->activation};
    if (layer->is_quantized()) {
      const TokenLevels levels(x_rotated, *layer);
      const QuantizedMlp quantized = {work, levels.of_token.data()};
      add_mlp(rows, y, [&](int64_t begin, int64_t end, float* sums) {
        kernels.quantized_mlp(quantized, begin, end, sums);
      });
    } else {
      add_mlp(rows, y, [&](int64_t begin, int64_t end, float* sums) {
        kernels.mlp(work, begin, end, sums);
      });
    }
  }
  if (!many.empty() && rows) {
    const Tensor x = padded_tokens();
    PackedMlp packed = {};
    packed.hidden = hidden;
    packed.inputs = layer->inputs;
    packed.activation = *layer->activation;
    packed.x_TH = x.data_ptr();
    packed.x_stride = x.stride(0);
    packed.y_TH = y.data_ptr<float>();
    add_packed_mlp_in_turn(many, packed, rows, token, weight, kernels, x.options());
  }
  const Tensor out = y.narrow(1, 0, hidden);
  return layer->is_quantized() ? rotated(*layer, out, true) : out.contiguous();
}

}  // namespace resmoe
