#include "gpu/device.h"

#include <algorithm>
#include <cstring>

#include "gpu/launch.h"

namespace streamo::gpu {
namespace {

streamo_status refuse_lost(const streamo_gpu* gpu) {
  return refuse(STREAMO_DEVICE_LOST, "the GPU is unusable until this process is restarted: it failed while %s",
                gpu->driver->cause[gpu->ordinal].c_str());
}

// Remembers the first of the errors that cannot be undone.
void lose(streamo_gpu* gpu, CuResult result, const char* what) {
  Driver& driver = *gpu->driver;
  const std::lock_guard<std::mutex> lock(driver.losing);
  if (gpu->lost()) return;
  try {
    driver.cause[gpu->ordinal] =
        std::string(what) + ": " + error_name(driver, result) + " (" + std::to_string(result) + ")";
  } catch (const std::bad_alloc&) {  // then without its cause
  }
  driver.lost[gpu->ordinal] = true;
}

streamo_status find_device(streamo_gpu* gpu) {
  int count = 0;
  CuResult result = gpu->driver->device_count(&count);
  if (result == kCudaSuccess && (gpu->ordinal < 0 || gpu->ordinal >= std::min(count, kMostDevices))) {
    return refuse(STREAMO_NO_DEVICE, "there is no GPU number %d: the driver shows %d", gpu->ordinal, count);
  }
  if (result == kCudaSuccess) result = gpu->driver->device_get(&gpu->device, gpu->ordinal);
  if (result == kCudaSuccess) return gpu->lost() ? refuse_lost(gpu) : STREAMO_OK;
  return refuse(STREAMO_NO_DEVICE, "GPU number %d cannot be used: %s (%d)", gpu->ordinal,
                error_name(*gpu->driver, result), result);
}

streamo_status ask_facts(streamo_gpu* gpu) {
  const Driver& driver = *gpu->driver;
  streamo_gpu_facts& facts = gpu->facts;
  int major = 0, minor = 0, multiprocessors = 0, integrated = 0, host_page_tables = 0;
  size_t memory = 0;
  const std::pair<int, int*> attributes[] = {{kAttributeMajor, &major},
                                             {kAttributeMinor, &minor},
                                             {kAttributeMultiprocessors, &multiprocessors},
                                             {kAttributeIntegrated, &integrated},
                                             {kAttributeHostPageTables, &host_page_tables}};
  for (const auto& [attribute, value] : attributes) {
    const CuResult result = driver.device_attribute(value, attribute, gpu->device);
    if (const streamo_status status = check(gpu, result, "asking the GPU for its properties")) return status;
  }
  CuResult result = driver.device_name(facts.name, static_cast<int>(sizeof facts.name), gpu->device);
  if (result == kCudaSuccess) result = driver.device_memory(&memory, gpu->device);
  facts.name[sizeof facts.name - 1] = '\0';
  facts.sm = 10 * major + minor;
  facts.multiprocessors = std::max(multiprocessors, 1);
  facts.integrated = integrated != 0;
  gpu->reads_host_memory = host_page_tables != 0;
  facts.driver_version = driver.version;
  facts.memory_bytes = static_cast<int64_t>(memory);
  return check(gpu, result, "asking the GPU for its name and memory");
}

// Minor versions of the driver may differ from the assembler's, the major version may only be newer.
streamo_status accept_archive(streamo_gpu* gpu) {
  const int built = gpu->archive.cuda_version, found = gpu->driver->version;
  if (built / 1000 > found / 1000) {
    return refuse(STREAMO_NO_DEVICE,
                  "the GPU driver is too old for the kernels of compute capability %d.%d: expected one for CUDA %d.0 "
                  "or newer, found CUDA %d.%d",
                  gpu->archive.sm / 10, gpu->archive.sm % 10, built / 1000, found / 1000, found % 1000 / 10);
  }
  for (const ArchivedKernel& archived : gpu->archive.kernels) {
    auto kernel = std::make_unique<Kernel>();
    kernel->archived = &archived;
    gpu->kernels.emplace(archived.name, std::move(kernel));
  }
  gpu->facts.kernel_sm = gpu->archive.sm;
  return STREAMO_OK;
}

streamo_status open(const char* folder, streamo_gpu* gpu) {
  if (const streamo_status status = load_driver(&gpu->driver)) return status;
  if (const streamo_status status = find_device(gpu)) return status;
  if (const streamo_status status = ask_facts(gpu)) return status;
  if (const streamo_status status = read_archive_for(folder, gpu->facts.sm, &gpu->archive)) return status;
  if (const streamo_status status = accept_archive(gpu)) return status;
  // Last, so that a refusal above leaves no context behind.
  return check(gpu, gpu->driver->context_retain(&gpu->context, gpu->device), "opening the GPU's context");
}

streamo_status load_kernel(streamo_gpu* gpu, Kernel& kernel) {
  const std::lock_guard<std::mutex> lock(gpu->loading);
  if (kernel.function.load() != nullptr) return STREAMO_OK;
  const ArchivedKernel& archived = *kernel.archived;
  const Driver& driver = *gpu->driver;
  CuModule module = nullptr;
  CuFunction function = nullptr;
  CuResult result = driver.module_load(&module, archived.cubin);
  if (result == kCudaSuccess) {
    result = driver.module_function(&function, module, archived.symbol.c_str());
    if (result == kCudaSuccess && archived.shared_bytes > 0) {
      result = driver.function_attribute(function, kFunctionDynamicShared, static_cast<int>(archived.shared_bytes));
    }
    if (result == kCudaSuccess && archived.shared_bytes > kSharedWithoutAsking) {
      // So that as many blocks are resident as registers allow. They read what they share once: the L1 has no part in it.
      driver.function_attribute(function, kFunctionSharedPart, 100);
    }
    if (result != kCudaSuccess) driver.module_unload(module);
  }
  if (result == kCudaSuccess) {
    kernel.module = module;
    kernel.function.store(function);
    return STREAMO_OK;
  }
  if (result == kCudaOutOfMemory || is_sticky(result)) return failure(gpu, result, "loading a kernel");
  return refuse(STREAMO_NO_KERNEL, "the GPU kernel `%s` does not load on this GPU: %s (%d)", archived.name.c_str(),
                error_name(driver, result), result);
}

streamo_status load_all(streamo_gpu* gpu, std::string_view prefix) {
  for (const ArchivedKernel& archived : gpu->archive.kernels) {
    if (archived.name.compare(0, prefix.size(), prefix) != 0) continue;
    Kernel* kernel = nullptr;
    if (const streamo_status status = find_kernel(gpu, archived.name, &kernel)) return status;
  }
  return STREAMO_OK;
}

}  // namespace

streamo_status failure(streamo_gpu* gpu, CuResult result, const char* what) {
  if (is_sticky(result)) {
    lose(gpu, result, what);
    return refuse_lost(gpu);
  }
  if (result == kCudaOutOfMemory) return refuse(STREAMO_OUT_OF_MEMORY, "the GPU has no memory left for %s", what);
  return refuse(STREAMO_DEVICE_ERROR, "the GPU driver refused %s: %s (%d)", what,
                error_name(*gpu->driver, result), result);
}

streamo_status find_kernel(streamo_gpu* gpu, std::string_view name, Kernel** kernel) {
  const auto found = gpu->kernels.find(name);
  if (found == gpu->kernels.end()) {
    return refuse(STREAMO_NO_KERNEL, "there is no GPU kernel `%.*s` for compute capability %d.%d",
                  static_cast<int>(name.size()), name.data(), gpu->facts.kernel_sm / 10, gpu->facts.kernel_sm % 10);
  }
  *kernel = found->second.get();
  return (*kernel)->function.load(std::memory_order_acquire) != nullptr ? STREAMO_OK : load_kernel(gpu, **kernel);
}

int32_t multiprocessors(const streamo_gpu* gpu) { return gpu->facts.multiprocessors; }

streamo_status detail::begin(streamo_gpu* gpu) {
  clear_error();
  if (gpu == nullptr) return refuse(STREAMO_BAD_ARGUMENT, "expected an open GPU, found NULL");
  if (gpu->lost()) return refuse_lost(gpu);
  return check(gpu, gpu->driver->context_push(gpu->context), "making the GPU's context current");
}

void detail::end(streamo_gpu* gpu) {
  CuContext popped = nullptr;
  gpu->driver->context_pop(&popped);
}

}  // namespace streamo::gpu

