#include "tensors.h"

#include <exception>
#include <limits>
#include <utility>

namespace streamo::ort {
namespace {

void check(const Api* api, Status* status) {
  if (status == nullptr) return;
  std::string message = GetErrorMessage::of(api)(status);
  ReleaseStatus::of(api)(status);
  refuse(kFail, std::move(message));
}

template <typename Dims>
std::string shape_text(const Dims& dims) {
  std::string text = "(";
  for (const std::int64_t size : dims) {
    if (text.size() > 1) text += ", ";
    text += size == kAny ? "any" : std::to_string(size);
  }
  return text + ")";
}

struct Shape {
  const std::int64_t *first, *last;
  const std::int64_t* begin() const { return first; }
  const std::int64_t* end() const { return last; }
};

void check_shape(const Tensor& tensor, const char* name, std::initializer_list<std::int64_t> dims) {
  bool fits = static_cast<std::size_t>(tensor.rank) == dims.size();
  int axis = 0;
  for (const std::int64_t expected : dims) {
    if (!fits) break;
    const std::int64_t found = tensor.dims[axis++];
    fits = expected == kAny || expected == found;
  }
  if (!fits) {
    refuse(kInvalidArgument, std::string(name) + ": expected shape " + shape_text(dims) + ", found " +
                                 shape_text(Shape{tensor.dims, tensor.dims + tensor.rank}));
  }
}

}  // namespace

void refuse(ErrorCode code, std::string message) { throw Refusal{code, std::move(message)}; }

std::int64_t Tensor::count() const {
  std::int64_t product = 1;
  for (int axis = 0; axis < rank; ++axis) product *= dims[axis];
  return product;
}

Tensor describe(const Api* api, const Value* value) {
  Tensor tensor;
  if (value == nullptr) return tensor;
  tensor.present = true;
  TensorInfo* info = nullptr;
  check(api, GetTensorTypeAndShape::of(api)(value, &info));
  std::size_t rank = 0;
  Status* status = GetDimensionsCount::of(api)(info, &rank);
  if (status == nullptr && rank <= kMaxRank) status = GetDimensions::of(api)(info, tensor.dims, rank);
  ReleaseTensorInfo::of(api)(info);
  check(api, status);
  if (rank > kMaxRank) {
    refuse(kInvalidArgument, "expected a tensor of at most 4 dimensions, found " + std::to_string(rank));
  }
  tensor.rank = static_cast<int>(rank);
  check(api, GetTensorMutableData::of(api)(value, &tensor.data));
  return tensor;
}

float attribute_float(const Api* api, const KernelInfo* info, const char* name) {
  float value = 0;
  check(api, GetAttributeFloat::of(api)(info, name, &value));
  return value;
}

std::int64_t attribute_int(const Api* api, const KernelInfo* info, const char* name) {
  std::int64_t value = 0;
  check(api, GetAttributeInt::of(api)(info, name, &value));
  return value;
}

Call::Call(const Api* api, KernelContext* context, int threads)
    : api_(api), context_(context), threads_{this, threads, &Call::run_tasks} {
  check(api, GetInputCount::of(api)(context, &inputs_));
}

void Call::run_tasks(void* pool, std::size_t tasks, streamo_task task, void* context) {
  const Call* call = static_cast<const Call*>(pool);
  constexpr std::size_t kOneByOne = 0;  // threads take tasks as they come, not in batches
  Status* status = ParallelFor::of(call->api_)(call->context_, task, tasks, kOneByOne, context);
  if (status != nullptr) {  // refused before it began
    ReleaseStatus::of(call->api_)(status);
    for (std::size_t i = 0; i < tasks; ++i) task(context, i);
  }
}

Tensor Call::input(std::size_t index) const {
  if (index >= inputs_) return {};
  const Value* value = nullptr;
  check(api_, GetInput::of(api_)(context_, index, &value));
  return describe(api_, value);
}

Tensor Call::input(std::size_t index, const char* name, std::initializer_list<std::int64_t> dims) const {
  const Tensor tensor = optional(index, name, dims);
  if (!tensor.present) refuse(kInvalidArgument, std::string(name) + ": expected a tensor, found none");
  return tensor;
}

Tensor Call::optional(std::size_t index, const char* name, std::initializer_list<std::int64_t> dims) const {
  const Tensor tensor = input(index);
  if (tensor.present) check_shape(tensor, name, dims);
  return tensor;
}

void* Call::output(std::size_t index, std::initializer_list<std::int64_t> dims) const {
  Value* value = nullptr;
  check(api_, GetOutput::of(api_)(context_, index, dims.begin(), dims.size(), &value));
  void* data = nullptr;
  if (value != nullptr) check(api_, GetTensorMutableData::of(api_)(value, &data));
  return data;
}

void* Call::continued(std::size_t index, const Tensor& source) const {
  Value* value = nullptr;
  check(api_, GetOutput::of(api_)(context_, index, source.dims, static_cast<std::size_t>(source.rank), &value));
  void* data = nullptr;
  check(api_, GetTensorMutableData::of(api_)(value, &data));
  return data;
}

void* Call::gpu_stream() const {
  void* stream = nullptr;
  check(api_, GetGpuStream::of(api_)(context_, &stream));
  return stream;
}

void accept(const char* op, streamo_status status) {
  if (status == STREAMO_OK) return;
  const ErrorCode code = status == STREAMO_BAD_ARGUMENT ? kInvalidArgument
                         : status == STREAMO_UNSUPPORTED ? kNotImplemented
                                                         : kFail;
  const char* said = streamo_last_error();
  refuse(code, said[0] != '\0' ? said : std::string(op) + " failed with status " + std::to_string(status));
}

std::int32_t to_int32(const char* name, std::int64_t value) {
  if (value < 0 || value > std::numeric_limits<std::int32_t>::max()) {
    refuse(kInvalidArgument, std::string(name) + ": expected 0 to 2147483647, found " + std::to_string(value));
  }
  return static_cast<std::int32_t>(value);
}

Status* status_of_current_exception(const Api* api, const char* op) noexcept {
  const auto create = CreateStatus::of(api);
  try {
    throw;
  } catch (const Refusal& refusal) {
    try {
      return create(refusal.code, (std::string("streamo::") + op + ": " + refusal.message).c_str());
    } catch (...) {
      return create(refusal.code, refusal.message.c_str());
    }
  } catch (const std::exception& error) {
    return create(kFail, error.what());
  } catch (...) {
    return create(kFail, "an unknown failure");
  }
}

}  // namespace streamo::ort
