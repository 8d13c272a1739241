// One quantised matrix product: quantise the input, then panel after panel, each wholly by one thread.
//
// K is never split between threads, and a panel's blocks are always summed in the same order: the same bits for any
// number of threads. Packed codes stream from memory once (once for every `row_limit` rows), the quantised input stays
// in the second-level cache, and the sums of a tile in the first.
#include <algorithm>
#include <cstring>
#include <new>

#include "common/scratch.h"
#include "common/status.h"
#include "common/threads.h"
#include "matmul/weights.h"

namespace streamo {
namespace {

constexpr std::int32_t row_limit = 252;       // rows whose sums one task holds
constexpr std::int32_t chunk_inputs = 512;    // K of the codes that a task unpacks at once, for all its rows
constexpr std::size_t tasks_per_thread = 64;  // fewer leave threads idle at the end, more cost their starting

constexpr std::size_t round_up(std::size_t value, std::size_t unit) { return (value + unit - 1) / unit * unit; }

// The input as codes: for each chunk of K, for each tile of rows, what QuantiseArguments says. So one chunk's walk over
// all rows reads memory in order.
struct QuantisedInput {
  std::int8_t* codes;
  float* scales;
  std::int32_t* starts;
};

// Consecutive blocks of equal length that are multiplied together.
struct Chunk {
  std::int32_t first_block, blocks;
  std::int32_t groups;  // of each block
};

class Product {
 public:
  Product(const streamo_weights& weights, const streamo_matmul& call)
      : weights_(weights), shape_(weights.shape), kernels_(*weights.kernels), call_(call) {
    const std::int32_t tile_rows = kernels_.tile_rows;
    tiles_ = (call.rows + tile_rows - 1) / tile_rows;
    const std::int32_t limit_tiles = std::max(1, row_limit / tile_rows);
    const std::int32_t least_parts = (tiles_ + limit_tiles - 1) / limit_tiles;
    part_tiles_ = (tiles_ + least_parts - 1) / least_parts;
    row_parts_ = (tiles_ + part_tiles_ - 1) / part_tiles_;
    unpacks_ = shape_.bits == 4 && call.rows > kernels_.few_rows;
    chunk_blocks_ = std::max(1, chunk_inputs / shape_.block);
    full_chunks_ = (shape_.full_blocks() + chunk_blocks_ - 1) / chunk_blocks_;
    chunks_ = full_chunks_ + (shape_.tail_groups() == 0 ? 0 : 1);
  }

  std::size_t input_bytes() const { return 2 * scales_bytes() + tiles_ * tile_group() * shape_.groups(); }
  // Of each thread: sums of its rows, and unpacked codes of one chunk.
  std::size_t task_bytes() const { return sums_bytes() + (unpacks_ ? chunk_bytes() : 0); }

  void place_input(void* memory) {
    std::uint8_t* bytes = static_cast<std::uint8_t*>(memory);
    input_.scales = reinterpret_cast<float*>(bytes);
    input_.starts = reinterpret_cast<std::int32_t*>(bytes + scales_bytes());
    input_.codes = reinterpret_cast<std::int8_t*>(bytes + 2 * scales_bytes());
  }

  std::size_t tiles() const { return tiles_; }
  std::size_t parts() const { return static_cast<std::size_t>(shape_.panels()) * row_parts_; }

  void quantise(std::int32_t tile) const {
    QuantiseArguments a;
    const std::int64_t first = static_cast<std::int64_t>(tile) * kernels_.tile_rows;
    a.stride = call_.input_stride;
    a.rows = tile_height(tile);
    a.block = shape_.block;
    a.zero = shape_.bits == 4 ? 8 : kernels_.zero8;
    for (std::int32_t index = 0; index < chunks_; ++index) {
      const Chunk chunk = chunk_at(index);
      const std::int32_t k = chunk.first_block * shape_.block;
      a.input = call_.input + first * call_.input_stride + k;
      a.inputs = std::min(chunk.blocks * shape_.block, shape_.inputs - k);
      const QuantisedInput out = quantised(chunk, tile);
      a.codes = out.codes;
      a.scales = out.scales;
      a.starts = out.starts;
      kernels_.quantise(a);
    }
  }

