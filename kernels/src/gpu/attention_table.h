// The table of one attention call: which rows of the cache are read, in the form that the kernels read it.
//
// In words of 32 bits: a header of 4 (the first is the number of tiles), the new tokens' slots padded to a multiple of 4,
// and tiles of 4: first row, rows (1 to 64), run, and the index behind the last tile of that run. Tiles of one run lie
// together; a tile of zeros ends them. Owns this layout and the making of it; knows no device.
#pragma once

#include <cstddef>
#include <cstdint>

#include "streamo_kernels.h"

namespace streamo::gpu {

constexpr int32_t kTileRows = 64;
constexpr int32_t kWordsATile = 4; /* and words of the header */

// How large a table may get.
struct TableSize {
  size_t slots; /* words */
  size_t tiles; /* the last one of zeros included */

  TableSize(int32_t new_tokens, int32_t capacity, int32_t most_spans)
      : slots((static_cast<size_t>(new_tokens) + 3) / 4 * 4),
        tiles(static_cast<size_t>(capacity) / kTileRows + static_cast<size_t>(most_spans) + 1) {}

  size_t words() const { return kWordsATile + slots + tiles * kWordsATile; }
};

// Where the parts of a table on the device are.
struct DeviceTable {
  const int32_t *header, *new_slots, *tiles;

  DeviceTable(const int32_t* table, const TableSize& size)
      : header(table), new_slots(table + kWordsATile), tiles(table + kWordsATile + size.slots) {}
};

// Writes the table of valid arguments with at most `size`'s spans to `table`, of size.words(). Returns the words used:
// what lies behind them need not be copied.
size_t write_table(const streamo_attention& arguments, const TableSize& size, int32_t* table);

}  // namespace streamo::gpu
