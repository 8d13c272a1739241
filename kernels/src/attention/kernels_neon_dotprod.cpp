// Attention's inner kernels for NEON with the dot product of signed bytes (SDOT).
#include "attention/intrinsics_neon.h"

namespace streamo {
namespace {

struct DotProduct : Neon {
  // The product of unsigned and signed bytes belongs to a later extension: weights are signed and take half the levels.
  static constexpr int weight_levels = 127, weight_vectors = 1;

  static void pack_values(const RowSource<int8_t>& values, int head_dim, int8_t* out) {
    for (int key = 0; key < values.count; key += 4) {
      int8_t* block = out + static_cast<size_t>(key) * head_dim;
      const int8_t* from[4];
      for (int i = 0; i < 4; ++i) {
        const int index = key + i < values.count ? key + i : key;
        from[i] = values.base + values.slots[index] * values.stride;
      }
      for (int column = 0; column < head_dim; column += 16) {
        int8x16x4_t lanes;
        for (int i = 0; i < 4; ++i) {
          lanes.val[i] = key + i < values.count ? vld1q_s8(from[i] + column) : vdupq_n_s8(0);
        }
        vst4q_s8(block + 4 * column, lanes);
      }
    }
  }
};

using Shared = Tiles<DotProduct>;
constexpr int kRows = 6, kColumns = DotProduct::columns;  // 24 sums, 6 rows of dwords and an operand: 31 registers

// sums[r][c] += bytes[c] . dword `Lane` of rows[r]
template <int Lane, int Rows, int Columns>
inline void add_dword(int32x4_t (&sums)[Rows][Columns], const int8x16_t (&rows)[Rows], const int8_t* bytes) {
  STREAMO_UNROLL
  for (int c = 0; c < Columns; ++c) {
    const int8x16_t operand = vld1q_s8(bytes + 16 * c);
    STREAMO_UNROLL
    for (int r = 0; r < Rows; ++r) sums[r][c] = vdotq_laneq_s32(sums[r][c], operand, rows[r], Lane);
  }
}

// sums[r][c] = the dots of `dwords` dwords of row r with those of `panel`, which lie `step` bytes apart. Rows lie
// `stride` bytes apart and can be read up to a multiple of 16 bytes.
template <int Rows, int Columns>
inline void multiply(const int8_t* rows, int stride, const int8_t* panel, int step, int dwords,
                     int32x4_t (&sums)[Rows][Columns]) {
  STREAMO_UNROLL
  for (int r = 0; r < Rows; ++r) {
    STREAMO_UNROLL
    for (int c = 0; c < Columns; ++c) sums[r][c] = vdupq_n_s32(0);
  }
  for (int i = 0; i < dwords; i += 4) {
    int8x16_t lanes[Rows];
    STREAMO_UNROLL
    for (int r = 0; r < Rows; ++r) lanes[r] = vld1q_s8(rows + r * stride + 4 * i);
    const int8_t* bytes = panel + static_cast<ptrdiff_t>(i) * step;
    add_dword<0>(sums, lanes, bytes);
    if (i + 1 < dwords) add_dword<1>(sums, lanes, bytes + step);
    if (i + 2 < dwords) add_dword<2>(sums, lanes, bytes + 2 * step);
    if (i + 3 < dwords) add_dword<3>(sums, lanes, bytes + 3 * step);
  }
}

void scores_int8(const int8_t* queries, const int32_t*, int32_t rows, int32_t head_dim, const uint8_t* panel,
                 int32_t count, int32_t* scores) {
  const int8_t* keys = reinterpret_cast<const int8_t*>(panel);
  for (int key = 0; key < count; key += Shared::panel_keys) {
    in_even_parts<kRows>(rows, [&](int row, auto part) {
      int32x4_t sums[part.value][kColumns];
      multiply(queries + row * head_dim, head_dim, keys + key * head_dim, 4 * Shared::panel_keys, head_dim / 4, sums);
      int32_t* out = scores + row * kTileKeys + key;
      STREAMO_UNROLL
      for (int r = 0; r < part.value; ++r) {
        STREAMO_UNROLL
        for (int c = 0; c < kColumns; ++c) vst1q_s32(out + r * kTileKeys + 4 * c, sums[r][c]);
      }
    });
  }
}

template <int Rows, int Columns>
void value_block(const int8_t* weights, const float* keep, const float* step, const int8_t* panel, int dwords,
                 int head_dim, float* sums) {
  int32x4_t dots[Rows][Columns];
  multiply(weights, kTileKeys, panel, 4 * head_dim, dwords, dots);
  STREAMO_UNROLL
  for (int r = 0; r < Rows; ++r) {
    STREAMO_UNROLL
    for (int c = 0; c < Columns; ++c) {
      float* sum = sums + r * head_dim + 4 * c;
      const float32x4_t kept = vmulq_n_f32(vld1q_f32(sum), keep[r]);
      vst1q_f32(sum, vfmaq_n_f32(kept, vcvtq_f32_s32(dots[r][c]), step[r]));
    }
  }
}

void values_int8(const uint8_t* weights, const float* keep, const float* step, int32_t rows, const int8_t* panel,
                 int32_t count, int32_t head_dim, float* sums) {
  const int8_t* levels = reinterpret_cast<const int8_t*>(weights);  // at most 127
  for (int column = 0; column < head_dim; column += 4 * kColumns) {
    in_even_parts<kRows>(rows, [&](int row, auto part) {
      value_block<part.value, kColumns>(levels + row * kTileKeys, keep + row, step + row, panel + 4 * column,
                                        (count + 3) / 4, head_dim, sums + row * head_dim + column);
    });
  }
}

}  // namespace

const AttentionKernels attention_kernels_dotprod = Shared::table_with(
    "dotprod", Shared::pack_keys_int8, Shared::pack_values_int8, scores_int8, values_int8);

}  // namespace streamo
