#include "gpu_device.h"

#include "gpu_step.h"
#include "tensors.h"

namespace streamo::ort {

GpuDevice::GpuDevice(const std::string& kernels_folder, int ordinal, bool on_host) : on_host_(on_host) {
  accept("opening the GPU", streamo_gpu_open(kernels_folder.c_str(), ordinal, &gpu_));
}

// Replacing waits for the device: what is still running may use the old block.
void* GpuDevice::room(Block& block, std::size_t bytes, void* stream) {
  if (bytes <= block.bytes) return block.memory;
  accept("freeing a workspace", streamo_gpu_free(gpu_, block.memory));
  block = {};
  count_move(stream);
  accept("a workspace", streamo_gpu_alloc(gpu_, bytes, &block.memory));
  block.bytes = bytes;
  return block.memory;
}

void GpuDevice::attend(const streamo_attention& arguments, void* stream) {
  const std::lock_guard<std::mutex> lock(busy_);
  Lane& lane = lanes_[stream];
  std::size_t bytes = 0;
  accept("attention's workspace", streamo_gpu_attention_workspace(gpu_, &arguments, &bytes));
  void* workspace = room(lane.workspace, bytes, stream);
  const GpuStep step = step_on(stream);
  accept("attention", streamo_gpu_attention_run(gpu_, &arguments, step.table, step.most_spans, workspace,
                                                lane.workspace.bytes, stream));
}

void GpuDevice::attend_in_windows(const streamo_window_attention& arguments, void* stream) {
  const std::lock_guard<std::mutex> lock(busy_);
  Lane& lane = lanes_[stream];
  std::size_t bytes = 0;  // asked first: it checks what window_starts holds
  accept("window attention's workspace", streamo_gpu_window_attention_workspace(gpu_, &arguments, &bytes));
  void* workspace = room(lane.workspace, bytes, stream);
  std::vector<std::int32_t> starts(arguments.window_starts, arguments.window_starts + arguments.window_count + 1);
  if (starts != lane.window_starts) {
    lane.window_starts.clear();  // until they are there
    const std::size_t starts_bytes = starts.size() * sizeof(std::int32_t);
    void* memory = room(lane.windows, starts_bytes, stream);
    accept("sending the windows", streamo_gpu_copy(gpu_, memory, starts.data(), starts_bytes, stream));
    lane.window_starts = std::move(starts);
  }
  accept("window attention",
         streamo_gpu_window_attention_run(gpu_, &arguments, static_cast<const std::int32_t*>(lane.windows.memory),
                                          workspace, lane.workspace.bytes, stream));
}

void GpuDevice::multiply(const streamo_weights_source& weights, const streamo_matmul& arguments, void* stream) {
  const std::lock_guard<std::mutex> lock(busy_);
  Lane& lane = lanes_[stream];
  std::size_t bytes = 0;
  accept("the product's workspace",
         streamo_gpu_matmul_workspace(gpu_, &weights, &arguments, STREAMO_GPU_ACTIVATIONS_AUTO, &bytes));
  void* workspace = room(lane.workspace, bytes, stream);
  accept("the product", streamo_gpu_matmul_run(gpu_, &weights, &arguments, STREAMO_GPU_ACTIVATIONS_AUTO, workspace,
                                               lane.workspace.bytes, stream));
}

void GpuDevice::copy(void* target, const void* source, std::size_t bytes, void* stream) {
  accept("a copy", streamo_gpu_copy(gpu_, target, source, bytes, stream));
}

}  // namespace streamo::ort
