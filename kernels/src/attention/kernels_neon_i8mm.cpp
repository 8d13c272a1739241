// Attention's inner kernels for NEON with products of 8-bit matrices (SMMLA, USMMLA).
//
// One instruction multiplies 2 rows of 8 bytes with 2 others. So packed keys are [panel][head_dim / 8][keys][8 codes]
// and packed values [keys / 8][head_dim][8 keys]; query rows and weights are paired as they are loaded.
#include "attention/intrinsics_neon.h"

namespace streamo {
namespace {

struct MatrixProduct : Neon {
  static constexpr int weight_levels = 255, weight_vectors = 1;
};

using Shared = Tiles<MatrixProduct>;
constexpr int kPanelKeys = Shared::panel_keys;
constexpr int kRowPairs = 2, kColumnPairs = 8;  // 16 sums, 4 pairs of rows and some operands; 3 would not fit
static_assert(kPanelKeys == 2 * kColumnPairs);

inline int8x16_t first_halves(int8x16_t a, int8x16_t b) {
  return vreinterpretq_s8_s64(vzip1q_s64(vreinterpretq_s64_s8(a), vreinterpretq_s64_s8(b)));
}

inline int8x16_t second_halves(int8x16_t a, int8x16_t b) {
  return vreinterpretq_s8_s64(vzip2q_s64(vreinterpretq_s64_s8(a), vreinterpretq_s64_s8(b)));
}

void pack_keys_int8(const RowSource<int8_t>& keys, int32_t head_dim, uint8_t* panel) {
  int8_t* out = reinterpret_cast<int8_t*>(panel);
  constexpr int kStep = 8 * kPanelKeys;
  const int padded = (keys.count + kPanelKeys - 1) / kPanelKeys * kPanelKeys;
  for (int key = 0; key < padded; key += 2) {
    int8_t* pair = out + key / kPanelKeys * kPanelKeys * head_dim + key % kPanelKeys * 8;
    const int8_t* from[2];
    for (int i = 0; i < 2; ++i) from[i] = keys.base + keys.slots[key + i < keys.count ? key + i : 0] * keys.stride;
    for (int column = 0; column < head_dim; column += 16, pair += 2 * kStep) {
      const int8x16_t a = key < keys.count ? vld1q_s8(from[0] + column) : vdupq_n_s8(0);
      const int8x16_t b = key + 1 < keys.count ? vld1q_s8(from[1] + column) : vdupq_n_s8(0);
      vst1q_s8(pair, first_halves(a, b));
      vst1q_s8(pair + kStep, second_halves(a, b));
    }
  }
}

// rows[i] byte j -> byte i of group j: 16 groups of 8 bytes, two a vector.
inline void transpose_bytes(const int8x16_t (&rows)[8], int8_t* out) {
  int8x16x2_t even[2], odd[2];
  const int8x16x2_t rows04 = vzipq_s8(rows[0], rows[4]), rows26 = vzipq_s8(rows[2], rows[6]);
  const int8x16x2_t rows15 = vzipq_s8(rows[1], rows[5]), rows37 = vzipq_s8(rows[3], rows[7]);
  for (int half = 0; half < 2; ++half) {
    even[half] = vzipq_s8(rows04.val[half], rows26.val[half]);
    odd[half] = vzipq_s8(rows15.val[half], rows37.val[half]);
  }
  for (int quarter = 0; quarter < 4; ++quarter) {
    const int8x16x2_t all = vzipq_s8(even[quarter / 2].val[quarter % 2], odd[quarter / 2].val[quarter % 2]);
    vst1q_s8(out + 32 * quarter, all.val[0]);
    vst1q_s8(out + 32 * quarter + 16, all.val[1]);
  }
}

void pack_values_int8(const RowSource<int8_t>& values, int32_t head_dim, int8_t* panel) {
  for (int key = 0; key < values.count; key += 8) {
    int8_t* block = panel + key * head_dim;
    const int8_t* from[8];
    for (int i = 0; i < 8; ++i) {
      const int index = key + i < values.count ? key + i : key;
      from[i] = values.base + values.slots[index] * values.stride;
    }
    for (int column = 0; column < head_dim; column += 16) {
      int8x16_t rows[8];
      for (int i = 0; i < 8; ++i) rows[i] = key + i < values.count ? vld1q_s8(from[i] + column) : vdupq_n_s8(0);
      transpose_bytes(rows, block + 8 * column);
    }
  }
}

inline int32x4_t add_product(int32x4_t sum, int8x16_t rows, int8x16_t columns, std::true_type) {
  return vmmlaq_s32(sum, rows, columns);
}

inline int32x4_t add_product(int32x4_t sum, int8x16_t rows, int8x16_t columns, std::false_type) {
  return vusmmlaq_s32(sum, vreinterpretq_u8_s8(rows), columns);
}

// Rows of bytes, `stride` apart; they can be read up to a multiple of 16 bytes. The last pair may have one row only,
// which then stands for both.
struct Rows {
  const int8_t* bytes;
  int stride, count;

