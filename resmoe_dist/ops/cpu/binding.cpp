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
}

TORCH_LIBRARY_IMPL(resmoe, CPU, library) {
  library.impl("restore", restore);
  library.impl("project_in", project_in);
  library.impl("project_out", project_out);
}