  // One panel for one part of the rows.
  void run_part(std::size_t part, void* scratch) const {
    const std::size_t panel = part / row_parts_;
    const std::int32_t first_tile = static_cast<std::int32_t>(part % row_parts_) * part_tiles_;
    const std::int32_t end_tile = std::min(tiles_, first_tile + part_tiles_);
    float* sums = static_cast<float*>(scratch);
    std::uint8_t* unpacked = static_cast<std::uint8_t*>(scratch) + sums_bytes();
    std::memset(sums, 0, (end_tile - first_tile) * tile_sums() * sizeof(float));
    for (std::int32_t index = 0; index < chunks_; ++index) {
      const Chunk chunk = chunk_at(index);
      run_chunk(chunk, panel, first_tile, end_tile, sums, unpacked);
    }
  }

 private:
  std::size_t tile_group() const { return static_cast<std::size_t>(kernels_.tile_rows) * shape_.group; }
  std::size_t scales_bytes() const {
    return round_up(static_cast<std::size_t>(tiles_) * shape_.blocks() * kernels_.tile_rows * sizeof(float), 64);
  }
  std::size_t tile_sums() const { return static_cast<std::size_t>(kernels_.tile_rows) * shape_.panel; }
  std::size_t sums_bytes() const { return round_up(part_tiles_ * tile_sums() * sizeof(float), 64); }
  std::size_t chunk_bytes() const {
    return static_cast<std::size_t>(chunk_blocks_) * shape_.block * shape_.panel;
  }
  std::int32_t tile_height(std::int32_t tile) const {
    return std::min(kernels_.tile_rows, call_.rows - tile * kernels_.tile_rows);
  }

  // The short block at the end of K is a chunk of its own.
  Chunk chunk_at(std::int32_t index) const {
    if (index == full_chunks_) return {shape_.full_blocks(), 1, shape_.tail_groups()};
    const std::int32_t first = index * chunk_blocks_;
    return {first, std::min(chunk_blocks_, shape_.full_blocks() - first), shape_.block_groups()};
  }

  QuantisedInput quantised(const Chunk& chunk, std::int32_t tile) const {
    const std::size_t before = static_cast<std::size_t>(tiles_) * chunk.first_block;  // tiles of blocks
    const std::size_t at = (before + static_cast<std::size_t>(tile) * chunk.blocks) * kernels_.tile_rows;
    const std::size_t of_chunk = static_cast<std::size_t>(tile) * chunk.blocks * chunk.groups;
    const std::size_t group = before * shape_.block_groups() + of_chunk;
    return {input_.codes + group * tile_group(), input_.scales + at, input_.starts + at};
  }

  void run_chunk(const Chunk& chunk, std::size_t panel, std::int32_t first_tile, std::int32_t end_tile, float* sums,
                 std::uint8_t* unpacked) const {
    const std::uint8_t* codes =
        weights_.data + panel * shape_.panel_bytes() + chunk.first_block * shape_.block_bytes();
    const bool last = chunk.first_block + chunk.blocks == shape_.blocks();
    const std::int32_t first_column = static_cast<std::int32_t>(panel) * shape_.panel_width();
    const std::size_t codes_bytes = chunk.groups * shape_.group_bytes();
    TileArguments a;
    a.codes = codes;
    a.scales = codes + codes_bytes;
    a.codes_stride = a.scales_stride = codes_bytes + shape_.panel * sizeof(float);
    a.blocks = chunk.blocks;
    a.groups = chunk.groups;
    if (unpacks_) {
      a.codes = unpacked;
      a.codes_stride = 2 * codes_bytes;
      for (std::int32_t b = 0; b < chunk.blocks; ++b) {
        kernels_.unpack(codes + b * a.scales_stride, unpacked + b * a.codes_stride, chunk.groups);
      }
    }
    std::size_t next = codes - weights_.data + chunk.blocks * a.scales_stride;
    const std::size_t ahead = round_up(chunk.blocks * a.scales_stride / (end_tile - first_tile) + 1, 64);
    for (std::int32_t tile = first_tile; tile < end_tile; ++tile, next += ahead) {
      if (end_tile - first_tile > 1) prefetch(next, ahead);
      const QuantisedInput input = quantised(chunk, tile);
      a.rows = tile_height(tile);
      if (last) prefetch_output(first_column, tile);
      a.input = input.codes;
      a.input_scales = input.scales;
      a.starts = input.starts;
      a.sums = sums + (tile - first_tile) * tile_sums();
      if (shape_.bits == 4 && !unpacks_) {
        kernels_.from_nibbles(a);
      } else {
        kernels_.from_bytes(a, shape_.bits);
      }
      if (last) finish(first_column, tile, a.sums);
    }
  }

