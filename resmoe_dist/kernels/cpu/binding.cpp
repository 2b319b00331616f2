// The operations as PyTorch has them: checks, threads, and the choice of an instruction set.

#include <ATen/Functions.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "kernels.h"

namespace {

using at::Tensor;
using namespace resmoe;

// Best first.
const InstructionSet* const kSets[] = {&kAvx512Bf16, &kAvx512, &kAvx2, &kPortable};

const InstructionSet* chosen = nullptr;

const InstructionSet& instruction_set() {
  if (!chosen) {
    for (const auto* set : kSets) {
      if (!chosen && set->name && set->supported()) chosen = set;
    }
  }
  return *chosen;
}

std::vector<std::string> instruction_sets() {
  std::vector<std::string> names;
  for (const auto* set : kSets) {
    if (set->name && set->supported()) names.emplace_back(set->name);
  }
  return names;
}

void use_instruction_set(const std::string& name) {
  for (const auto* set : kSets) {
    if (set->name && name == set->name && set->supported()) {
      chosen = set;
      return;
    }
  }
  TORCH_CHECK(false, "no instruction set ", name, " on this machine");
}

const Kernels& kernels_for(at::ScalarType dtype) {
  if (dtype == at::kBFloat16) return instruction_set().bfloat16;
  TORCH_CHECK(dtype == at::kFloat, "no kernels for ", dtype);
  return instruction_set().float32;
}

using Optional = std::optional<Tensor>;

// Whether the offsets rise from one value to another.
bool in_order(const Rows& rows, int64_t count) {
  bool right = rows.offset(0) >= 0 && rows.offset(count) <= rows.num_values;
  for (int64_t row = 0; row < count; ++row) right &= rows.offset(row) <= rows.offset(row + 1);
  return right;
}

// Everything a kernel goes by is checked but the bitmap's contents, which reading a checkpoint
// compares with the offsets.
Rows as_rows(const Optional& center, const Optional& bitmap, const Optional& values,
             const Optional& offsets, at::ScalarType dtype, int64_t count, int64_t columns) {
  Rows rows;
  TORCH_CHECK(center || bitmap, "rows of neither a centre nor a residual");
  if (center) {
    TORCH_CHECK(center->dim() == 2 && center->stride(1) == 1 && center->size(0) == count &&
                    center->size(1) >= columns && center->scalar_type() == dtype,
                "centre of another shape, layout or dtype");
    rows.center = center->data_ptr();
    rows.center_stride = center->stride(0);
  }
  if (bitmap) {
    TORCH_CHECK(values && offsets, "a bitmap without values");
    TORCH_CHECK(bitmap->dim() == 2 && bitmap->is_contiguous() && bitmap->size(0) == count &&
                    8 * bitmap->size(1) >= columns && bitmap->scalar_type() == at::kByte,
                "bitmap of another shape, layout or dtype");
    TORCH_CHECK(values->dim() == 1 && values->is_contiguous() && values->scalar_type() == dtype,
                "values of another shape, layout or dtype");
    TORCH_CHECK(offsets->dim() == 1 && offsets->is_contiguous() && offsets->size(0) == count + 1,
                "row offsets of another shape or layout");
    rows.bitmap = bitmap->const_data_ptr<uint8_t>();
    rows.bitmap_stride = bitmap->size(1);
    rows.values = values->data_ptr();
    rows.num_values = values->size(0);
    if (offsets->scalar_type() == at::kInt) {
      rows.offsets_32 = offsets->const_data_ptr<int32_t>();
    } else {
      rows.offsets_64 = offsets->const_data_ptr<int64_t>();
    }
    TORCH_CHECK(in_order(rows, count), "row offsets out of order, or past the values");
  }
  return rows;
}

// work(part, begin, end) on equal shares of [0, count), a thread each. The shares depend on the
// number of threads alone, and so do the results.
template <class Work>
void share(int64_t count, int64_t parts, const Work& work) {
  at::parallel_for(0, parts, 1, [&](int64_t first, int64_t last) {
    for (int64_t part = first; part < last; ++part) {
      work(part, part * count / parts, (part + 1) * count / parts);
    }
  });
}

// Outputs of all threads together up to this are added up after.
constexpr int64_t kSummedBytes = 4 << 20;

// An output larger than this would push everything else out of the caches.
constexpr int64_t kStreamedBytes = 16 << 20;

void restore(Tensor& out_SC, const Optional& center, const Optional& bitmap,
             const Optional& values, const Optional& offsets, int64_t first_column) {
  TORCH_CHECK(out_SC.dim() == 2 && out_SC.stride(1) == 1, "output must have rows in one piece");
  TORCH_CHECK(first_column >= 0, "no column ", first_column);
  const int64_t count = out_SC.size(0);
  Restore work;
  work.rows = as_rows(center, bitmap, values, offsets, out_SC.scalar_type(), count,
                      first_column + out_SC.size(1));
  work.first_column = first_column;
  work.columns = out_SC.size(1);
  work.out = out_SC.data_ptr();
  work.out_stride = out_SC.stride(0);
  work.stream = static_cast<int64_t>(out_SC.nbytes()) > kStreamedBytes;
  const auto run = kernels_for(out_SC.scalar_type()).restore;
  at::parallel_for(0, count, 64, [&](int64_t begin, int64_t end) { run(work, begin, end); });
}

using Optionals = std::vector<Optional>;

std::vector<Job> as_jobs(const std::vector<int64_t>& counts, const Optionals& centers,
                         const Optionals& bitmaps, const Optionals& values,
                         const Optionals& offsets, at::ScalarType dtype, int64_t rows,
                         int64_t columns, const Tensor& token_N, int64_t num_tokens) {
  TORCH_CHECK(token_N.dim() == 1 && token_N.is_contiguous() && token_N.scalar_type() == at::kLong,
              "token numbers must be int64 in one piece");
  for (const size_t size : {centers.size(), bitmaps.size(), values.size(), offsets.size()}) {
    TORCH_CHECK(size == counts.size(), "counts and jobs disagree");
  }
  const int64_t* token = token_N.const_data_ptr<int64_t>();
  std::vector<Job> jobs;
  int64_t copies = 0;
  for (size_t j = 0; j < counts.size(); ++j) {
    const Rows of_job =
        as_rows(centers[j], bitmaps[j], values[j], offsets[j], dtype, rows, columns);
    TORCH_CHECK(counts[j] >= 0 && copies + counts[j] <= token_N.size(0),
                "counts and token numbers disagree");
    bool distinct = true;
    for (int64_t n = copies; n < copies + counts[j]; ++n) {
      TORCH_CHECK(token[n] >= 0 && token[n] < num_tokens, "no token ", token[n]);
      distinct = distinct && (n == copies || token[n - 1] < token[n]);
    }
    jobs.push_back({of_job, copies, counts[j], distinct});
    copies += counts[j];
  }
  TORCH_CHECK(copies == token_N.size(0), "counts and token numbers disagree");
  return jobs;
}

// x with zeros after its rows, and those no power of two apart, as then the same columns of several
// rows would compete for the same few cache lines.
Tensor with_padding(const Tensor& x_TH) {
  return at::constant_pad_nd(x_TH, {0, padded(x_TH.size(1)) - x_TH.size(1) + 32});
}

Tensor project_in(const Tensor& x_TH, const Tensor& token_N, std::vector<int64_t> counts,
                  const Optionals& centers, const Optionals& bitmaps, const Optionals& values,
                  const Optionals& offsets, int64_t inputs, int64_t rows) {
  TORCH_CHECK(x_TH.dim() == 2, "tokens must be rows of a matrix");
  TORCH_CHECK(inputs == 1 || inputs == 2, "1 or 2 inputs");
  const int64_t hidden = x_TH.size(1);
  const auto jobs = as_jobs(counts, centers, bitmaps, values, offsets, x_TH.scalar_type(), rows,
                            inputs * hidden, token_N, x_TH.size(0));
  const Tensor x = with_padding(x_TH);
  Tensor out = at::empty({token_N.size(0), inputs * rows}, x.options().dtype(at::kFloat));
  const ProjectIn work = {jobs.data(),
                          static_cast<int64_t>(jobs.size()),
                          token_N.const_data_ptr<int64_t>(),
                          x.data_ptr(),
                          x.stride(0),
                          hidden,
                          inputs,
                          out.data_ptr<float>(),
                          rows};
  const auto run = kernels_for(x_TH.scalar_type()).project_in;
  share(rows, at::get_num_threads(), [&](int64_t, int64_t begin, int64_t end) {
    run(work, begin, end);
  });
  return out;
}

Tensor project_out(const Tensor& h_NS, const Tensor& token_N, std::vector<int64_t> counts,
                   const Optionals& centers, const Optionals& bitmaps, const Optionals& values,
                   const Optionals& offsets, int64_t inputs, int64_t num_tokens, int64_t hidden) {
  TORCH_CHECK(h_NS.dim() == 2, "activations must be rows of a matrix");
  TORCH_CHECK(inputs == 1 || inputs == 2, "1 or 2 inputs");
  TORCH_CHECK(num_tokens >= 0 && hidden >= 0, "no output of ", num_tokens, " x ", hidden);
  const int64_t rows = h_NS.size(1);
  const auto jobs = as_jobs(counts, centers, bitmaps, values, offsets, h_NS.scalar_type(), rows,
                            (inputs + 1) * hidden, token_N, num_tokens);
  TORCH_CHECK(h_NS.size(0) == token_N.size(0), "activations and token numbers disagree");
  const Tensor h = h_NS.contiguous();
  const ProjectOut work = {jobs.data(),  static_cast<int64_t>(jobs.size()),
                           token_N.const_data_ptr<int64_t>(),
                           h.data_ptr(), hidden,
                           inputs,       rows};
  const auto run = kernels_for(h_NS.scalar_type()).project_out;
  const int64_t parts = at::get_num_threads();
  const int64_t width = padded(hidden);
  const auto floats = h.options().dtype(at::kFloat);
  const int64_t size = num_tokens * width;
  if (parts * size * 4 <= kSummedBytes) {
    // Rows are shared, which reads memory in long stretches; then there is a sum for each thread.
    const Tensor sums = at::zeros({parts, num_tokens, width}, floats);
    float* y = sums.data_ptr<float>();
    share(rows, parts, [&](int64_t part, int64_t begin, int64_t end) {
      run(work, {begin, end, 0, hidden, y + part * size});
    });
    return sums.sum(0).narrow(1, 0, hidden);
  }
  // Columns are shared, where sums would take more time than they save.
  const Tensor sum = at::zeros({num_tokens, width}, floats);
  float* y = sum.data_ptr<float>();
  share(width / kPadding, parts, [&](int64_t, int64_t begin, int64_t end) {
    run(work, {0, rows, begin * kPadding, std::min(end * kPadding, hidden), y});
  });
  return sum.narrow(1, 0, hidden);
}

// Copies from which on a job is multiplied with packed copies.
constexpr int64_t kPackedCopies = 12;

// Sums of all threads together take no more than this.
constexpr int64_t kMostSummedBytes = 64 << 20;

// Rows of a thread in a block of packed products.
constexpr int64_t kPackedRows = 256;

// What is packed at a time: mostly in the last-level cache, and no burden on memory.
constexpr int64_t kPackedBytes = 32 << 20;

Activation as_activation(const std::string& name) {
  if (name == "silu") return Activation::kSilu;
  if (name == "gelu_tanh") return Activation::kGeluTanh;
  TORCH_CHECK(name == "relu", "no activation ", name);
  return Activation::kRelu;
}

// Adds to y [T, padded(H)] what the jobs make of few copies each.
void add_mlp(const Mlp& work, int64_t rows, const Kernels& kernels, const Tensor& y) {
  const int64_t parts = at::get_num_threads(), size = y.numel();
  const Tensor sums = at::empty({parts, size}, y.options());
  float* of_parts = sums.data_ptr<float>();
  share(rows, parts, [&](int64_t part, int64_t begin, int64_t end) {
    float* of_part = of_parts + part * size;
    std::fill(of_part, of_part + size, 0.0f);
    kernels.mlp(work, begin, end, of_part);
  });
  float* total = y.data_ptr<float>();
  at::parallel_for(0, size, 1 << 14, [&](int64_t begin, int64_t end) {
    for (int64_t part = 0; part < parts; ++part) {
      const float* of_part = of_parts + part * size;
      for (int64_t i = begin; i < end; ++i) total[i] += of_part[i];
    }
  });
}

// Adds to y what jobs make of many copies each.
void add_packed_mlp(std::vector<PackedJob> jobs, PackedMlp work, int64_t rows,
                    const Kernels& kernels, const at::TensorOptions& options) {
  const int64_t parts = at::get_num_threads(), hidden = work.hidden;
  // Blocks of equal size, an even number of rows each but for the last.
  const int64_t blocks = (rows + parts * kPackedRows - 1) / (parts * kPackedRows);
  work.most_rows = up_to_multiple((rows + blocks - 1) / blocks, 2);
  int64_t lanes = 0;
  for (const PackedJob& job : jobs) lanes += Chunks(job.copies, kernels.lanes).lanes();
  const Tensor x = at::empty({lanes, padded(hidden)}, options);
  const Tensor h = at::empty({lanes, work.most_rows}, options);
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
    lanes += Chunks(job.copies, kernels.lanes).lanes();
  }
  work.jobs = jobs.data();
  work.num_jobs = jobs.size();
  const auto in_shares = [&](int64_t count, int64_t unit, auto kernel) {
    share((count + unit - 1) / unit, parts, [&](int64_t, int64_t begin, int64_t end) {
      kernel(work, begin * unit, std::min(end * unit, count));
    });
  };
  in_shares(padded(hidden), 32, kernels.pack);
  for (; work.first_row < rows; work.first_row += work.most_rows) {
    work.rows = std::min(work.most_rows, rows - work.first_row);
    in_shares(work.rows, 2, kernels.mlp_packed_in);
    in_shares(hidden, kPackedColumns, kernels.mlp_packed_out);
  }
  in_shares(hidden, 16, kernels.add_packed);
}

