// The part of ONNX Runtime's C ABI that a library of custom operators needs, in our own words: no header of ONNX Runtime
// is in its Python package. The ABI only ever grows at the end: the table of functions is addressed by index (all of
// them since 1.17), and an operator says in its `version` how far its struct goes.
#pragma once

#include <cstddef>
#include <cstdint>

namespace streamo::ort {

// Opaque.
struct Status;
struct SessionOptions;
struct CustomOpDomain;
struct KernelInfo;
struct KernelContext;
struct Value;
struct TensorInfo;

struct Api;  // a table of functions, as many as its version has

struct ApiBase {
  const Api* (*get_api)(std::uint32_t version);
  const char* (*get_version_string)();
};

constexpr std::uint32_t kApiVersion = 17;  // first with ParallelFor

enum ErrorCode : int { kFail = 1, kInvalidArgument = 2, kNotImplemented = 9 };
enum ElementType : int { kFloat = 1, kUint8 = 2, kInt8 = 3, kInt32 = 6 };
enum Characteristic : int { kRequired = 0, kOptional = 1 };
enum MemoryType : int { kHostInput = -2, kDefaultMemory = 0 };

// 16 is the first version whose kernels return a status when they are made and when they run.
struct CustomOp {
  std::uint32_t version = 16;
  void* (*create_kernel)(const CustomOp*, const Api*, const KernelInfo*) = nullptr;
  const char* (*name)(const CustomOp*) = nullptr;
  const char* (*execution_provider)(const CustomOp*) = nullptr;
  ElementType (*input_type)(const CustomOp*, std::size_t) = nullptr;
  std::size_t (*input_count)(const CustomOp*) = nullptr;
  ElementType (*output_type)(const CustomOp*, std::size_t) = nullptr;
  std::size_t (*output_count)(const CustomOp*) = nullptr;
  void (*compute)(void*, KernelContext*) = nullptr;
  void (*destroy_kernel)(void*) = nullptr;
  Characteristic (*input_characteristic)(const CustomOp*, std::size_t) = nullptr;
  Characteristic (*output_characteristic)(const CustomOp*, std::size_t) = nullptr;
  MemoryType (*input_memory_type)(const CustomOp*, std::size_t) = nullptr;
  int (*variadic_input_min)(const CustomOp*) = nullptr;
  int (*variadic_input_homogeneous)(const CustomOp*) = nullptr;
  int (*variadic_output_min)(const CustomOp*) = nullptr;
  int (*variadic_output_homogeneous)(const CustomOp*) = nullptr;
  Status* (*create_kernel_with_status)(const CustomOp*, const Api*, const KernelInfo*, void**) = nullptr;
  Status* (*compute_with_status)(void*, KernelContext*) = nullptr;
};

// One function of the table: where it stands and what it takes.
template <std::size_t Index, typename Signature>
struct Entry {
  static Signature* of(const Api* api) { return reinterpret_cast<Signature* const*>(api)[Index]; }
};

using CreateStatus = Entry<0, Status*(ErrorCode, const char*)>;
using GetErrorMessage = Entry<2, const char*(const Status*)>;
using CreateCustomOpDomain = Entry<26, Status*(const char*, CustomOpDomain**)>;
using CustomOpDomainAdd = Entry<27, Status*(CustomOpDomain*, const CustomOp*)>;
using AddCustomOpDomain = Entry<28, Status*(SessionOptions*, CustomOpDomain*)>;
using GetTensorMutableData = Entry<51, Status*(const Value*, void**)>;
using GetDimensionsCount = Entry<61, Status*(const TensorInfo*, std::size_t*)>;
using GetDimensions = Entry<62, Status*(const TensorInfo*, std::int64_t*, std::size_t)>;
using GetTensorTypeAndShape = Entry<65, Status*(const Value*, TensorInfo**)>;
using GetAttributeFloat = Entry<85, Status*(const KernelInfo*, const char*, float*)>;
using GetAttributeInt = Entry<86, Status*(const KernelInfo*, const char*, std::int64_t*)>;
using GetInputCount = Entry<88, Status*(const KernelContext*, std::size_t*)>;
using GetInput = Entry<90, Status*(const KernelContext*, std::size_t, const Value**)>;
using GetOutput = Entry<91, Status*(KernelContext*, std::size_t, const std::int64_t*, std::size_t, Value**)>;
using ReleaseStatus = Entry<93, void(Status*)>;
using ReleaseTensorInfo = Entry<99, void(TensorInfo*)>;
using GetGpuStream = Entry<193, Status*(const KernelContext*, void**)>;
using GetConstantInput = Entry<249, Status*(const KernelInfo*, std::size_t, int*, const Value**)>;
using ParallelFor =
    Entry<274, Status*(const KernelContext*, void (*)(void*, std::size_t), std::size_t, std::size_t, void*)>;

}  // namespace streamo::ort
