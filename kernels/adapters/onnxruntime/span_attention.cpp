// streamo::SpanAttention and streamo::SpanAttentionInt8: attention over a cache that is appended in place.
#include <cstring>

#include "operators.h"

namespace streamo::ort {
namespace {

enum : std::size_t {
  kQkv, kQkvBias, kRopeCos, kRopeSin, kKeyCache, kValueCache, kNewSlots, kSpans, kRunCos, kRunSin,
  kKeyScales, kValueScales, kKeyOffset, kSlotCos, kSlotSin
};

constexpr Input kHostTable{kInt32, kRequired, true};
constexpr Input kInputs[] = {{kFloat}, {kFloat, kOptional}, {kFloat}, {kFloat}, {kFloat},
                             {kFloat}, kHostTable,          kHostTable, {kFloat}, {kFloat}};
constexpr ElementType kOutputs[] = {kFloat, kFloat, kFloat};

constexpr Input kInputsInt8[] = {{kFloat}, {kFloat, kOptional}, {kFloat},            {kFloat},            {kInt8},
                                 {kInt8},  kHostTable,          kHostTable,          {kFloat},            {kFloat},
                                 {kFloat}, {kFloat},            {kFloat, kOptional}, {kFloat, kOptional}, {kFloat, kOptional}};
constexpr ElementType kOutputsInt8[] = {kFloat, kInt8, kInt8, kFloat, kFloat};

// An empty tensor may have no memory; the kernels want a pointer all the same.
template <typename T>
const T* of(const Tensor& tensor) {
  alignas(64) static const T nothing{};
  return tensor.data == nullptr ? &nothing : tensor.as<const T>();
}

template <typename T>
const T* or_null(const Tensor& tensor) {
  return tensor.present ? of<T>(tensor) : nullptr;
}

class SpanAttention : public Kernel {
 public:
  SpanAttention(const Node& node, streamo_kv_type kv_type) : gpu_(node.gpu) {
    fixed_.query_heads = to_int32("num_heads", attribute_int(node.api, node.info, "num_heads"));
    fixed_.kv_heads = to_int32("num_kv_heads", attribute_int(node.api, node.info, "num_kv_heads"));
    fixed_.scale = attribute_float(node.api, node.info, "scale");
    fixed_.kv_type = kv_type;
  }

  void run(Call& call) override {
    streamo_attention arguments = fixed_;
    const std::int64_t query_heads = fixed_.query_heads, kv_heads = fixed_.kv_heads;
    const Tensor keys = call.input(kKeyCache, "key_cache", {1, kv_heads, kAny, kAny});
    const std::int64_t capacity = keys.dims[2], head_dim = keys.dims[3], half = head_dim / 2;
    const Tensor values = call.input(kValueCache, "value_cache", {1, kv_heads, capacity, head_dim});
    const std::int64_t width = (query_heads + 2 * kv_heads) * head_dim;
    const Tensor qkv = call.input(kQkv, "qkv", {kAny, width});
    const std::int64_t tokens = qkv.dims[0];
    arguments.head_dim = to_int32("head width", head_dim);
    arguments.capacity = to_int32("capacity", capacity);
    arguments.new_tokens = to_int32("new tokens", tokens);
    arguments.qkv = of<float>(qkv);
    arguments.qkv_bias = or_null<float>(call.optional(kQkvBias, "qkv_bias", {width}));
    arguments.rope_cos = of<float>(call.input(kRopeCos, "rope_cos", {tokens, half}));
    arguments.rope_sin = of<float>(call.input(kRopeSin, "rope_sin", {tokens, half}));
    arguments.new_slots = of<std::int32_t>(call.input(kNewSlots, "new_slots", {tokens}));

    const Tensor spans = call.input(kSpans, "spans", {kAny, 3});
    arguments.spans = of<streamo_span>(spans);
    arguments.span_count = to_int32("spans", spans.dims[0]);
    const Tensor run_cos = call.input(kRunCos, "run_cos", {kAny, half});
    arguments.run_cos = of<float>(run_cos);
    arguments.run_sin = of<float>(call.input(kRunSin, "run_sin", {run_cos.dims[0], half}));
    arguments.run_count = to_int32("runs", run_cos.dims[0]);

    take_caches(call, keys, values, arguments);
    arguments.output = static_cast<float*>(call.output(0, {tokens, query_heads * head_dim}));
    if (gpu_ != nullptr) {
      gpu_->attend(arguments, stream_of(*gpu_, call));
    } else {
      accept("attention", streamo_attention_run(&arguments, call.threads()));
    }
  }

 private:
  // The output that shares memory with a cache, or is a copy of it.
  void* updated(const Call& call, std::size_t index, const Tensor& cache, std::size_t element_bytes) const {
    void* data = call.continued(index, cache);
    const std::size_t bytes = static_cast<std::size_t>(cache.count()) * element_bytes;
    if (data == cache.data || bytes == 0) return data;
    if (gpu_ != nullptr) {
      gpu_->copy(data, cache.data, bytes, stream_of(*gpu_, call));
    } else {
      std::memcpy(data, cache.data, bytes);
    }
    return data;
  }

  void take_caches(const Call& call, const Tensor& keys, const Tensor& values, streamo_attention& arguments) const {
    const bool int8 = arguments.kv_type == STREAMO_KV_INT8;
    const std::size_t element_bytes = int8 ? sizeof(std::int8_t) : sizeof(float);
    arguments.key_cache = updated(call, 1, keys, element_bytes);
    arguments.value_cache = updated(call, 2, values, element_bytes);
    if (!int8) return;
    const std::int64_t kv_heads = arguments.kv_heads, capacity = arguments.capacity, head_dim = arguments.head_dim;
    const Tensor key_scales = call.input(kKeyScales, "key_scales", {1, kv_heads, capacity});
    const Tensor value_scales = call.input(kValueScales, "value_scales", {1, kv_heads, capacity});
    arguments.key_scales = static_cast<float*>(updated(call, 3, key_scales, sizeof(float)));
    arguments.value_scales = static_cast<float*>(updated(call, 4, value_scales, sizeof(float)));
    arguments.key_offset = or_null<float>(call.optional(kKeyOffset, "key_offset", {kv_heads, head_dim}));
    arguments.slot_cos = or_null<float>(call.optional(kSlotCos, "slot_cos", {capacity, head_dim / 2}));
    arguments.slot_sin = or_null<float>(call.optional(kSlotSin, "slot_sin", {capacity, head_dim / 2}));
  }

  GpuDevice* gpu_;
  streamo_attention fixed_{};
};

}  // namespace

const Description kSpanAttention = {
    "SpanAttention", kInputs, std::size(kInputs), kOutputs, std::size(kOutputs),
    [](const Node& node) -> std::unique_ptr<Kernel> { return std::make_unique<SpanAttention>(node, STREAMO_KV_F32); }};

const Description kSpanAttentionInt8 = {
    "SpanAttentionInt8", kInputsInt8, std::size(kInputsInt8), kOutputsInt8, std::size(kOutputsInt8),
    [](const Node& node) -> std::unique_ptr<Kernel> { return std::make_unique<SpanAttention>(node, STREAMO_KV_INT8); }};

}  // namespace streamo::ort
