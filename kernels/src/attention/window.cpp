// Attention inside the windows of a vision tower: turn everything once, then one task a block of rows of a window.
#include <algorithm>
#include <cfloat>
#include <new>

#include "attention/carve.h"
#include "attention/kernels.h"
#include "attention/validate.h"
#include "common/scratch.h"
#include "common/status.h"
#include "common/threads.h"

namespace streamo {
namespace {

constexpr float kLog2E = 1.44269504088896340736f;
constexpr int32_t kMostBlockRows = 96;
constexpr int32_t kRowsATask = 16;

struct WindowBlock {
  int32_t begin, count;           /* query rows */
  int32_t keys_begin, keys_count; /* rows of their window */
};

struct WindowCall {
  const streamo_window_attention& arguments;
  const AttentionKernels& kernels;
  const int32_t* rows;       /* 0 .. P - 1 */
  const WindowBlock* blocks;
  int32_t block_count;
  float *queries, *keys;     /* (heads, P, D), turned; queries times scale and log2(e) */
};

int32_t cut_into_blocks(const streamo_window_attention& a, WindowBlock* blocks) {
  int32_t count = 0;
  for (int32_t window = 0; window < a.window_count; ++window) {
    const int32_t begin = a.window_starts[window], rows = a.window_starts[window + 1] - begin;
    const int32_t parts = (rows + kMostBlockRows - 1) / kMostBlockRows;
    for (int32_t part = 0; part < parts; ++part) {
      const auto edge = [&](int64_t i) { return static_cast<int32_t>(rows * i / parts); };
      blocks[count++] = {begin + edge(part), edge(part + 1) - edge(part), begin, rows};
    }
  }
  return count;
}

WindowCall prepare(const streamo_window_attention& a) {
  thread_local Scratch scratch;
  const size_t elements = static_cast<size_t>(a.heads) * a.rows * a.head_dim;
  const size_t most_blocks = static_cast<size_t>(a.window_count) + static_cast<size_t>(a.rows) / kMostBlockRows;
  Carve memory(scratch.reserve(2 * Carve::bytes_of<float>(elements) +
                               Carve::bytes_of<int32_t>(static_cast<size_t>(a.rows)) +
                               Carve::bytes_of<WindowBlock>(most_blocks)));
  float* queries = memory.take<float>(elements);
  float* keys = memory.take<float>(elements);
  int32_t* rows = memory.take<int32_t>(static_cast<size_t>(a.rows));
  WindowBlock* blocks = memory.take<WindowBlock>(most_blocks);
  for (int32_t row = 0; row < a.rows; ++row) rows[row] = row;
  const int32_t block_count = cut_into_blocks(a, blocks);
  return {a, attention_kernels(), rows, blocks, block_count, queries, keys};
}

void turn_row(const WindowCall& call, size_t row) {
  const streamo_window_attention& a = call.arguments;
  const size_t width = static_cast<size_t>(a.head_dim), heads = static_cast<size_t>(a.heads);
  const float *cosine = a.rope_cos + row * (width / 2), *sine = a.rope_sin + row * (width / 2);
  const float factor = a.scale * kLog2E;
  for (size_t head = 0; head < heads; ++head) {
    const float* query = a.qkv + (row * 3 * heads + head) * width;
    float* turned = call.queries + (head * a.rows + row) * width;
    call.kernels.turn(query, cosine, sine, a.head_dim / 2, turned);
    for (size_t i = 0; i < width; ++i) turned[i] *= factor;
    call.kernels.turn(query + heads * width, cosine, sine, a.head_dim / 2,
                      call.keys + (head * a.rows + row) * width);
  }
}

void attend_block(const WindowCall& call, size_t head, const WindowBlock& block) {
  const streamo_window_attention& a = call.arguments;
  const size_t width = static_cast<size_t>(a.head_dim);
  thread_local Scratch scratch;
  Carve memory(scratch.reserve(Carve::bytes_of<float>(kTileKeys * width) +
                               Carve::bytes_of<float>(size_t{kStripRows} * kTileKeys) +
                               Carve::bytes_of<float>(kMostBlockRows * width) +
                               2 * Carve::bytes_of<float>(kMostBlockRows)));
  float* panel = memory.take<float>(kTileKeys * width);
  float* scores = memory.take<float>(size_t{kStripRows} * kTileKeys);
  float* sums = memory.take<float>(kMostBlockRows * width);
  float* maximum = memory.take<float>(kMostBlockRows);
  float* sum = memory.take<float>(kMostBlockRows);
  std::fill(sums, sums + static_cast<size_t>(block.count) * width, 0.0f);
  std::fill(maximum, maximum + block.count, -FLT_MAX);
  std::fill(sum, sum + block.count, 0.0f);

  const float* queries = call.queries + (head * a.rows + block.begin) * width;
  const float* keys = call.keys + head * a.rows * width;
  const float* values = a.qkv + (2 * static_cast<size_t>(a.heads) + head) * width;
  const std::ptrdiff_t value_stride = 3 * static_cast<std::ptrdiff_t>(a.heads) * a.head_dim;
  for (int32_t key = 0; key < block.keys_count; key += kTileKeys) {
    const int32_t count = std::min(kTileKeys, block.keys_count - key);
    const int32_t* rows = call.rows + block.keys_begin + key;
    call.kernels.pack_keys_float({keys, a.head_dim, rows, count}, a.head_dim, panel);
    for (int32_t row = 0; row < block.count; row += kStripRows) {
      const int32_t strip = std::min(kStripRows, block.count - row);
      float keep[kStripRows];
      call.kernels.scores_float(queries + row * width, strip, a.head_dim, panel, count, scores);
      call.kernels.softmax_float({strip, count, nullptr, scores, {maximum + row, sum + row}, keep});
      call.kernels.values_float(scores, keep, strip, {values, value_stride, rows, count}, a.head_dim,
                                sums + row * width);
    }
  }
  for (size_t row = 0; row < static_cast<size_t>(block.count); ++row) {
    float* output = a.output + ((block.begin + row) * a.heads + head) * width;
    const float factor = 1.0f / sum[row];
    for (size_t i = 0; i < width; ++i) output[i] = sums[row * width + i] * factor;
  }
}

streamo_status out_of_memory() {
  return refuse(STREAMO_OUT_OF_MEMORY, "window attention found no memory for its scratch");
}

streamo_status run(const streamo_window_attention& arguments, const streamo_threads* threads) {
  const WindowCall call = prepare(arguments);
  const size_t turn_tasks = (static_cast<size_t>(arguments.rows) + kRowsATask - 1) / kRowsATask;
  parallel_for(threads, turn_tasks, [&](size_t task) {
    const size_t begin = task * kRowsATask, end = std::min(begin + kRowsATask, static_cast<size_t>(arguments.rows));
    for (size_t row = begin; row < end; ++row) turn_row(call, row);
  });
  const size_t blocks = static_cast<size_t>(call.block_count);
  const bool done = try_parallel_for(threads, static_cast<size_t>(arguments.heads) * blocks, [&](size_t task) {
    attend_block(call, task / blocks, call.blocks[task % blocks]);
  });
  return done ? STREAMO_OK : out_of_memory();
}

}  // namespace
}  // namespace streamo

extern "C" streamo_status streamo_window_attention_run(const streamo_window_attention* arguments,
                                                       const streamo_threads* threads) {
  using namespace streamo;
  clear_error();
  try {
    if (const streamo_status status = validate(arguments)) return status;
    if (const streamo_status status = validate(threads)) return status;
    return run(*arguments, threads);
  } catch (const std::bad_alloc&) {
    return out_of_memory();
  }
}
