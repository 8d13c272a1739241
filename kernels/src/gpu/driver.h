// The CUDA driver, found at run time: its functions, and what its error codes mean to us.
//
// The declarations are ours; only the functions used here are named. Owns the library's handle. Knows no kernel.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <string>

#include "streamo_gpu.h"

namespace streamo::gpu {

using CuResult = int;
using CuDevice = int;
using CuPointer = unsigned long long;
struct CuContextOpaque;
struct CuModuleOpaque;
struct CuFunctionOpaque;
using CuContext = CuContextOpaque*;
using CuModule = CuModuleOpaque*;
using CuFunction = CuFunctionOpaque*;
using CuHandle = void*;  // streams, events, graphs: passed through

// X(member, exported name, parameters)
#define STREAMO_CUDA_FUNCTIONS(X)                                                                                     \
  X(init, "cuInit", (unsigned))                                                                                       \
  X(driver_version, "cuDriverGetVersion", (int*))                                                                     \
  X(error_name, "cuGetErrorName", (CuResult, const char**))                                                           \
  X(device_count, "cuDeviceGetCount", (int*))                                                                         \
  X(device_get, "cuDeviceGet", (CuDevice*, int))                                                                      \
  X(device_name, "cuDeviceGetName", (char*, int, CuDevice))                                                           \
  X(device_attribute, "cuDeviceGetAttribute", (int*, int, CuDevice))                                                  \
  X(device_memory, "cuDeviceTotalMem_v2", (size_t*, CuDevice))                                                        \
  X(context_retain, "cuDevicePrimaryCtxRetain", (CuContext*, CuDevice))                                               \
  X(context_release, "cuDevicePrimaryCtxRelease_v2", (CuDevice))                                                      \
  X(context_push, "cuCtxPushCurrent_v2", (CuContext))                                                                 \
  X(context_pop, "cuCtxPopCurrent_v2", (CuContext*))                                                                  \
  X(memory_alloc, "cuMemAlloc_v2", (CuPointer*, size_t))                                                              \
  X(memory_free, "cuMemFree_v2", (CuPointer))                                                                         \
  X(memory_info, "cuMemGetInfo_v2", (size_t*, size_t*))                                                               \
  X(copy, "cuMemcpyAsync", (CuPointer, CuPointer, size_t, CuHandle))                                                  \
  X(pointer_attribute, "cuPointerGetAttribute", (void*, int, CuPointer))                                              \
  X(fill, "cuMemsetD8Async", (CuPointer, unsigned char, size_t, CuHandle))                                            \
  X(stream_create, "cuStreamCreate", (CuHandle*, unsigned))                                                           \
  X(stream_destroy, "cuStreamDestroy_v2", (CuHandle))                                                                 \
  X(stream_synchronize, "cuStreamSynchronize", (CuHandle))                                                            \
  X(stream_wait, "cuStreamWaitEvent", (CuHandle, CuHandle, unsigned))                                                 \
  X(stream_capturing, "cuStreamIsCapturing", (CuHandle, int*))                                                        \
  X(stream_begin_capture, "cuStreamBeginCapture_v2", (CuHandle, int))                                                 \
  X(stream_end_capture, "cuStreamEndCapture", (CuHandle, CuHandle*))                                                  \
  X(event_create, "cuEventCreate", (CuHandle*, unsigned))                                                             \
  X(event_destroy, "cuEventDestroy_v2", (CuHandle))                                                                   \
  X(event_record, "cuEventRecord", (CuHandle, CuHandle))                                                              \
  X(event_synchronize, "cuEventSynchronize", (CuHandle))                                                              \
  X(event_elapsed, "cuEventElapsedTime", (float*, CuHandle, CuHandle))                                                \
  X(graph_instantiate, "cuGraphInstantiateWithFlags", (CuHandle*, CuHandle, unsigned long long))                      \
  X(graph_destroy, "cuGraphDestroy", (CuHandle))                                                                      \
  X(graph_launch, "cuGraphLaunch", (CuHandle, CuHandle))                                                              \
  X(graph_exec_destroy, "cuGraphExecDestroy", (CuHandle))                                                             \
  X(module_load, "cuModuleLoadData", (CuModule*, const void*))                                                        \
  X(module_unload, "cuModuleUnload", (CuModule))                                                                      \
  X(module_function, "cuModuleGetFunction", (CuFunction*, CuModule, const char*))                                     \
  X(function_attribute, "cuFuncSetAttribute", (CuFunction, int, int))                                                 \
  X(launch, "cuLaunchKernel",                                                                                         \
    (CuFunction, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, CuHandle, void**, void**))

// The numbers of the driver's interface that are used here.
constexpr CuResult kCudaSuccess = 0, kCudaOutOfMemory = 2, kCudaNoDevice = 100;
constexpr int kAttributeMultiprocessors = 16, kAttributeIntegrated = 18, kAttributeMajor = 75, kAttributeMinor = 76;
constexpr int kAttributeHostPageTables = 100;  // the device reads any host memory itself, through the host's page tables
constexpr int kPointerMemoryType = 2;
constexpr unsigned kDeviceMemory = 2;  // a type of memory
constexpr int kFunctionDynamicShared = 8;  // the largest dynamic shared memory of a function
constexpr int kFunctionSharedPart = 9;     // of the memory that shared memory and the L1 divide, in percent; a wish
constexpr unsigned kSharedWithoutAsking = 48 << 10;
constexpr unsigned kStreamNonBlocking = 1;
constexpr int kCaptureThreadLocal = 1;

// The oldest driver, 1000 * major + 10 * minor: JetPack 6 has 12.6; what is used here has been there since 11.4.
constexpr int kOldestDriver = 12000;
constexpr int kMostDevices = 64;

struct Driver {
#define STREAMO_CUDA_MEMBER(member, name, parameters) CuResult(*member) parameters = nullptr;
  STREAMO_CUDA_FUNCTIONS(STREAMO_CUDA_MEMBER)
#undef STREAMO_CUDA_MEMBER

  std::string library;
  int version = 0;
  // A sticky error spoils the primary context of a device for the whole process, so everyone who uses it must know.
  // `cause` is written once, before `lost`.
  std::atomic<bool> lost[kMostDevices] = {};
  std::string cause[kMostDevices];
  std::mutex losing;
};

// Finds, loads and initialises the driver, once for each library name. STREAMO_NO_DEVICE says why it cannot be used.
// The environment variable STREAMO_CUDA_DRIVER names another library than libcuda.so.1; for tests.
streamo_status load_driver(Driver** driver);

// Whether after this error no call to the device can succeed until the process ends.
bool is_sticky(CuResult result);

// The driver's own name of an error, or "error".
const char* error_name(const Driver& driver, CuResult result);

}  // namespace streamo::gpu