  const int8_t* row(int index) const { return bytes + (index < count ? index : count - 1) * stride; }
};

// sums[p][c] = { row 2p . column 2c, row 2p . column 2c + 1, and the same of row 2p + 1 }, over `words` words of 8
// bytes; words of `panel` lie `step` bytes apart. `Signed`: whether the rows are.
template <typename Signed, int Pairs>
inline void multiply(const Rows& rows, const int8_t* panel, int step, int words,
                     int32x4_t (&sums)[Pairs][kColumnPairs]) {
  const int8_t* from[2 * Pairs];
  STREAMO_UNROLL
  for (int r = 0; r < 2 * Pairs; ++r) from[r] = rows.row(r);
  STREAMO_UNROLL
  for (int p = 0; p < Pairs; ++p) {
    STREAMO_UNROLL
    for (int c = 0; c < kColumnPairs; ++c) sums[p][c] = vdupq_n_s32(0);
  }
  for (int word = 0; word < words; word += 2, panel += 2 * step) {
    int8x16_t first[Pairs], second[Pairs];
    STREAMO_UNROLL
    for (int p = 0; p < Pairs; ++p) {
      const int8x16_t a = vld1q_s8(from[2 * p] + 8 * word), b = vld1q_s8(from[2 * p + 1] + 8 * word);
      first[p] = first_halves(a, b);
      second[p] = second_halves(a, b);
    }
    STREAMO_UNROLL
    for (int c = 0; c < kColumnPairs; ++c) {
      const int8x16_t columns = vld1q_s8(panel + 16 * c);
      STREAMO_UNROLL
      for (int p = 0; p < Pairs; ++p) sums[p][c] = add_product(sums[p][c], first[p], columns, Signed());
    }
    if (word + 1 == words) break;
    STREAMO_UNROLL
    for (int c = 0; c < kColumnPairs; ++c) {
      const int8x16_t columns = vld1q_s8(panel + step + 16 * c);
      STREAMO_UNROLL
      for (int p = 0; p < Pairs; ++p) sums[p][c] = add_product(sums[p][c], second[p], columns, Signed());
    }
  }
}

// Four sums of row 2p + `Second` from those of two pairs of columns.
template <int Second>
inline int32x4_t sums_of_row(int32x4_t left, int32x4_t right) {
  const int64x2_t a = vreinterpretq_s64_s32(left), b = vreinterpretq_s64_s32(right);
  return vreinterpretq_s32_s64(Second == 0 ? vzip1q_s64(a, b) : vzip2q_s64(a, b));
}

// Calls use(row, column, four sums) for every row that exists and every fourth column.
template <int Pairs, typename Use>
inline void for_each_four(const int32x4_t (&sums)[Pairs][kColumnPairs], int rows, const Use& use) {
  STREAMO_UNROLL
  for (int p = 0; p < Pairs; ++p) {
    STREAMO_UNROLL
    for (int c = 0; c < kColumnPairs; c += 2) use(2 * p, 2 * c, sums_of_row<0>(sums[p][c], sums[p][c + 1]));
    if (2 * p + 1 >= rows) break;
    STREAMO_UNROLL
    for (int c = 0; c < kColumnPairs; c += 2) use(2 * p + 1, 2 * c, sums_of_row<1>(sums[p][c], sums[p][c + 1]));
  }
}

void scores_int8(const int8_t* queries, const int32_t*, int32_t rows, int32_t head_dim, const uint8_t* panel,
                 int32_t count, int32_t* scores) {
  const int8_t* keys = reinterpret_cast<const int8_t*>(panel);
  for (int key = 0; key < count; key += kPanelKeys) {
    in_even_parts<kRowPairs>((rows + 1) / 2, [&](int pair, auto pairs) {
      const int row = 2 * pair, left = rows - row;
      int32x4_t sums[pairs.value][kColumnPairs];
      multiply<std::true_type>({queries + row * head_dim, head_dim, left}, keys + key * head_dim, 8 * kPanelKeys,
                               head_dim / 8, sums);
      int32_t* out = scores + row * kTileKeys + key;
      for_each_four(sums, left, [&](int r, int c, int32x4_t dots) { vst1q_s32(out + r * kTileKeys + c, dots); });
    });
  }
}

void values_int8(const uint8_t* weights, const float* keep, const float* step, int32_t rows, const int8_t* panel,
                 int32_t count, int32_t head_dim, float* sums) {
  const int8_t* bytes = reinterpret_cast<const int8_t*>(weights);
  for (int column = 0; column < head_dim; column += 2 * kColumnPairs) {
    in_even_parts<kRowPairs>((rows + 1) / 2, [&](int pair, auto pairs) {
      const int row = 2 * pair, left = rows - row;
      int32x4_t dots[pairs.value][kColumnPairs];
      multiply<std::false_type>({bytes + row * kTileKeys, kTileKeys, left}, panel + 8 * column, 8 * head_dim,
                                (count + 7) / 8, dots);
      for_each_four(dots, left, [&](int r, int c, int32x4_t four) {
        float* sum = sums + (row + r) * head_dim + column + c;
        const float32x4_t kept = vmulq_n_f32(vld1q_f32(sum), keep[row + r]);
        vst1q_f32(sum, vfmaq_n_f32(kept, vcvtq_f32_s32(four), step[row + r]));
      });
    });
  }
}

}  // namespace

const AttentionKernels attention_kernels_i8mm = Shared::table_with(
    "i8mm", pack_keys_int8, pack_values_int8, scores_int8, values_int8);

}  // namespace streamo
