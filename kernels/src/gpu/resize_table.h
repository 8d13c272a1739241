// How Pillow's antialiased bicubic filter makes each new pixel of a line from old ones.
//
// Owns the weights, in the fixed point that Pillow uses for 8-bit pictures, and their places. Knows no device.
#pragma once

#include <cstdint>
#include <vector>

namespace streamo::gpu {

struct ResizeTable {
  int32_t size = 0, new_size = 0;
  int32_t taps = 0;              // the most old pixels of a new one
  std::vector<int32_t> starts;   // (new_size) the first old pixel
  std::vector<int32_t> counts;   // (new_size) how many
  std::vector<int32_t> weights;  // (taps, new_size) in 2^-22
};

ResizeTable make_resize_table(int32_t size, int32_t new_size);

}  // namespace streamo::gpu
