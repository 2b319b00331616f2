// The operations that PyTorch sees, except `mlp`, which is in fused_mlp.cpp.

#include <ATen/Functions.h>
#include <torch/library.h>

#include <algorithm>

#include "dispatch.h"
#include "layer.h"

namespace resmoe {

namespace {

using at::Tensor;
using LayerPtr = c10::intrusive_ptr<Layer>;

// Up to this size, every thread gets its own output; they are added up at the end.
constexpr int64_t kSummedBytes = 4 << 20;

// Larger outputs are written past the caches.
constexpr int64_t kStreamedBytes = 16 << 20;

// Centre plus residual of one expert, rotated back if it is quantised: as many rows and columns as `out` has, from first_row and
// first_column on.
void restore(const LayerPtr& layer, int64_t expert, Tensor& out_RC, int64_t first_row,
             int64_t first_column) {
  TORCH_CHECK(out_RC.dim() == 2 && out_RC.stride(1) == 1 && out_RC.scalar_type() == layer->dtype,
              "output must have contiguous rows of the layer's dtype");
  TORCH_CHECK(expert >= 0 && expert < static_cast<int64_t>(layer->num_experts()), "no expert ",
              expert);
  const int64_t count = out_RC.size(0);
  TORCH_CHECK(first_row >= 0 && first_row + count <= layer->rows() && first_column >= 0 &&
                  first_column + out_RC.size(1) <= layer->columns(),
              "no such rows or columns");
  Restore work;
  work.rows = layer->rows_of(Part::kWhole, expert, first_row);
  work.rotation = layer->rotation;
  work.first_column = first_column;
  work.columns = out_RC.size(1);
  work.out = out_RC.data_ptr();
  work.out_stride = out_RC.stride(0);
  work.stream = static_cast<int64_t>(out_RC.nbytes()) > kStreamedBytes;
  const auto run = kernels_for(layer->dtype).restore;
  at::parallel_for(0, count, 64, [&](int64_t begin, int64_t end) { run(work, begin, end); });
}

void check_rows(const Layer& layer, int64_t first_row, int64_t rows) {
  TORCH_CHECK(first_row >= 0 && rows >= 0 && first_row + rows <= layer.rows(), "no such rows");
}

// Products of copies with the input columns of rows [first_row, first_row + rows) of their job:
// [N, inputs·rows] in float32. Copies without a job get zeros.
Tensor project_in(const LayerPtr& layer, const std::string& part, const Tensor& x_TH,
                  const Tensor& token_N, const Tensor& offsets_J, int64_t first_row,
                  int64_t rows) {
  TORCH_CHECK(x_TH.dim() == 2 && x_TH.size(1) == layer->hidden &&
                  x_TH.scalar_type() == layer->dtype,
              "tokens of another shape or dtype than the layer");
  check_rows(*layer, first_row, rows);
  const auto jobs =
      layer->jobs(as_part(part), {token_N, offsets_J, x_TH.size(0)}, first_row);
  const Tensor x = with_padding(x_TH);
  Tensor out = at::empty({token_N.size(0), layer->inputs * rows}, x.options().dtype(at::kFloat));
  const int64_t routed = jobs.back().first_copy + jobs.back().copies;
  if (routed < out.size(0)) out.narrow(0, routed, out.size(0) - routed).zero_();
  const RoutedInput input = {jobs.data(),
                             static_cast<int64_t>(jobs.size()),
                             token_N.const_data_ptr<int64_t>(),
                             x.data_ptr(),
                             x.stride(0),
                             layer->hidden,
                             layer->inputs};
  const ProjectIn work = {input, out.data_ptr<float>(), rows};
  const auto run = kernels_for(layer->dtype).project_in;
  share(rows, at::get_num_threads(), [&](int64_t, int64_t begin, int64_t end) {
    run(work, begin, end);
  });
  return out;
}

// The sum over the first dimension of contiguous parts; see sums.h.
Tensor add_up(const Tensor& parts_PX) {
  TORCH_CHECK(parts_PX.dim() > 0 && parts_PX.size(0) > 0 && parts_PX.is_contiguous(),
              "expected contiguous parts, at least one");
  const Tensor out = at::empty(parts_PX.sizes().slice(1), parts_PX.options());
  const AddParts work = {parts_PX.data_ptr(), parts_PX.size(0), out.numel(), out.data_ptr()};
  const auto run = kernels_for(parts_PX.scalar_type()).add_parts;
  at::parallel_for(0, work.size, 1 << 14,
                   [&](int64_t begin, int64_t end) { run(work, begin, end); });
  return out;
}

// See `rotated`.
Tensor rotate(const LayerPtr& layer, const Tensor& x_TH, bool back) {
  return rotated(*layer, x_TH, back);
}

// Products of activations [N, rows] with the output columns of rows [first_row, first_row + rows)
// of their job, added up per token: [T, H] in float32.
Tensor project_out(const LayerPtr& layer, const std::string& part, const Tensor& h_NR,
                   const Tensor& token_N, const Tensor& offsets_J, int64_t first_row,
                   int64_t num_tokens) {
  TORCH_CHECK(h_NR.dim() == 2 && h_NR.scalar_type() == layer->dtype &&
                  h_NR.size(0) == token_N.size(0),
              "activations of another shape or dtype than the layer and its copies");
  TORCH_CHECK(num_tokens >= 0, "negative number of tokens");
  const int64_t rows = h_NR.size(1), hidden = layer->hidden;
  check_rows(*layer, first_row, rows);
  const auto jobs = layer->jobs(as_part(part), {token_N, offsets_J, num_tokens}, first_row);
  const Tensor h = h_NR.contiguous();
  const ProjectOut work = {jobs.data(),  static_cast<int64_t>(jobs.size()),
                           token_N.const_data_ptr<int64_t>(),
                           h.data_ptr(), hidden,
                           layer->inputs, rows};
  const auto run = kernels_for(layer->dtype).project_out;
  const int64_t parts = at::get_num_threads();
  const int64_t width = padded(hidden);
  const auto floats = h.options().dtype(at::kFloat);
  const int64_t size = num_tokens * width;
  if (parts * size * 4 <= kSummedBytes) {
    // Threads share the rows, which reads memory in long stretches; each has its own sum.
    const Tensor sums = at::zeros({parts, num_tokens, width}, floats);
    float* y = sums.data_ptr<float>();
    share(rows, parts, [&](int64_t part_number, int64_t begin, int64_t end) {
      run(work, {begin, end, 0, hidden, y + part_number * size});
    });
    return sums.sum(0).narrow(1, 0, hidden);
  }
  // Threads share the columns: adding up sums this large would cost more than it saves.
  const Tensor sum = at::zeros({num_tokens, width}, floats);
  float* y = sum.data_ptr<float>();
  share(width / kPadding, parts, [&](int64_t, int64_t begin, int64_t end) {
    run(work, {0, rows, begin * kPadding, std::min(end * kPadding, hidden), y});
  });
  return sum.narrow(1, 0, hidden);
}

// Layer::quantized, with the dtype as PyTorch passes it.
LayerPtr quantized_layer(Layer::QuantizedList residuals, Layer::QuantizedList centers,
                         std::vector<int64_t> center_of, int64_t hidden, int64_t inputs,
                         std::string activation, Tensor signs, int64_t hadamard_size,
                         at::ScalarType dtype) {
  return Layer::quantized(std::move(residuals), std::move(centers), std::move(center_of), hidden,
                          inputs, activation, signs, hadamard_size, dtype);
}

}  // namespace

TORCH_LIBRARY(resmoe, library) {
  library.class_<QuantizedWeights>("QuantizedMatrix")
      .def(torch::init<Tensor, Tensor, const Tensor&, const std::string&, int64_t, int64_t, int64_t,
                       int64_t, int64_t, int64_t, int64_t, int64_t>());
  library.class_<Layer>("Layer").def(
      torch::init<std::vector<Tensor>, std::vector<Tensor>, std::vector<Tensor>,
                  std::vector<Tensor>, std::vector<int64_t>, int64_t, int64_t,
                  const std::string&>())
      .def_static("quantized", quantized_layer);
  library.def("instruction_sets() -> str[]", instruction_sets);
  library.def("use_instruction_set(str name) -> ()", use_instruction_set);
  library.def(
      "restore(__torch__.torch.classes.resmoe.Layer layer, int expert, Tensor(a!) out, "
      "int first_row, int first_column) -> ()");
  library.def(
      "project_in(__torch__.torch.classes.resmoe.Layer layer, str part, Tensor x, Tensor token, "
      "Tensor offsets, int first_row, int rows) -> Tensor");
  library.def(
      "project_out(__torch__.torch.classes.resmoe.Layer layer, str part, Tensor h, Tensor token, "
      "Tensor offsets, int first_row, int num_tokens) -> Tensor");
  library.def("add_up(Tensor parts) -> Tensor");
  library.def(
      "rotate(__torch__.torch.classes.resmoe.Layer layer, Tensor x, bool back) -> Tensor");
  library.def(
      "mlp(__torch__.torch.classes.resmoe.Layer layer, Tensor x, Tensor token, Tensor weight, "
      "Tensor offsets, Tensor? center_token, Tensor? center_offsets, Tensor? center_index) "
      "-> Tensor");
}

TORCH_LIBRARY_IMPL(resmoe, CPU, library) {
  library.impl("restore", restore);
  library.impl("project_in", project_in);
  library.impl("project_out", project_out);
  library.impl("rotate", rotate);
  library.impl("add_up", add_up);
  library.impl("mlp", fused_mlp);
}

}  // namespace resmoe
