// Attention on the GPU: append the new tokens, attend in splits of the cache, merge the splits. Three launches, two with
// one split. Owns the choice of kernels and splits and the workspace; the kernels are in kernels/gpu.
#include <algorithm>
#include <cstdio>

#include "attention/validate.h"
#include "common/scratch.h"
#include "gpu/attention_table.h"
#include "gpu/launch.h"

namespace streamo::gpu {
namespace {

constexpr float kLog2E = 1.44269504088896340736f;
constexpr int32_t kMostAppendSplits = 8;
constexpr int32_t kDecodeRows = 16;  /* up to so many query rows of a KV head are one tile of a tensor core */

// How the query rows of a KV head and the cache are cut. Depends on sizes and the device alone: not on how many rows are
// cached, so that a decode step keeps its grids, nor on timing, so that the same call gives the same bits.
struct Cut {
  int32_t group, rows;   /* query heads of a KV head; T * group */
  int32_t block_rows;    /* query rows of a program */
  int32_t blocks;        /* of query rows */
  int32_t splits;        /* of the cache */
  int32_t least_tiles;   /* of a split that gets any */
};

bool offset_of(const streamo_attention& a) { return a.key_offset != nullptr; }

// Splits of a decode step: two programs for each multiprocessor, so that one computes while the other waits for memory.
// The least share is two tiles: the sums of a split are as many bytes, written and read, as half a tile.
int32_t decode_splits(const streamo_attention& a, int32_t processors, int32_t most_tiles) {
  const int32_t wanted = (2 * processors + a.kv_heads - 1) / a.kv_heads;
  return std::max(1, std::min({wanted, (most_tiles + 1) / 2, 256}));
}

// Splits of an append: the number that takes the fewest rounds of all processors, counted in tiles of a full cache, for
// blocks of rows alone rarely fill the last round. A split costs about 6 tiles more: its start, its sums, their merging.
int32_t append_splits(int32_t programs, int32_t processors, int32_t most_tiles) {
  constexpr int32_t kSplitCost = 6;
  int32_t best = 1;
  int64_t best_cost = INT64_MAX;
  for (int32_t splits = 1; splits <= std::min(kMostAppendSplits, most_tiles); ++splits) {
    const int64_t rounds = (int64_t{programs} * splits + processors - 1) / processors;
    const int64_t cost = rounds * ((most_tiles + splits - 1) / splits + kSplitCost);
    if (cost < best_cost) {
      best = splits;
      best_cost = cost;
    }
  }
  return best;
}

Cut cut(const streamo_gpu* gpu, const streamo_attention& a) {
  Cut c = {};
  c.group = a.query_heads / a.kv_heads;
  c.rows = a.new_tokens * c.group;
  const bool decode = c.rows <= kDecodeRows;
  c.block_rows = decode ? kDecodeRows : a.kv_type == STREAMO_KV_INT8 && !offset_of(a) ? 128 : 32;
  c.blocks = (c.rows + c.block_rows - 1) / c.block_rows;
  const int32_t processors = std::max(1, multiprocessors(gpu));
  const int32_t most_tiles = (a.capacity + kTileRows - 1) / kTileRows;
  c.splits = decode ? decode_splits(a, processors, most_tiles)
                    : append_splits(c.blocks * a.kv_heads, processors, most_tiles);
  c.least_tiles = decode ? 2 : 8;
  return c;
}

// A cut with at least as many sums as any call has that has at most these sizes.
Cut most_cut(const streamo_gpu* gpu, const streamo_attention& a) {
  Cut c = cut(gpu, a);
  if (c.rows <= kDecodeRows) return c;
  const int32_t most_tiles = (a.capacity + kTileRows - 1) / kTileRows;
  const int32_t of_decode = kDecodeRows * decode_splits(a, std::max(1, multiprocessors(gpu)), most_tiles);
  c.splits = std::max(std::min(kMostAppendSplits, most_tiles), (of_decode + c.rows - 1) / c.rows);
  return c;
}

// Everything a call keeps in its workspace.
struct Pieces {
  int8_t *codes, *remainders;
  void* factors; /* float16 */
  float *code_scales, *remainder_scales, *factor_scales;
  float* queries; /* of a float cache */
  float *sums, *maximum, *total;
  int32_t* table;
};

Pieces take(const streamo_attention& a, const Cut& c, size_t table_words, Workspace& workspace) {
  Pieces p = {};
  const size_t rows = (static_cast<size_t>(a.run_count) + 1) * a.kv_heads * c.rows;
  const size_t width = static_cast<size_t>(a.head_dim);
  if (a.kv_type == STREAMO_KV_INT8) {
    p.codes = workspace.take<int8_t>(rows * width);
    p.code_scales = workspace.take<float>(rows);
    if (offset_of(a)) {
      p.remainders = workspace.take<int8_t>(rows * width);
      p.remainder_scales = workspace.take<float>(rows);
      p.factors = workspace.take<uint16_t>(rows * width * 2);
      p.factor_scales = workspace.take<float>(rows);
    }
  } else {
    p.queries = workspace.take<float>(rows * width);
  }
  if (c.splits > 1) {
    const size_t parts = static_cast<size_t>(c.splits) * a.kv_heads * c.rows;
    p.sums = workspace.take<float>(parts * width);
    p.maximum = workspace.take<float>(parts);
    p.total = workspace.take<float>(parts);
  }
  if (table_words > 0) p.table = workspace.take<int32_t>(table_words);
  return p;
}

class Name {
 public:
  Name(const char* what, const streamo_attention& a, const char* last, int32_t number) {
    const char* kind = a.kv_type != STREAMO_KV_INT8 ? "f32" : offset_of(a) ? "int8_offset" : "int8";
    std::snprintf(text_, sizeof text_, "%s_%s_d%d_%s%d", what, kind, a.head_dim, last, number);
  }
  operator const char*() const { return text_; }

