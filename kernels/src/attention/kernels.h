// The inner kernels of attention, as a table that every instruction set fills.
//
// Owns the shapes that callers and kernels agree on. It does not know spans, runs, caches' sizes or threads: a kernel
// sees one tile of keys (at most kTileKeys, gathered from any slots) and one strip of query rows (at most kStripRows).
// How a packed tile looks inside is the instruction set's own business; only its size in bytes is fixed here.
#pragma once

#include <cstddef>
#include <cstdint>

namespace streamo {

constexpr int32_t kTileKeys = 256;
constexpr int32_t kPaddedKeys = 64;  // a kernel may read scales up to a multiple of it
constexpr int32_t kStripRows = 48;
constexpr int32_t kMaxHeadDim = 256;

// Rows of a cache: row `slots[i]` lies at `base + slots[i] * stride` (elements).
template <typename Element>
struct RowSource {
  const Element* base;
  std::ptrdiff_t stride;
  const int32_t* slots;
  int32_t count; /* 1 .. kTileKeys */
};

// The running softmax of one query row: maximum (of scores times log2(e)) and sum of the weights so far.
struct RowState {
  float* maximum; /* (rows) */
  float* sum;     /* (rows) */
};

// A strip of scores that becomes weights. Rows lie kTileKeys apart in scores and weights.
struct FloatSoftmax {
  int32_t rows;
  int32_t count;           /* keys of the tile */
  const int32_t* visible;  /* (rows) keys that a row sees, each 1 .. count; NULL: all */
  float* scores;           /* in: scores times log2(e); out: weights, 0 behind the visible ones up to count */
  RowState state;
  float* keep;             /* (rows) out: what the sums before this tile are multiplied by */
};

struct Int8Softmax {
  int32_t rows;
  int32_t count;
  const int32_t* visible;
  const int32_t* scores;      /* integer dots */
  const float* query_scales;  /* (rows) */
  const float* key_scales;    /* (kTileKeys), 0 behind count; as the next two, set up to a multiple of kPaddedKeys */
  const float* value_logarithms; /* (kTileKeys) of the value scales, base 2; finite */
  const float* value_inverses;   /* (kTileKeys) 1 / value scale, of the same scales */
  const float* corrections;   /* added to the scaled scores, rows kTileKeys apart; NULL: none, nor the two below */
  const int32_t* remainders;  /* integer dots of what rounding the queries lost, as scores */
  const float* remainder_scales; /* (rows) */
  uint8_t* weights;           /* out: weight times value scale over `step`; 0 behind the visible ones up to kTileKeys */
  RowState state;             /* the maximum is that of the scores plus value_logarithms */
  float* keep;                /* (rows) out, as above */
  float* step;                /* (rows) out: what one unit of the weights is worth */

  // `some` rows of it, from `first` on.
  Int8Softmax part(int32_t first, int32_t some) const {
    const std::ptrdiff_t at = std::ptrdiff_t{first} * kTileKeys;
    Int8Softmax part = *this;
    part.rows = some;
    if (visible != nullptr) part.visible += first;
    part.scores += at;
    part.query_scales += first;
    if (corrections != nullptr) {
      part.corrections += at;
      part.remainders += at;
      part.remainder_scales += first;
    }
    part.weights += at;
    part.state = {state.maximum + first, state.sum + first};
    part.keep += first;
    part.step += first;
    return part;
  }
};

struct FewRowsKernels;  // few_rows.h

struct AttentionKernels {
  const char* name;

  // out = x turned: (a, b) -> (a cos - b sin, b cos + a sin) for the pairs (i, i + half). Products and sums rounded one
  // by one, so that every instruction set gives the same bits. `out` may be `x`.
  void (*turn)(const float* x, const float* cosine, const float* sine, int32_t half, float* out);
  // codes = clamp(round_half_even(x / s), -127, 127) with s = max|x| / 127, which is returned. Bits as above.
  float (*quantise)(const float* x, int32_t width, int8_t* codes);
  // The same but for the last bit of a quotient, and without divisions: nobody keeps the codes of queries.
  float (*quantise_queries)(const float* x, int32_t width, int8_t* codes);

  // --- float: panel holds kTileKeys * depth floats
  void (*pack_keys_float)(const RowSource<float>& keys, int32_t depth, float* panel);
  // A panel of depth 2 pair_count: the columns `pairs` of the cosines, then those of the sines.
  void (*pack_angles)(const RowSource<float>& cosines, const RowSource<float>& sines, const int32_t* pairs,
                      int32_t pair_count, float* panel);
  void (*scores_float)(const float* queries, int32_t rows, int32_t depth, const float* panel, int32_t count,
                       float* scores);
  void (*softmax_float)(const FloatSoftmax& tile);
  // sums = sums * keep + weights . values
  void (*values_float)(const float* weights, const float* keep, int32_t rows, const RowSource<float>& values,
                       int32_t head_dim, float* sums);

  // --- int8: panels hold kTileKeys * head_dim bytes; queries are codes, row-major
  void (*pack_keys_int8)(const RowSource<int8_t>& keys, int32_t head_dim, uint8_t* panel);
  void (*pack_values_int8)(const RowSource<int8_t>& values, int32_t head_dim, int8_t* panel);
  // query_sums: the sum of each row's codes, for instruction sets whose keys are packed with a zero point.
  void (*scores_int8)(const int8_t* queries, const int32_t* query_sums, int32_t rows, int32_t head_dim,
                      const uint8_t* panel, int32_t count, int32_t* scores);
  void (*softmax_int8)(const Int8Softmax& tile);
  // sums = sums * keep + step * (weights . codes)
  void (*values_int8)(const uint8_t* weights, const float* keep, const float* step, int32_t rows, const int8_t* panel,
                      int32_t count, int32_t head_dim, float* sums);

  const FewRowsKernels* few_rows = nullptr; /* for calls of few query rows, where there are any */
};

// The table of the instruction set in use.
const AttentionKernels& attention_kernels();

// One table each; only those of the CPU's architecture exist.
extern const AttentionKernels attention_kernels_portable;
extern const AttentionKernels attention_kernels_avx2;
extern const AttentionKernels attention_kernels_avx512;
extern const AttentionKernels attention_kernels_dotprod;
extern const AttentionKernels attention_kernels_i8mm;

}  // namespace streamo
