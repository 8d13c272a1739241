// What every operator does with ONNX Runtime's tensors: read attributes, look at inputs, ask for outputs, refuse.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <string>

#include "ort_abi.h"
#include "streamo_kernels.h"

namespace streamo::ort {

// Thrown inside an operator, caught in `guarded`: why it does not run. Nothing is thrown across the C ABI.
struct Refusal {
  ErrorCode code;
  std::string message;
};

[[noreturn]] void refuse(ErrorCode code, std::string message);

constexpr int kMaxRank = 4;
constexpr std::int64_t kAny = -1;

struct Tensor {
  void* data = nullptr;  // null: the optional input is absent, or the tensor is empty
  bool present = false;
  int rank = 0;
  std::int64_t dims[kMaxRank] = {};

  std::int64_t count() const;
  template <typename T>
  T* as() const {
    return static_cast<T*>(data);
  }
};

Tensor describe(const Api* api, const Value* value);

float attribute_float(const Api* api, const KernelInfo* info, const char* name);
std::int64_t attribute_int(const Api* api, const KernelInfo* info, const char* name);

// One call of an operator.
class Call {
 public:
  // `threads`: how many ONNX Runtime may use, a hint for splitting.
  Call(const Api* api, KernelContext* context, int threads);
  Call(const Call&) = delete;
  Call& operator=(const Call&) = delete;

  // Absent inputs have `present` false.
  Tensor input(std::size_t index) const;
  // An input that must be there with these dimensions, kAny standing for every size.
  Tensor input(std::size_t index, const char* name, std::initializer_list<std::int64_t> dims) const;
  // The same, or absent.
  Tensor optional(std::size_t index, const char* name, std::initializer_list<std::int64_t> dims) const;
  void* output(std::size_t index, std::initializer_list<std::int64_t> dims) const;
  // Output `index` that continues `source`: the same memory where both are bound to it, else without its contents.
  void* continued(std::size_t index, const Tensor& source) const;
  // The stream of the provider that the node runs in: a GPU's.
  void* gpu_stream() const;
  // ONNX Runtime's threads, for as long as this call lasts.
  const streamo_threads* threads() const { return &threads_; }

 private:
  static void run_tasks(void* pool, std::size_t tasks, streamo_task task, void* context);

  const Api* api_;
  KernelContext* context_;
  std::size_t inputs_ = 0;
  streamo_threads threads_;
};

// Throws what the kernels' last error says unless `status` is STREAMO_OK.
void accept(const char* op, streamo_status status);

// A dimension or attribute as the C ABI takes it.
std::int32_t to_int32(const char* name, std::int64_t value);

Status* status_of_current_exception(const Api* api, const char* op) noexcept;

// Runs `body` and turns whatever it throws into a status.
template <typename Body>
Status* guarded(const Api* api, const char* op, Body&& body) noexcept {
  try {
    body();
    return nullptr;
  } catch (...) {
    return status_of_current_exception(api, op);
  }
}

}  // namespace streamo::ort
