// Attention inside windows on the GPU: one launch, a program for each head and block of rows of a window.
#include <algorithm>
#include <cstdio>
#include <iterator>

#include "attention/validate.h"
#include "gpu/launch.h"

namespace streamo::gpu {
namespace {

constexpr float kLog2E = 1.44269504088896340736f;
constexpr int32_t kBlockRows = 64; /* BLOCK_M of kernels/gpu/window.py */
constexpr int32_t kWidths[] = {32, 64, 80, 128};

// Blocks of query rows in the largest window; smaller windows leave programs without work.
int32_t blocks_of_largest(const streamo_window_attention& a) {
  int32_t largest = 0;
  for (int32_t i = 0; i < a.window_count; ++i) {
    largest = std::max(largest, a.window_starts[i + 1] - a.window_starts[i]);
  }
  return (largest + kBlockRows - 1) / kBlockRows;
}

int32_t* take_starts(const streamo_window_attention& a, Workspace& workspace) {
  return workspace.take<int32_t>(static_cast<size_t>(a.window_count) + 1);
}

streamo_status validate_for_gpu(const streamo_window_attention& a) {
  if (std::find(std::begin(kWidths), std::end(kWidths), a.head_dim) == std::end(kWidths)) {
    return refuse(STREAMO_UNSUPPORTED, "window attention on a GPU has kernels for a head_dim of 32, 64, 80 and 128, "
                  "found %d", a.head_dim);
  }
  if (a.window_count > kMostGrid || blocks_of_largest(a) > kMostGrid) {
    return refuse(STREAMO_UNSUPPORTED, "%d rows in %d windows are too many for a GPU", a.rows, a.window_count);
  }
  for (const void* pointer : {static_cast<const void*>(a.qkv), static_cast<const void*>(a.rope_cos),
                              static_cast<const void*>(a.rope_sin), static_cast<const void*>(a.output)}) {
    if (!is_aligned(pointer)) {
      return refuse(STREAMO_BAD_ARGUMENT, "window attention: expected tensors aligned to 16 bytes, found address %p",
                    pointer);
    }
  }
  return STREAMO_OK;
}

streamo_status run(streamo_gpu* gpu, const streamo_window_attention& a, const int32_t* starts, Workspace workspace,
                   void* stream) {
  if (const streamo_status status = validate_for_gpu(a)) return status;
  if (starts == nullptr) {
    int32_t* sent = take_starts(a, workspace);
    if (const streamo_status status = workspace.check("window attention")) return status;
    const size_t bytes = (static_cast<size_t>(a.window_count) + 1) * sizeof(int32_t);
    if (const streamo_status status = upload(gpu, sent, a.window_starts, bytes, stream)) return status;
    starts = sent;
  }
  char name[40];
  std::snprintf(name, sizeof name, "window_attention_d%d", a.head_dim);
  const Grid grid = {static_cast<uint32_t>(a.heads), static_cast<uint32_t>(a.window_count),
                     static_cast<uint32_t>(blocks_of_largest(a))};
  const float factor = a.scale * kLog2E;
  return launch(gpu, name, grid, stream, a.qkv, a.rope_cos, a.rope_sin, starts, a.output, a.heads, factor);
}

}  // namespace
}  // namespace streamo::gpu

extern "C" streamo_status streamo_gpu_window_attention_workspace(streamo_gpu* gpu,
                                                                 const streamo_window_attention* arguments,
                                                                 size_t* bytes) {
  using namespace streamo;
  using namespace streamo::gpu;
  return on_device(gpu, [&]() -> streamo_status {
    if (bytes == nullptr) return refuse(STREAMO_BAD_ARGUMENT, "window attention: expected a place for the size");
    if (const streamo_status status = validate(arguments)) return status;
    Workspace counted;
    take_starts(*arguments, counted);
    *bytes = counted.used();
    return STREAMO_OK;
  });
}

extern "C" streamo_status streamo_gpu_window_attention_run(streamo_gpu* gpu, const streamo_window_attention* arguments,
                                                           const int32_t* device_starts, void* workspace,
                                                           size_t workspace_bytes, void* stream) {
  using namespace streamo;
  using namespace streamo::gpu;
  return on_device(gpu, [&]() -> streamo_status {
    if (const streamo_status status = validate(arguments)) return status;
    return run(gpu, *arguments, device_starts, Workspace(workspace, workspace_bytes), stream);
  });
}
