// The quantised matrix product with NEON's dot product of signed bytes (SDOT): 16 integer sums in registers, shaped by
// the number of rows.
//
// A group is 4 codes, so 4 rows of a group of the input are the 4 lanes of one register, each of which one instruction
// multiplies with 4 outputs. Codes of 4 bits are 0 .. 15, codes of 8 bits signed: both are signed bytes.
#include "matmul/finish_rows.h"
#include "matmul/intrinsics_neon.h"
#include "matmul/kernels.h"
#include "matmul/quantise_rows.h"

namespace streamo {
namespace {

constexpr int panel = 32;
constexpr int group = 4;
constexpr int tile_rows = 8;
constexpr int few_rows = 8;
constexpr std::size_t group_codes = panel * group;

// dots[first .. first + 3] += weights . the rows that are the lanes of `input`
template <int First, int Rows, int Columns>
inline void add_lanes_of(int8x16_t input, const int8x16_t (&weights)[Columns], int32x4_t (&dots)[Rows][Columns]) {
  STREAMO_UNROLL
  for (int c = 0; c < Columns; ++c) {
    dots[First][c] = vdotq_laneq_s32(dots[First][c], weights[c], input, 0);
    if constexpr (First + 1 < Rows) dots[First + 1][c] = vdotq_laneq_s32(dots[First + 1][c], weights[c], input, 1);
    if constexpr (First + 2 < Rows) dots[First + 2][c] = vdotq_laneq_s32(dots[First + 2][c], weights[c], input, 2);
    if constexpr (First + 3 < Rows) dots[First + 3][c] = vdotq_laneq_s32(dots[First + 3][c], weights[c], input, 3);
  }
}

// One strip of 4 * Columns outputs over all blocks; `codes`, `scales` and `sums` are already those of the strip.
template <int Rows, int Columns, bool Nibbles>
inline void run_strip(const TileArguments& a, const std::uint8_t* codes, const std::uint8_t* scales, float* sums) {
  constexpr std::size_t group_bytes = Nibbles ? group_codes / 2 : group_codes;
  const std::int8_t* input = a.input;
  for (std::int32_t b = 0; b < a.blocks; ++b, codes += a.codes_stride, scales += a.scales_stride) {
    int32x4_t dots[Rows][Columns];
    STREAMO_UNROLL
    for (int row = 0; row < Rows; ++row) {
      STREAMO_UNROLL
      for (int c = 0; c < Columns; ++c) dots[row][c] = vdupq_n_s32(a.starts[b * tile_rows + row]);
    }
    const std::uint8_t* next = codes;
    for (std::int32_t g = 0; g < a.groups; ++g, next += group_bytes, input += tile_rows * group) {
      int8x16_t weights[Columns];
      load_weights<Columns, Nibbles>(next, weights);
      add_lanes_of<0>(vld1q_s8(input), weights, dots);
      if constexpr (Rows > 4) add_lanes_of<4>(vld1q_s8(input + 16), weights, dots);
    }
    STREAMO_UNROLL
    for (int c = 0; c < Columns; ++c) {
      const float32x4_t scale = vld1q_f32(reinterpret_cast<const float*>(scales) + 4 * c);
      STREAMO_UNROLL
      for (int row = 0; row < Rows; ++row) {
        float* sum = sums + row * panel + 4 * c;
        const float32x4_t both = vmulq_n_f32(scale, a.input_scales[b * tile_rows + row]);
        vst1q_f32(sum, vfmaq_f32(vld1q_f32(sum), vcvtq_f32_s32(dots[row][c]), both));
      }
    }
  }
}

template <int Rows, int Columns, bool Nibbles>
void run_tile(const TileArguments& a) {
  constexpr int strip = 4 * Columns;
  constexpr int strip_bytes = Nibbles ? strip * group / 2 : strip * group;
  for (int s = 0; s < panel / strip; ++s) {
    run_strip<Rows, Columns, Nibbles>(a, a.codes + s * strip_bytes, a.scales + s * strip * sizeof(float),
                                      a.sums + s * strip);
  }
}

template <bool Nibbles>
void run_rows(const TileArguments& a) {
  switch (a.rows) {
    case 1:
      return run_tile<1, 8, Nibbles>(a);
    case 2:
      return run_tile<2, 8, Nibbles>(a);
    case 3:
      return run_tile<3, 4, Nibbles>(a);
    case 4:
      return run_tile<4, 4, Nibbles>(a);
    case 5:
    case 6:
      return run_tile<6, 2, Nibbles>(a);
    default:
      return run_tile<8, 2, Nibbles>(a);
  }
}

void from_bytes(const TileArguments& a, std::int32_t) { run_rows<false>(a); }

}  // namespace

const MatmulKernels matmul_dotprod = {
    panel,     group,
    nibble_span,
    0,         tile_rows,
    few_rows,  quantise_rows<tile_rows, group>,
    unpack_nibbles<group_codes>,
    from_bytes,
    run_rows<true>,
    finish_rows<panel>,
};

}  // namespace streamo
