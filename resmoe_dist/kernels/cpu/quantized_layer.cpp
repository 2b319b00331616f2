// Quantised layers: checked when they are loaded.

#include <ATen/Functions.h>

#include <cmath>
#include <cstring>

#include "dispatch.h"
#include "layer.h"

namespace resmoe {

namespace {

using at::Tensor;

constexpr int64_t kScalesPerOctave = 16;

// The rows of a contiguous byte matrix, and a copy of its last ones with padding.
ByteRows byte_rows(const Tensor& rows_RP, std::vector<Tensor>& tensors) {
  const int64_t rows = rows_RP.size(0), stride = rows_RP.size(1);
  const int64_t copied = stride ? std::min(rows, (kOverRead + stride - 1) / stride) : 0;
  const Tensor last = at::zeros({copied * stride + kOverRead}, rows_RP.options());
  const uint8_t* bytes = rows_RP.const_data_ptr<uint8_t>();
  if (copied) {
    std::memcpy(last.data_ptr(), bytes + (rows - copied) * stride, copied * stride);
  }
  tensors.push_back(last);
  return {bytes, stride, last.const_data_ptr<uint8_t>(), rows - copied};
}

Coder as_coder(const std::string& name) {
  if (name == "scalar") return Coder::kScalar;
  TORCH_CHECK(name == "trellis", "no coder ", name);
  return Coder::kTrellis;
}

void check_window(Coder coder, int64_t bits, int64_t window_bits) {
  const bool known = bits == 1 || bits == 2 || bits == 3 || bits == 4 || bits == 8;
  if (coder == Coder::kScalar) {
    TORCH_CHECK(known && window_bits == bits, "no scalar coder of ", bits, " bits");
  } else {
    TORCH_CHECK(known && bits <= 4 && window_bits >= bits && window_bits <= 16,
                "no trellis of ", bits, " bits with windows of ", window_bits);
  }
}

}  // namespace

QuantizedWeights::QuantizedWeights(Tensor codes, Tensor scales, const Tensor& top,
                                   const std::string& coder, int64_t bits, int64_t window_bits,
                                   int64_t group_size, int64_t hidden, int64_t blocks,
                                   int64_t first_factor, int64_t second_factor, int64_t mark)
    : matrix{}, blocks(blocks) {
  matrix.coder = as_coder(coder);
  check_window(matrix.coder, bits, window_bits);
  TORCH_CHECK(hidden > 0 && blocks > 0, "no columns");
  TORCH_CHECK(group_size > 0 && (group_size % kLevelStep == 0 || group_size >= hidden),
              "groups of ", group_size, " entries");
  matrix.bits = bits;
  matrix.window_bits = window_bits;
  matrix.factors[0] = static_cast<uint16_t>(first_factor);
  matrix.factors[1] = static_cast<uint16_t>(second_factor);
  matrix.mark = static_cast<uint16_t>(mark);
  matrix.hidden = hidden;
  matrix.group_size = group_size;
  matrix.groups = (hidden + group_size - 1) / group_size;
  for (const Tensor* bytes : {&codes, &scales}) {
    TORCH_CHECK(bytes->dim() == 2 && bytes->is_contiguous() && bytes->scalar_type() == at::kByte,
                "codes and scales must be contiguous matrices of bytes");
  }
  TORCH_CHECK(scales.size(0) == codes.size(0) && scales.size(1) == blocks * matrix.groups,
              "scales of another shape than the codes");
  const int64_t stream_bits = bits * blocks * hidden + window_bits - bits;
  TORCH_CHECK(8 * codes.size(1) >= stream_bits, "codes of fewer columns");
  TORCH_CHECK(top.numel() == 1 && top.scalar_type() == at::kFloat, "top must be one float32");
  const double largest = top.item<float>();
  for (int byte = 1; byte < 256; ++byte) {
    matrix.scale_of[byte] =
        static_cast<float>(largest * std::exp2((byte - 255.0) / kScalesPerOctave));
  }
  tensors_ = {codes, scales};
  matrix.codes = byte_rows(codes, tensors_);
  matrix.scales = byte_rows(scales, tensors_);
}

c10::intrusive_ptr<Layer> Layer::quantized(QuantizedList residuals, QuantizedList centers,
                                           std::vector<int64_t> center_of, int64_t hidden,
                                           int64_t inputs, const std::string& activation,
                                           const Tensor& signs, int64_t hadamard_size,
                                           at::ScalarType dtype) {
  TORCH_CHECK(inputs == 1 || inputs == 2, "1 or 2 inputs");
  TORCH_CHECK(dtype == at::kFloat || dtype == at::kBFloat16, "no kernels for ", dtype);
  TORCH_CHECK(!residuals.empty() && center_of.size() == residuals.size(),
              "lists of different lengths");
  auto layer = c10::intrusive_ptr<Layer>::unsafe_steal_from_new(new Layer());
  layer->hidden = hidden;
  layer->inputs = inputs;
  layer->center_of = std::move(center_of);
  layer->dtype = dtype;
  layer->itemsize_ = c10::elementSize(dtype);
  if (!activation.empty()) layer->activation = as_activation(activation);
  layer->rows_ = residuals[0]->rows();
  layer->columns_ = (inputs + 1) * hidden;
  for (const auto* list : {&residuals, &centers}) {
    for (const auto& weights : *list) {
      TORCH_CHECK(weights->matrix.hidden == hidden && weights->blocks == inputs + 1 &&
                      weights->rows() == layer->rows_,
                  "matrices of different shapes");
      layer->quantized_.push_back(weights);
    }
  }
  for (const auto& center : centers) {
    Rows rows;
    rows.quantized_center = &center->matrix;
    layer->centers_.push_back(rows);
  }
  for (size_t k = 0; k < residuals.size(); ++k) {
    const int64_t center = layer->center_of[k];
    TORCH_CHECK(center >= -1 && center < static_cast<int64_t>(centers.size()), "no centre ",
                center);
    Rows rows;
    rows.quantized = &residuals[k]->matrix;
    layer->residuals_.push_back(rows);
    if (center >= 0) rows.quantized_center = &centers[center]->matrix;
    layer->wholes_.push_back(rows);
  }
  if (signs.numel()) {
    TORCH_CHECK(signs.dim() == 1 && signs.is_contiguous() && signs.size(0) == hidden &&
                    signs.scalar_type() == at::kFloat,
                "signs must be a contiguous float32 vector, one per hidden column");
    TORCH_CHECK(hadamard_size >= 16 && (hadamard_size & (hadamard_size - 1)) == 0 &&
                    hidden % hadamard_size == 0,
                "no Hadamard transform of ", hadamard_size, " of ", hidden, " columns");
    layer->rotation = {signs.const_data_ptr<float>(), hadamard_size};
    layer->tensors_.push_back(signs);
  }
  return layer;
}

Tensor rotated(const Layer& layer, const Tensor& x_TH, bool back) {
  TORCH_CHECK(x_TH.dim() == 2 && x_TH.size(1) == layer.hidden, "vectors of another size");
  Tensor x = x_TH.to(at::kFloat, /*non_blocking=*/false, /*copy=*/true).contiguous();
  const Rotate work = {layer.rotation, back, x.data_ptr<float>(), layer.hidden, layer.hidden};
  const auto run = kernels_for(layer.dtype).rotate;
  at::parallel_for(0, x.size(0), 1, [&](int64_t begin, int64_t end) { run(work, begin, end); });
  return x;
}

}  // namespace resmoe
