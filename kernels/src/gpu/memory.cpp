// Memory, streams, events and graphs: the driver's, with our statuses.
#include "gpu/device.h"
#include "gpu/launch.h"

using namespace streamo;
using namespace streamo::gpu;

namespace streamo::gpu {
namespace {

CuPointer address(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer); }

streamo_status missing(const char* what) { return refuse(STREAMO_BAD_ARGUMENT, "expected %s, found NULL", what); }

bool is_device_memory(const Driver& driver, const void* pointer) {
  unsigned type = 0;
  return driver.pointer_attribute(&type, kPointerMemoryType, address(pointer)) == kCudaSuccess && type == kDeviceMemory;
}

// A copy whose host memory may be used again when it returns. The driver copies host memory that is not pinned to its
// own first, and so reads it before it returns; but where the device reads such memory itself (Grace, Thor), the copy may
// still be to come. While a stream is recorded nothing can be waited for, and nothing is read.
CuResult copy(const streamo_gpu* gpu, void* target, const void* source, size_t bytes, void* stream) {
  const Driver& driver = *gpu->driver;
  CuResult result = driver.copy(address(target), address(source), bytes, stream);
  if (result != kCudaSuccess || !gpu->reads_host_memory) return result;
  if (is_device_memory(driver, target) && is_device_memory(driver, source)) return result;
  int recorded = 0;
  result = driver.stream_capturing(stream, &recorded);
  return result != kCudaSuccess || recorded != 0 ? result : driver.stream_synchronize(stream);
}

}  // namespace

streamo_status upload(streamo_gpu* gpu, void* device, const void* host, size_t bytes, void* stream) {
  if (bytes == 0) return STREAMO_OK;
  int recorded = 0;
  const CuResult result = gpu->driver->stream_capturing(stream, &recorded);
  if (result == kCudaSuccess && recorded != 0) {
    return refuse(STREAMO_BAD_ARGUMENT,
                  "a call that sends a table from the host cannot be recorded in a graph, which would read the host's "
                  "memory again each time: expected the table on the device");
  }
  return check(gpu, result == kCudaSuccess ? copy(gpu, device, host, bytes, stream) : result, "copying to the GPU");
}

streamo_status fill(streamo_gpu* gpu, void* device, uint8_t value, size_t bytes, void* stream) {
  if (bytes == 0) return STREAMO_OK;
  return check(gpu, gpu->driver->fill(address(device), value, bytes, stream), "filling memory");
}

}  // namespace streamo::gpu

extern "C" streamo_status streamo_gpu_alloc(streamo_gpu* gpu, size_t bytes, void** pointer) {
  return on_device(gpu, [&]() -> streamo_status {
    if (pointer == nullptr) return missing("a place for the pointer");
    *pointer = nullptr;
    if (bytes == 0) return refuse(STREAMO_BAD_ARGUMENT, "expected at least 1 byte to allocate, found 0");
    CuPointer found = 0;
    const CuResult result = gpu->driver->memory_alloc(&found, bytes);
    if (result == kCudaOutOfMemory) {
      size_t unused = 0, total = 0;
      gpu->driver->memory_info(&unused, &total);
      return refuse(STREAMO_OUT_OF_MEMORY, "the GPU has no memory for %zu bytes: %zu of %zu bytes are free", bytes,
                    unused, total);
    }
    *pointer = reinterpret_cast<void*>(static_cast<uintptr_t>(found));
    return check(gpu, result, "allocating memory");
  });
}

extern "C" streamo_status streamo_gpu_free(streamo_gpu* gpu, void* pointer) {
  return on_device(gpu, [&]() -> streamo_status {
    if (pointer == nullptr) return STREAMO_OK;
    return check(gpu, gpu->driver->memory_free(address(pointer)), "freeing memory");
  });
}

extern "C" streamo_status streamo_gpu_copy(streamo_gpu* gpu, void* target, const void* source, size_t bytes,
                                           void* stream) {
  return on_device(gpu, [&]() -> streamo_status {
    if (bytes == 0) return STREAMO_OK;
    if (target == nullptr || source == nullptr) return missing("a target and a source of a copy");
    return check(gpu, copy(gpu, target, source, bytes, stream), "copying memory");
  });
}

extern "C" streamo_status streamo_gpu_fill(streamo_gpu* gpu, void* target, uint8_t value, size_t bytes, void* stream) {
  return on_device(gpu, [&]() -> streamo_status {
    if (bytes != 0 && target == nullptr) return missing("memory to fill");
    return fill(gpu, target, value, bytes, stream);
  });
}

