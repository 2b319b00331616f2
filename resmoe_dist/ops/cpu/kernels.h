// What the instruction sets offer: three kernels per dtype, on raw memory, one thread each.
//
// Legend: S rows, H hidden, D columns, N copies, T tokens, P bytes of bitmap per row.
// A design matrix row is [inputs (1 or 2 times H) | output (H) | biases].

#pragma once

#include <cstdint>

namespace resmoe {

// Rows of a design matrix: a centre, a pruned residual, or their sum. Absent parts are null.
struct Rows {
  const void* center = nullptr;
  int64_t center_stride = 0;  // in entries
  const uint8_t* bitmap = nullptr;
  int64_t bitmap_stride = 0;  // P, in bytes
  const void* values = nullptr;
  int64_t num_values = 0;
  const int32_t* offsets_32 = nullptr;
  const int64_t* offsets_64 = nullptr;

  int64_t offset(int64_t row) const { return offsets_32 ? offsets_32[row] : offsets_64[row]; }
};

// Rows, and the copies that are multiplied by them: [first_copy, first_copy + copies).
struct Job {
  Rows rows;
  int64_t first_copy;
  int64_t copies;
  bool distinct;  // no token has two copies here, so that several can be added to at a time
};

// Vectors that products read or add to are padded to a multiple of this many entries, so that no
// inner loop has a tail. The padding of what is read holds zeros.
constexpr int64_t kPadding = 128;

constexpr int64_t padded(int64_t entries) { return (entries + kPadding - 1) / kPadding * kPadding; }

struct Restore {
  Rows rows;
  int64_t first_column;
  int64_t columns;
  void* out;
  int64_t out_stride;
  bool stream;  // past the caches: the output is larger than they are
};

struct ProjectIn {
  const Job* jobs;
  int64_t num_jobs;
  const int64_t* token_N;
  const void* x_TH;  // rows of padded(hidden), x_stride apart
  int64_t x_stride;
  int64_t hidden;
  int64_t inputs;
  float* out_NC;  // [N, inputs·S]
  int64_t num_rows;
};

struct ProjectOut {
  const Job* jobs;
  int64_t num_jobs;
  const int64_t* token_N;
  const void* h_NS;
  int64_t hidden;
  int64_t inputs;
  int64_t num_rows;
};

// A thread's share of an output: rows of the weights (sums of several threads are to be added up),
// or columns (whole multiples of kPadding but for the last). y_TH: rows of padded(hidden).
struct OutShare {
  int64_t first_row;
  int64_t end_row;
  int64_t first_column;
  int64_t end_column;
  float* y_TH;
};

// restore and project_in work on rows [begin, end); project_out adds to y.
struct Kernels {
  void (*restore)(const Restore&, int64_t begin, int64_t end);
  void (*project_in)(const ProjectIn&, int64_t begin, int64_t end);
  void (*project_out)(const ProjectOut&, const OutShare&);
};

struct InstructionSet {
  const char* name;
  bool (*supported)();
  Kernels bfloat16;
  Kernels float32;
};

extern const InstructionSet kAvx512Bf16;
extern const InstructionSet kAvx512;
extern const InstructionSet kAvx2;
extern const InstructionSet kPortable;

}  // namespace resmoe
