// Calls the plugin as TensorRT would, for tests/test_tensorrt_plugin.py: make it from a graph's attributes, ask for
// shapes, write it to an engine, make it again from that, and run a clone of it. Compiled with the stand-in header.
#include <NvInfer.h>

#include <cstring>
#include <deque>
#include <memory>
#include <string>
#include <vector>

using namespace nvinfer1;

extern "C" IPluginCreatorInterface* const* getCreators(int32_t& count);
extern "C" void setLoggerFinder(ILoggerFinder* finder);

namespace {

std::string said;

class Log final : public ILogger {
 public:
  void log(Severity, AsciiChar const* message) noexcept override { said += std::string(message) + "\n"; }
} log_;
class Finder final : public ILoggerFinder {
 public:
  ILogger* findLogger() override { return &log_; }
} finder_;

class Builder final : public IExprBuilder {
 public:
  IDimensionExpr const* constant(int64_t value) noexcept override { return &kept_.emplace_back(value); }
  IDimensionExpr const* operation(DimensionOperation op, IDimensionExpr const& a, IDimensionExpr const& b) noexcept
      override {
    int64_t const x = a.getConstantValue(), y = b.getConstantValue();
    return constant(op == DimensionOperation::kPROD ? x * y : x / y);
  }

 private:
  std::deque<IDimensionExpr> kept_;
};

IPluginCreatorV3One* find(char const* name) {
  setLoggerFinder(&finder_);
  int32_t count = 0;
  IPluginCreatorInterface* const* creators = getCreators(count);
  for (int32_t i = 0; i < count; ++i) {
    auto* const creator = static_cast<IPluginCreatorV3One*>(creators[i]);
    if (!std::strcmp(creator->getPluginName(), name)) return creator;
  }
  return nullptr;
}

template <typename T>
T* capability(IPluginV3* plugin, PluginCapabilityType type) {
  return static_cast<T*>(plugin->getCapabilityInterface(type));
}

std::vector<DynamicPluginTensorDesc> at_most(int64_t const* shapes, int32_t inputs) {
  std::vector<DynamicPluginTensorDesc> tensors(inputs);
  for (int32_t i = 0; i < inputs; ++i) {
    tensors[i].max.nbDims = static_cast<int32_t>(shapes[8 * i]);
    std::memcpy(tensors[i].max.d, shapes + 8 * i + 1, 7 * sizeof(int64_t));
    tensors[i].desc.dims.nbDims = -1;  // nothing but the profile's bounds is known yet
  }
  return tensors;
}

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT char const* standin_messages() {
  static std::string shown;
  shown.swap(said);
  said.clear();
  return shown.c_str();
}

// The names of the attributes that an operator wants, separated by spaces.
EXPORT char const* standin_fields(char const* op) {
  static std::string names;
  names.clear();
  IPluginCreatorV3One* const creator = find(op);
  if (!creator) return nullptr;
  PluginFieldCollection const* const fields = creator->getFieldNames();
  for (int32_t i = 0; i < fields->nbFields; ++i) names += std::string(fields->fields[i].name) + " ";
  return names.c_str();
}

// From integers named in `names` and a scale, as a parser gives them; in 64 bits where `wide`.
EXPORT void* standin_create(char const* op, char const* const* names, int32_t const* values, int32_t count, float scale,
                            int32_t building, int32_t wide) {
  IPluginCreatorV3One* const creator = find(op);
  if (!creator) return nullptr;
  std::vector<int64_t> long_values(values, values + count);
  std::vector<PluginField> fields;
  for (int32_t i = 0; i < count; ++i) {
    void const* const data = wide ? static_cast<void const*>(&long_values[i]) : &values[i];
    fields.emplace_back(names[i], data, wide ? PluginFieldType::kINT64 : PluginFieldType::kINT32, 1);
  }
  fields.emplace_back("scale", &scale, PluginFieldType::kFLOAT32, 1);
  PluginFieldCollection const collection{static_cast<int32_t>(fields.size()), fields.data()};
  return creator->createPlugin("node", &collection, building ? TensorRTPhase::kBUILD : TensorRTPhase::kRUNTIME);
}

// Into an engine and out of it again, and bound to a context.
EXPORT void* standin_reload(void* given) {
  auto* const plugin = static_cast<IPluginV3*>(given);
  auto* const runtime = capability<IPluginV3OneRuntime>(plugin, PluginCapabilityType::kRUNTIME);
  auto* const core = capability<IPluginV3OneCore>(plugin, PluginCapabilityType::kCORE);
  PluginFieldCollection const* const kept = runtime->getFieldsToSerialize();
  std::unique_ptr<IPluginV3> const made(find(core->getPluginName())->createPlugin("node", kept, TensorRTPhase::kRUNTIME));
  if (!made) return nullptr;
  return capability<IPluginV3OneRuntime>(made.get(), PluginCapabilityType::kRUNTIME)->attachToContext(nullptr);
}

EXPORT void standin_destroy(void* plugin) { delete static_cast<IPluginV3*>(plugin); }

// Sizes and element types of the outputs: `shapes` holds 8 numbers a tensor, rank first. Returns how many, or -1.
EXPORT int32_t standin_outputs(void* given, int64_t const* input_shapes, int32_t inputs, int64_t* shapes,
                               int32_t* types, int32_t* aliases) {
  auto* const build = capability<IPluginV3OneBuildV2>(static_cast<IPluginV3*>(given), PluginCapabilityType::kBUILD);
  Builder builder;
  std::vector<DimsExprs> in(inputs), out(build->getNbOutputs());
  for (int32_t i = 0; i < inputs; ++i) {
    in[i].nbDims = static_cast<int32_t>(input_shapes[8 * i]);
    for (int32_t axis = 0; axis < in[i].nbDims; ++axis) in[i].d[axis] = builder.constant(input_shapes[8 * i + 1 + axis]);
  }
  std::vector<DataType> found(out.size());
  std::vector<DataType> const given_types(inputs, DataType::kFLOAT);
  if (build->getOutputDataTypes(found.data(), out.size(), given_types.data(), inputs)) return -1;
  if (build->getOutputShapes(in.data(), inputs, nullptr, 0, out.data(), out.size(), builder)) return -1;
  for (size_t i = 0; i < out.size(); ++i) {
    types[i] = static_cast<int32_t>(found[i]);
    aliases[i] = build->getAliasedInput(static_cast<int32_t>(i));
    shapes[8 * i] = out[i].nbDims;
    for (int32_t axis = 0; axis < out[i].nbDims; ++axis) shapes[8 * i + 1 + axis] = out[i].d[axis]->getConstantValue();
  }
  return static_cast<int32_t>(out.size());
}

// Whether tensor `position` may have this type, with everything linear or not.
EXPORT int32_t standin_supports(void* given, int32_t position, int32_t inputs, int32_t outputs, int32_t type,
                                int32_t linear) {
  auto* const build = capability<IPluginV3OneBuildV2>(static_cast<IPluginV3*>(given), PluginCapabilityType::kBUILD);
  std::vector<DynamicPluginTensorDesc> tensors(inputs + outputs);
  tensors[position].desc.type = static_cast<DataType>(type);
  tensors[position].desc.format = linear ? TensorFormat::kLINEAR : TensorFormat::kCHW2;
  return build->supportsFormatCombination(position, tensors.data(), inputs, outputs);
}

// A profile that allows shapes of at most `shapes`: 0 if the plugin takes it.
EXPORT int32_t standin_configure(void* given, int64_t const* shapes, int32_t inputs) {
  auto* const build = capability<IPluginV3OneBuildV2>(static_cast<IPluginV3*>(given), PluginCapabilityType::kBUILD);
  std::vector<DynamicPluginTensorDesc> const in = at_most(shapes, inputs);
  return build->configurePlugin(in.data(), inputs, nullptr, build->getNbOutputs());
}

// Workspace for shapes of at most `shapes`.
EXPORT size_t standin_workspace(void* given, int64_t const* shapes, int32_t inputs) {
  auto* const build = capability<IPluginV3OneBuildV2>(static_cast<IPluginV3*>(given), PluginCapabilityType::kBUILD);
  return build->getWorkspaceSize(at_most(shapes, inputs).data(), inputs, nullptr, 0);
}

EXPORT int32_t standin_enqueue(void* given, int64_t const* shapes, int32_t inputs, void const* const* in,
                               void* const* out, void* workspace, void* stream) {
  auto* const runtime = capability<IPluginV3OneRuntime>(static_cast<IPluginV3*>(given), PluginCapabilityType::kRUNTIME);
  std::vector<PluginTensorDesc> tensors(inputs);
  for (int32_t i = 0; i < inputs; ++i) {
    tensors[i].dims.nbDims = static_cast<int32_t>(shapes[8 * i]);
    std::memcpy(tensors[i].dims.d, shapes + 8 * i + 1, 7 * sizeof(int64_t));
  }
  if (runtime->onShapeChange(tensors.data(), inputs, nullptr, 0)) return -1;
  return runtime->enqueue(tensors.data(), nullptr, in, out, workspace, static_cast<cudaStream_t>(stream));
}