extern "C" streamo_status streamo_gpu_stream_create(streamo_gpu* gpu, void** stream) {
  return on_device(gpu, [&]() -> streamo_status {
    if (stream == nullptr) return missing("a place for the stream");
    return check(gpu, gpu->driver->stream_create(stream, kStreamNonBlocking), "making a stream");
  });
}

extern "C" streamo_status streamo_gpu_stream_destroy(streamo_gpu* gpu, void* stream) {
  return on_device(gpu, [&]() -> streamo_status {
    if (stream == nullptr) return STREAMO_OK;
    return check(gpu, gpu->driver->stream_destroy(stream), "ending a stream");
  });
}

extern "C" streamo_status streamo_gpu_synchronize(streamo_gpu* gpu, void* stream) {
  return on_device(gpu, [&] { return check(gpu, gpu->driver->stream_synchronize(stream), "computing"); });
}

extern "C" streamo_status streamo_gpu_event_create(streamo_gpu* gpu, void** event) {
  return on_device(gpu, [&]() -> streamo_status {
    if (event == nullptr) return missing("a place for the event");
    return check(gpu, gpu->driver->event_create(event, 0), "making an event");
  });
}

extern "C" streamo_status streamo_gpu_event_destroy(streamo_gpu* gpu, void* event) {
  return on_device(gpu, [&]() -> streamo_status {
    if (event == nullptr) return STREAMO_OK;
    return check(gpu, gpu->driver->event_destroy(event), "ending an event");
  });
}

extern "C" streamo_status streamo_gpu_event_record(streamo_gpu* gpu, void* event, void* stream) {
  return on_device(gpu, [&]() -> streamo_status {
    if (event == nullptr) return missing("an event");
    return check(gpu, gpu->driver->event_record(event, stream), "recording an event");
  });
}

extern "C" streamo_status streamo_gpu_stream_wait(streamo_gpu* gpu, void* stream, void* event) {
  return on_device(gpu, [&]() -> streamo_status {
    if (event == nullptr) return missing("an event");
    return check(gpu, gpu->driver->stream_wait(stream, event, 0), "waiting for an event");
  });
}

extern "C" streamo_status streamo_gpu_event_elapsed(streamo_gpu* gpu, void* from, void* to, float* milliseconds) {
  return on_device(gpu, [&]() -> streamo_status {
    if (from == nullptr || to == nullptr || milliseconds == nullptr) return missing("two events and a place for the time");
    CuResult result = gpu->driver->event_synchronize(to);
    if (result == kCudaSuccess) result = gpu->driver->event_elapsed(milliseconds, from, to);
    return check(gpu, result, "timing");
  });
}

extern "C" streamo_status streamo_gpu_graph_begin(streamo_gpu* gpu, void* stream) {
  return on_device(gpu, [&]() -> streamo_status {
    if (stream == nullptr) return missing("a stream of one's own to record (the default stream cannot be)");
    return check(gpu, gpu->driver->stream_begin_capture(stream, kCaptureThreadLocal), "recording a graph");
  });
}

extern "C" streamo_status streamo_gpu_graph_end(streamo_gpu* gpu, void* stream, void** graph) {
  return on_device(gpu, [&]() -> streamo_status {
    if (stream == nullptr || graph == nullptr) return missing("a stream and a place for the graph");
    *graph = nullptr;
    CuHandle recorded = nullptr;
    CuResult result = gpu->driver->stream_end_capture(stream, &recorded);
    if (result != kCudaSuccess) return failure(gpu, result, "recording a graph");
    result = gpu->driver->graph_instantiate(graph, recorded, 0);
    gpu->driver->graph_destroy(recorded);
    return check(gpu, result, "preparing a graph");
  });
}

extern "C" streamo_status streamo_gpu_graph_launch(streamo_gpu* gpu, void* graph, void* stream) {
  return on_device(gpu, [&]() -> streamo_status {
    if (graph == nullptr) return missing("a graph");
    return check(gpu, gpu->driver->graph_launch(graph, stream), "starting a graph");
  });
}

extern "C" streamo_status streamo_gpu_graph_destroy(streamo_gpu* gpu, void* graph) {
  return on_device(gpu, [&]() -> streamo_status {
    if (graph == nullptr) return STREAMO_OK;
    return check(gpu, gpu->driver->graph_exec_destroy(graph), "ending a graph");
  });
}