// The same, as many copies at a time as there is memory for.
void add_packed_mlp_in_turn(const std::vector<Job>& jobs, const PackedMlp& work, int64_t rows,
                            const int64_t* token_N, const float* weight_N, const Kernels& kernels,
                            const at::TensorOptions& options) {
  const int64_t lane_bytes = padded(work.hidden) * 2 * sizeof(float);
  const int64_t chunk = kernels.lanes.most * kernels.lanes.vector;
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
      const int64_t more = Chunks(copies, kernels.lanes).lanes();
      if (lanes + more > most) run();
      now.push_back({job.rows, token_N + first, copies, weight_N + first});
      lanes += more;
    }
  }
  run();
}

// Which tokens each shared centre is multiplied with, and where each copy finds them.
struct Sharing {
  std::vector<SharedCenter> centers;
  std::vector<int64_t> token_C;
  std::vector<int64_t> index_N;
};

Sharing as_sharing(const std::vector<Job>& jobs, const std::vector<int64_t>& shared_J,
                   const std::vector<Rows>& centers, const int64_t* token_N, int64_t num_copies,
                   int64_t num_tokens) {
  Sharing sharing;
  sharing.index_N.assign(num_copies, -1);
  for (size_t c = 0; c < centers.size(); ++c) {
    std::vector<int64_t> index_T(num_tokens, -1);
    const int64_t first = sharing.token_C.size();
    for (size_t j = 0; j < jobs.size(); ++j) {
      if (shared_J[j] != static_cast<int64_t>(c)) continue;
      for (int64_t n = jobs[j].first_copy; n < jobs[j].first_copy + jobs[j].copies; ++n) {
        int64_t& index = index_T[token_N[n]];
        if (index < 0) {
          index = sharing.token_C.size();
          sharing.token_C.push_back(token_N[n]);
        }
        sharing.index_N[n] = index;
      }
    }
    const int64_t count = sharing.token_C.size() - first;
    if (count) sharing.centers.push_back({centers[c], first, count});
  }
  return sharing;
}

