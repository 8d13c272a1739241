// Attention of few query rows, as when decoding: the keys and values are used where they lie, with query rows as the
// lanes of a vector. Packing a tile for the many-row kernels would cost several times what so few rows need.
//
// Owns the shapes that the driver and an instruction set agree on. A kernel sees one tile and one strip of at most
// kLanes rows; it knows no runs and no threads.
#pragma once

#include "attention/kernels.h"

namespace streamo {

constexpr int32_t kLanes = 16;
constexpr int32_t kMostFewRows = 2 * kLanes;  // query rows of a KV head; beyond, packing pays
constexpr int32_t kPieceBytes = 64;           // value columns that one vector holds; sums are padded to whole pieces

// A row has two lanes where all rows then fit, each for every second dword of a row's codes.
inline int32_t lanes_per_row(int32_t rows) { return 2 * rows <= kLanes ? 2 : 1; }

// Which row of the strip a lane of scores belongs to. With two lanes a row, groups of four lanes hold
// [key k: row 2g, row 2g + 1, key k + 1: row 2g, row 2g + 1].
inline int32_t row_of_lane(int32_t lane, int32_t lanes_a_row) {
  return lanes_a_row == 1 ? lane : 2 * (lane / 4) + lane % 2;
}

// Quantised query rows in lanes. Lanes without a row hold zeros.
struct LaneCodes {
  int8_t* codes;  /* (D / (4 lanes a row), kLanes, 4) */
  int32_t* start; /* (kLanes) what undoes the keys' zero point */
  float* scales;  /* (kLanes) in the order of scores */
};

struct FewRowsTile {
  int32_t rows, head_dim;
  RowSource<int8_t> keys, values;
  RowSource<int8_t> next_keys, next_values; /* of the tile that follows, to be asked for ahead; maybe none */
  const float *key_scales, *value_scales; /* of the KV head, by slot */
  const int32_t* visible;                 /* (kLanes) keys that each lane's row sees; NULL: all */
  LaneCodes queries, remainder;           /* the remainder only with an offset */
  int32_t pair_count;                     /* of the offset; 0: none */
  const int32_t* pairs;                   /* (pair_count) */
  const float* factors;                   /* (2 pair_count, kLanes), in the order of scores: of cosines, of sines */
  const float *slot_cos, *slot_sin;       /* (C, D / 2) */
  void* workspace;
  float *maximum, *sum; /* (kLanes) the running softmax, in the order of scores; a row's sum is that of its lanes */
  float* sums;          /* (rows, padded D), columns in the kernel's own order */
};

struct FewRowsFloatTile {
  int32_t rows, head_dim;
  RowSource<float> keys, next_keys, next_values;
  const float* queries; /* (D / lanes a row, kLanes) */
  float* scores;        /* (kLanes, kTileKeys) */
};

struct FewRowsKernels {
  size_t (*workspace_bytes)(int32_t head_dim);
  void (*attend_int8)(const FewRowsTile& tile);
  // Sums of one row in the order of an output's columns.
  void (*order_columns)(const float* sums, int32_t head_dim, float* out);
  void (*scores_float)(const FewRowsFloatTile& tile);
};

extern const FewRowsKernels few_rows_avx512;

}  // namespace streamo