using namespace streamo;
using namespace streamo::gpu;

extern "C" streamo_status streamo_gpu_count(int32_t* count) {
  clear_error();
  if (count == nullptr) return refuse(STREAMO_BAD_ARGUMENT, "expected a place for the number of GPUs, found NULL");
  try {
    *count = 0;
    Driver* driver = nullptr;
    if (const streamo_status status = load_driver(&driver)) return status;
    int found = 0;
    const CuResult result = driver->device_count(&found);
    if (result != kCudaSuccess) {
      return refuse(STREAMO_NO_DEVICE, "the GPUs cannot be counted: %s (%d)", error_name(*driver, result), result);
    }
    *count = found;
    return STREAMO_OK;
  } catch (const std::exception& error) {
    return refuse(STREAMO_OUT_OF_MEMORY, "no host memory for the GPU driver: %s", error.what());
  }
}

extern "C" streamo_status streamo_gpu_open(const char* cubin_folder, int32_t device, streamo_gpu** gpu) {
  clear_error();
  if (cubin_folder == nullptr || gpu == nullptr) {
    return refuse(STREAMO_BAD_ARGUMENT, "expected a folder and a place for the GPU, found NULL");
  }
  *gpu = nullptr;
  try {
    auto opened = std::make_unique<streamo_gpu>();
    opened->ordinal = device;
    const streamo_status status = open(cubin_folder, opened.get());
    if (status == STREAMO_OK) *gpu = opened.release();
    return status;
  } catch (const std::exception& error) {
    return refuse(STREAMO_OUT_OF_MEMORY, "no host memory to open a GPU: %s", error.what());
  }
}

extern "C" void streamo_gpu_close(streamo_gpu* gpu) {
  if (gpu == nullptr) return;
  const Driver& driver = *gpu->driver;
  if (!gpu->lost() && driver.context_push(gpu->context) == kCudaSuccess) {
    for (const auto& [name, kernel] : gpu->kernels) {
      if (kernel->module != nullptr) driver.module_unload(kernel->module);
    }
    CuContext popped = nullptr;
    driver.context_pop(&popped);
    driver.context_release(gpu->device);
  }
  delete gpu;
}

extern "C" streamo_status streamo_gpu_get_facts(streamo_gpu* gpu, streamo_gpu_facts* facts) {
  clear_error();
  if (gpu == nullptr || facts == nullptr) {
    return refuse(STREAMO_BAD_ARGUMENT, "expected an open GPU and a place for its facts, found NULL");
  }
  *facts = gpu->facts;
  return on_device(gpu, [&]() -> streamo_status {
    size_t unused = 0, total = 0;
    const CuResult result = gpu->driver->memory_info(&unused, &total);
    facts->free_bytes = static_cast<int64_t>(unused);
    return check(gpu, result, "asking the GPU for its free memory");
  });
}

extern "C" streamo_status streamo_gpu_load(streamo_gpu* gpu, const char* prefix) {
  return on_device(gpu, [&] { return load_all(gpu, prefix == nullptr ? "" : prefix); });
}
