// AVX-512 kernels with bfloat16 dot products, and matrix instructions (Intel AMX) for jobs with many
// copies.
//
// The steps for many copies are those of packed_mlp.h. Packing and the way in are its code: a
// product with packed copies is what a matrix instruction computes. On the way out the factors swap
// places: copies are the rows of the left factor, and y is stored copy by copy.

#include "target.h"

#include "kernels.h"

#if defined(__x86_64__) && defined(__linux__) && __has_include(<amxbf16intrin.h>)
#include <sys/syscall.h>
#include <unistd.h>

RESMOE_TARGET(
    "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vbmi2,avx512vnni,avx512vpopcntdq,"
    "avx512bf16,bmi2,popcnt,fma,amx-tile,amx-bf16")
#include <immintrin.h>

#include "avx512_bf16.h"
#include "avx512_levels.h"
#include "matrix_registers.h"

namespace {

struct MatrixPrimitives : DotProductPrimitives {
  static constexpr int64_t kLanes = kMatrixSide;
  static constexpr int kMaxVectors = 2;
  static constexpr int64_t kMinPackedCopies = 6;
  static constexpr int rows_at_once(int) { return 3 * kMatrixSide; }

  // Takes whole matrices of the depth. Weights and copies are padded with zeros up to them.
  template <int kRows, int kVectors>
  static void multiply(const BFloat16* weights, int64_t row_stride, int64_t /*step_stride*/,
                       const BFloat16* packed, int64_t steps, float* out, bool add) {
    multiply_matrices<kRows / kMatrixSide, kVectors>(
        weights, row_stride, packed, 2 * kVectors * kLanes,
        round_up(steps * kDepthPerStep, kMatrixDepth), out, kVectors * kLanes, add);
  }
};

template <class Scalar>
struct Primitives;
template <>
struct Primitives<BFloat16> : MatrixPrimitives {};

using LevelPrimitives = Avx512Levels;

}  // namespace

#include "packed_mlp.h"

namespace {

// Rows per tile on the way out. Many, because every sum is read and written once per tile.
constexpr int64_t kMatrixOutRows = 192;

void mlp_in(const PackedMlp& work, int64_t begin, int64_t end) {
  const MatrixRegisters registers;
  mlp_packed_in<BFloat16>(work, begin, end);
}

// Packed h of one chunk, from pairs of rows [rows / 2][lanes][2] to [lanes][rows].
void unpack_rows(const BFloat16* packed, int64_t lanes, int64_t rows, MatrixView<BFloat16> h) {
  const __m512i pairs = _mm512_mullo_epi32(
      _mm512_set1_epi32(lanes),
      _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0));
  for (int64_t lane = 0; lane < lanes; ++lane) {
    for (int64_t r = 0; r < rows; r += kMatrixDepth) {
      const int64_t count = std::min(kMatrixDepth, rows - r);
      const __mmask16 exist = _bzhi_u32(0xFFFF, (count + 1) / 2);
      const __m512i row = _mm512_mask_i32gather_epi32(_mm512_setzero_si512(), exist, pairs,
                                                      packed + r * lanes + 2 * lane, 4);
      _mm512_storeu_si512(h.row(lane) + r, row);
    }
  }
}

// As mlp_packed_out, but y is [lane][packed_columns(hidden)].
void mlp_out(const PackedMlp& work, int64_t begin, int64_t end) {
  const MatrixRegisters registers;
  constexpr int kColumnMatrices = kPackedColumnMultiple / kMatrixSide;
  const int64_t y_stride = packed_columns(work.hidden);
  thread_local RowBlock<BFloat16> block;
  for (int64_t j = 0; j < work.num_jobs; ++j) {
    const PackedJob& job = work.jobs[j];
    const Chunks chunks(job.copies, packed_layout<BFloat16>());
    for (int64_t first = 0; first < work.rows; first += kMatrixOutRows) {
      const int64_t rows = std::min(kMatrixOutRows, work.rows - first);
      const int64_t depth = round_up(rows, kMatrixDepth);
      const Tile<BFloat16, Use::kActivations> h(chunks.lanes(), depth);
      for (int64_t c = 0; c < chunks.count; ++c) {
        const int64_t lane = chunks.first_lane(c), lanes = chunks.lanes(c);
        unpack_rows(static_cast<const BFloat16*>(job.h) + lane * work.block_rows + first * lanes,
                    lanes, rows, {h.row(lane), h.stride()});
      }
      block.start(job.rows, work.first_row + first, rows, work.inputs * work.hidden + begin, 0);
      for (int64_t panel = begin; panel < end; panel += kPackedPanelColumns) {
        const int64_t columns = std::min(kPackedPanelColumns, end - panel);
        const int64_t width = round_up(packed_columns(columns), 32);
        const auto pairs = block.next_tile_of_row_pairs(columns, width, kMatrixDepth);
        for (int64_t lane = 0; lane < chunks.lanes(); lane += 2 * kMatrixSide) {
          const bool two = lane + kMatrixSide < chunks.lanes();
          const auto multiply =
              two ? multiply_matrices<2, kColumnMatrices> : multiply_matrices<1, kColumnMatrices>;
          for (int64_t column = 0; column < columns; column += kPackedColumnMultiple) {
            multiply(h.row(lane), h.stride(), pairs.entries + 2 * column, pairs.stride, depth,
                     job.y + lane * y_stride + panel + column, y_stride,
                     work.first_row + first > 0);
          }
        }
      }
    }
  }
}

// Adds columns [begin, end) of each copy's y to its token's output.
void add_rows(const PackedMlp& work, int64_t begin, int64_t end) {
  for (int64_t j = 0; j < work.num_jobs; ++j) {
    const PackedJob& job = work.jobs[j];
    for (int64_t n = 0; n < job.copies; ++n) {
      const float* y = job.y + n * packed_columns(work.hidden);
      float* out = work.y_TH + job.token_n[n] * padded(work.hidden);
      for (int64_t column = begin; column < end; ++column) out[column] += y[column];
    }
  }
}

// Linux lends the registers to processes that ask.
bool has_amx() {
  if (!has_avx512_bf16() || !__builtin_cpu_supports("amx-bf16")) return false;
  constexpr int kRequestPermission = 0x1023, kMatrixData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kMatrixData) == 0;
}

resmoe::InstructionSet with_matrices(resmoe::InstructionSet set) {
  set.name = "amx";
  set.supported = has_amx;
  set.bfloat16.pack = pack_columns<BFloat16>;
  set.bfloat16.mlp_packed_in = mlp_in;
  set.bfloat16.mlp_packed_out = mlp_out;
  set.bfloat16.add_packed = add_rows;
  set.bfloat16.lane_layout = packed_layout<BFloat16>();
  return set;
}

}  // namespace

const resmoe::InstructionSet resmoe::kAmx = with_matrices(resmoe::kAvx512Bf16);
RESMOE_TARGET_END
#else
const resmoe::InstructionSet resmoe::kAmx = {};
#endif
