// One task of attention: a block of query rows against a chunk of tiles, with the running softmax.
#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstring>

#include "attention/call.h"
#include "attention/query_block.h"

namespace streamo {
namespace {

constexpr int32_t kSoftmaxRows = 8;  // as many as the kernels take at once

// Memory of a task, sized for the largest block and tile.
struct Workspace {
  void *key_panel, *value_panel;
  float* angle_panel;   /* with a key offset */
  float* scores;        /* (kStripRows, kTileKeys) float or int32 */
  float* corrections;   /* (kStripRows, kTileKeys) with a key offset */
  int32_t* remainders;  /* (kStripRows, kTileKeys) with a key offset */
  uint8_t* weights;     /* (kStripRows, kTileKeys), int8 only, as the scales */
  float *key_scales, *value_logarithms, *value_inverses; /* (kTileKeys) */
  float* sums;          /* (block rows, D) */
  float *maximum, *sum; /* (block rows) */
};

size_t workspace_bytes(const AttentionCall& call) {
  const size_t width = static_cast<size_t>(call.arguments.head_dim);
  const size_t rows = static_cast<size_t>(call.plan.block_rows);
  const size_t strip = size_t{kStripRows} * kTileKeys;
  return Carve::bytes_of<float>(kTileKeys * width) * 3 + Carve::bytes_of<float>(strip) * 3 +
         Carve::bytes_of<uint8_t>(strip) + Carve::bytes_of<float>(kTileKeys) * 3 +
         Carve::bytes_of<float>(rows * width) + Carve::bytes_of<float>(rows) * 2;
}

Workspace take_workspace(const AttentionCall& call, Carve& memory) {
  const size_t width = static_cast<size_t>(call.arguments.head_dim);
  const size_t rows = static_cast<size_t>(call.plan.block_rows);
  const size_t strip = size_t{kStripRows} * kTileKeys;
  Workspace w;
  w.key_panel = memory.take<float>(kTileKeys * width);
  w.value_panel = memory.take<float>(kTileKeys * width);
  w.angle_panel = memory.take<float>(kTileKeys * width);
  w.scores = memory.take<float>(strip);
  w.corrections = memory.take<float>(strip);
  w.remainders = memory.take<int32_t>(strip);
  w.weights = memory.take<uint8_t>(strip);
  w.key_scales = memory.take<float>(kTileKeys);
  w.value_logarithms = memory.take<float>(kTileKeys);
  w.value_inverses = memory.take<float>(kTileKeys);
  w.sums = memory.take<float>(rows * width);
  w.maximum = memory.take<float>(rows);
  w.sum = memory.take<float>(rows);
  return w;
}

// log2(x) to 5e-6, of a positive normal number; in a form that compilers vectorise.
inline float logarithm(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  const uint32_t exponent = bits - 0x3f3504f3u;  // of x / sqrt(1/2)
  const uint32_t fraction = (exponent & 0x007fffffu) + 0x3f3504f3u;
  std::memcpy(&x, &fraction, sizeof x);
  const float t = (x - 1.0f) / (x + 1.0f), square = t * t;  // |t| < 0.172
  const float series = 0.9617966939f + square * (0.5770780164f + square * 0.4121985831f);
  return static_cast<float>(static_cast<int32_t>(exponent) >> 23) + t * (2.885390082f + square * series);
}

// Of the scales of a tile's values. A row of zeros has no scale, and any will do; one that hardly counts beside its
// neighbours, or at all, gets one that keeps powers of two in range.
void invert_scales(const float* scales, int32_t count, float* logarithms, float* inverses) {
  float largest = 0.0f;
  for (int32_t i = 0; i < count; ++i) largest = std::max(largest, scales[i]);
  const float least = std::max(largest * 0x1p-60f, 1e-30f), missing = largest > 0.0f ? largest : 1.0f;
  for (int32_t i = 0; i < count; ++i) {
    const float scale = scales[i] > 0.0f ? std::max(scales[i], least) : missing;
    logarithms[i] = logarithm(scale);
    inverses[i] = 1.0f / scale;
  }
}

class Task {
 public:
  Task(const AttentionCall& call, size_t index, Carve& memory)
      : call_(call),
        a_(call.arguments),
        head_(static_cast<int32_t>(index / static_cast<size_t>(call.plan.chunks) / call.plan.blocks)),
        begin_(static_cast<int32_t>(index / static_cast<size_t>(call.plan.chunks) % call.plan.blocks) *
               call.plan.block_rows),
        rows_(std::min(call.plan.block_rows, call.plan.rows - begin_)),
        chunk_(static_cast<int32_t>(index % static_cast<size_t>(call.plan.chunks))),
        work_(take_workspace(call, memory)),
        queries_(call, head_, begin_, rows_, memory) {
    if (call.plan.chunks > 1) aim_at_partial_sums();
  }

