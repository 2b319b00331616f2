#include "layer.h"

#include <ATen/Functions.h>

#include <algorithm>

namespace resmoe {

namespace {

using at::Tensor;

// Whether the offsets ascend within the values.
bool in_order(const Rows& rows, int64_t count) {
  bool right = rows.offset(0) >= 0 && rows.offset(count) <= rows.num_values;
  for (int64_t row = 0; row < count; ++row) right &= rows.offset(row) <= rows.offset(row + 1);
  return right;
}

Rows center_rows(const Tensor& center, at::ScalarType dtype, int64_t rows, int64_t columns) {
  TORCH_CHECK(center.dim() == 2 && (!rows || center.stride(1) == 1) && center.size(0) == rows &&
                  center.size(1) >= columns && center.scalar_type() == dtype,
              "centre of another shape, layout or dtype");
  Rows found;
  found.center = center.data_ptr();
  found.center_stride = center.stride(0);
  return found;
}

// Checks everything that a kernel relies on, except the bitmap's contents: reading a checkpoint
// compares those with the offsets.
Rows residual_rows(const Tensor& bitmap, const Tensor& values, const Tensor& offsets,
                   at::ScalarType dtype, int64_t rows, int64_t columns) {
  TORCH_CHECK(bitmap.dim() == 2 && bitmap.is_contiguous() && bitmap.size(0) == rows &&
                  8 * bitmap.size(1) >= columns && bitmap.scalar_type() == at::kByte,
              "bitmap of another shape, layout or dtype");
  TORCH_CHECK(values.dim() == 1 && values.is_contiguous() && values.scalar_type() == dtype,
              "values of another shape, layout or dtype");
  TORCH_CHECK(offsets.dim() == 1 && offsets.is_contiguous() && offsets.size(0) == rows + 1 &&
                  (offsets.scalar_type() == at::kInt || offsets.scalar_type() == at::kLong),
              "row offsets of another shape, layout or dtype");
  Rows found;
  found.bitmap = bitmap.const_data_ptr<uint8_t>();
  found.bitmap_stride = bitmap.size(1);
  found.values = values.data_ptr();
  found.num_values = values.size(0);
  if (offsets.scalar_type() == at::kInt) {
    found.offsets_32 = offsets.const_data_ptr<int32_t>();
  } else {
    found.offsets_64 = offsets.const_data_ptr<int64_t>();
  }
  TORCH_CHECK(in_order(found, rows), "row offsets out of order, or past the values");
  return found;
}

Rows from_row(Rows rows, int64_t first_row, int64_t itemsize) {
  if (rows.center) {
    rows.center = static_cast<const char*>(rows.center) + first_row * rows.center_stride * itemsize;
  }
  if (rows.bitmap) rows.bitmap += first_row * rows.bitmap_stride;
  if (rows.offsets_32) rows.offsets_32 += first_row;
  if (rows.offsets_64) rows.offsets_64 += first_row;
  rows.first_row += first_row;
  return rows;
}

}  // namespace

Part as_part(const std::string& name) {
  if (name == "residual") return Part::kResidual;
  if (name == "whole") return Part::kWhole;
  TORCH_CHECK(name == "center", "no part ", name);
  return Part::kCenter;
}

Activation as_activation(const std::string& name) {
  if (name == "silu") return Activation::kSilu;
  if (name == "gelu_tanh") return Activation::kGeluTanh;
  TORCH_CHECK(name == "relu", "no activation ", name);
  return Activation::kRelu;
}

Layer::Layer(std::vector<Tensor> bitmaps, std::vector<Tensor> values,
             std::vector<Tensor> row_offsets, std::vector<Tensor> centers,
             std::vector<int64_t> center_of_L, int64_t hidden, int64_t inputs,
             const std::string& activation)
    : hidden(hidden), inputs(inputs), center_of(std::move(center_of_L)) {
  TORCH_CHECK(inputs == 1 || inputs == 2, "1 or 2 inputs");
  TORCH_CHECK(hidden >= 0, "hidden size below 0");
  for (const size_t size : {values.size(), row_offsets.size(), center_of.size()}) {
    TORCH_CHECK(!bitmaps.empty() && size == bitmaps.size(), "lists of different lengths");
  }
  if (!activation.empty()) this->activation = as_activation(activation);
  dtype = values[0].scalar_type();
  itemsize_ = values[0].element_size();
  TORCH_CHECK(bitmaps[0].dim() == 2, "bitmap of another shape, layout or dtype");
  rows_ = bitmaps[0].size(0);
  const int64_t least_columns = (inputs + 1) * hidden;
  columns_ = 8 * bitmaps[0].size(1);
  for (const Tensor& center : centers) {
    centers_.push_back(center_rows(center, dtype, rows_, least_columns));
    columns_ = std::min(columns_, center.size(1));
  }
  for (size_t k = 0; k < bitmaps.size(); ++k) {
    const int64_t center = center_of[k];
    TORCH_CHECK(center >= -1 && center < static_cast<int64_t>(centers.size()), "no centre ",
                center);
    residuals_.push_back(
        residual_rows(bitmaps[k], values[k], row_offsets[k], dtype, rows_, least_columns));
    columns_ = std::min(columns_, 8 * bitmaps[k].size(1));
    Rows whole = residuals_.back();
    if (center >= 0) {
      whole.center = centers_[center].center;
      whole.center_stride = centers_[center].center_stride;
    }
    wholes_.push_back(whole);
  }
  for (const auto* list : {&bitmaps, &values, &row_offsets, &centers}) {
    tensors_.insert(tensors_.end(), list->begin(), list->end());
  }
}

const std::vector<Rows>& Layer::all(Part part) const {
  if (part == Part::kCenter) return centers_;
  return part == Part::kWhole ? wholes_ : residuals_;
}

Rows Layer::rows_of(Part part, int64_t job, int64_t first_row) const {
  return from_row(all(part)[job], first_row, itemsize_);
}

std::vector<Job> Layer::jobs(Part part, const Copies& copies, int64_t first_row) const {
  const Tensor& token_N = copies.token_N;
  const Tensor& offsets_J = copies.offsets_J;
  for (const Tensor* numbers : {&token_N, &offsets_J}) {
    TORCH_CHECK(numbers->dim() == 1 && numbers->is_contiguous() &&
                    numbers->scalar_type() == at::kLong,
                "token numbers and offsets must be contiguous int64 vectors");
  }
  const int64_t num_jobs = all(part).size();
  TORCH_CHECK(num_jobs && offsets_J.size(0) == num_jobs + 1, "expected ", num_jobs + 1,
              " offsets, got ", offsets_J.size(0));
  const int64_t* token = token_N.const_data_ptr<int64_t>();
  const int64_t* offset = offsets_J.const_data_ptr<int64_t>();
  std::vector<Job> jobs;
  jobs.reserve(num_jobs);
  for (int64_t j = 0; j < num_jobs; ++j) {
    TORCH_CHECK(offset[j] >= 0 && offset[j] <= offset[j + 1] && offset[j + 1] <= token_N.size(0),
                "offsets out of order, or past the copies");
    bool distinct = true;
    for (int64_t n = offset[j]; n < offset[j + 1]; ++n) {
      TORCH_CHECK(token[n] >= 0 && token[n] < copies.num_tokens, "no token ", token[n]);
      distinct = distinct && (n == offset[j] || token[n - 1] < token[n]);
    }
    jobs.push_back({rows_of(part, j, first_row), offset[j], offset[j + 1] - offset[j], distinct});
  }
  return jobs;
}

Tensor with_padding(const Tensor& x_TH) {
  return at::constant_pad_nd(x_TH, {0, padded(x_TH.size(1)) - x_TH.size(1) + 32});
}

}  // namespace resmoe
