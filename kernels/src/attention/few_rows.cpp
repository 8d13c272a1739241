// One task of attention with few query rows: all rows of a KV head against a chunk of tiles.
#include "attention/few_rows.h"

#include <algorithm>
#include <cfloat>
#include <cstring>

#include "attention/call.h"
#include "attention/query_block.h"

namespace streamo {
namespace {

constexpr int32_t kMostStrips = kMostFewRows / kLanes;
constexpr int32_t kZeroPoint = 128;  // of the keys, whose codes must lose their sign

int32_t padded(int32_t head_dim) { return (head_dim + kPieceBytes - 1) / kPieceBytes * kPieceBytes; }

LaneCodes take_codes(int32_t head_dim, Carve& memory) {
  return {memory.take<int8_t>(static_cast<size_t>(head_dim) * kLanes), memory.take<int32_t>(kLanes),
          memory.take<float>(kLanes)};
}

size_t codes_bytes(int32_t head_dim) {
  return Carve::bytes_of<int8_t>(static_cast<size_t>(head_dim) * kLanes) + Carve::bytes_of<int32_t>(kLanes) +
         Carve::bytes_of<float>(kLanes);
}

// Rows of a block that go through the kernels together.
struct Strip {
  int32_t begin, rows;
  LaneCodes queries, remainder;
  float* factors;
  float *maximum, *sum, *sums;

  static size_t bytes(int32_t head_dim) {
    const size_t width = static_cast<size_t>(head_dim);
    return 2 * codes_bytes(head_dim) + Carve::bytes_of<float>(width * kLanes) + 2 * Carve::bytes_of<float>(kLanes) +
           Carve::bytes_of<float>(static_cast<size_t>(kLanes) * padded(head_dim));
  }

  void take(int32_t head_dim, Carve& memory) {
    queries = take_codes(head_dim, memory);
    remainder = take_codes(head_dim, memory);
    factors = memory.take<float>(static_cast<size_t>(head_dim) * kLanes);
    maximum = memory.take<float>(kLanes);
    sum = memory.take<float>(kLanes);
    sums = memory.take<float>(static_cast<size_t>(kLanes) * padded(head_dim));
    std::fill(maximum, maximum + kLanes, -FLT_MAX);
    std::fill(sum, sum + kLanes, 0.0f);
    std::fill(sums, sums + static_cast<size_t>(rows) * padded(head_dim), 0.0f);
  }

  int32_t lanes_a_row() const { return lanes_per_row(rows); }

  void pack(const QueryCodes& from, int32_t head_dim, const LaneCodes& to) const {
    const int32_t lanes = lanes_a_row(), bytes = 4 * lanes;
    std::memset(to.codes, 0, static_cast<size_t>(head_dim) * kLanes / lanes);
    std::memset(to.start, 0, kLanes * sizeof(int32_t));
    for (int32_t row = 0; row < rows; ++row) {
      const int8_t* codes = from.codes + static_cast<size_t>(begin + row) * head_dim;
      for (int32_t i = 0; i < head_dim / bytes; ++i) {
        std::memcpy(to.codes + (static_cast<size_t>(i) * kLanes + row * lanes) * 4, codes + i * bytes, bytes);
      }
      to.start[row * lanes] = -kZeroPoint * from.sums[begin + row];
    }
    for (int32_t lane = 0; lane < kLanes; ++lane) {
      const int32_t row = row_of_lane(lane, lanes);
      to.scales[lane] = row < rows ? from.scales[begin + row] : 0.0f;
    }
  }

  // Float queries, as the lanes of `factors`, which only an int8 cache would need.
  void pack_floats(const float* from, int32_t head_dim) const {
    const int32_t lanes = lanes_a_row();
    std::memset(factors, 0, static_cast<size_t>(head_dim) * kLanes / lanes * sizeof(float));
    for (int32_t row = 0; row < rows; ++row) {
      const float* query = from + static_cast<size_t>(begin + row) * head_dim;
      for (int32_t i = 0; i < head_dim; ++i) factors[i / lanes * kLanes + row * lanes + i % lanes] = query[i];
    }
  }

