// How one call is cut into tiles and tasks. Depends on the shapes and spans only, never on the number of threads, so
// that sums are formed in the same order wherever they run.
#pragma once

#include "attention/kernels.h"
#include "common/scratch.h"
#include "streamo_kernels.h"

namespace streamo {

constexpr int32_t kNewTokens = -1;

// Consecutive keys of `Plan::slots`, all of one run.
struct Tile {
  int32_t begin, count;
  int32_t run;         /* kNewTokens: the new tokens themselves, causal */
  int32_t first_token; /* of a tile of new tokens */
};

struct Plan {
  const int32_t* slots; /* of all keys, run by run, the new tokens last */
  const Tile* tiles;
  int32_t tile_count;
  int32_t rows;        /* query rows of a KV head: token-major, T * (Hq / Hkv) */
  int32_t block_rows;  /* rows of a task */
  int32_t blocks;      /* of rows */
  int32_t chunk_tiles; /* tiles of a task */
  int32_t chunks;      /* of tiles; more than one: partial sums are merged */
};

// Lives until the next call with the same memory. May throw std::bad_alloc.
Plan make_plan(const streamo_attention& arguments, Scratch& memory);

}  // namespace streamo
