#include "attention/plan.h"

#include <algorithm>
#include <cstring>

namespace streamo {
namespace {

constexpr int32_t kMostBlockRows = 576;   // queries, sums and a tile then fit a second-level cache
constexpr int32_t kEnoughTasks = 8;       // below this the keys are cut into chunks as well
constexpr int32_t kWantedTasks = 12;
constexpr int32_t kManyRows = 256;        // from here on, more chunks than needed cost more in sums than they balance
constexpr int32_t kFewestChunkTiles = 2;

int32_t divide_up(int64_t a, int64_t b) { return static_cast<int32_t>((a + b - 1) / b); }

// Where each run's keys begin in `slots`; the new tokens are run_count.
void sort_by_run(const streamo_attention& a, int32_t* starts, int32_t* slots) {
  std::fill(starts, starts + a.run_count + 1, 0);
  for (int32_t i = 0; i < a.span_count; ++i) {
    if (a.spans[i].length > 0) starts[a.spans[i].run + 1] += a.spans[i].length;
  }
  for (int32_t run = 0; run < a.run_count; ++run) starts[run + 1] += starts[run];
  for (int32_t i = 0; i < a.span_count; ++i) {
    const streamo_span& span = a.spans[i];
    if (span.length <= 0) continue;
    int32_t* to = slots + starts[span.run];
    for (int32_t row = 0; row < span.length; ++row) to[row] = span.slot + row;
    starts[span.run] += span.length;
  }
  // Every start has moved to its run's end, which is the next run's start.
  std::memmove(starts + 1, starts, static_cast<size_t>(a.run_count) * sizeof(int32_t));
  starts[0] = 0;
  std::memcpy(slots + starts[a.run_count], a.new_slots, static_cast<size_t>(a.new_tokens) * sizeof(int32_t));
}

int32_t cut_into_tiles(const streamo_attention& a, const int32_t* starts, Tile* tiles) {
  int32_t count = 0;
  for (int32_t run = 0; run <= a.run_count; ++run) {
    const bool fresh = run == a.run_count;
    const int32_t end = fresh ? starts[run] + a.new_tokens : starts[run + 1];
    for (int32_t begin = starts[run]; begin < end; begin += kTileKeys) {
      tiles[count++] = {begin, std::min(kTileKeys, end - begin), fresh ? kNewTokens : run, begin - starts[run]};
    }
  }
  return count;
}

}  // namespace

Plan make_plan(const streamo_attention& a, Scratch& memory) {
  int64_t keys = a.new_tokens;
  for (int32_t i = 0; i < a.span_count; ++i) keys += a.spans[i].length;
  const size_t most_tiles = static_cast<size_t>(keys / kTileKeys) + static_cast<size_t>(a.run_count) + 2;
  char* bytes = memory.reserve_of<char>(static_cast<size_t>(keys) * sizeof(int32_t) + most_tiles * sizeof(Tile) +
                                        (static_cast<size_t>(a.run_count) + 1) * sizeof(int32_t));
  Tile* tiles = reinterpret_cast<Tile*>(bytes);
  int32_t* starts = reinterpret_cast<int32_t*>(tiles + most_tiles);
  int32_t* slots = starts + a.run_count + 1;
  sort_by_run(a, starts, slots);

  Plan plan;
  plan.slots = slots;
  plan.tiles = tiles;
  plan.tile_count = cut_into_tiles(a, starts, tiles);
  plan.rows = a.new_tokens * (a.query_heads / a.kv_heads);
  const int32_t blocks = divide_up(plan.rows, kMostBlockRows);
  plan.block_rows = std::min(divide_up(divide_up(plan.rows, blocks), kStripRows) * kStripRows, plan.rows);
  plan.blocks = divide_up(plan.rows, plan.block_rows);

  const int64_t tasks = int64_t{plan.blocks} * a.kv_heads;
  plan.chunk_tiles = plan.tile_count;
  if (tasks < kEnoughTasks) {
    const int32_t wanted = plan.block_rows < kManyRows ? kWantedTasks : kEnoughTasks;
    plan.chunk_tiles = std::max(kFewestChunkTiles, divide_up(plan.tile_count * tasks, wanted));
  }
  plan.chunks = divide_up(plan.tile_count, plan.chunk_tiles);
  return plan;
}

}  // namespace streamo