 private:
  char text_[64];
};

streamo_status append(streamo_gpu* gpu, const streamo_attention& a, const Pieces& p, const DeviceTable& table,
                      void* stream) {
  const int32_t tokens = a.new_tokens == 1 ? 1 : 16;
  const Name name("append", a, "t", tokens);
  const Grid grid = {static_cast<uint32_t>((a.new_tokens + tokens - 1) / tokens),
                     static_cast<uint32_t>(a.query_heads + 2 * a.kv_heads), static_cast<uint32_t>(a.run_count + 1)};
  const int32_t has_bias = a.qkv_bias != nullptr;
  const float factor = a.scale * kLog2E;
  if (a.kv_type != STREAMO_KV_INT8) {
    return launch(gpu, name, grid, stream, a.qkv, a.qkv_bias, a.rope_cos, a.rope_sin, a.run_cos, a.run_sin,
                  table.new_slots, a.key_cache, a.value_cache, p.queries, a.new_tokens, a.query_heads, a.kv_heads,
                  a.capacity, a.run_count, factor, has_bias);
  }
  return launch(gpu, name, grid, stream, a.qkv, a.qkv_bias, a.rope_cos, a.rope_sin, a.run_cos, a.run_sin, a.key_offset,
                table.new_slots, a.key_cache, a.value_cache, a.key_scales, a.value_scales, p.codes, p.code_scales,
                p.remainders, p.remainder_scales, p.factors, p.factor_scales, a.new_tokens, a.query_heads, a.kv_heads,
                a.capacity, a.run_count, factor, has_bias);
}

// The bias of the values, which an int8 cache leaves out; NULL if there is none to add.
const float* value_bias(const streamo_attention& a) {
  if (a.kv_type != STREAMO_KV_INT8 || a.qkv_bias == nullptr) return nullptr;
  return a.qkv_bias + (static_cast<size_t>(a.query_heads) + a.kv_heads) * a.head_dim;
}

streamo_status attend(streamo_gpu* gpu, const streamo_attention& a, const Cut& c, const Pieces& p,
                      const DeviceTable& table, void* stream) {
  const Name name("attend", a, "m", c.block_rows);
  const Grid grid = {static_cast<uint32_t>(a.kv_heads), static_cast<uint32_t>(c.blocks),
                     static_cast<uint32_t>(c.splits)};
  if (a.kv_type != STREAMO_KV_INT8) {
    return launch(gpu, name, grid, stream, p.queries, a.key_cache, a.value_cache, table.header, table.tiles,
                  table.new_slots, p.sums, p.maximum, p.total, a.output, c.rows, c.group, a.new_tokens, a.capacity,
                  a.run_count, c.least_tiles);
  }
  const float* bias = value_bias(a);
  const int32_t has_bias = bias != nullptr;
  return launch(gpu, name, grid, stream, p.codes, p.code_scales, p.remainders, p.remainder_scales, p.factors,
                p.factor_scales, a.key_cache, a.value_cache, a.key_scales, a.value_scales, a.slot_cos, a.slot_sin,
                table.header, table.tiles, table.new_slots, p.sums, p.maximum, p.total, a.output, bias, c.rows, c.group,
                a.new_tokens, a.capacity, a.run_count, c.least_tiles, has_bias);
}

streamo_status merge(streamo_gpu* gpu, const streamo_attention& a, const Cut& c, const Pieces& p, void* stream) {
  char name[32];
  std::snprintf(name, sizeof name, "merge_d%d_s%d", a.head_dim, c.splits <= 8 ? 4 : 32);
  const float* bias = value_bias(a);
  const int32_t has_bias = bias != nullptr;
  return launch(gpu, name, {static_cast<uint32_t>(c.rows), static_cast<uint32_t>(a.kv_heads)}, stream, p.sums,
                p.maximum, p.total, a.output, bias, c.rows, c.group, c.splits, has_bias);
}

streamo_status validate_alignment(const streamo_attention& a) {
  const struct {
    const void* pointer;
    const char* name;
  } pointers[] = {{a.qkv, "qkv"},           {a.qkv_bias, "qkv_bias"},         {a.rope_cos, "rope_cos"},
                  {a.rope_sin, "rope_sin"}, {a.key_cache, "key_cache"},       {a.value_cache, "value_cache"},
                  {a.run_cos, "run_cos"},   {a.run_sin, "run_sin"},           {a.key_offset, "key_offset"},
                  {a.slot_cos, "slot_cos"}, {a.slot_sin, "slot_sin"},         {a.key_scales, "key_scales"},
                  {a.output, "output"},     {a.value_scales, "value_scales"}};
  for (const auto& entry : pointers) {
    if (!is_aligned(entry.pointer)) {
      return refuse(STREAMO_BAD_ARGUMENT, "%s must be aligned to 16 bytes on a GPU, found address %p", entry.name,
                    entry.pointer);
    }
  }
  return STREAMO_OK;
}

streamo_status validate_for_gpu(const streamo_attention& a, const Cut& c) {
  if (a.head_dim != 64 && a.head_dim != 128) {
    return refuse(STREAMO_UNSUPPORTED, "attention on a GPU has kernels for a head_dim of 64 and 128, found %d",
                  a.head_dim);
  }
  if (c.blocks > kMostGrid || a.run_count >= kMostGrid || a.query_heads + 2 * a.kv_heads > kMostGrid) {
    return refuse(STREAMO_UNSUPPORTED, "%d query rows, %d runs and %d heads are too many for a GPU", c.rows, a.run_count,
                  a.query_heads);
  }
  return STREAMO_OK;
}

// The arguments as they are checked: with a table on the device, neither spans nor slots of the host are looked at.
streamo_status validate_call(const streamo_attention* arguments, const void* table, int32_t most_spans) {
  if (arguments == nullptr) return refuse(STREAMO_BAD_ARGUMENT, "arguments must not be NULL");
  if (table == nullptr) return validate(arguments);
  streamo_attention without_rows = *arguments;
  without_rows.span_count = 0;
  without_rows.new_slots = static_cast<const int32_t*>(table);
  if (most_spans < 0 || !is_aligned(table)) {
    return refuse(STREAMO_BAD_ARGUMENT, "attention: expected a table aligned to 16 bytes, for at least 0 spans, found %d",
                  most_spans);
  }
  return validate_layout(without_rows);
}

// Without a table of the caller's. It goes where only this call's stream looks, the workspace, in the stream's order: the
// kernels of the call before have read theirs, and those of other streams have other workspaces. `upload` is done with
// the host's memory when it returns, so the next call may write there.
streamo_status send_table(streamo_gpu* gpu, const streamo_attention& a, const TableSize& size, int32_t* device,
                          void* stream) {
  thread_local Scratch scratch;
  int32_t* table = scratch.reserve_of<int32_t>(size.words());
  return upload(gpu, device, table, write_table(a, size, table) * sizeof(int32_t), stream);
}

streamo_status run(streamo_gpu* gpu, const streamo_attention& a, const void* given_table, int32_t most_spans,
                   Workspace workspace, void* stream) {
  const Cut c = cut(gpu, a);
  if (const streamo_status status = validate_for_gpu(a, c)) return status;
  if (const streamo_status status = validate_alignment(a)) return status;
  const TableSize size(a.new_tokens, a.capacity, given_table == nullptr ? a.span_count : most_spans);
  const Pieces p = take(a, c, given_table == nullptr ? size.words() : 0, workspace);
  if (const streamo_status status = workspace.check("attention")) return status;
  if (given_table == nullptr) {
    if (const streamo_status status = send_table(gpu, a, size, p.table, stream)) return status;
  }
  const DeviceTable table(given_table == nullptr ? p.table : static_cast<const int32_t*>(given_table), size);
  if (const streamo_status status = append(gpu, a, p, table, stream)) return status;
  if (const streamo_status status = attend(gpu, a, c, p, table, stream)) return status;
  return c.splits == 1 ? STREAMO_OK : merge(gpu, a, c, p, stream);
}

// The workspace of a call with these sizes that is cut as `cut_of` says.
streamo_status count_workspace(streamo_gpu* gpu, const streamo_attention* arguments,
                               Cut (*cut_of)(const streamo_gpu*, const streamo_attention&), size_t* bytes) {
  return on_device(gpu, [&]() -> streamo_status {
    if (arguments == nullptr || bytes == nullptr) {
      return refuse(STREAMO_BAD_ARGUMENT, "attention: expected arguments and a place for the workspace's size");
    }
    const streamo_attention& a = *arguments;
    if (const streamo_status status = validate_sizes(a)) return status;
    if (const streamo_status status = validate_for_gpu(a, cut(gpu, a))) return status;
    Workspace counted;
    take(a, cut_of(gpu, a), TableSize(a.new_tokens, a.capacity, a.span_count).words(), counted);
    *bytes = counted.used();
    return STREAMO_OK;
  });
}

}  // namespace
}  // namespace streamo::gpu

// With a table in the workspace, whether the call will bring one of its own or not, whatever it names.
extern "C" streamo_status streamo_gpu_attention_workspace(streamo_gpu* gpu, const streamo_attention* arguments,
                                                          size_t* bytes) {
  return streamo::gpu::count_workspace(gpu, arguments, streamo::gpu::cut, bytes);
}

extern "C" streamo_status streamo_gpu_attention_most_workspace(streamo_gpu* gpu, const streamo_attention* arguments,
                                                               size_t* bytes) {
  return streamo::gpu::count_workspace(gpu, arguments, streamo::gpu::most_cut, bytes);
}

extern "C" streamo_status streamo_gpu_attention_run(streamo_gpu* gpu, const streamo_attention* arguments,
                                                    const void* table, int32_t most_spans, void* workspace,
                                                    size_t workspace_bytes, void* stream) {
  using namespace streamo;
  using namespace streamo::gpu;
  return on_device(gpu, [&]() -> streamo_status {
    if (const streamo_status status = validate_call(arguments, table, most_spans)) return status;
    return run(gpu, *arguments, table, most_spans, Workspace(workspace, workspace_bytes), stream);
  });
}