  void run() {
    std::fill(work_.sums, work_.sums + static_cast<size_t>(rows_) * a_.head_dim, 0.0f);
    std::fill(work_.maximum, work_.maximum + rows_, -FLT_MAX);
    std::fill(work_.sum, work_.sum + rows_, 0.0f);
    const int32_t first = chunk_ * call_.plan.chunk_tiles;
    const int32_t last = std::min(first + call_.plan.chunk_tiles, call_.plan.tile_count);
    for (int32_t i = first; i < last; ++i) {
      next_ = i + 1 < last ? &call_.plan.tiles[i + 1] : nullptr;
      asked_ = 0;
      attend_to(call_.plan.tiles[i]);
    }
    if (call_.plan.chunks == 1) write_output();
  }

 private:
  // The sums are formed where merge_chunks will look for them.
  void aim_at_partial_sums() {
    const size_t row = (static_cast<size_t>(chunk_) * a_.kv_heads + head_) * call_.plan.rows + begin_;
    work_.sums = call_.partial.values + row * a_.head_dim;
    work_.maximum = call_.partial.maximum + row;
    work_.sum = call_.partial.sum + row;
  }

  // Asks for some of the tile that comes next, each time that `query_rows` of this one are through: more at once than a
  // core can have under way would make it wait. Inlined always: GCC drops calls of functions that only prefetch.
  template <typename Element>
  __attribute__((always_inline)) void ask_ahead(int32_t query_rows) {
    if (next_ == nullptr) return;
    const RowSource<Element> keys = call_.keys_of<Element>(head_, *next_);
    const Element* values = call_.values_of<Element>(head_, *next_).base;
    const int32_t end = std::min(keys.count, asked_ + (keys.count * query_rows + rows_ - 1) / rows_);
    for (; asked_ < end; ++asked_) {
      const std::ptrdiff_t row = keys.slots[asked_] * keys.stride;
      for (std::ptrdiff_t i = row; i < row + a_.head_dim; i += 64 / static_cast<std::ptrdiff_t>(sizeof(Element))) {
        __builtin_prefetch(keys.base + i, 0, 2);
        __builtin_prefetch(values + i, 0, 2);
      }
    }
  }

  void attend_to(const Tile& tile) {
    // Rows are token-major: those of tokens before the tile see nothing of it.
    int32_t first_row = 0;
    if (tile.run == kNewTokens) first_row = std::max(0, tile.first_token * call_.group() - begin_);
    if (first_row >= rows_) return;
    queries_.turn_for(tile.run);
    if (a_.kv_type == STREAMO_KV_INT8) {
      pack_int8(tile);
    } else {
      call_.kernels.pack_keys_float(call_.keys_of<float>(head_, tile), a_.head_dim,
                                    static_cast<float*>(work_.key_panel));
    }
    // Strips as even as can be: a last one of two rows would waste most of a register tile.
    const int32_t strips = (rows_ - first_row + kStripRows - 1) / kStripRows;
    for (int32_t strip = 0, row = first_row; strip < strips; ++strip) {
      const int32_t count = (rows_ - row + strips - strip - 1) / (strips - strip);
      int32_t visible[kStripRows];
      const int32_t* some = causal(tile, row, count, visible) ? visible : nullptr;
      if (a_.kv_type == STREAMO_KV_INT8) {
        attend_strip_int8(tile, row, count, some);
      } else {
        attend_strip_float(tile, row, count, some);
      }
      row += count;
    }
  }

