// One GPU in use: its context, its facts, and its kernels, loaded as they are needed.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string_view>
#include <unordered_map>

#include "gpu/archive.h"
#include "gpu/driver.h"

namespace streamo::gpu {

struct Kernel {
  const ArchivedKernel* archived = nullptr;
  std::atomic<CuFunction> function = nullptr;
  CuModule module = nullptr;
};

// What a failed call of the driver is for the caller, with the sentence. `what` says what was tried.
streamo_status failure(streamo_gpu* gpu, CuResult result, const char* what);

inline streamo_status check(streamo_gpu* gpu, CuResult result, const char* what) {
  return result == kCudaSuccess ? STREAMO_OK : failure(gpu, result, what);
}

// The kernel of that name, its code on the device. nullptr with a status: there is none, or it does not load.
streamo_status find_kernel(streamo_gpu* gpu, std::string_view name, Kernel** kernel);

}  // namespace streamo::gpu

struct streamo_gpu {
  streamo::gpu::Driver* driver = nullptr;
  streamo::gpu::CuDevice device = 0;
  int32_t ordinal = 0;
  bool reads_host_memory = false;  // of the host's processes, pinned or not, without the driver's staging
  streamo::gpu::CuContext context = nullptr;
  streamo_gpu_facts facts = {};
  streamo::gpu::Archive archive;
  std::unordered_map<std::string_view, std::unique_ptr<streamo::gpu::Kernel>> kernels;
  std::mutex loading;

  bool lost() const { return driver->lost[ordinal]; }
};
