// Weights from the bundle's layout to the panels of the instruction set in use.
#include <cstring>
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "common/status.h"
#include "common/threads.h"
#include "matmul/weights.h"

namespace streamo {
namespace {

constexpr std::size_t huge_page = std::size_t{2} << 20;

// Large weights are read as one long stream: huge pages keep the address translation out of the way.
std::uint8_t* allocate(std::size_t bytes) {
  const std::size_t alignment = bytes >= huge_page ? huge_page : 64;
  void* memory = std::aligned_alloc(alignment, (bytes + alignment - 1) / alignment * alignment);
#if defined(__linux__)
  if (memory != nullptr && alignment == huge_page) madvise(memory, bytes, MADV_HUGEPAGE);
#endif
  return static_cast<std::uint8_t*>(memory);
}

// `count` codes of one row from column `first` on, with the zero point added.
void read_codes(const streamo_weights_source& source, int zero, std::int32_t row, std::int32_t first,
                std::int32_t count, std::uint8_t* out) {
  const std::size_t start = static_cast<std::size_t>(row) * source.outputs + first;
  const std::uint8_t* bytes = static_cast<const std::uint8_t*>(source.codes);
  if (source.bits == 8) {
    for (std::int32_t i = 0; i < count; ++i) out[i] = static_cast<std::uint8_t>(bytes[start + i] + zero);
    return;
  }
  // A nibble n stands for the code n - 16 if n > 7; flipping its upper bit adds the zero point of 8.
  std::int32_t i = 0;
  if (start % 2 != 0 && count > 0) out[i++] = (bytes[start / 2] >> 4) ^ 8;
  const std::uint8_t* pairs = bytes + (start + i) / 2;
  const std::int32_t whole = (count - i) / 2;
  for (std::int32_t pair = 0; pair < whole; ++pair) {
    out[i + 2 * pair] = (pairs[pair] & 15) ^ 8;
    out[i + 2 * pair + 1] = (pairs[pair] >> 4) ^ 8;
  }
  if ((count - i) % 2 != 0) out[count - 1] = (pairs[whole] & 15) ^ 8;
}

class PanelPacker {
 public:
  PanelPacker(const streamo_weights_source& source, const streamo_weights& packed)
      : source_(source), packed_(packed), shape_(packed.shape), zero_(shape_.bits == 4 ? 8 : packed.kernels->zero8) {}

  void pack(std::int32_t index) const {
    const std::int32_t first = index * shape_.panel_width();
    const std::int32_t left = shape_.width() - first;
    const std::int32_t count = left < shape_.panel_width() ? left : shape_.panel_width();
    std::uint8_t* out = packed_.data + index * shape_.panel_bytes();
    for (std::int32_t b = 0; b < shape_.blocks(); ++b) {
      const std::int32_t end = b < shape_.full_blocks() ? (b + 1) * shape_.block : shape_.inputs;
      for (std::int32_t k = b * shape_.block; k < end; k += shape_.group) {
        pack_group(k, end, first, count, out);
        out += shape_.group_bytes();
      }
      float scales[max_panel] = {};
      const float* row = source_.scales + static_cast<std::size_t>(b) * source_.outputs + first;
      std::memcpy(scales, row, count * sizeof(float));
      if (shape_.gated) std::memcpy(scales + shape_.panel / 2, row + shape_.width(), count * sizeof(float));
      std::memcpy(out, scales, shape_.panel * sizeof(float));
      out += shape_.panel * sizeof(float);
    }
  }

  static constexpr int max_panel = 128;
  static constexpr int max_group = 8;

 private:
  // One group of K values of every output of the panel. Lanes and K values that do not exist hold the zero point.
  void pack_group(std::int32_t k, std::int32_t end, std::int32_t first, std::int32_t count, std::uint8_t* out) const {
    std::uint8_t rows[max_group][max_panel];
    std::memset(rows, zero_, sizeof rows);
    for (std::int32_t i = 0; i < shape_.group && k + i < end; ++i) {
      read_codes(source_, zero_, k + i, first, count, rows[i]);
      if (shape_.gated) read_codes(source_, zero_, k + i, first + shape_.width(), count, rows[i] + shape_.panel / 2);
    }
    std::uint8_t codes[max_panel * max_group];
    for (std::int32_t lane = 0; lane < shape_.panel; ++lane) {
      for (std::int32_t i = 0; i < shape_.group; ++i) codes[lane * shape_.group + i] = rows[i][lane];
    }
    if (shape_.bits == 8) {
      std::memcpy(out, codes, shape_.group_bytes());
      return;
    }
    const std::int32_t span = packed_.kernels->nibble_span;
    const std::uint8_t* from = codes;
    for (std::size_t done = 0; done < shape_.group_bytes(); done += span, from += 2 * span) {
      for (std::int32_t i = 0; i < span; ++i) out[done + i] = from[i] | static_cast<std::uint8_t>(from[span + i] << 4);
    }
  }

  const streamo_weights_source& source_;
  const streamo_weights& packed_;
  const WeightsShape& shape_;
  const int zero_;
};

streamo_status no_memory(std::size_t bytes, const streamo_weights_source& source) {
  return refuse(STREAMO_OUT_OF_MEMORY,
                "weights: no memory for %zu bytes (%d inputs, %d outputs, %d bits, blocks of %d)", bytes, source.inputs,
                source.outputs, source.bits, source.block);
}

}  // namespace
}  // namespace streamo

extern "C" streamo_status streamo_weights_pack(const streamo_weights_source* source, const streamo_threads* threads,
                                               streamo_weights** packed) {
  using namespace streamo;
  clear_error();
  if (packed == nullptr) return refuse(STREAMO_BAD_ARGUMENT, "weights: expected a place for the result, found NULL");
  *packed = nullptr;
  const streamo_status status = check_weights_source(source);
  if (status != STREAMO_OK) return status;

  const InstructionSet set = instruction_set();
  const MatmulKernels& kernels = matmul_kernels(set);
  WeightsShape shape;
  shape.inputs = source->inputs;
  shape.outputs = source->outputs;
  shape.bits = source->bits;
  shape.block = source->block;
  shape.gated = source->gated != 0;
  shape.panel = kernels.panel;
  shape.group = kernels.group;

  const std::size_t bytes = shape.panels() * shape.panel_bytes();
  streamo_weights* weights = new (std::nothrow) streamo_weights{set, &kernels, shape, bytes, nullptr};
  if (weights == nullptr) return no_memory(bytes, *source);
  weights->data = allocate(bytes);
  if (weights->data == nullptr) {
    delete weights;
    return no_memory(bytes, *source);
  }
  const PanelPacker packer(*source, *weights);
  parallel_for(threads, shape.panels(), [&](std::size_t panel) { packer.pack(static_cast<std::int32_t>(panel)); });
  *packed = weights;
  return STREAMO_OK;
}

extern "C" void streamo_weights_destroy(streamo_weights* packed) {
  if (packed == nullptr) return;
  std::free(packed->data);
  delete packed;
}

extern "C" size_t streamo_weights_bytes(const streamo_weights* packed) {
  return packed == nullptr ? 0 : sizeof *packed + packed->bytes;
}
