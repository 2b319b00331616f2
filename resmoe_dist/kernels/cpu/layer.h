// The weights of one MoE layer as the kernels read them: checked once, used for every token.

#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/custom_class.h>
#include <torch/custom_class.h>

#include <optional>
#include <string>
#include <vector>

#include "kernels.h"

namespace resmoe {

// Which weights a product uses: an expert's residual alone, its centre plus residual, or the centre
// that a group of experts shares.
enum class Part { kResidual, kWhole, kCenter };

Part as_part(const std::string& name);

Activation as_activation(const std::string& name);

// Copies sorted by job (an expert, or a shared centre), as PyTorch passes them.
//
// token_N: int64, the row of x of each copy. offsets_J: int64, one more than there are jobs: copies
// [offsets[j], offsets[j + 1]) belong to job j. Copies after the last offset are ignored.
struct Copies {
  const at::Tensor& token_N;
  const at::Tensor& offsets_J;
  int64_t num_tokens;
};

// A quantised matrix, checked. Row biases are no part of it.
struct QuantizedWeights : torch::CustomClassHolder {
  // codes: uint8 [S, P]. scales: uint8 [S, G]. top: float32 [1]. coder: "scalar" or "trellis".
  // window_bits, factors, mark: see quantized.h.
  QuantizedWeights(at::Tensor codes, at::Tensor scales, const at::Tensor& top,
                   const std::string& coder, int64_t bits, int64_t window_bits,
                   int64_t group_size, int64_t hidden, int64_t blocks,
                   int64_t first_factor, int64_t second_factor, int64_t mark);

  int64_t rows() const { return tensors_[0].size(0); }

  QuantizedMatrix matrix;
  int64_t blocks;

 private:
  std::vector<at::Tensor> tensors_;  // keeps the memory alive
};

// One layer: L experts of S rows, some with one of G shared centres. Each expert is a pruned
// residual, and centres are dense; or all are quantised.
struct Layer : torch::CustomClassHolder {
  using QuantizedList = std::vector<c10::intrusive_ptr<QuantizedWeights>>;

  // bitmaps, values, row_offsets: of each expert. centers: [S, D] of each centre. center_of: which
  // centre each expert uses, -1 for none. activation: a name, or "" if only the half products and
  // `restore` are used.
  Layer(std::vector<at::Tensor> bitmaps, std::vector<at::Tensor> values,
        std::vector<at::Tensor> row_offsets, std::vector<at::Tensor> centers,
        std::vector<int64_t> center_of, int64_t hidden, int64_t inputs,
        const std::string& activation);

  // A layer of quantised matrices, for tokens of a dtype. signs: of the rotation, float32 [H], with
  // Hadamard transforms of `hadamard_size`; empty for no rotation.
  static c10::intrusive_ptr<Layer> quantized(QuantizedList residuals, QuantizedList centers,
                                             std::vector<int64_t> center_of, int64_t hidden,
                                             int64_t inputs, const std::string& activation,
                                             const at::Tensor& signs, int64_t hadamard_size,
                                             at::ScalarType dtype);

  // Rows from first_row on of one job (an expert, or a centre) of a part.
  Rows rows_of(Part part, int64_t job, int64_t first_row) const;

  // The jobs of a part with their copies. Raises if token numbers or offsets are out of range.
  std::vector<Job> jobs(Part part, const Copies& copies, int64_t first_row = 0) const;

  int64_t rows() const { return rows_; }
  int64_t columns() const { return columns_; }
  size_t num_experts() const { return residuals_.size(); }
  bool is_quantized() const { return !quantized_.empty(); }

  at::ScalarType dtype;
  int64_t hidden;
  int64_t inputs;
  std::optional<Activation> activation;
  std::vector<int64_t> center_of;
  Rotation rotation;  // of quantised matrices

 private:
  Layer() = default;
  const std::vector<Rows>& all(Part part) const;

  int64_t rows_ = 0;
  int64_t columns_ = 0;  // of the narrowest matrix, padding of the bitmap included
  int64_t itemsize_;
  std::vector<Rows> residuals_, wholes_, centers_;
  std::vector<at::Tensor> tensors_;  // keeps the memory alive
  QuantizedList quantized_;          // the same
};

// x with zeros after its rows. The stride is no power of two: otherwise the same columns of several
// rows would compete for the same few cache lines.
at::Tensor with_padding(const at::Tensor& x_TH);

// x [T, H] in float32, rotated as the layer's weights are, or rotated back.
at::Tensor rotated(const Layer& layer, const at::Tensor& x_TH, bool back);

// A whole MLP of every copy; see `fused_mlp.cpp`.
at::Tensor fused_mlp(const c10::intrusive_ptr<Layer>& layer, const at::Tensor& x_TH,
                     const at::Tensor& token_N, const at::Tensor& weight_N,
                     const at::Tensor& offsets_L, const std::optional<at::Tensor>& center_token_C,
                     const std::optional<at::Tensor>& center_offsets_G,
                     const std::optional<at::Tensor>& center_index_N);

}  // namespace resmoe
