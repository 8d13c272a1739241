// Products with quantised weights on the GPU: which kernels a call takes, with what grid, and where their data lies.
//
// Knows the tile sizes of kernels/gpu/product_*.py and finish.py, and nothing of their arithmetic. The choice depends on
// sizes and on the number of multiprocessors only, so that the same call always gives the same bits on one device.
#include "matmul/weights.h"

#include <algorithm>
#include <cstdio>

#include "gpu/launch.h"

namespace streamo::gpu {
namespace {

// Of product_row.py.
constexpr int32_t kSegment = 32, kShortSegment = 16, kRowWords = 32, kAtOnce = 256;
// Of product_rows.py and product_any.py.
constexpr int32_t kColumns = 128, kFewRows = 16, kManyRows = 64, kAnyColumns = 64, kAnyTile = 16;
// Of finish.py and prepare_rows.py.
constexpr int32_t kFinishColumns = 128, kBlocksOfProgram = 4;

// Programs for each multiprocessor that are enough to keep it busy: one row needs many loads on their way (programs of
// two warps), tensor cores need a second program while the first one waits. Threads of 12 warps fill one for one row.
constexpr int32_t kFullRowThreads = 12 * 32, kRowPrograms = 8, kFewRowsPrograms = 4, kManyRowsPrograms = 2;
// A split below this many tiles costs more to merge than it saves.
constexpr int32_t kFewestTiles = 8;

constexpr int32_t kMostOutputs = 1 << 24, kMostRows = kMostGrid;

int32_t ceil_div(int64_t a, int64_t b) { return static_cast<int32_t>((a + b - 1) / b); }

// Pieces of 16 bytes in a row of codes.
int32_t quads_of(const streamo_weights_source& weights) {
  return static_cast<int32_t>(static_cast<int64_t>(weights.outputs) * weights.bits / 128);
}

enum class Way { row, rows, any };

struct Plan {
  Way way;
  bool by_block;       // rows rounded to 8 bits by block, as on the CPU
  bool gate_in_place;  // the product's kernel writes the output itself
  int32_t segment = 0;   // of K, for one row
  int32_t row_tile = 0, tile = 0, tiles = 0, tiles_each = 0, splits = 1, pitch = 0, scale_stride = 1;
  Grid grid;
};

// How many splits of `tiles`, for about `wanted` programs where one split has `programs`.
void split(Plan& plan, int64_t programs, int64_t wanted, int32_t fewest) {
  const int64_t most = std::max<int64_t>(1, plan.tiles / fewest);
  const int64_t splits = std::clamp<int64_t>(wanted / std::max<int64_t>(programs, 1), 1, most);
  plan.tiles_each = ceil_div(plan.tiles, splits);
  plan.splits = ceil_div(plan.tiles, plan.tiles_each);
  plan.grid.z = static_cast<uint32_t>(plan.splits);
}

Plan plan_for(const streamo_gpu* gpu, const streamo_weights_source& weights, const streamo_matmul& call,
              int32_t activations) {
  Plan plan{};
  plan.by_block = activations == STREAMO_GPU_ACTIVATIONS_INT8 ||
                  (activations == STREAMO_GPU_ACTIVATIONS_AUTO && weights.bits == 8);
  if (plan.by_block) plan.scale_stride = ceil_div(weights.inputs, weights.block);
  const int64_t row_bytes = static_cast<int64_t>(weights.outputs) * weights.bits / 8;
  const bool regular = row_bytes % 16 == 0 && weights.inputs % kSegment == 0 && weights.block % kSegment == 0;
  const int32_t processors = multiprocessors(gpu);
  if (regular && call.rows == 1) {
    plan.way = Way::row;
    const int64_t threads = row_bytes / 16 * (weights.inputs / kSegment);
    plan.segment = threads < int64_t{kFullRowThreads} * processors ? kShortSegment : kSegment;
    plan.tiles = ceil_div(weights.inputs, kAtOnce);  // steps of a program
    plan.grid.x = static_cast<uint32_t>(ceil_div(row_bytes, 4 * kRowWords));
    split(plan, plan.grid.x, int64_t{kRowPrograms} * processors, 1);
    plan.grid.y = plan.grid.z;
    plan.grid.z = 1;
    return plan;
  }
  if (regular && (weights.bits == 4 || plan.by_block)) {
    plan.way = Way::rows;
    plan.pitch = weights.inputs;
    plan.tile = weights.block % 64 == 0 && weights.inputs % 64 == 0 ? 64 : 32;
    plan.tiles = weights.inputs / plan.tile;
    plan.row_tile = call.rows <= kFewRows ? kFewRows : kManyRows;
    plan.grid.x = static_cast<uint32_t>(ceil_div(weights.outputs, kColumns));
    plan.grid.y = static_cast<uint32_t>(ceil_div(call.rows, plan.row_tile));
    const int32_t programs = plan.row_tile == kFewRows ? kFewRowsPrograms : kManyRowsPrograms;
    split(plan, int64_t{plan.grid.x} * plan.grid.y, int64_t{programs} * processors, kFewestTiles);
    plan.gate_in_place =
        weights.gated && plan.splits == 1 && call.residual == nullptr && row_bytes / 2 % 16 == 0 &&
        call.output_stride <= kMostOutputs;  // the kernel's places inside of a tile are 32-bit
    if (plan.gate_in_place) plan.grid.x = static_cast<uint32_t>(ceil_div(weights.outputs / 2, kColumns / 2));
    return plan;
  }
  plan.way = Way::any;
  plan.pitch = ceil_div(weights.inputs, kAnyTile) * kAnyTile;
  plan.row_tile = kFewRows;
  plan.tiles = ceil_div(weights.inputs, kAnyTile);
  plan.grid.x = static_cast<uint32_t>(ceil_div(weights.outputs, kAnyColumns));
  plan.grid.y = static_cast<uint32_t>(ceil_div(call.rows, kFewRows));
  split(plan, int64_t{plan.grid.x} * plan.grid.y, int64_t{kFewRowsPrograms} * processors, kFewestTiles);
  return plan;
}

// What a call needs besides its arguments.
struct Pieces {
  void* rows = nullptr;           // (rows, pitch) float16
  float* row_scales = nullptr;    // (rows, scale_stride)
  float* sums = nullptr;          // (splits, rows, outputs)
};

Pieces cut(Workspace& workspace, const Plan& plan, const streamo_weights_source& weights, const streamo_matmul& call) {
  Pieces pieces;
  const size_t rows = static_cast<size_t>(call.rows);
  if (plan.way != Way::row) {
    pieces.rows = workspace.take<uint16_t>(rows * plan.pitch);
    pieces.row_scales = workspace.take<float>(rows * plan.scale_stride);
  }
  if (!plan.gate_in_place) pieces.sums = workspace.take<float>(rows * plan.splits * weights.outputs);
  return pieces;
}

streamo_status check_call(const streamo_weights_source* weights, const streamo_matmul* call, int32_t activations) {
  if (const streamo_status status = check_weights_source(weights)) return status;
  const int32_t width = weights->gated ? weights->outputs / 2 : weights->outputs;
  if (const streamo_status status = check_matmul(call, weights->inputs, width)) return status;
  if (activations < STREAMO_GPU_ACTIVATIONS_AUTO || activations > STREAMO_GPU_ACTIVATIONS_INT8) {
    return refuse(STREAMO_BAD_ARGUMENT, "matmul: expected activations 0, 1 or 2, found %d", activations);
  }
  if (call->rows > kMostRows || weights->outputs > kMostOutputs) {
    return refuse(STREAMO_UNSUPPORTED, "matmul: expected at most %d rows and %d outputs on a GPU, found %d and %d",
                  kMostRows, kMostOutputs, call->rows, weights->outputs);
  }
  const void* pointers[] = {weights->codes, weights->scales, call->input, call->bias, call->residual, call->output};
  for (const void* pointer : pointers) {
    if (const streamo_status status = check_aligned("matmul", pointer)) return status;
  }
  return STREAMO_OK;
}

streamo_status prepare(streamo_gpu* gpu, const Plan& plan, const Pieces& pieces, const streamo_weights_source& weights,
                       const streamo_matmul& call, void* stream) {
  const uint32_t rows = static_cast<uint32_t>(call.rows);
  if (!plan.by_block) {
    return launch(gpu, "rows_by_row", {rows}, stream, call.input, pieces.rows, pieces.row_scales, weights.inputs,
                  call.input_stride, plan.pitch);
  }
  const uint32_t groups = static_cast<uint32_t>(ceil_div(plan.scale_stride, kBlocksOfProgram));
  return launch(gpu, "rows_by_block", {rows, groups}, stream, call.input, pieces.rows, pieces.row_scales,
                weights.inputs, call.input_stride, plan.pitch, weights.block, plan.scale_stride);
}

streamo_status multiply_row(streamo_gpu* gpu, const Plan& plan, const Pieces& pieces,
                            const streamo_weights_source& weights, const streamo_matmul& call, void* stream) {
  char name[64];
  std::snprintf(name, sizeof name, "product_row_w%da%d_s%d", weights.bits, plan.by_block ? 8 : 32, plan.segment);
  const float of_block = static_cast<float>(plan.segment) / static_cast<float>(weights.block);
  return launch(gpu, name, plan.grid, stream, call.input, weights.codes, weights.scales, pieces.sums,
                weights.inputs / plan.segment, weights.outputs, quads_of(weights), weights.block, of_block,
                plan.tiles_each * (kAtOnce / plan.segment));
}

streamo_status multiply_rows(streamo_gpu* gpu, const Plan& plan, const Pieces& pieces,
                             const streamo_weights_source& weights, const streamo_matmul& call, void* stream) {
  char name[64];
  std::snprintf(name, sizeof name, "product_rows_w%da%d_k%d_m%d%s", weights.bits, plan.by_block ? 8 : 16, plan.tile,
                plan.row_tile, plan.gate_in_place ? "_gated" : "");
  float* sums = plan.gate_in_place ? call.output : pieces.sums;
  const int32_t stride = plan.gate_in_place ? static_cast<int32_t>(call.output_stride) : weights.outputs;
  return launch(gpu, name, plan.grid, stream, pieces.rows, pieces.row_scales, weights.codes, weights.scales, sums,
                call.bias, call.rows, plan.pitch, weights.outputs, quads_of(weights), plan.tiles,
                weights.block / plan.tile, plan.scale_stride, plan.tiles_each, stride,
                call.bias == nullptr ? 0 : weights.outputs);
}

streamo_status multiply_any(streamo_gpu* gpu, const Plan& plan, const Pieces& pieces,
                            const streamo_weights_source& weights, const streamo_matmul& call, void* stream) {
  char name[64];
  std::snprintf(name, sizeof name, "product_any_w%da%d", weights.bits, plan.by_block ? 8 : 16);
  return launch(gpu, name, plan.grid, stream, pieces.rows, pieces.row_scales, weights.codes, weights.scales,
                pieces.sums, call.rows, weights.inputs, plan.pitch, weights.outputs, weights.block, plan.scale_stride,
                plan.tiles_each);
}

streamo_status finish(streamo_gpu* gpu, const Plan& plan, const Pieces& pieces, const streamo_weights_source& weights,
                      const streamo_matmul& call, void* stream) {
  const int32_t width = weights.gated ? weights.outputs / 2 : weights.outputs;
  const Grid grid{static_cast<uint32_t>(ceil_div(width, kFinishColumns)), static_cast<uint32_t>(call.rows)};
  return launch(gpu, weights.gated ? "finish_gated" : "finish", grid, stream, pieces.sums, call.bias, call.residual,
                call.output, call.rows, weights.outputs, plan.splits, call.output_stride,
                call.bias == nullptr ? 0 : weights.outputs, call.residual == nullptr ? 0 : width);
}

streamo_status run(streamo_gpu* gpu, const streamo_weights_source& weights, const streamo_matmul& call,
                   int32_t activations, void* memory, size_t bytes, void* stream) {
  const Plan plan = plan_for(gpu, weights, call, activations);
  Workspace workspace(memory, bytes);
  const Pieces pieces = cut(workspace, plan, weights, call);
  if (const streamo_status status = workspace.check("matmul")) return status;
  streamo_status status = plan.way == Way::row ? STREAMO_OK : prepare(gpu, plan, pieces, weights, call, stream);
  if (status != STREAMO_OK) return status;
  switch (plan.way) {
    case Way::row: status = multiply_row(gpu, plan, pieces, weights, call, stream); break;
    case Way::rows: status = multiply_rows(gpu, plan, pieces, weights, call, stream); break;
    case Way::any: status = multiply_any(gpu, plan, pieces, weights, call, stream); break;
  }
  if (status != STREAMO_OK || plan.gate_in_place) return status;
  return finish(gpu, plan, pieces, weights, call, stream);
}

// The largest workspace of a call with at most `call.rows`. Each way cuts rows into tiles whose size kFewRows divides, so
// that between two multiples of it more rows need more.
size_t most_workspace(const streamo_gpu* gpu, const streamo_weights_source& weights, streamo_matmul call,
                      int32_t activations) {
  const int32_t most_rows = call.rows;
  size_t most = 0;
  const auto consider = [&](int32_t rows) {
    call.rows = rows;
    Workspace counted;
    cut(counted, plan_for(gpu, weights, call, activations), weights, call);
    most = std::max(most, counted.used());
  };
  consider(1);
  for (int32_t rows = kFewRows; rows < most_rows; rows += kFewRows) consider(rows);
  consider(most_rows);
  return most;
}

}  // namespace
}  // namespace streamo::gpu

