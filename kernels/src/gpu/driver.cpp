#include "gpu/driver.h"

#include <dlfcn.h>

#include <cstdlib>
#include <map>
#include <memory>
#include <mutex>

#include "common/status.h"

namespace streamo::gpu {
namespace {

const char* library_name() {
  const char* other = std::getenv("STREAMO_CUDA_DRIVER");
  return other != nullptr && other[0] != '\0' ? other : "libcuda.so.1";
}

streamo_status find_functions(Driver& driver, void* library) {
#define STREAMO_CUDA_FIND(member, name, parameters)                                                          \
  driver.member = reinterpret_cast<CuResult(*) parameters>(dlsym(library, name));                            \
  if (driver.member == nullptr) {                                                                            \
    return refuse(STREAMO_NO_DEVICE, "the GPU driver `%s` is too old: it has no function %s, which CUDA 12.0 has", \
                  driver.library.c_str(), name);                                                             \
  }
  STREAMO_CUDA_FUNCTIONS(STREAMO_CUDA_FIND)
#undef STREAMO_CUDA_FIND
  return STREAMO_OK;
}

streamo_status start(Driver& driver) {
  driver.driver_version(&driver.version);  // works without a device
  if (driver.version < kOldestDriver) {
    return refuse(STREAMO_NO_DEVICE, "the GPU driver is too old: expected one for CUDA %d.%d or newer, found CUDA %d.%d",
                  kOldestDriver / 1000, kOldestDriver % 1000 / 10, driver.version / 1000, driver.version % 1000 / 10);
  }
  const CuResult result = driver.init(0);
  if (result == kCudaNoDevice) return refuse(STREAMO_NO_DEVICE, "the GPU driver shows no GPU");
  if (result != kCudaSuccess) {
    return refuse(STREAMO_NO_DEVICE, "the GPU driver does not start: %s (%d)", error_name(driver, result), result);
  }
  return STREAMO_OK;
}

// What has been loaded stays for the life of the process: other libraries hold on to the driver as well.
std::mutex registry_mutex;
std::map<std::string, std::unique_ptr<Driver>>& registry() {
  static auto* drivers = new std::map<std::string, std::unique_ptr<Driver>>;  // outlives every thread
  return *drivers;
}

}  // namespace

streamo_status load_driver(Driver** found) {
  const std::lock_guard<std::mutex> lock(registry_mutex);
  std::unique_ptr<Driver>& known = registry()[library_name()];
  if (known == nullptr) {
    auto driver = std::make_unique<Driver>();
    driver->library = library_name();
    void* library = dlopen(library_name(), RTLD_NOW | RTLD_LOCAL);
    if (library == nullptr) {
      return refuse(STREAMO_NO_DEVICE, "the GPU driver cannot be loaded: %s", dlerror());
    }
    streamo_status status = find_functions(*driver, library);
    if (status == STREAMO_OK) status = start(*driver);
    if (status != STREAMO_OK) {
      dlclose(library);
      return status;
    }
    known = std::move(driver);
  }
  *found = known.get();
  return STREAMO_OK;
}

bool is_sticky(CuResult result) {
  switch (result) {
    case 4:    // the driver has been shut down
    case 46:   // device unavailable
    case 214:  // uncorrectable memory error
    case 220:  // uncorrectable NVLink error
    case 226:  // contained error
    case 700:  // illegal address
    case 702:  // launch timeout
    case 709:  // the context is destroyed
    case 710:  // assertion
    case 714:  // hardware stack error
    case 715:  // illegal instruction
    case 716:  // misaligned address
    case 717:  // invalid address space
    case 718:  // invalid program counter
    case 719:  // launch failed
    case 721:  // tensor memory leak
    case 802:  // system not ready
    case 810:  // the MPS client was ended
    case 911:  // error of an external device
    case 999:  // unknown
      return true;
    default:
      return false;
  }
}

const char* error_name(const Driver& driver, CuResult result) {
  const char* name = nullptr;
  return driver.error_name(result, &name) == kCudaSuccess && name != nullptr ? name : "error";
}

}  // namespace streamo::gpu
