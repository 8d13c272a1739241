// Packed weights: where the codes and scales of a panel lie. Knows the layout, not the arithmetic.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>

#include "matmul/kernels.h"
#include "streamo_kernels.h"

namespace streamo {

// What the sizes of a weight mean for the layout of one instruction set.
struct WeightsShape {
  std::int32_t inputs = 0, outputs = 0, bits = 0, block = 0;
  bool gated = false;
  std::int32_t panel = 0, group = 0;

  std::int32_t full_blocks() const { return inputs / block; }
  std::int32_t blocks() const { return (inputs + block - 1) / block; }
  // Groups of a full block, and of the short one at the end (0 if there is none).
  std::int32_t block_groups() const { return block / group; }
  std::int32_t tail_groups() const { return (inputs % block + group - 1) / group; }
  std::int32_t groups() const { return full_blocks() * block_groups() + tail_groups(); }

  // Outputs of the product, and how many of them a panel yields.
  std::int32_t width() const { return gated ? outputs / 2 : outputs; }
  std::int32_t panel_width() const { return gated ? panel / 2 : panel; }
  std::int32_t panels() const { return (width() + panel_width() - 1) / panel_width(); }

  std::size_t group_bytes() const { return static_cast<std::size_t>(panel) * group * bits / 8; }
  std::size_t codes_bytes() const { return block_groups() * group_bytes(); }  // of a full block
  std::size_t block_bytes() const { return codes_bytes() + panel * sizeof(float); }
  std::size_t panel_bytes() const { return groups() * group_bytes() + blocks() * panel * sizeof(float); }
};

// Refuses a source that does not fit; STREAMO_OK otherwise.
streamo_status check_weights_source(const streamo_weights_source* source);

// Refuses a call that does not fit weights of these sizes; STREAMO_OK otherwise.
streamo_status check_matmul(const streamo_matmul* arguments, std::int32_t inputs, std::int32_t width);

}  // namespace streamo

struct streamo_weights {
  streamo::InstructionSet set;
  const streamo::MatmulKernels* kernels;
  streamo::WeightsShape shape;
  std::size_t bytes;
  std::uint8_t* data;  // [panels][panel_bytes], aligned to a page or more
};
