// The query rows of one task, turned and quantised as the run at hand needs them.
#pragma once

#include "attention/call.h"
#include "attention/carve.h"

namespace streamo {

// The pairs of a KV head's key offset that are not zero; `score += query . RoPE(offset)` needs no others.
struct OffsetPairs {
  int32_t count = 0;
  int32_t index[kMaxHeadDim / 2];
  float low[kMaxHeadDim / 2], high[kMaxHeadDim / 2]; /* the offset at index and at index + D/2 */
};

// Quantised rows: code times scale.
struct QueryCodes {
  int8_t* codes = nullptr;  /* (count, D) */
  float* scales = nullptr;  /* (count) */
  int32_t* sums = nullptr;  /* (count) of a row's codes */

  static size_t bytes(size_t rows, size_t width);
  void take(size_t rows, size_t width, Carve& memory);
};

class QueryBlock {
 public:
  // Rows begin .. begin + count - 1 of KV head `head`.
  QueryBlock(const AttentionCall& call, int32_t head, int32_t begin, int32_t count, Carve& memory);

  static size_t bytes(const AttentionCall& call);

  // Turns the rows for `run`. Does nothing if they are already.
  void turn_for(int32_t run);

  const float* rows() const { return rows_; }                    /* (count, D) */
  const QueryCodes& codes() const { return codes_; }             /* int8 caches only, as what follows */
  const OffsetPairs& offset() const { return offset_; }
  // What rounding to `codes` lost, coded again; only with an offset. Where the keys of a model have channels that drown
  // the others, so have its queries.
  const QueryCodes& remainder() const { return remainder_; }
  const float* offset_factors() const { return offset_factors_; } /* (count, 2 offset().count): of cosines, of sines */

 private:
  void find_offset_pairs(int32_t head);
  void quantise_row(const float* row, size_t index, QueryCodes& to) const;
  void quantise();
  void weigh_offset();

  const AttentionCall& call_;
  const float* base_;
  int32_t count_, width_;
  bool int8_;
  int32_t run_ = -2; /* no run, and not the new tokens either */
  const float* rows_ = nullptr;
  float* turned_ = nullptr;
  QueryCodes codes_, remainder_;
  OffsetPairs offset_;
  float* offset_factors_ = nullptr;
};

}  // namespace streamo
