// One GPU as the operators use it: the same call structs as on the CPU, with tensors on the device and a stream.
//
// Owns the workspaces, one for each stream, and the table of a frame's windows, which its layers share. What is computed
// is kernels/include/streamo_gpu.h's.
#pragma once

#include <cstddef>
#include <map>
#include <mutex>
#include <string>
#include <vector>

#include "streamo_gpu.h"

namespace streamo::ort {

class GpuDevice {
 public:
  // `on_host`: the operators stand in the CPU provider, and their tensors in host memory; for tests with a driver that
  // takes such pointers. Throws a Refusal where the device cannot be used.
  GpuDevice(const std::string& kernels_folder, int ordinal, bool on_host);
  GpuDevice(const GpuDevice&) = delete;
  GpuDevice& operator=(const GpuDevice&) = delete;

  bool on_host() const { return on_host_; }
  void attend(const streamo_attention& arguments, void* stream);
  void attend_in_windows(const streamo_window_attention& arguments, void* stream);
  void multiply(const streamo_weights_source& weights, const streamo_matmul& arguments, void* stream);
  void copy(void* target, const void* source, std::size_t bytes, void* stream);

 private:
  // Device memory that is replaced when more is needed.
  struct Block {
    void* memory = nullptr;
    std::size_t bytes = 0;
  };
  // What calls after each other on one stream share.
  struct Lane {
    Block workspace, windows;
    std::vector<std::int32_t> window_starts;  // what `windows` holds
  };

  void* room(Block& block, std::size_t bytes, void* stream);

  std::mutex busy_;  // one call puts its work on a stream at a time
  bool on_host_;
  streamo_gpu* gpu_ = nullptr;
  std::map<void*, Lane> lanes_;
};

}  // namespace streamo::ort