Tensor mlp(const Tensor& x_TH, const Tensor& token_N, const Tensor& weight_N,
           std::vector<int64_t> counts, const Optionals& centers, const Optionals& bitmaps,
           const Optionals& values, const Optionals& offsets, const std::vector<Tensor>& shared,
           std::vector<int64_t> shared_J, int64_t inputs, int64_t rows,
           const std::string& activation) {
  TORCH_CHECK(x_TH.dim() == 2, "tokens must be rows of a matrix");
  TORCH_CHECK(inputs == 1 || inputs == 2, "1 or 2 inputs");
  const auto dtype = x_TH.scalar_type();
  const int64_t tokens = x_TH.size(0), hidden = x_TH.size(1), columns = (inputs + 1) * hidden;
  std::vector<Job> jobs = as_jobs(counts, centers, bitmaps, values, offsets, dtype, rows, columns,
                                  token_N, tokens);
  TORCH_CHECK(weight_N.sizes() == token_N.sizes() && weight_N.is_contiguous() &&
                  weight_N.scalar_type() == at::kFloat,
              "weights must be float32 in one piece, one for each copy");
  TORCH_CHECK(shared_J.size() == jobs.size(), "shared centres and jobs disagree");
  std::vector<Rows> shared_rows;
  for (const Tensor& center : shared) {
    shared_rows.push_back(
        as_rows(center, std::nullopt, std::nullopt, std::nullopt, dtype, rows, columns));
  }
  const Activation between = as_activation(activation);
  const Kernels& kernels = kernels_for(dtype);
  const int64_t parts = at::get_num_threads();
  const Tensor y = at::zeros({tokens, padded(hidden)}, x_TH.options().dtype(at::kFloat));
  // With so many tokens a centre is no longer worth sharing, and is taken along by each job.
  const bool many_tokens = parts * static_cast<int64_t>(y.nbytes()) > kMostSummedBytes;
  std::vector<Job> few, many;
  std::vector<int64_t> shared_by_few;
  for (size_t j = 0; j < jobs.size(); ++j) {
    const int64_t center = shared_J[j];
    TORCH_CHECK(center >= -1 && center < static_cast<int64_t>(shared.size()), "no centre ", center);
    TORCH_CHECK(center < 0 || !jobs[j].rows.center, "a job with two centres");
    if (!jobs[j].copies) continue;
    if (many_tokens && center >= 0) {
      jobs[j].rows.center = shared_rows[center].center;
      jobs[j].rows.center_stride = shared_rows[center].center_stride;
    }
    if (many_tokens || (center < 0 && jobs[j].copies >= kPackedCopies)) {
      many.push_back(jobs[j]);
    } else {
      few.push_back(jobs[j]);
      shared_by_few.push_back(center);
    }
  }
  const Tensor x = with_padding(x_TH);
  const int64_t* token = token_N.const_data_ptr<int64_t>();
  const float* weight = weight_N.const_data_ptr<float>();
  if (!few.empty()) {
    const Sharing sharing =
        as_sharing(few, shared_by_few, shared_rows, token, token_N.size(0), tokens);
    add_mlp({few.data(), static_cast<int64_t>(few.size()), token, weight, sharing.centers.data(),
             static_cast<int64_t>(sharing.centers.size()), sharing.token_C.data(),
             static_cast<int64_t>(sharing.token_C.size()), sharing.index_N.data(), x.data_ptr(),
             x.stride(0), hidden, inputs, between},
            rows, kernels, y);
  }
  if (!many.empty() && rows) {
    PackedMlp packed = {};
    packed.hidden = hidden;
    packed.inputs = inputs;
    packed.activation = between;
    packed.x_TH = x.data_ptr();
    packed.x_stride = x.stride(0);
    packed.y_TH = y.data_ptr<float>();
    add_packed_mlp_in_turn(many, packed, rows, token, weight, kernels, x.options());
  }
  return y.narrow(1, 0, hidden).contiguous();
}

}  // namespace

