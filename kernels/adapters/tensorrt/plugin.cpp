// libstreamo_tensorrt: our operators as TensorRT plugins.
//
// Owns the translation of TensorRT's tensors into the structs of streamo_gpu.h, and nothing else: kernels, tables and
// checks are behind that interface. Uses what TensorRT 10.3 and 11.x have in common (IPluginV3 with aliased outputs).
// Operators, their inputs and attributes: `edge/contract.py`, TABLE_ATTENTION and PLUGIN_MATMUL.
//
// A plugin that TensorRT makes while it builds an engine launches nothing: there is no tactic to choose, and the tables
// it would be timed with hold no table.
#include <NvInfer.h>

#include <dlfcn.h>

#include <array>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <mutex>
#include <new>
#include <optional>
#include <string>
#include <vector>

#include "streamo_gpu.h"

namespace {

using namespace nvinfer1;

constexpr char kNamespace[] = "streamo";
constexpr char kVersion[] = "1";
constexpr int32_t kOk = 0, kFailed = -1;

ILoggerFinder* logger_finder = nullptr;

// What was refused, a line each, until somebody asks: TensorRT promises a logger only to plugins inside of an engine.
class Refusals {
 public:
  void add(std::string const& sentence) {
    std::lock_guard<std::mutex> const lock(mutex_);
    if (lines_.size() < kMost) lines_ += sentence + "\n";
  }
  std::string take() {
    std::lock_guard<std::mutex> const lock(mutex_);
    std::string found;
    found.swap(lines_);
    return found;
  }