extern "C" streamo_status streamo_gpu_matmul_workspace(streamo_gpu* gpu, const streamo_weights_source* weights,
                                                       const streamo_matmul* arguments, int32_t activations,
                                                       size_t* bytes) {
  using namespace streamo;
  return gpu::on_device(gpu, [&]() -> streamo_status {
    if (const streamo_status status = gpu::check_call(weights, arguments, activations)) return status;
    if (bytes == nullptr) return refuse(STREAMO_BAD_ARGUMENT, "matmul: expected a place for the size, found NULL");
    gpu::Workspace counted;
    gpu::cut(counted, gpu::plan_for(gpu, *weights, *arguments, activations), *weights, *arguments);
    *bytes = counted.used();
    return STREAMO_OK;
  });
}

extern "C" streamo_status streamo_gpu_matmul_most_workspace(streamo_gpu* gpu, const streamo_weights_source* weights,
                                                            const streamo_matmul* arguments, int32_t activations,
                                                            size_t* bytes) {
  using namespace streamo;
  return gpu::on_device(gpu, [&]() -> streamo_status {
    if (weights == nullptr || arguments == nullptr || bytes == nullptr) {
      return refuse(STREAMO_BAD_ARGUMENT, "matmul: expected weights, arguments and a place for the size, found NULL");
    }
    alignas(16) static float somewhere = 0;  // what is read while a call runs must not be NULL
    streamo_weights_source source = *weights;
    streamo_matmul call = *arguments;
    source.codes = &somewhere;
    source.scales = call.input = call.output = &somewhere;
    if (call.bias != nullptr) call.bias = &somewhere;
    if (call.residual != nullptr) call.residual = &somewhere;
    if (const streamo_status status = gpu::check_call(&source, &call, activations)) return status;
    *bytes = gpu::most_workspace(gpu, source, call, activations);
    return STREAMO_OK;
  });
}

extern "C" streamo_status streamo_gpu_matmul_run(streamo_gpu* gpu, const streamo_weights_source* weights,
                                                 const streamo_matmul* arguments, int32_t activations, void* workspace,
                                                 size_t workspace_bytes, void* stream) {
  using namespace streamo;
  return gpu::on_device(gpu, [&]() -> streamo_status {
    if (const streamo_status status = gpu::check_call(weights, arguments, activations)) return status;
    return gpu::run(gpu, *weights, *arguments, activations, workspace, workspace_bytes, stream);
  });
}