  void pack_factors(const float* from, int32_t depth) const {
    for (int32_t lane = 0; lane < kLanes; ++lane) {
      const int32_t row = row_of_lane(lane, lanes_a_row());
      for (int32_t i = 0; i < depth; ++i) {
        factors[i * kLanes + lane] = row < rows ? from[static_cast<size_t>(begin + row) * depth + i] : 0.0f;
      }
    }
  }
};

class FewRowsTask {
 public:
  FewRowsTask(const AttentionCall& call, size_t index, Carve& memory)
      : call_(call),
        a_(call.arguments),
        kernels_(*call.few_rows),
        head_(static_cast<int32_t>(index) / call.plan.chunks),
        chunk_(static_cast<int32_t>(index) % call.plan.chunks),
        queries_(call, head_, 0, call.plan.rows, memory),
        workspace_(memory.take<char>(workspace_bytes(call))) {
    strip_count_ = (call.plan.rows + kLanes - 1) / kLanes;
    for (int32_t i = 0, begin = 0; i < strip_count_; ++i) {
      strips_[i].begin = begin;
      strips_[i].rows = (call.plan.rows - begin + strip_count_ - i - 1) / (strip_count_ - i);
      strips_[i].take(a_.head_dim, memory);
      begin += strips_[i].rows;
    }
  }

  static size_t bytes(const AttentionCall& call) {
    return QueryBlock::bytes(call) + Carve::bytes_of<char>(workspace_bytes(call)) +
           kMostStrips * Strip::bytes(call.arguments.head_dim);
  }

  void run() {
    const int32_t first = chunk_ * call_.plan.chunk_tiles;
    const int32_t last = std::min(first + call_.plan.chunk_tiles, call_.plan.tile_count);
    for (int32_t i = first; i < last; ++i) {
      const Tile& tile = call_.plan.tiles[i];
      const Tile* next = i + 1 < last ? &tile + 1 : nullptr;
      if (tile.run != run_) turn_for(tile.run);
      for (int32_t strip = 0; strip < strip_count_; ++strip) {
        if (a_.kv_type == STREAMO_KV_INT8) {
          attend_int8(tile, strip == 0 ? next : nullptr, strips_[strip]);
        } else {
          attend_float(tile, strip == 0 ? next : nullptr, strips_[strip]);
        }
      }
    }
    for (int32_t strip = 0; strip < strip_count_; ++strip) write_partial_sums(strips_[strip]);
  }

 private:
  static size_t workspace_bytes(const AttentionCall& call) {
    const int32_t width = call.arguments.head_dim;
    return call.arguments.kv_type == STREAMO_KV_INT8 ? call.few_rows->workspace_bytes(width)
                                                       : kLanes * kTileKeys * sizeof(float);
  }

  void turn_for(int32_t run) {
    run_ = run;
    queries_.turn_for(run);
    if (a_.kv_type != STREAMO_KV_INT8) {
      for (int32_t i = 0; i < strip_count_; ++i) strips_[i].pack_floats(queries_.rows(), a_.head_dim);
      return;
    }
    for (int32_t i = 0; i < strip_count_; ++i) {
      strips_[i].pack(queries_.codes(), a_.head_dim, strips_[i].queries);
      if (queries_.offset().count == 0) continue;
      strips_[i].pack(queries_.remainder(), a_.head_dim, strips_[i].remainder);
      strips_[i].pack_factors(queries_.offset_factors(), 2 * queries_.offset().count);
    }
  }

