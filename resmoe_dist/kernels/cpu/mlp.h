// Whole MLPs in one pass over the rows, for few copies per job. Included after `Primitives<V>`.
//
// A neuron's row holds its weights on the way in and out, so a block of rows goes from the tokens
// to the outputs at once: memory is read once, from front to back, and nothing in between leaves
// the caches. A centre that jobs share comes first on the way in, last on the way out:
//
//     h_k = act(C_in x + R_k,in x)
//     y   = Σ g_k R_k,out h_k + C_out Σ g_k h_k

#pragma once

#include "activations.h"
#include "products.h"

namespace {

// Rows at a time: as few as possible for streams from memory that stay in step, more where sums
// would be read and written for each block.
inline int64_t mlp_block(const Mlp& work) {
  int64_t most = 0;
  for (int64_t j = 0; j < work.num_jobs; ++j) most = std::max(most, work.jobs[j].copies);
  for (int64_t c = 0; c < work.num_centers; ++c) most = std::max(most, work.centers[c].count);
  return most <= kFewCopies ? 16 : 64;
}

// g · act(…) of each copy of a job: from its products and those of its centre to h, and to its
// centre's sums.
template <class V>
void activate_block(const Mlp& work, const Job& job, int64_t rows, int64_t most,
                    Vectors<float> products, Vectors<const float> of_centers, Vectors<V> h,
                    Vectors<float> sums) {
  constexpr int64_t W = Primitives<V>::kLanes;
  using X = Vector<W>;
  for (int64_t n = 0; n < job.copies; ++n) {
    const int64_t index = work.index_N[job.first_copy + n];
    const float weight = work.weight_N[job.first_copy + n];
    const float* product = products.row(n);
    for (int64_t r = 0; r < most; r += W) {
      typename X::Floats in[2];
      for (int64_t i = 0; i < work.inputs; ++i) {
        in[i] = X::load(product + i * most + r);
        if (index >= 0) in[i] += X::load(of_centers.row(index) + i * most + r);
      }
      typename X::Floats value = activate<X>(work.activation, in[0]) * weight;
      if (work.inputs == 2) value *= in[1];
      X::store(value, h.row(n) + r);
      if (index >= 0) X::store(X::load(sums.row(index) + r) + value, sums.row(index) + r);
    }
    // A partner for the last of an odd number of rows.
    if (rows % 2) h.row(n)[rows] = V{};
  }
}

template <class V>
void mlp_rows(const Mlp& work, int64_t begin, int64_t end, float* y_TH) {
  const Vectors<const V> x = {static_cast<const V*>(work.x_TH), work.x_stride};
  const Vectors<float> y = {y_TH, padded(work.hidden)};
  const int64_t block = mlp_block(work);
  const int64_t width = work.inputs * block;
  thread_local Strip<V> strip;
  thread_local std::vector<Strip<V>> of_centers;
  if (static_cast<int64_t>(of_centers.size()) < work.num_centers) {
    of_centers.resize(work.num_centers);
  }
  int64_t most = 0;
  for (int64_t j = 0; j < work.num_jobs; ++j) most = std::max(most, work.jobs[j].copies);
  const Tile<float, kProducts> products(most, width);
  const Tile<float, kOfCenters> center_products(work.num_of_centers, width);
  const Tile<float, kSums> sums(work.num_of_centers, block);
  const Tile<V, kActivations> h(std::max(most, work.num_of_centers), block);
  const auto copies_of = [&](const SharedCenter& center) {
    return Copies{work.token_C + center.first, center.count, true};
  };
  for (int64_t first = begin; first < end; first += block) {
    const int64_t rows = std::min(block, end - first);
    // 1. What the centres make of the tokens.
    for (int64_t c = 0; c < work.num_centers; ++c) {
      const SharedCenter& center = work.centers[c];
      of_centers[c].start(center.rows, first, rows, 0, 0);
      multiply_in(of_centers[c], work.hidden, work.inputs, x, copies_of(center), block,
                  {center_products.row(center.first), center_products.stride()});
    }
    for (int64_t n = 0; n < work.num_of_centers; ++n) {
      std::fill(sums.row(n), sums.row(n) + block, 0.0f);
    }
    // 2. The jobs, there and back.
    for (int64_t j = 0; j < work.num_jobs; ++j) {
      const Job& job = work.jobs[j];
      if (!job.copies) continue;
      const Copies copies = {work.token_N + job.first_copy, job.copies, job.distinct};
      strip.start(job.rows, first, rows, 0, 0);
      multiply_in(strip, work.hidden, work.inputs, x, copies, block,
                  {products.row(0), products.stride()});
      activate_block<V>(work, job, rows, block, {products.row(0), products.stride()},
                        {center_products.row(0), center_products.stride()},
                        {h.row(0), h.stride()}, {sums.row(0), sums.stride()});
      multiply_out(strip, 0, work.hidden, {h.row(0), h.stride()}, copies, y);
    }
    // 3. The centres back.
    for (int64_t c = 0; c < work.num_centers; ++c) {
      const SharedCenter& center = work.centers[c];
      for (int64_t n = 0; n < center.count; ++n) {
        const float* sum = sums.row(center.first + n);
        V* of_token = h.row(n);
        for (int64_t r = 0; r < rows; ++r) of_token[r] = round_to(sum[r], V{});
        if (rows % 2) of_token[rows] = V{};
      }
      multiply_out(of_centers[c], 0, work.hidden, {h.row(0), h.stride()}, copies_of(center), y);
    }
  }
}

}  // namespace
