// Fused MLPs for few copies per job: one pass over the rows, intermediates stay in cache.
//
// A row of a design matrix holds a neuron's weights on the way in and on the way out, so a block of
// rows takes the tokens all the way to the outputs. Memory is read once, from front to back. A
// centre that several jobs share is multiplied once per token, first on the way in and last on the
// way out:
//
//     h_k = g_k · act(C_in x + R_k,in x)
//     y   = Σ R_k,out h_k + C_out Σ h_k
//
// with g_k the weight of the copy.

#pragma once

#include "activations.h"
#include "products.h"

namespace {

inline int64_t max_copies(const Mlp& work) {
  int64_t result = 0;
  for (int64_t j = 0; j < work.num_jobs; ++j) result = std::max(result, work.jobs[j].copies);
  return result;
}

// Rows per block. Small blocks read memory nearly from front to back, which is best for few tokens.
// Outputs are read and written once per block, so blocks are larger for more tokens.
inline int64_t mlp_block_rows(const Mlp& work) {
  int64_t max_tokens = max_copies(work);
  for (int64_t c = 0; c < work.num_centers; ++c) {
    max_tokens = std::max(max_tokens, work.centers[c].count);
  }
  return max_tokens <= kFewCopies ? 16 : 64;
}

// From products on the way in to activations, for one job and a block of `rows` rows:
// h.row(copy)[row] = weight of the copy · act(…), also added to the sums of the copy's shared
// centre. Processes `block_rows` rows, which is a multiple of the vectors' width.
template <class Scalar>
void activate_block(const Mlp& work, const Job& job, int64_t rows, int64_t block_rows,
                    MatrixView<float> products, MatrixView<const float> center_products,
                    MatrixView<Scalar> h, MatrixView<float> center_sums) {
  constexpr int64_t kWidth = Primitives<Scalar>::kLanes;
  using Vec = Vector<kWidth>;
  for (int64_t n = 0; n < job.copies; ++n) {
    const int64_t index = work.index_N[job.first_copy + n];
    const float weight = work.weight_N[job.first_copy + n];
    const float* product = products.row(n);
    for (int64_t r = 0; r < block_rows; r += kWidth) {
      typename Vec::Floats in[2];
      for (int64_t i = 0; i < work.inputs; ++i) {
        in[i] = Vec::load(product + i * block_rows + r);
        if (index >= 0) in[i] += Vec::load(center_products.row(index) + i * block_rows + r);
      }
      typename Vec::Floats value = activate<Vec>(work.activation, in[0]) * weight;
      if (work.inputs == 2) value *= in[1];
      Vec::store(value, h.row(n) + r);
      if (index >= 0) {
        float* sum = center_sums.row(index) + r;
        Vec::store(Vec::load(sum) + value, sum);
      }
    }
    // `multiply_out` reads an even number of rows.
    if (rows % 2) h.row(n)[rows] = Scalar{};
  }
}

template <class Scalar>
void mlp_rows(const Mlp& work, int64_t begin, int64_t end, float* y) {
  const MatrixView<const Scalar> x_TH = {static_cast<const Scalar*>(work.x_TH), work.x_stride};
  const MatrixView<float> y_TH = {y, padded(work.hidden)};
  const int64_t block_rows = mlp_block_rows(work);
  const int64_t products_width = work.inputs * block_rows;
  thread_local RowBlock<Scalar> block;
  thread_local std::vector<RowBlock<Scalar>> center_blocks;
  if (static_cast<int64_t>(center_blocks.size()) < work.num_centers) {
    center_blocks.resize(work.num_centers);
  }
  const int64_t copies = max_copies(work);
  const int64_t center_tokens = work.num_center_rows;
  const Tile<float, Use::kProducts> products(copies, products_width);
  const Tile<float, Use::kCenterProducts> center_products(center_tokens, products_width);
  const Tile<float, Use::kCenterSums> center_sums(center_tokens, block_rows);
  const Tile<Scalar, Use::kActivations> h(std::max(copies, center_tokens), block_rows);
  const auto copies_of_center = [&](const SharedCenter& center) {
    return Copies{work.token_C + center.first, center.count, true};
  };
  for (int64_t first = begin; first < end; first += block_rows) {
    const int64_t rows = std::min(block_rows, end - first);
    // 1. The way in through the shared centres.
    for (int64_t c = 0; c < work.num_centers; ++c) {
      const SharedCenter& center = work.centers[c];
      center_blocks[c].start(center.rows, first, rows, 0, 0);
      multiply_in<Scalar>(center_blocks[c], work.hidden, work.inputs, x_TH,
                          copies_of_center(center), block_rows,
                          {center_products.row(center.first), center_products.stride()});
    }
    for (int64_t n = 0; n < center_tokens; ++n) {
      std::fill(center_sums.row(n), center_sums.row(n) + block_rows, 0.0f);
    }
    // 2. The jobs: in, activation, out.
    for (int64_t j = 0; j < work.num_jobs; ++j) {
      const Job& job = work.jobs[j];
      if (!job.copies) continue;
      const Copies job_copies = copies_of(job, work.token_N);
      block.start(job.rows, first, rows, 0, 0);
      multiply_in<Scalar>(block, work.hidden, work.inputs, x_TH, job_copies, block_rows, products);
      activate_block<Scalar>(work, job, rows, block_rows, products, center_products, h,
                             center_sums);
      multiply_out<Scalar>(block, 0, work.hidden, h, job_copies, y_TH);
    }
    // 3. The way out through the shared centres.
    for (int64_t c = 0; c < work.num_centers; ++c) {
      const SharedCenter& center = work.centers[c];
      for (int64_t n = 0; n < center.count; ++n) {
        const float* sum = center_sums.row(center.first + n);
        Scalar* of_token = h.row(n);
        for (int64_t r = 0; r < rows; ++r) of_token[r] = round_to<Scalar>(sum[r]);
        if (rows % 2) of_token[rows] = Scalar{};
      }
      multiply_out<Scalar>(center_blocks[c], 0, work.hidden, h, copies_of_center(center), y_TH);
    }
  }
}

}  // namespace