  // A share of the next chunk on its way from memory while this one is multiplied.
  void prefetch(std::size_t start, std::size_t count) const {
    const std::size_t end = std::min(weights_.bytes, start + count);
    for (std::size_t at = start; at < end; at += 64) __builtin_prefetch(weights_.data + at, 0, 2);
  }

  // The lines that `finish` will write for a tile, while its last sums are made.
  void prefetch_output(std::int32_t first_column, std::int32_t tile) const {
    const std::int32_t width = std::min(shape_.panel_width(), shape_.width() - first_column);
    const std::int64_t first_row = static_cast<std::int64_t>(tile) * kernels_.tile_rows;
    for (std::int32_t row = 0; row < tile_height(tile); ++row) {
      const float* output = call_.output + (first_row + row) * call_.output_stride + first_column;
      for (std::int32_t column = 0; column < width; column += 16) __builtin_prefetch(output + column, 1);
    }
  }

  void finish(std::int32_t first_column, std::int32_t tile, const float* sums) const {
    const std::int64_t first_row = static_cast<std::int64_t>(tile) * kernels_.tile_rows;
    const std::int64_t offset = first_row * call_.output_stride + first_column;
    FinishArguments a;
    a.sums = sums;
    a.rows = tile_height(tile);
    a.width = std::min(shape_.panel_width(), shape_.width() - first_column);
    a.gated = shape_.gated;
    a.bias = call_.bias == nullptr ? nullptr : call_.bias + first_column;
    a.bias_up = call_.bias == nullptr || !shape_.gated ? nullptr : a.bias + shape_.width();
    a.residual = call_.residual == nullptr ? nullptr : call_.residual + offset;
    a.output = call_.output + offset;
    a.output_stride = call_.output_stride;
    kernels_.finish(a);
  }

  const streamo_weights& weights_;
  const WeightsShape& shape_;
  const MatmulKernels& kernels_;
  const streamo_matmul& call_;
  std::int32_t tiles_, row_parts_, part_tiles_, chunk_blocks_, full_chunks_, chunks_;
  bool unpacks_;
  QuantisedInput input_{};
};

thread_local Scratch input_scratch;
thread_local Scratch task_scratch;

streamo_status run_product(Product& product, const streamo_threads* threads) {
  try {
    product.place_input(input_scratch.reserve(product.input_bytes()));
  } catch (const std::bad_alloc&) {
    return refuse(STREAMO_OUT_OF_MEMORY, "matmul: no memory for %zu bytes of quantised input", product.input_bytes());
  }
  parallel_for(threads, product.tiles(), [&](std::size_t tile) { product.quantise(static_cast<std::int32_t>(tile)); });

  const std::size_t parts = product.parts();
  const std::size_t wanted = tasks_per_thread * static_cast<std::size_t>(std::max(1, thread_count(threads)));
  const std::size_t per_task = std::max<std::size_t>(1, parts / wanted);
  const bool done = try_parallel_for(threads, (parts + per_task - 1) / per_task, [&](std::size_t task) {
    void* scratch = task_scratch.reserve(product.task_bytes());
    const std::size_t end = std::min(parts, (task + 1) * per_task);
    for (std::size_t part = task * per_task; part < end; ++part) product.run_part(part, scratch);
  });
  if (!done) return refuse(STREAMO_OUT_OF_MEMORY, "matmul: no memory for %zu bytes a thread", product.task_bytes());
  return STREAMO_OK;
}

}  // namespace
}  // namespace streamo

extern "C" streamo_status streamo_matmul_run(const streamo_weights* weights, const streamo_matmul* arguments,
                                             const streamo_threads* threads) {
  using namespace streamo;
  clear_error();
  if (weights == nullptr) return refuse(STREAMO_BAD_ARGUMENT, "matmul: expected packed weights, found NULL");
  if (weights->set != instruction_set()) {
    return refuse(STREAMO_BAD_ARGUMENT, "matmul: expected weights packed for the instruction set in use, found others; "
                                        "pack them again after selecting one");
  }
  const streamo_status status = check_matmul(arguments, weights->shape.inputs, weights->shape.width());
  if (status != STREAMO_OK) return status;
  Product product(*weights, *arguments);
  return run_product(product, threads);
}