  // How many keys of the tile each row sees; false if all rows see all.
  bool causal(const Tile& tile, int32_t row, int32_t count, int32_t* visible) const {
    if (tile.run != kNewTokens) return false;
    for (int32_t i = 0; i < count; ++i) visible[i] = call_.visible_to(begin_ + row + i, tile);
    return visible[0] < tile.count;
  }

  void attend_strip_float(const Tile& tile, int32_t row, int32_t count, const int32_t* visible) {
    const size_t at = static_cast<size_t>(row) * a_.head_dim;
    float keep[kStripRows];
    call_.kernels.scores_float(queries_.rows() + at, count, a_.head_dim, static_cast<const float*>(work_.key_panel),
                               tile.count, work_.scores);
    ask_ahead<float>(count);
    call_.kernels.softmax_float(
        {count, tile.count, visible, work_.scores, {work_.maximum + row, work_.sum + row}, keep});
    call_.kernels.values_float(work_.scores, keep, count, call_.values_of<float>(head_, tile), a_.head_dim,
                               work_.sums + at);
  }

  void pack_int8(const Tile& tile) {
    call_.kernels.pack_keys_int8(call_.keys_of<int8_t>(head_, tile), a_.head_dim,
                                 static_cast<uint8_t*>(work_.key_panel));
    call_.kernels.pack_values_int8(call_.values_of<int8_t>(head_, tile), a_.head_dim,
                                   static_cast<int8_t*>(work_.value_panel));
    const int32_t* slots = call_.plan.slots + tile.begin;
    const size_t head = static_cast<size_t>(head_) * a_.capacity;
    alignas(64) float value_scales[kTileKeys];
    const int32_t padded = (tile.count + kPaddedKeys - 1) / kPaddedKeys * kPaddedKeys;
    for (int32_t i = 0; i < padded; ++i) {
      work_.key_scales[i] = i < tile.count ? a_.key_scales[head + slots[i]] : 0.0f;
      value_scales[i] = i < tile.count ? a_.value_scales[head + slots[i]] : 0.0f;
    }
    invert_scales(value_scales, padded, work_.value_logarithms, work_.value_inverses);
    if (queries_.offset().count > 0) {
      const std::ptrdiff_t half = a_.head_dim / 2;
      call_.kernels.pack_angles({a_.slot_cos, half, slots, tile.count}, {a_.slot_sin, half, slots, tile.count},
                                queries_.offset().index, queries_.offset().count, work_.angle_panel);
    }
  }

  void score_int8(const QueryCodes& queries, const Tile& tile, int32_t row, int32_t count, int32_t* dots) const {
    call_.kernels.scores_int8(queries.codes + static_cast<size_t>(row) * a_.head_dim, queries.sums + row, count,
                              a_.head_dim, static_cast<const uint8_t*>(work_.key_panel), tile.count, dots);
  }

  // What the int8 scores of a strip lack: the keys' offset, and the queries' own rounding.
  void correct_strip(const Tile& tile, int32_t row, int32_t count) const {
    const int32_t depth = 2 * queries_.offset().count;
    call_.kernels.scores_float(queries_.offset_factors() + static_cast<size_t>(row) * depth, count, depth,
                               work_.angle_panel, tile.count, work_.corrections);
    score_int8(queries_.remainder(), tile, row, count, work_.remainders);
  }

