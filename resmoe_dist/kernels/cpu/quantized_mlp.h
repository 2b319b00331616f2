// Fused MLPs over quantised rows, for few copies per job: the steps of mlp.h, with the products of
// quantized_products.h.

#pragma once

#include "mlp.h"
#include "quantized_out.h"

namespace {

// Rows per block: their bytes stay in the second-level cache between the way in and the way out.
constexpr int64_t kLevelRows = 2 * kMaxDots;

// The parts of a job's rows: a residual, a centre, or both. Null for an absent part.
struct QuantizedParts {
  const QuantizedMatrix* part[2];

  explicit QuantizedParts(const Rows& rows) : part{rows.quantized, rows.quantized_center} {}
};

// Multiplies a block of rows with copies on the way in. products: see levels_in.
template <int kPlanes>
void parts_in(const Rows& rows, int64_t first, int64_t count, const QuantizedMlp& work,
              const int64_t* token, int64_t copies, MatrixView<float> products) {
  const Tile<const LevelVector*, Use::kLevels> x(1, copies);
  for (int64_t n = 0; n < copies; ++n) x.row(0)[n] = work.levels_T + token[n];
  bool add = false;
  for (const QuantizedMatrix* part : QuantizedParts(rows).part) {
    if (!part) continue;
    levels_in<kPlanes>(*part, rows.first_row + first, count, work.inputs, x.row(0), copies,
                       kLevelRows, products, add);
    add = true;
  }
}

template <int kPlanes>
void parts_out(const Rows& rows, int64_t first, int64_t count, const QuantizedMlp& work,
               MatrixView<const float> h, const int64_t* token, int64_t copies, bool distinct,
               MatrixView<float> y_TH) {
  for (const QuantizedMatrix* part : QuantizedParts(rows).part) {
    if (!part) continue;
    levels_out<kPlanes>(*part, rows.first_row + first, count, work.inputs, h, token, copies,
                        distinct, y_TH);
  }
}

template <int kPlanes>
void tokens_to_levels(const ToLevels& work, int64_t begin, int64_t end) {
  for (int64_t t = begin; t < end; ++t) {
    to_levels<kPlanes>(work.x_TH + t * work.x_stride, work.hidden, work.levels_T[t]);
  }
}

// See mlp_rows, whose steps these are.
template <int kPlanes>
void quantized_mlp_rows(const QuantizedMlp& work, int64_t begin, int64_t end, float* y) {
  const MatrixView<float> y_TH = {y, padded(work.hidden)};
  const int64_t copies = max_copies(work), center_tokens = work.num_center_rows;
  const int64_t products_width = work.inputs * kLevelRows;
  const Tile<float, Use::kProducts> products(copies, products_width);
  const Tile<float, Use::kCenterProducts> center_products(center_tokens, products_width);
  const Tile<float, Use::kCenterSums> center_sums(center_tokens, kLevelRows);
  const Tile<float, Use::kActivations> h(copies, kLevelRows);
  // Without shared centres, each job takes all rows: long uninterrupted reads are fastest.
  const bool shares = work.num_centers > 0;
  const auto run_job = [&](const Job& job, int64_t first, int64_t rows) {
    const int64_t* token = work.token_N + job.first_copy;
    parts_in<kPlanes>(job.rows, first, rows, work, token, job.copies, products);
    activate_block<float>(work, job, rows, kLevelRows, products, center_products, h, center_sums);
    parts_out<kPlanes>(job.rows, first, rows, work, h, token, job.copies, job.distinct, y_TH);
  };
  if (!shares) {
    for (int64_t j = 0; j < work.num_jobs; ++j) {
      for (int64_t first = begin; first < end; first += kLevelRows) {
        run_job(work.jobs[j], first, std::min(kLevelRows, end - first));
      }
    }
    return;
  }
  for (int64_t first = begin; first < end; first += kLevelRows) {
    const int64_t rows = std::min(kLevelRows, end - first);
    for (int64_t c = 0; c < work.num_centers; ++c) {
      const SharedCenter& center = work.centers[c];
      parts_in<kPlanes>(center.rows, first, rows, work, work.token_C + center.first, center.count,
                        {center_products.row(center.first), center_products.stride()});
    }
    for (int64_t n = 0; n < center_tokens; ++n) {
      std::fill(center_sums.row(n), center_sums.row(n) + kLevelRows, 0.0f);
    }
    for (int64_t j = 0; j < work.num_jobs; ++j) run_job(work.jobs[j], first, rows);
    for (int64_t c = 0; c < work.num_centers; ++c) {
      const SharedCenter& center = work.centers[c];
      parts_out<kPlanes>(center.rows, first, rows, work,
                         {center_sums.row(center.first), center_sums.stride()},
                         work.token_C + center.first, center.count, true, y_TH);
    }
  }
}

}  // namespace
