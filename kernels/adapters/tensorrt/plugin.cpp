// libstreamo_tensorrt: our operators as TensorRT plugins.
//
// Owns the translation of TensorRT's tensors into the structs of streamo_gpu.h, and nothing else: kernels, tables and
// checks are behind that interface. Uses what TensorRT 10.3 and 11.x have in common (IPluginV3 with aliased outputs).
// Operators, their inputs and attributes: `edge/contract.py`, TABLE_ATTENTION and PLUGIN_MATMUL.
//
// A plugin that TensorRT makes while it builds an engine launches nothing: there is no tactic to choose, and the tables
// it would be timed with hold no table.
#include <NvInfer.h>

#include <array>
#include <cstdint>
#include <new>
#include <optional>
#include <string>

#include "operator.h"
#include "streamo_gpu.h"

namespace streamo::tensorrt {
namespace {

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
}  // namespace streamo::tensorrt

using namespace nvinfer1;
using namespace streamo::tensorrt;

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
