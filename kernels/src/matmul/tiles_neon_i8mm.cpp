// The quantised matrix product with NEON's products of 8-bit matrices (SMMLA): 16 registers of integer sums, each of
// 2 rows and 2 outputs.
//
// A group is 8 codes, so one register holds a group of 2 outputs, or of 2 rows of the input, and one instruction adds
// their 4 products. A row alone leaves half of it idle. Codes of 4 bits are 0 .. 15, codes of 8 bits signed.
#include "matmul/finish_rows.h"
#include "matmul/intrinsics_neon.h"
#include "matmul/kernels.h"
#include "matmul/quantise_rows.h"

namespace streamo {
namespace {

constexpr int panel = 32;
constexpr int group = 8;
constexpr int tile_rows = 8;
constexpr int few_rows = 8;
constexpr std::size_t group_codes = panel * group;

// sums of one row and 4 outputs += dots * scale * input_scale
inline void add_scaled(float* sums, int64x2_t dots, float32x4_t scale, float input_scale) {
  const float32x4_t both = vmulq_n_f32(scale, input_scale);
  vst1q_f32(sums, vfmaq_f32(vld1q_f32(sums), vcvtq_f32_s32(vreinterpretq_s32_s64(dots)), both));
}

// One strip of 2 * Columns outputs over all blocks; `codes`, `scales` and `sums` are already those of the strip. Rows
// of the tile that do not exist are zeros, and so is what they add to their sums.
template <int Pairs, int Columns, bool Nibbles>
inline void run_strip(const TileArguments& a, const std::uint8_t* codes, const std::uint8_t* scales, float* sums) {
  constexpr std::size_t group_bytes = Nibbles ? group_codes / 2 : group_codes;
  const std::int8_t* input = a.input;
  for (std::int32_t b = 0; b < a.blocks; ++b, codes += a.codes_stride, scales += a.scales_stride) {
    int32x4_t dots[Pairs][Columns];
    STREAMO_UNROLL
    for (int pair = 0; pair < Pairs; ++pair) {
      const std::int32_t* starts = a.starts + b * tile_rows + 2 * pair;
      const int32x4_t start = vcombine_s32(vdup_n_s32(starts[0]), vdup_n_s32(starts[1]));
      STREAMO_UNROLL
      for (int c = 0; c < Columns; ++c) dots[pair][c] = start;
    }
    const std::uint8_t* next = codes;
    for (std::int32_t g = 0; g < a.groups; ++g, next += group_bytes, input += tile_rows * group) {
      int8x16_t weights[Columns];
      load_weights<Columns, Nibbles>(next, weights);
      STREAMO_UNROLL
      for (int pair = 0; pair < Pairs; ++pair) {
        const int8x16_t rows = vld1q_s8(input + 16 * pair);
        STREAMO_UNROLL
        for (int c = 0; c < Columns; ++c) dots[pair][c] = vmmlaq_s32(dots[pair][c], rows, weights[c]);
      }
    }
    STREAMO_UNROLL
    for (int c = 0; c < Columns; c += 2) {
      const float32x4_t scale = vld1q_f32(reinterpret_cast<const float*>(scales) + 2 * c);
      STREAMO_UNROLL
      for (int pair = 0; pair < Pairs; ++pair) {
        const float* input_scales = a.input_scales + b * tile_rows + 2 * pair;
        float* sum = sums + 2 * pair * panel + 2 * c;
        const int64x2_t left = vreinterpretq_s64_s32(dots[pair][c]), right = vreinterpretq_s64_s32(dots[pair][c + 1]);
        add_scaled(sum, vzip1q_s64(left, right), scale, input_scales[0]);
        add_scaled(sum + panel, vzip2q_s64(left, right), scale, input_scales[1]);
      }
    }
  }
}

template <int Pairs, int Columns, bool Nibbles>
void run_tile(const TileArguments& a) {
  constexpr int strip = 2 * Columns;
  constexpr int strip_bytes = Nibbles ? strip * group / 2 : strip * group;
  for (int s = 0; s < panel / strip; ++s) {
    run_strip<Pairs, Columns, Nibbles>(a, a.codes + s * strip_bytes, a.scales + s * strip * sizeof(float),
                                       a.sums + s * strip);
  }
}

template <bool Nibbles>
void run_rows(const TileArguments& a) {
  switch ((a.rows + 1) / 2) {
    case 1:
      return run_tile<1, 8, Nibbles>(a);
    case 2:
      return run_tile<2, 8, Nibbles>(a);
    case 3:
      return run_tile<3, 4, Nibbles>(a);
    default:
      return run_tile<4, 4, Nibbles>(a);
  }
}

void from_bytes(const TileArguments& a, std::int32_t) { run_rows<false>(a); }

}  // namespace

const MatmulKernels matmul_i8mm = {
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