TORCH_LIBRARY(resmoe, library) {
  library.def("instruction_sets() -> str[]", instruction_sets);
  library.def("use_instruction_set(str name) -> ()", use_instruction_set);
  library.def(
      "restore(Tensor(a!) out, Tensor? center, Tensor? bitmap, Tensor? values, Tensor? offsets, "
      "int first_column) -> ()");
  library.def(
      "project_in(Tensor x, Tensor token, int[] counts, Tensor?[] centers, Tensor?[] bitmaps, "
      "Tensor?[] values, Tensor?[] offsets, int inputs, int rows) -> Tensor");
  library.def(
      "project_out(Tensor h, Tensor token, int[] counts, Tensor?[] centers, Tensor?[] bitmaps, "
      "Tensor?[] values, Tensor?[] offsets, int inputs, int num_tokens, int hidden) -> Tensor");
  library.def(
      "mlp(Tensor x, Tensor token, Tensor weight, int[] counts, Tensor?[] centers, "
      "Tensor?[] bitmaps, Tensor?[] values, Tensor?[] offsets, Tensor[] shared, int[] shared_by, "
      "int inputs, int rows, str activation) -> Tensor");
}

TORCH_LIBRARY_IMPL(resmoe, CPU, library) {
  library.impl("restore", restore);
  library.impl("project_in", project_in);
  library.impl("project_out", project_out);
  library.impl("mlp", mlp);
}
