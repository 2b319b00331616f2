// The kernels of one instruction set: a few per dtype, single-threaded, on raw memory.
//
// Legend: S rows, H hidden, D columns, N copies, T tokens, P bytes of bitmap per row, C rows of
// shared centres (a token to a centre), L lanes (copies, and padding to whole registers).
// A design matrix row is [inputs (1 or 2 times H) | output (H) | biases].

#pragma once

#include <algorithm>
#include <cstdint>

#include "quantized.h"

namespace resmoe {

// Rows of a design matrix: a centre, a residual, or their sum. Absent parts are null. A residual is
// pruned and a centre dense, or both are quantised; then `first_row` is their first row.
struct Rows {
  const void* center = nullptr;
  int64_t center_stride = 0;  // in entries
  const uint8_t* bitmap = nullptr;
  int64_t bitmap_stride = 0;  // P, in bytes
  const void* values = nullptr;
  int64_t num_values = 0;
  const int32_t* offsets_32 = nullptr;
  const int64_t* offsets_64 = nullptr;
  const QuantizedMatrix* quantized = nullptr;
  const QuantizedMatrix* quantized_center = nullptr;
  int64_t first_row = 0;

  bool is_quantized() const { return quantized || quantized_center; }
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

constexpr int64_t round_up(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

constexpr int64_t padded(int64_t entries) { return round_up(entries, kPadding); }

struct Restore {
  Rows rows;
  Rotation rotation;  // of quantised rows, undone
  int64_t first_column;
  int64_t columns;
  void* out;
  int64_t out_stride;
  bool stream;  // write past the caches, because the output is larger than they are
};

// Jobs, and the tokens that they read.
struct RoutedInput {
  const Job* jobs;
  int64_t num_jobs;
  const int64_t* token_N;
  const void* x_TH;  // rows of padded(hidden), x_stride apart
  int64_t x_stride;
  int64_t hidden;
  int64_t inputs;
};

struct ProjectIn : RoutedInput {
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

// A thread's share of an output: rows of the weights (the caller adds up the threads' sums), or
// columns (multiples of kPadding, except for the last end). y_TH: rows of padded(hidden).
struct OutShare {
  int64_t first_row;
  int64_t end_row;
  int64_t first_column;
  int64_t end_column;
  float* y_TH;
};

// act(gate) · up with two inputs, act(in) with one.
enum class Activation { kSilu, kGeluTanh, kRelu };

// A centre that jobs share. It is multiplied once with each of the tokens [first, first + count) of
// token_C, no matter how many jobs use the product.
struct SharedCenter {
  Rows rows;
  int64_t first;
  int64_t count;
};

// Whole MLPs of few copies each: one pass over the rows, on the way in and out at once.
struct Mlp : RoutedInput {
  const float* weight_N;
  const SharedCenter* centers;
  int64_t num_centers;
  const int64_t* token_C;
  int64_t num_center_rows;  // C
  const int64_t* index_N;   // which of the C each copy takes besides its job's rows, or -1
  Activation activation;
};

// The same for quantised rows. levels_T: the tokens, rotated as the rows are.
struct QuantizedMlp : Mlp {
  const LevelVector* levels_T;
};

// Tokens that are rotated, or rotated back, in place.
struct Rotate {
  Rotation rotation;
  bool back;
  float* x_TH;
  int64_t x_stride;
  int64_t hidden;
};

// Tokens as whole numbers; see LevelVector.
struct ToLevels {
  const float* x_TH;
  int64_t x_stride;
  int64_t hidden;
  LevelVector* levels_T;
};

// Parts of the same numbers, at least one, that are added up: num_parts of `size` entries each.
struct AddParts {
  const void* parts;
  int64_t num_parts;
  int64_t size;
  void* out;
};

// How a product takes copies as lanes of vectors.
struct LaneLayout {
  int64_t vector_lanes;  // lanes of one vector
  int64_t max_vectors;   // of one chunk
  int64_t min_copies;    // of a job: with fewer, the kernels for few copies are faster
};

// The copies of a job, split into chunks of whole vectors of nearly equal size. Each chunk is stored
// as one matrix [depth][lanes]; the depths that a product takes in one step are adjacent.
struct Chunks {
  LaneLayout layout;
  int64_t vectors;
  int64_t count;

  Chunks(int64_t copies, LaneLayout lane_layout)
      : layout(lane_layout),
        vectors((copies + layout.vector_lanes - 1) / layout.vector_lanes),
        count((vectors + layout.max_vectors - 1) / layout.max_vectors) {}

  int64_t first_lane(int64_t chunk) const {
    return chunk * vectors / count * layout.vector_lanes;
  }
  int64_t lanes(int64_t chunk) const { return first_lane(chunk + 1) - first_lane(chunk); }
  int64_t lanes() const { return vectors * layout.vector_lanes; }
};

// The output columns of packed copies are padded to a multiple of this.
constexpr int64_t kPackedColumnMultiple = 48;

constexpr int64_t packed_columns(int64_t hidden) { return round_up(hidden, kPackedColumnMultiple); }

// A job with its copies in lanes, `copies` of them and padding to whole registers.
struct PackedJob {
  Rows rows;
  const int64_t* token_n;
  int64_t copies;
  const float* weight_l;  // zero for the padding
  void* x;                // chunks of [padded(hidden)][lanes]
  void* h;                // chunks of [block_rows][lanes]
  float* y;               // chunks of [packed_columns(hidden)][lanes]
};

// Whole MLPs of many copies per job, a block of rows [first_row, first_row + rows) at a time.
struct PackedMlp {
  const PackedJob* jobs;
  int64_t num_jobs;
  int64_t hidden;
  int64_t inputs;
  Activation activation;
  const void* x_TH;  // rows of padded(hidden), x_stride apart
  int64_t x_stride;
  float* y_TH;       // rows of padded(hidden)
  int64_t block_rows;
  int64_t first_row;
  int64_t rows;
};

// restore, project_in, mlp and quantized_mlp work on rows [begin, end) of the weights; rotate and
// to_levels on tokens [begin, end); add_parts on entries. mlp, quantized_mlp and project_out add to y.
// The packed kernels run in this order, and divide columns of x, rows of the block, columns of y, and
// columns of y; see packed_mlp.h.
struct Kernels {
  void (*restore)(const Restore&, int64_t begin, int64_t end);
  void (*project_in)(const ProjectIn&, int64_t begin, int64_t end);
  void (*project_out)(const ProjectOut&, const OutShare&);
  void (*mlp)(const Mlp&, int64_t begin, int64_t end, float* y_TH);
  void (*quantized_mlp)(const QuantizedMlp&, int64_t begin, int64_t end, float* y_TH);
  void (*rotate)(const Rotate&, int64_t begin, int64_t end);
  void (*to_levels)(const ToLevels&, int64_t begin, int64_t end);
  void (*add_parts)(const AddParts&, int64_t begin, int64_t end);
  void (*pack)(const PackedMlp&, int64_t begin, int64_t end);
  void (*mlp_packed_in)(const PackedMlp&, int64_t begin, int64_t end);
  void (*mlp_packed_out)(const PackedMlp&, int64_t begin, int64_t end);
  void (*add_packed)(const PackedMlp&, int64_t begin, int64_t end);
  LaneLayout lane_layout;
};

struct InstructionSet {
  const char* name;
  bool (*supported)();
  Kernels bfloat16;
  Kernels float32;
};

extern const InstructionSet kAmx;
extern const InstructionSet kAvx512Bf16;
extern const InstructionSet kAvx512;
extern const InstructionSet kAvx2;
extern const InstructionSet kPortable;

}  // namespace resmoe
