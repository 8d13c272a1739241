// What a file with one operation's GPU code needs: the guard of a public function, launches, copies, workspaces.
//
//   extern "C" streamo_status streamo_gpu_norm_run(streamo_gpu* gpu, const streamo_gpu_norm* a, void* stream) {
//     return streamo::gpu::on_device(gpu, [&]() -> streamo_status {
//       if (a == nullptr || a->rows < 1) return refuse(STREAMO_BAD_ARGUMENT, "norm: ...");
//       return launch(gpu, "norm_2048", {uint32_t(a->rows)}, stream, a->input, a->weight, a->output, a->width);
//     });
//   }
//
// `refuse` is in common/status.h. Knows no CUDA header and no operation.
#pragma once

#include <cstddef>
#include <cstdint>
#include <exception>
#include <new>
#include <type_traits>

#include "common/status.h"
#include "streamo_gpu.h"

namespace streamo::gpu {

// Programs along each axis: tl.program_id(0), (1), (2).
struct Grid {
  uint32_t x = 1, y = 1, z = 1;
};
constexpr int32_t kMostGrid = 65535;  // of y and of z

// Whether kernels take this address: kernels/gpu/variant.py promises them so much of pointers. They take NULL.
inline bool is_aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

// Refuses another one, for the operation called `what`: the device would stop for good at the first access.
inline streamo_status check_aligned(const char* what, const void* pointer) {
  if (is_aligned(pointer)) return STREAMO_OK;
  return refuse(STREAMO_BAD_ARGUMENT, "%s: expected addresses that are multiples of 16 bytes, found %p", what, pointer);
}

// How many multiprocessors the device has: for choosing splits.
int32_t multiprocessors(const streamo_gpu* gpu);

// Asynchronous, on `stream`. `upload` reads host memory before it returns, and refuses a stream that is recorded.
streamo_status upload(streamo_gpu* gpu, void* device, const void* host, size_t bytes, void* stream);
streamo_status fill(streamo_gpu* gpu, void* device, uint8_t value, size_t bytes, void* stream);

// One argument of a kernel: where its value is, and its type's letter as in kernels/gpu/variant.py.
struct Argument {
  const void* value;
  char letter;
};

streamo_status launch_arguments(streamo_gpu* gpu, const char* variant, Grid grid, void* stream,
                                const Argument* arguments, size_t count);

namespace detail {

template <typename T>
constexpr char letter_of() {
  if constexpr (std::is_pointer_v<T> || std::is_null_pointer_v<T>) {
    return 'p';
  } else if constexpr (std::is_integral_v<T> && sizeof(T) == 4) {
    return 'i';
  } else if constexpr (std::is_integral_v<T> && sizeof(T) == 8) {
    return 'l';
  } else {
    static_assert(std::is_same_v<T, float>, "a kernel takes pointers, 32-bit and 64-bit integers, and floats");
    return 'f';
  }
}

// Makes the device's context current for a call; `end` restores the one before.
streamo_status begin(streamo_gpu* gpu);
void end(streamo_gpu* gpu);

}  // namespace detail

// Launch the kernel called `variant` with one program for each point of the grid. The arguments are the kernel's
// run-time parameters in their order: any pointer, int32_t, int64_t or float. Their number and types are checked
// against the archive. A grid with a zero does nothing.
template <typename... Arguments>
streamo_status launch(streamo_gpu* gpu, const char* variant, Grid grid, void* stream, Arguments... arguments) {
  const Argument packed[] = {{&arguments, detail::letter_of<Arguments>()}..., {nullptr, '\0'}};
  return launch_arguments(gpu, variant, grid, stream, packed, sizeof...(arguments));
}

// Runs the body of a public function: with the device's context current, refused if the device is lost, and with
// nothing thrown to the caller.
template <typename Body>
streamo_status on_device(streamo_gpu* gpu, Body body) {
  if (const streamo_status status = detail::begin(gpu)) return status;
  streamo_status status;
  try {
    status = body();
  } catch (const std::bad_alloc&) {
    status = refuse(STREAMO_OUT_OF_MEMORY, "no host memory for a call to the GPU");
  } catch (const std::exception& error) {
    status = refuse(STREAMO_UNSUPPORTED, "a call to the GPU failed: %s", error.what());
  }
  detail::end(gpu);
  return status;
}

// Cuts a workspace into pieces, each aligned to 256 bytes. Without memory it only counts: the same code then tells how
// much is needed.
//
//   Workspace pieces(workspace, bytes);        float* sums = pieces.take<float>(rows * splits);
//   if (const streamo_status status = pieces.check("norm")) return status;
class Workspace {
 public:
  Workspace() = default;  // counts
  Workspace(void* memory, size_t bytes) : memory_(static_cast<char*>(memory)), bytes_(bytes) {}

  template <typename T>
  T* take(size_t count) {
    const size_t offset = used_;
    used_ += (count * sizeof(T) + kAlignment - 1) / kAlignment * kAlignment;
    return memory_ == nullptr ? nullptr : reinterpret_cast<T*>(memory_ + offset);
  }

  size_t used() const { return used_; }

  // Refuses a workspace that is too small or not aligned, for the operation called `what`.
  streamo_status check(const char* what) const {
    if (used_ == 0) return STREAMO_OK;
    if (memory_ == nullptr || bytes_ < used_) {
      return refuse(STREAMO_BAD_ARGUMENT, "%s: expected a workspace of %zu bytes, found %zu", what, used_,
                    memory_ == nullptr ? size_t{0} : bytes_);
    }
    if (!is_aligned(memory_)) {
      return refuse(STREAMO_BAD_ARGUMENT, "%s: the workspace is not aligned to 16 bytes", what);
    }
    return STREAMO_OK;
  }

 private:
  static constexpr size_t kAlignment = 256;
  char* memory_ = nullptr;
  size_t bytes_ = 0, used_ = 0;
};

}  // namespace streamo::gpu
