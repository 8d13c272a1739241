// What the parts of one attention call share.
#pragma once

#include <algorithm>

#include "attention/kernels.h"
#include "attention/plan.h"
#include "streamo_kernels.h"

namespace streamo {

// Sums over some chunk of the keys: not yet divided by the weights' sum.
struct PartialSums {
  float* values;  /* (chunks, Hkv, rows, D) */
  float* maximum; /* (chunks, Hkv, rows) */
  float* sum;     /* (chunks, Hkv, rows) */
};

struct AttentionCall {
  const streamo_attention& arguments;
  const AttentionKernels& kernels;
  Plan plan;
  const FewRowsKernels* few_rows; /* NULL where the many-row kernels are better or alone */
  float* queries; /* (Hkv, rows, D): turned, times scale and log2(e), so that weights are powers of two */
  PartialSums partial;

  int32_t group() const { return arguments.query_heads / arguments.kv_heads; }

  // Whether tasks leave partial sums.
  bool merged() const { return plan.chunks > 1 || few_rows != nullptr; }

  template <typename Element>
  RowSource<Element> keys_of(int32_t head, const Tile& tile) const {
    return rows_of<Element>(arguments.key_cache, head, tile);
  }
  template <typename Element>
  RowSource<Element> values_of(int32_t head, const Tile& tile) const {
    return rows_of<Element>(arguments.value_cache, head, tile);
  }

  // How many keys of a tile a query row sees; not above 0 if none.
  int32_t visible_to(int32_t row, const Tile& tile) const {
    if (tile.run != kNewTokens) return tile.count;
    return std::min(tile.count, row / group() + 1 - tile.first_token);
  }

  // The bias of KV head `head`'s values, or NULL.
  const float* value_bias(int32_t head) const {
    if (arguments.qkv_bias == nullptr) return nullptr;
    const size_t heads = static_cast<size_t>(arguments.query_heads) + arguments.kv_heads + head;
    return arguments.qkv_bias + heads * arguments.head_dim;
  }

 private:
  template <typename Element>
  RowSource<Element> rows_of(const void* cache, int32_t head, const Tile& tile) const {
    const size_t first = static_cast<size_t>(head) * arguments.capacity * arguments.head_dim;
    return {static_cast<const Element*>(cache) + first, arguments.head_dim, plan.slots + tile.begin, tile.count};
  }
};

// Token `token`: its queries to `call.queries`, its key and value to their row of the caches.
void append_token(const AttentionCall& call, int32_t token);

// One task: query rows of a block attend to a chunk of the keys. `index` below Hkv * blocks * chunks.
// Writes the output itself where there is one chunk, else partial sums. May throw std::bad_alloc.
void attend(const AttentionCall& call, size_t index);

// As `attend` with the call's `few_rows`, but always leaves partial sums.
void attend_few_rows(const AttentionCall& call, size_t index);

// Block `block` of KV head `head`: partial sums to output.
void merge_chunks(const AttentionCall& call, int32_t head, int32_t block);

}  // namespace streamo