  void attend_strip_int8(const Tile& tile, int32_t row, int32_t count, const int32_t* visible) {
    const size_t at = static_cast<size_t>(row) * a_.head_dim;
    int32_t* dots = reinterpret_cast<int32_t*>(work_.scores);
    const bool corrected = queries_.offset().count > 0;
    if (corrected) correct_strip(tile, row, count);
    score_int8(queries_.codes(), tile, row, count, dots);
    float keep[kStripRows], step[kStripRows];
    Int8Softmax softmax = {};
    softmax.rows = count;
    softmax.count = tile.count;
    softmax.visible = visible;
    softmax.scores = dots;
    softmax.query_scales = queries_.codes().scales + row;
    softmax.key_scales = work_.key_scales;
    softmax.value_logarithms = work_.value_logarithms;
    softmax.value_inverses = work_.value_inverses;
    if (corrected) {
      softmax.corrections = work_.corrections;
      softmax.remainders = work_.remainders;
      softmax.remainder_scales = queries_.remainder().scales + row;
    }
    softmax.weights = work_.weights;
    softmax.state = {work_.maximum + row, work_.sum + row};
    softmax.keep = keep;
    softmax.step = step;
    for (int32_t i = 0; i < count; i += kSoftmaxRows) {
      call_.kernels.softmax_int8(softmax.part(i, std::min(kSoftmaxRows, count - i)));
      ask_ahead<int8_t>(kSoftmaxRows);
    }
    call_.kernels.values_int8(work_.weights, keep, step, count, static_cast<const int8_t*>(work_.value_panel),
                              tile.count, a_.head_dim, work_.sums + at);
  }

  void write_output() const;

  const AttentionCall& call_;
  const streamo_attention& a_;
  int32_t head_, begin_, rows_, chunk_;
  const Tile* next_ = nullptr; /* the one after that at hand */
  int32_t asked_ = 0;          /* of its rows */
  Workspace work_;
  QueryBlock queries_;
};

// The output's row of query row `row` of KV head `head`.
float* output_row(const AttentionCall& call, int32_t head, int32_t row) {
  const streamo_attention& a = call.arguments;
  const int32_t group = call.group();
  const size_t query_head = static_cast<size_t>(head) * group + row % group;
  return a.output + (static_cast<size_t>(row / group) * a.query_heads + query_head) * a.head_dim;
}

void add_value_bias(const AttentionCall& call, int32_t head, float* output) {
  if (call.arguments.kv_type != STREAMO_KV_INT8) return;  // a float cache holds it
  const float* bias = call.value_bias(head);
  if (bias == nullptr) return;
  for (int32_t i = 0; i < call.arguments.head_dim; ++i) output[i] += bias[i];
}

void Task::write_output() const {
  for (int32_t row = 0; row < rows_; ++row) {
    float* output = output_row(call_, head_, begin_ + row);
    const float* sums = work_.sums + static_cast<size_t>(row) * a_.head_dim;
    const float factor = 1.0f / work_.sum[row];
    for (int32_t i = 0; i < a_.head_dim; ++i) output[i] = sums[i] * factor;
    add_value_bias(call_, head_, output);
  }
}

}  // namespace

void attend(const AttentionCall& call, size_t index) {
  thread_local Scratch scratch;
  Carve memory(scratch.reserve(workspace_bytes(call) + QueryBlock::bytes(call)));
  Task(call, index, memory).run();
}

void merge_chunks(const AttentionCall& call, int32_t head, int32_t block) {
  const streamo_attention& a = call.arguments;
  const int32_t end = std::min((block + 1) * call.plan.block_rows, call.plan.rows);
  for (int32_t row = block * call.plan.block_rows; row < end; ++row) {
    const size_t first = static_cast<size_t>(head) * call.plan.rows + row;
    const size_t step = static_cast<size_t>(a.kv_heads) * call.plan.rows;
    float maximum = -FLT_MAX;
    for (int32_t chunk = 0; chunk < call.plan.chunks; ++chunk) {
      maximum = std::max(maximum, call.partial.maximum[first + chunk * step]);
    }
    float* output = output_row(call, head, row);
    std::fill(output, output + a.head_dim, 0.0f);
    float sum = 0.0f;
    for (int32_t chunk = 0; chunk < call.plan.chunks; ++chunk) {
      const size_t at = first + chunk * step;
      if (!(call.partial.sum[at] > 0.0f)) continue;  // the row sees nothing of this chunk
      const float factor = std::exp2(call.partial.maximum[at] - maximum);
      sum += call.partial.sum[at] * factor;
      const float* values = call.partial.values + at * a.head_dim;
      for (int32_t i = 0; i < a.head_dim; ++i) output[i] += values[i] * factor;
    }
    const float factor = 1.0f / sum;
    for (int32_t i = 0; i < a.head_dim; ++i) output[i] *= factor;
    add_value_bias(call, head, output);
  }
}

}  // namespace streamo