  void attend_int8(const Tile& tile, const Tile* next, const Strip& strip) {
    int32_t visible[kLanes];
    bool all = tile.count == kTileKeys;
    for (int32_t lane = 0; lane < kLanes; ++lane) {
      const int32_t row = std::min(row_of_lane(lane, strip.lanes_a_row()), strip.rows - 1);
      visible[lane] = call_.visible_to(strip.begin + row, tile);
      all = all && visible[lane] == tile.count;
    }
    RowSource<int8_t> next_keys = {}, next_values = {};
    if (next != nullptr) {
      next_keys = call_.keys_of<int8_t>(head_, *next);
      next_values = call_.values_of<int8_t>(head_, *next);
    }
    const size_t head = static_cast<size_t>(head_) * a_.capacity;
    kernels_.attend_int8({strip.rows, a_.head_dim, call_.keys_of<int8_t>(head_, tile),
                          call_.values_of<int8_t>(head_, tile), next_keys, next_values,
                          a_.key_scales + head, a_.value_scales + head, all ? nullptr : visible, strip.queries,
                          strip.remainder, queries_.offset().count, queries_.offset().index, strip.factors,
                          a_.slot_cos, a_.slot_sin, workspace_, strip.maximum, strip.sum, strip.sums});
  }

  void attend_float(const Tile& tile, const Tile* next, const Strip& strip) {
    float* scores = reinterpret_cast<float*>(workspace_);
    int32_t visible[kLanes];
    float keep[kLanes];
    for (int32_t row = 0; row < strip.rows; ++row) visible[row] = call_.visible_to(strip.begin + row, tile);
    RowSource<float> next_keys = {}, next_values = {};
    if (next != nullptr) {
      next_keys = call_.keys_of<float>(head_, *next);
      next_values = call_.values_of<float>(head_, *next);
    }
    kernels_.scores_float(
        {strip.rows, a_.head_dim, call_.keys_of<float>(head_, tile), next_keys, next_values, strip.factors, scores});
    call_.kernels.softmax_float({strip.rows, tile.count, visible, scores, {strip.maximum, strip.sum}, keep});
    call_.kernels.values_float(scores, keep, strip.rows, call_.values_of<float>(head_, tile), a_.head_dim, strip.sums);
  }

  void write_partial_sums(const Strip& strip) const {
    const size_t first = (static_cast<size_t>(chunk_) * a_.kv_heads + head_) * call_.plan.rows + strip.begin;
    const bool int8 = a_.kv_type == STREAMO_KV_INT8;
    for (int32_t row = 0; row < strip.rows; ++row) {
      float* values = call_.partial.values + (first + row) * a_.head_dim;
      if (int8) {
        kernels_.order_columns(strip.sums + static_cast<size_t>(row) * padded(a_.head_dim), a_.head_dim, values);
      } else {
        std::copy_n(strip.sums + static_cast<size_t>(row) * a_.head_dim, a_.head_dim, values);
      }
    }
    const int32_t lanes = int8 ? strip.lanes_a_row() : 1;
    std::fill_n(call_.partial.sum + first, strip.rows, 0.0f);
    for (int32_t lane = 0; lane < kLanes; ++lane) {
      const int32_t row = row_of_lane(lane, lanes);
      if (row >= strip.rows) continue;
      call_.partial.maximum[first + row] = strip.maximum[lane];
      call_.partial.sum[first + row] += strip.sum[lane];
    }
  }

  const AttentionCall& call_;
  const streamo_attention& a_;
  const FewRowsKernels& kernels_;
  int32_t head_, chunk_;
  int32_t run_ = -2; /* no run, and not the new tokens either */
  QueryBlock queries_;
  char* workspace_;
  int32_t strip_count_ = 0;
  Strip strips_[kMostStrips];
};

}  // namespace

void attend_few_rows(const AttentionCall& call, size_t index) {
  thread_local Scratch scratch;
  Carve memory(scratch.reserve(FewRowsTask::bytes(call)));
  FewRowsTask(call, index, memory).run();
}

}  // namespace streamo
