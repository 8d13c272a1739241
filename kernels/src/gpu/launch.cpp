#include "gpu/launch.h"

#include <string>
#include <vector>

#include "gpu/device.h"

namespace streamo::gpu {
namespace {

constexpr uint32_t kThreadsAWarp = 32;
constexpr size_t kMostArguments = 64;  // the archive's reader allows no more

streamo_status check_arguments(const ArchivedKernel& kernel, const Argument* arguments, size_t count) {
  bool same = kernel.letters.size() == count;
  for (size_t i = 0; same && i < count; ++i) same = kernel.letters[i] == arguments[i].letter;
  if (same) return STREAMO_OK;
  std::string found;
  for (size_t i = 0; i < count; ++i) found += arguments[i].letter;
  return refuse(STREAMO_BAD_ARGUMENT, "the GPU kernel `%s` takes the arguments %s, found %s", kernel.name.c_str(),
                kernel.letters.c_str(), found.c_str());
}

}  // namespace

streamo_status launch_arguments(streamo_gpu* gpu, const char* variant, Grid grid, void* stream,
                                const Argument* arguments, size_t count) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return STREAMO_OK;
  Kernel* kernel = nullptr;
  if (const streamo_status status = find_kernel(gpu, variant, &kernel)) return status;
  const ArchivedKernel& archived = *kernel->archived;
  if (const streamo_status status = check_arguments(archived, arguments, count)) return status;

  // Triton's kernels end with two pointers to scratch memory, which ours do not use.
  const void* none = nullptr;
  void* values[kMostArguments + 2];
  for (size_t i = 0; i < count; ++i) values[i] = const_cast<void*>(arguments[i].value);
  values[count] = values[count + 1] = &none;
  const CuResult result =
      gpu->driver->launch(kernel->function.load(std::memory_order_acquire), grid.x, grid.y, grid.z,
                          archived.warps * kThreadsAWarp, 1, 1, archived.shared_bytes, stream, values, nullptr);
  if (result == kCudaSuccess) return STREAMO_OK;
  return failure(gpu, result, ("running the kernel `" + archived.name + "`").c_str());
}

}  // namespace streamo::gpu

extern "C" streamo_status streamo_gpu_launch(streamo_gpu* gpu, const char* kernel, const uint32_t* grid,
                                             const char* letters, const void* const* arguments, void* stream) {
  using namespace streamo;
  using namespace streamo::gpu;
  return on_device(gpu, [&]() -> streamo_status {
    if (kernel == nullptr || grid == nullptr || letters == nullptr || arguments == nullptr) {
      return refuse(STREAMO_BAD_ARGUMENT, "expected a kernel, its grid and arguments, found NULL");
    }
    std::vector<Argument> packed;
    for (size_t i = 0; letters[i] != '\0'; ++i) packed.push_back({arguments[i], letters[i]});
    return launch_arguments(gpu, kernel, {grid[0], grid[1], grid[2]}, stream, packed.data(), packed.size());
  });
}