 private:
  static constexpr size_t kMost = 2000;
  std::mutex mutex_;
  std::string lines_;
} refusals;

int32_t fail(std::string const& sentence) noexcept {
  refusals.add(sentence);
  ILogger* const logger = logger_finder ? logger_finder->findLogger() : nullptr;
  if (logger) logger->log(ILogger::Severity::kERROR, sentence.c_str());
  return kFailed;
}

int32_t accept(streamo_status status, char const* what) noexcept {
  if (status == STREAMO_OK) return kOk;
  return fail(std::string(what) + ": " + streamo_last_error());
}

// The GPU with its kernels, opened once for all plugins of the process and given back with it.
streamo_gpu* gpu() noexcept {
  static std::mutex mutex;
  static streamo_gpu* opened = nullptr;
  std::lock_guard<std::mutex> const lock(mutex);
  if (opened) return opened;
  std::string folder;
  char const* const given = std::getenv("STREAMO_EDGE_CUBINS");
  if (given && *given) {
    folder = given;
  } else {  // beside the library that launches them
    Dl_info info{};
    if (!dladdr(reinterpret_cast<void const*>(&streamo_gpu_open), &info) || !info.dli_fname) {
      fail("The GPU: it is not known where the kernels' library lies; STREAMO_EDGE_CUBINS can name their folder");
      return nullptr;
    }
    folder = info.dli_fname;
    folder.erase(folder.find_last_of('/') + 1);
    folder += "cubins";
  }
  // TensorRT itself works on the process's first GPU unless told otherwise, and nothing here tells it.
  if (accept(streamo_gpu_open(folder.c_str(), 0, &opened), "The GPU") != kOk) opened = nullptr;
  return opened;
}

// What one of streamo_gpu.h's functions that count a workspace answers. None without a GPU, or where it refuses:
// TensorRT's log has the sentence.
template <typename Count, typename... Arguments>
std::optional<size_t> workspace_bytes(char const* what, Count count, Arguments... arguments) noexcept {
  size_t bytes = 0;
  streamo_gpu* const device = gpu();
  if (!device || accept(count(device, arguments..., &bytes), what) != kOk) return std::nullopt;
  return bytes;
}

int32_t size(PluginTensorDesc const& tensor, int32_t axis) { return static_cast<int32_t>(tensor.dims.d[axis]); }
int32_t most(DynamicPluginTensorDesc const& tensor, int32_t axis) { return static_cast<int32_t>(tensor.max.d[axis]); }

std::string text_of(int64_t const* sizes, size_t count) {
  std::string text;
  for (size_t i = 0; i < count; ++i) text += (i ? ", " : "") + std::to_string(sizes[i]);
  return "(" + text + ")";
}

// Whether the largest sizes of an input that the profile allows are these. -1 stands for any from 1 on, also for what
// follows the tokens, the cache and its runs: TensorRT need not know that they go together.
bool has_sizes(char const* what, DynamicPluginTensorDesc const* inputs, int32_t index,
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

// One operator's attributes, by name; as they come from a graph and as they are kept in an engine.
class Attributes {
 public:
  explicit Attributes(std::vector<char const*> const& integers, bool has_scale) {
    for (char const* name : integers) names_.push_back(name);
    integers_.assign(names_.size(), -1);
    for (char const* name : integers) fields_.emplace_back(name, nullptr, PluginFieldType::kINT32, 1);
    if (has_scale) fields_.emplace_back("scale", nullptr, PluginFieldType::kFLOAT32, 1);
    point_fields();
  }
  Attributes(Attributes const& other)
      : names_(other.names_), integers_(other.integers_), scale_(other.scale_), fields_(other.fields_) {
    point_fields();
  }
  Attributes& operator=(Attributes const&) = delete;

  // Whether every attribute was there.
  bool read(PluginFieldCollection const& given) {
    for (int32_t i = 0; i < given.nbFields; ++i) take(given.fields[i]);
    for (int32_t value : integers_) {
      if (value < 0) return false;
    }
    return fields_.size() == names_.size() || scale_ > 0;
  }

  int32_t operator[](char const* name) const {
    for (size_t i = 0; i < names_.size(); ++i) {
      if (!std::strcmp(names_[i], name)) return integers_[i];
    }
    return -1;
  }
  float scale() const { return scale_; }
  PluginFieldCollection const* fields() const { return &collection_; }

 private:
  void take(PluginField const& field) {
    if (!field.data || field.length < 1) return;
    if (!std::strcmp(field.name, "scale") && field.type == PluginFieldType::kFLOAT32) {
      std::memcpy(&scale_, field.data, sizeof scale_);
    }
    for (size_t i = 0; i < names_.size(); ++i) {
      if (std::strcmp(names_[i], field.name)) continue;
      if (field.type == PluginFieldType::kINT32) std::memcpy(&integers_[i], field.data, sizeof(int32_t));
      if (field.type == PluginFieldType::kINT64) {
        int64_t wide;
        std::memcpy(&wide, field.data, sizeof wide);
        integers_[i] = static_cast<int32_t>(wide);
      }
    }
  }
  void point_fields() {
    for (size_t i = 0; i < fields_.size(); ++i) {
      fields_[i].data = i < integers_.size() ? static_cast<void const*>(&integers_[i]) : &scale_;
    }
    collection_.nbFields = static_cast<int32_t>(fields_.size());
    collection_.fields = fields_.data();
  }

  std::vector<char const*> names_;
  std::vector<int32_t> integers_;
  float scale_ = 0;
  std::vector<PluginField> fields_;
  PluginFieldCollection collection_{};
};

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

class TableAttention final : public Plugin {
 public:
  static constexpr char kName[] = "StreamoTableAttention";
  static Attributes attributes() {
    return Attributes({"num_heads", "num_kv_heads", "int8_cache", "key_offset", "most_spans"}, true);
  }
  using Plugin::Plugin;

  AsciiChar const* getPluginName() const noexcept override { return kName; }
  IPluginV3* clone() noexcept override { return new (std::nothrow) TableAttention(attributes_, building_); }
  int32_t getNbOutputs() const noexcept override { return int8() ? 5 : 3; }
  int32_t getAliasedInput(int32_t output) noexcept override { return output == 0 ? -1 : cache_input(output); }
  int32_t getOutputShapes(DimsExprs const* inputs, int32_t, DimsExprs const*, int32_t, DimsExprs* outputs,
                          int32_t count, IExprBuilder& builder) noexcept override {
    outputs[0].nbDims = 2;
    outputs[0].d[0] = inputs[kQkv].d[0];
    IDimensionExpr const* const both_halves = builder.constant(2 * attributes_["num_heads"]);
    outputs[0].d[1] = builder.operation(DimensionOperation::kPROD, *inputs[kRopeCos].d[1], *both_halves);
    for (int32_t i = 1; i < count; ++i) outputs[i] = inputs[cache_input(i)];
    return kOk;
  }

 protected:
  int32_t input_count() const noexcept override { return kScales + (int8() ? 2 : 0) + (offset() ? 3 : 0); }
  bool takes(DynamicPluginTensorDesc const* in) const noexcept override {
    if (!has_sizes(kName, in, kRopeCos, {-1, -1})) return false;
    int64_t const half = in[kRopeCos].max.d[1], width = 2 * half, row = int8() ? width / 4 : width;
    int64_t const kv_heads = attributes_["num_kv_heads"], qkv = (attributes_["num_heads"] + 2 * kv_heads) * width;
    bool fits = has_sizes(kName, in, kQkv, {-1, qkv}) && has_sizes(kName, in, kBias, {qkv}) &&
                has_sizes(kName, in, kRopeSin, {-1, half}) && has_sizes(kName, in, kKeys, {1, kv_heads, -1, row}) &&
                has_sizes(kName, in, kValues, {1, kv_heads, -1, row}) && has_sizes(kName, in, kTable, {-1}) &&
                has_sizes(kName, in, kRunCos, {-1, half}) && has_sizes(kName, in, kRunSin, {-1, half});
    for (int32_t i = kScales; fits && int8() && i < kScales + 2; ++i) fits = has_sizes(kName, in, i, {1, kv_heads, -1});
    int32_t const first = input_count() - 3;
    return fits && (!offset() || (has_sizes(kName, in, first, {kv_heads, width}) &&
                                  has_sizes(kName, in, first + 1, {-1, half}) &&
                                  has_sizes(kName, in, first + 2, {-1, half})));
  }
  std::optional<size_t> most_workspace(DynamicPluginTensorDesc const* inputs) const noexcept override {
    streamo_attention const step = sizes(most(inputs[kQkv], 0), most(inputs[kKeys], 2), most(inputs[kRopeCos], 1),
                                         most(inputs[kRunCos], 0));
    return workspace_bytes(kName, streamo_gpu_attention_most_workspace, &step);
  }
  bool words(int32_t position, int32_t inputs) const noexcept override {
    if (position == kTable) return true;
    return int8() && (position == kKeys || position == kValues || position == inputs + 1 || position == inputs + 2);
  }
  int32_t run(PluginTensorDesc const* types, PluginTensorDesc const*, void const* const* inputs, void* const* outputs,
              void* workspace, void* stream) noexcept override {
    for (int32_t i = 1; i < getNbOutputs(); ++i) {
      if (outputs[i] != inputs[cache_input(i)]) return fail("A cache's output must be bound to its input's memory");
    }
    streamo_attention step =
        sizes(size(types[kQkv], 0), size(types[kKeys], 2), size(types[kRopeCos], 1), size(types[kRunCos], 0));
    step.qkv = as<float>(inputs[kQkv]);
    step.qkv_bias = as<float>(inputs[kBias]);
    step.rope_cos = as<float>(inputs[kRopeCos]);
    step.rope_sin = as<float>(inputs[kRopeSin]);
    step.run_cos = as<float>(inputs[kRunCos]);
    step.run_sin = as<float>(inputs[kRunSin]);
    step.output = static_cast<float*>(outputs[0]);
    step.key_cache = outputs[1];
    step.value_cache = outputs[2];
    if (int8()) {
      step.key_scales = static_cast<float*>(outputs[3]);
      step.value_scales = static_cast<float*>(outputs[4]);
    }
    if (offset()) {
      int32_t const first = input_count() - 3;
      step.key_offset = as<float>(inputs[first]);
      step.slot_cos = as<float>(inputs[first + 1]);
      step.slot_sin = as<float>(inputs[first + 2]);
    }
    streamo_gpu* const device = gpu();
    if (!device) return kFailed;
    std::optional<size_t> const bytes = workspace_bytes(kName, streamo_gpu_attention_workspace, &step);
    if (!bytes) return kFailed;
    return accept(streamo_gpu_attention_run(device, &step, inputs[kTable], attributes_["most_spans"], workspace, *bytes,
                                            stream),
                  kName);
  }

 private:
  enum Input : int32_t { kQkv, kBias, kRopeCos, kRopeSin, kKeys, kValues, kTable, kRunCos, kRunSin, kScales };

  bool int8() const { return attributes_["int8_cache"] == 1; }
  bool offset() const { return attributes_["key_offset"] == 1; }
  static int32_t cache_input(int32_t output) { return output < 3 ? kKeys + output - 1 : kScales + output - 3; }

  streamo_attention sizes(int32_t tokens, int32_t capacity, int32_t half, int32_t runs) const {
    streamo_attention step{};
    step.query_heads = attributes_["num_heads"];
    step.kv_heads = attributes_["num_kv_heads"];
    step.head_dim = 2 * half;
    step.capacity = capacity;
    step.new_tokens = tokens;
    step.kv_type = int8() ? STREAMO_KV_INT8 : STREAMO_KV_F32;
    step.scale = attributes_.scale();
    step.run_count = runs;
    static float const somewhere = 0;  // how much scratch memory a step takes depends on whether there is an offset
    if (offset()) step.key_offset = &somewhere;
    return step;
  }
};

class MatMul final : public Plugin {
 public:
  static constexpr char kName[] = "StreamoMatMul";
  static Attributes attributes() { return Attributes({"bits", "block_size", "gated", "bias", "residual"}, false); }
  using Plugin::Plugin;

  AsciiChar const* getPluginName() const noexcept override { return kName; }
  IPluginV3* clone() noexcept override { return new (std::nothrow) MatMul(attributes_, building_); }
  int32_t getNbOutputs() const noexcept override { return 1; }
  int32_t getOutputShapes(DimsExprs const* inputs, int32_t, DimsExprs const*, int32_t, DimsExprs* outputs, int32_t,
                          IExprBuilder& builder) noexcept override {
    outputs[0].nbDims = 2;
    outputs[0].d[0] = inputs[kValues].d[0];
    IDimensionExpr const* const halves = builder.constant(1 + attributes_["gated"]);
    outputs[0].d[1] = builder.operation(DimensionOperation::kFLOOR_DIV, *inputs[kScales].d[1], *halves);
    return kOk;
  }

 protected:
  int32_t input_count() const noexcept override { return kRest + attributes_["bias"] + attributes_["residual"]; }
  bool takes(DynamicPluginTensorDesc const* in) const noexcept override {
    if (!has_sizes(kName, in, kValues, {-1, -1}) || !has_sizes(kName, in, kScales, {-1, -1})) return false;
    int64_t const width = in[kValues].max.d[1], columns = in[kScales].max.d[1], bits = attributes_["bits"];
    int64_t const block = attributes_["block_size"] > 0 ? attributes_["block_size"] : 1;  // 0 is refused with the sizes
    return has_sizes(kName, in, kScales, {(width + block - 1) / block, columns}) &&
           has_sizes(kName, in, kCodes, {width * columns * bits / 32}) &&
           (!attributes_["bias"] || has_sizes(kName, in, kRest, {columns})) &&
           (!attributes_["residual"] ||
            has_sizes(kName, in, kRest + attributes_["bias"], {-1, columns / (1 + attributes_["gated"])}));
  }
  std::optional<size_t> most_workspace(DynamicPluginTensorDesc const* inputs) const noexcept override {
    int32_t const width = most(inputs[kValues], 1), columns = most(inputs[kScales], 1);
    streamo_weights_source const source = weights(width, columns);
    streamo_matmul arguments = product(most(inputs[kValues], 0), width, columns);
    static float const somewhere = 0;  // how much scratch memory a product takes depends on what is added to it
    if (attributes_["bias"]) arguments.bias = &somewhere;
    if (attributes_["residual"]) arguments.residual = &somewhere;
    return workspace_bytes(kName, streamo_gpu_matmul_most_workspace, &source, &arguments, kActivations);
  }
  bool words(int32_t position, int32_t) const noexcept override { return position == kCodes; }
  int32_t run(PluginTensorDesc const* types, PluginTensorDesc const*, void const* const* inputs, void* const* outputs,
              void* workspace, void* stream) noexcept override {
    int32_t const width = size(types[kValues], 1), columns = size(types[kScales], 1);
    streamo_weights_source source = weights(width, columns);
    source.codes = inputs[kCodes];
    source.scales = as<float>(inputs[kScales]);
    streamo_matmul arguments = product(size(types[kValues], 0), width, columns);
    arguments.input = as<float>(inputs[kValues]);
    if (attributes_["bias"]) arguments.bias = as<float>(inputs[kRest]);
    if (attributes_["residual"]) arguments.residual = as<float>(inputs[kRest + attributes_["bias"]]);
    arguments.output = static_cast<float*>(outputs[0]);
    streamo_gpu* const device = gpu();
    if (!device) return kFailed;
    std::optional<size_t> const bytes =
        workspace_bytes(kName, streamo_gpu_matmul_workspace, &source, &arguments, kActivations);
    if (!bytes) return kFailed;
    return accept(streamo_gpu_matmul_run(device, &source, &arguments, kActivations, workspace, *bytes, stream), kName);
  }

 private:
  enum Input : int32_t { kValues, kCodes, kScales, kRest };
  static constexpr int32_t kActivations = STREAMO_GPU_ACTIVATIONS_AUTO;

  streamo_weights_source weights(int32_t inputs, int32_t outputs) const {
    streamo_weights_source source{};
    source.inputs = inputs;
    source.outputs = outputs;
    source.bits = attributes_["bits"];
    source.block = attributes_["block_size"];
    source.gated = attributes_["gated"];
    return source;
  }
  streamo_matmul product(int32_t rows, int32_t inputs, int32_t outputs) const {
    streamo_matmul arguments{};
    arguments.rows = rows;
    arguments.input_stride = inputs;
    arguments.output_stride = outputs / (1 + attributes_["gated"]);
    return arguments;
  }
};

template <typename Operator>
class Creator final : public IPluginCreatorV3One {
 public:
  AsciiChar const* getPluginName() const noexcept override { return Operator::kName; }
  AsciiChar const* getPluginVersion() const noexcept override { return kVersion; }
  AsciiChar const* getPluginNamespace() const noexcept override { return kNamespace; }
  PluginFieldCollection const* getFieldNames() noexcept override { return names_.fields(); }
  IPluginV3* createPlugin(AsciiChar const* name, PluginFieldCollection const* given,
                          TensorRTPhase phase) noexcept override {
    Attributes attributes = Operator::attributes();
    if (!given || !attributes.read(*given)) {
      fail(std::string(name ? name : Operator::kName) + ": an attribute of " + Operator::kName + " is missing");
      return nullptr;
    }
    return new (std::nothrow) Operator(attributes, phase == TensorRTPhase::kBUILD);
  }

 private:
  Attributes names_ = Operator::attributes();
};

}  // namespace

#define STREAMO_EXPORT extern "C" __attribute__((visibility("default")))

// What TensorRT's plugin registry asks a library for.
STREAMO_EXPORT IPluginCreatorInterface* const* getCreators(int32_t& count) {
  static Creator<TableAttention> attention;
  static Creator<MatMul> product;
  static std::array<IPluginCreatorInterface*, 2> creators{&attention, &product};
  count = static_cast<int32_t>(creators.size());
  return creators.data();
}

STREAMO_EXPORT void setLoggerFinder(ILoggerFinder* finder) { logger_finder = finder; }

// What was refused since the last call, a line each; valid until the thread's next call.
STREAMO_EXPORT char const* streamo_tensorrt_messages() {
  thread_local std::string shown;
  shown = refusals.take();
  return shown.c_str();
}

// What this library was compiled from, as `edge/engines/plugin.py` counts it; "" where nobody said.
#ifndef STREAMO_PLUGIN_SOURCES
#define STREAMO_PLUGIN_SOURCES ""
#endif
STREAMO_EXPORT char const* streamo_tensorrt_sources() { return STREAMO_PLUGIN_SOURCES; }

// The TensorRT that this library was compiled for: 10 000 * major + 100 * minor + patch.
STREAMO_EXPORT int32_t streamo_tensorrt_version() {
  return 10000 * NV_TENSORRT_MAJOR + 100 * NV_TENSORRT_MINOR + NV_TENSORRT_PATCH;
}
