#include "attention/query_block.h"

namespace streamo {

size_t QueryCodes::bytes(size_t rows, size_t width) {
  return Carve::bytes_of<int8_t>(rows * width) + Carve::bytes_of<float>(rows) + Carve::bytes_of<int32_t>(rows);
}

void QueryCodes::take(size_t rows, size_t width, Carve& memory) {
  codes = memory.take<int8_t>(rows * width);
  scales = memory.take<float>(rows);
  sums = memory.take<int32_t>(rows);
}

size_t QueryBlock::bytes(const AttentionCall& call) {
  const size_t rows = static_cast<size_t>(call.plan.block_rows), width = static_cast<size_t>(call.arguments.head_dim);
  size_t bytes = Carve::bytes_of<float>(rows * width);
  if (call.arguments.kv_type == STREAMO_KV_INT8) bytes += QueryCodes::bytes(rows, width);
  if (call.arguments.key_offset != nullptr) {
    bytes += Carve::bytes_of<float>(rows * width) + QueryCodes::bytes(rows, width);
  }
  return bytes;
}

QueryBlock::QueryBlock(const AttentionCall& call, int32_t head, int32_t begin, int32_t count, Carve& memory)
    : call_(call),
      base_(call.queries + (static_cast<size_t>(head) * call.plan.rows + begin) * call.arguments.head_dim),
      count_(count),
      width_(call.arguments.head_dim),
      int8_(call.arguments.kv_type == STREAMO_KV_INT8) {
  const size_t rows = static_cast<size_t>(call.plan.block_rows), width = static_cast<size_t>(width_);
  turned_ = memory.take<float>(rows * width);
  if (int8_) codes_.take(rows, width, memory);
  if (call.arguments.key_offset != nullptr) {
    offset_factors_ = memory.take<float>(rows * width);
    remainder_.take(rows, width, memory);
    find_offset_pairs(head);
  }
}

void QueryBlock::find_offset_pairs(int32_t head) {
  const float* offset = call_.arguments.key_offset + static_cast<size_t>(head) * width_;
  const int32_t half = width_ / 2;
  const auto used = [&](int32_t pair) { return offset[pair] != 0.0f || offset[pair + half] != 0.0f; };
  int32_t used_count = 0;
  for (int32_t pair = 0; pair < half; ++pair) used_count += used(pair) ? 1 : 0;
  const bool all = used_count > half / 2;  // whole rows are packed faster than many single columns
  for (int32_t pair = 0; pair < half; ++pair) {
    if (!all && !used(pair)) continue;
    offset_.index[offset_.count] = pair;
    offset_.low[offset_.count] = offset[pair];
    offset_.high[offset_.count] = offset[pair + half];
    ++offset_.count;
  }
}

void QueryBlock::turn_for(int32_t run) {
  if (run == run_) return;
  run_ = run;
  if (run == kNewTokens) {
    rows_ = base_;
  } else {
    const size_t half = static_cast<size_t>(width_) / 2;
    const float* cosine = call_.arguments.run_cos + run * half;
    const float* sine = call_.arguments.run_sin + run * half;
    for (size_t row = 0; row < static_cast<size_t>(count_); ++row) {
      call_.kernels.turn(base_ + row * width_, cosine, sine, width_ / 2, turned_ + row * width_);
    }
    rows_ = turned_;
  }
  if (int8_) quantise();
  if (offset_.count > 0) weigh_offset();
}

void QueryBlock::quantise_row(const float* row, size_t index, QueryCodes& to) const {
  int8_t* codes = to.codes + index * width_;
  to.scales[index] = call_.kernels.quantise_queries(row, width_, codes);
  int32_t sum = 0;
  for (int32_t i = 0; i < width_; ++i) sum += codes[i];
  to.sums[index] = sum;
}

void QueryBlock::quantise() {
  for (size_t row = 0; row < static_cast<size_t>(count_); ++row) {
    const float* query = rows_ + row * width_;
    quantise_row(query, row, codes_);
    if (offset_.count == 0) continue;
    alignas(64) float lost[kMaxHeadDim];
    const int8_t* codes = codes_.codes + row * width_;
    for (int32_t i = 0; i < width_; ++i) lost[i] = query[i] - codes_.scales[row] * static_cast<float>(codes[i]);
    quantise_row(lost, row, remainder_);
  }
}

// With a query pair (a, b) and an offset pair (c, d) turned by an angle, their product is
// cos (a c + b d) + sin (b c - a d): linear in the cosines and sines of the cached row.
void QueryBlock::weigh_offset() {
  const int32_t half = width_ / 2;
  for (size_t row = 0; row < static_cast<size_t>(count_); ++row) {
    const float* query = rows_ + row * width_;
    float* of_cosines = offset_factors_ + row * 2 * offset_.count;
    float* of_sines = of_cosines + offset_.count;
    for (int32_t i = 0; i < offset_.count; ++i) {
      const float a = query[offset_.index[i]], b = query[offset_.index[i] + half];
      of_cosines[i] = a * offset_.low[i] + b * offset_.high[i];
      of_sines[i] = b * offset_.low[i] - a * offset_.high[i];
    }
  }
}

}  // namespace streamo
