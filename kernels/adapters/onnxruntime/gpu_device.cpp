#include "gpu_device.h"

#include <algorithm>
#include <cstdint>

#include "tensors.h"

namespace streamo::ort {
namespace {

constexpr std::int32_t kFewestSpans = 64;  // of a table, so that it keeps its size while a window grows

std::int32_t most_spans(std::int32_t count) {
  std::int32_t most = kFewestSpans;
  while (most < count && most < (INT32_MAX >> 1)) most *= 2;
  return most;
}

}  // namespace

GpuDevice::GpuDevice(const std::string& kernels_folder, int ordinal, bool on_host) : on_host_(on_host) {
  accept("opening the GPU", streamo_gpu_open(kernels_folder.c_str(), ordinal, &gpu_));
}

// Replacing waits for the device: what is still running may use the old block.
void* GpuDevice::room(Block& block, std::size_t bytes) {
  if (bytes <= block.bytes) return block.memory;
  accept("freeing a workspace", streamo_gpu_free(gpu_, block.memory));
  block = {};
  accept("a workspace", streamo_gpu_alloc(gpu_, bytes, &block.memory));
  block.bytes = bytes;
  return block.memory;
}

void GpuDevice::attend(const streamo_attention& arguments, void* stream) {
  const std::lock_guard<std::mutex> lock(busy_);
  Lane& lane = lanes_[stream];
  const std::int32_t spans = most_spans(arguments.span_count);
  std::vector<std::int32_t> made_from = {arguments.new_tokens, arguments.capacity, arguments.run_count, spans};
  made_from.insert(made_from.end(), arguments.new_slots, arguments.new_slots + std::max(0, arguments.new_tokens));
  for (std::int32_t i = 0; i < arguments.span_count; ++i) {
    const streamo_span& span = arguments.spans[i];
    made_from.insert(made_from.end(), {span.slot, span.length, span.run});
  }
  Table& table = lane.attention;
  if (made_from != table.made_from) {
    std::size_t bytes = 0;
    accept("the table's size",
           streamo_gpu_attention_table_bytes(arguments.new_tokens, arguments.capacity, spans, &bytes));
    std::vector<char> host(bytes);
    accept("the table", streamo_gpu_attention_table(&arguments, spans, host.data(), bytes));
    table.made_from.clear();  // until it is there
    void* memory = room(table.block, bytes);
    accept("sending the table", streamo_gpu_copy(gpu_, memory, host.data(), bytes, stream));
    table.made_from = std::move(made_from);
  }
  std::size_t bytes = 0;
  accept("attention's workspace", streamo_gpu_attention_workspace(gpu_, &arguments, &bytes));
  void* workspace = room(lane.workspace, bytes);
  accept("attention", streamo_gpu_attention_run(gpu_, &arguments, table.block.memory, spans, workspace,
                                                lane.workspace.bytes, stream));
}

void GpuDevice::attend_in_windows(const streamo_window_attention& arguments, void* stream) {
  const std::lock_guard<std::mutex> lock(busy_);
  Lane& lane = lanes_[stream];
  Table& table = lane.windows;
  std::size_t bytes = 0;  // asked first: it checks what window_starts holds
  accept("window attention's workspace", streamo_gpu_window_attention_workspace(gpu_, &arguments, &bytes));
  void* workspace = room(lane.workspace, bytes);
  std::vector<std::int32_t> starts(arguments.window_starts, arguments.window_starts + arguments.window_count + 1);
  if (starts != table.made_from) {
    table.made_from.clear();
    const std::size_t starts_bytes = starts.size() * sizeof(std::int32_t);
    void* memory = room(table.block, starts_bytes);
    accept("sending the windows", streamo_gpu_copy(gpu_, memory, starts.data(), starts_bytes, stream));
    table.made_from = std::move(starts);
  }
  accept("window attention",
         streamo_gpu_window_attention_run(gpu_, &arguments, static_cast<const std::int32_t*>(table.block.memory),
                                          workspace, lane.workspace.bytes, stream));
}

void GpuDevice::multiply(const streamo_weights_source& weights, const streamo_matmul& arguments, void* stream) {
  const std::lock_guard<std::mutex> lock(busy_);
  Lane& lane = lanes_[stream];
  std::size_t bytes = 0;
  accept("the product's workspace",
         streamo_gpu_matmul_workspace(gpu_, &weights, &arguments, STREAMO_GPU_ACTIVATIONS_AUTO, &bytes));
  void* workspace = room(lane.workspace, bytes);
  accept("the product", streamo_gpu_matmul_run(gpu_, &weights, &arguments, STREAMO_GPU_ACTIVATIONS_AUTO, workspace,
                                               lane.workspace.bytes, stream));
}

void GpuDevice::copy(void* target, const void* source, std::size_t bytes, void* stream) {
  accept("a copy", streamo_gpu_copy(gpu_, target, source, bytes, stream));
}

}  // namespace streamo::ort
