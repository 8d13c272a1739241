// What TensorRT asks every plugin, answered once for both of our operators, and the sizes of what it hands over.
#pragma once

#include <NvInfer.h>

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <string>

#include "attributes.h"
#include "device.h"

namespace streamo::tensorrt {

constexpr char kNamespace[] = "streamo";
constexpr char kVersion[] = "1";

inline int32_t size(PluginTensorDesc const& tensor, int32_t axis) { return static_cast<int32_t>(tensor.dims.d[axis]); }
inline int32_t most(DynamicPluginTensorDesc const& tensor, int32_t axis) { return static_cast<int32_t>(tensor.max.d[axis]); }

inline std::string text_of(int64_t const* sizes, size_t count) {
  std::string text;
  for (size_t i = 0; i < count; ++i) text += (i ? ", " : "") + std::to_string(sizes[i]);
  return "(" + text + ")";
}

// Whether the largest sizes of an input that the profile allows are these. -1 stands for any from 1 on, also for what
// follows the tokens, the cache and its runs: TensorRT need not know that they go together.
inline bool has_sizes(char const* what, DynamicPluginTensorDesc const* inputs, int32_t index,
               std::initializer_list<int64_t> expected) {
  Dims const& found = inputs[index].max;
  size_t const rank = found.nbDims < 0 ? 0 : static_cast<size_t>(found.nbDims);
  bool same = rank == expected.size();
  for (size_t i = 0; same && i < rank; ++i) {
    int64_t const wanted = expected.begin()[i];
    same = wanted < 0 ? found.d[i] >= 1 : found.d[i] == wanted;
  }
  if (!same) {
    fail(std::string(what) + ": input " + std::to_string(index) + " is at most " + text_of(found.d, rank) +
         ", expected " + text_of(expected.begin(), expected.size()) + ", -1 for any");
  }
  return same;
}

template <typename T>
T const* as(void const* pointer) {
  return static_cast<T const*>(pointer);
}

// What both operators have in common: every tensor is linear, float32 unless `words` says int32, and what a plugin
// computes follows from its attributes and the sizes.
class Plugin : public IPluginV3, public IPluginV3OneCore, public IPluginV3OneBuildV2, public IPluginV3OneRuntime {
 public:
  Plugin(Attributes const& attributes, bool building) : attributes_(attributes), building_(building) {}

  IPluginCapability* getCapabilityInterface(PluginCapabilityType type) noexcept override {
    switch (type) {
      case PluginCapabilityType::kCORE: return static_cast<IPluginV3OneCore*>(this);
      case PluginCapabilityType::kBUILD: return static_cast<IPluginV3OneBuildV2*>(this);
      case PluginCapabilityType::kRUNTIME: return static_cast<IPluginV3OneRuntime*>(this);
    }
    return nullptr;
  }
  AsciiChar const* getPluginVersion() const noexcept override { return kVersion; }
  AsciiChar const* getPluginNamespace() const noexcept override { return kNamespace; }

  // Ends the build where the kernels refuse a profile: `getWorkspaceSize` could not, and 0 bytes would be too few.
  int32_t configurePlugin(DynamicPluginTensorDesc const* given, int32_t inputs, DynamicPluginTensorDesc const*,
                          int32_t outputs) noexcept override {
    if (inputs != input_count() || outputs != getNbOutputs()) return fail(wrong_count(inputs));
    return takes(given) && most_workspace(given) ? kOk : kFailed;
  }
  size_t getWorkspaceSize(DynamicPluginTensorDesc const* inputs, int32_t, DynamicPluginTensorDesc const*,
                          int32_t) const noexcept override {
    return most_workspace(inputs).value_or(0);
  }
  bool supportsFormatCombination(int32_t position, DynamicPluginTensorDesc const* tensors, int32_t inputs,
                                 int32_t) noexcept override {
    PluginTensorDesc const& tensor = tensors[position].desc;
    DataType const wanted = words(position, inputs) ? DataType::kINT32 : DataType::kFLOAT;
    return tensor.format == TensorFormat::kLINEAR && tensor.type == wanted;
  }
  int32_t getOutputDataTypes(DataType* types, int32_t outputs, DataType const*, int32_t inputs) const noexcept override {
    if (inputs != input_count()) return fail(wrong_count(inputs));
    for (int32_t i = 0; i < outputs; ++i) types[i] = words(inputs + i, inputs) ? DataType::kINT32 : DataType::kFLOAT;
    return kOk;
  }
  int32_t onShapeChange(PluginTensorDesc const*, int32_t, PluginTensorDesc const*, int32_t) noexcept override {
    return kOk;
  }
  IPluginV3* attachToContext(IPluginResourceContext*) noexcept override { return clone(); }
  PluginFieldCollection const* getFieldsToSerialize() noexcept override { return attributes_.fields(); }
  int32_t enqueue(PluginTensorDesc const* input_types, PluginTensorDesc const* output_types, void const* const* inputs,
                  void* const* outputs, void* workspace, cudaStream_t stream) noexcept override {
    return building_ ? kOk : run(input_types, output_types, inputs, outputs, workspace, stream);
  }

 protected:
  virtual int32_t input_count() const noexcept = 0;
  // Whether inputs of these sizes belong to an operator with these attributes.
  virtual bool takes(DynamicPluginTensorDesc const* inputs) const noexcept = 0;
  // Bytes that are enough for whatever the profile allows; none where the kernels refuse it.
  virtual std::optional<size_t> most_workspace(DynamicPluginTensorDesc const* inputs) const noexcept = 0;
  virtual bool words(int32_t position, int32_t inputs) const noexcept = 0;
  virtual int32_t run(PluginTensorDesc const* input_types, PluginTensorDesc const* output_types,
                      void const* const* inputs, void* const* outputs, void* workspace, void* stream) noexcept = 0;

  Attributes const attributes_;
  bool const building_;

 private:
  std::string wrong_count(int32_t inputs) const {
    return std::string(getPluginName()) + " takes " + std::to_string(input_count()) + " inputs, found " +
           std::to_string(inputs);
  }
};

}  // namespace streamo::tensorrt
