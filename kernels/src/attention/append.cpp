// The new tokens: bias, rotation, offset removal, quantisation, and their rows of the caches.
#include <cstring>

#include "attention/call.h"

namespace streamo {
namespace {

constexpr float kLog2E = 1.44269504088896340736f;

// out = x + bias - offset, where NULL stands for zeros.
void add_bias(const float* x, const float* bias, const float* offset, int32_t width, float* out) {
  if (bias == nullptr) {
    std::memcpy(out, x, static_cast<size_t>(width) * sizeof(float));
  } else {
    for (int32_t i = 0; i < width; ++i) out[i] = x[i] + bias[i];
  }
  if (offset == nullptr) return;
  for (int32_t i = 0; i < width; ++i) out[i] -= offset[i];
}

// One token's slice of qkv, of its bias and of the rotation tables.
struct TokenRow {
  const float *qkv, *bias, *cosine, *sine;
};

void append_queries(const AttentionCall& call, int32_t token, const TokenRow& row) {
  const streamo_attention& a = call.arguments;
  const int32_t width = a.head_dim, group = call.group();
  const float factor = a.scale * kLog2E;
  for (int32_t head = 0; head < a.query_heads; ++head) {
    const size_t column = static_cast<size_t>(head) * width;
    const size_t query = (static_cast<size_t>(head / group) * a.new_tokens + token) * group + head % group;
    float* out = call.queries + query * width;
    add_bias(row.qkv + column, row.bias == nullptr ? nullptr : row.bias + column, nullptr, width, out);
    call.kernels.turn(out, row.cosine, row.sine, width / 2, out);
    for (int32_t i = 0; i < width; ++i) out[i] *= factor;
  }
}

void append_float(const AttentionCall& call, size_t cache_row, const float* key, const float* value) {
  const streamo_attention& a = call.arguments;
  const size_t bytes = static_cast<size_t>(a.head_dim) * sizeof(float);
  std::memcpy(static_cast<float*>(a.key_cache) + cache_row * a.head_dim, key, bytes);
  std::memcpy(static_cast<float*>(a.value_cache) + cache_row * a.head_dim, value, bytes);
}

void append_int8(const AttentionCall& call, size_t cache_row, const float* key, const float* value) {
  const streamo_attention& a = call.arguments;
  int8_t* keys = static_cast<int8_t*>(a.key_cache) + cache_row * a.head_dim;
  int8_t* values = static_cast<int8_t*>(a.value_cache) + cache_row * a.head_dim;
  a.key_scales[cache_row] = call.kernels.quantise(key, a.head_dim, keys);
  a.value_scales[cache_row] = call.kernels.quantise(value, a.head_dim, values);
}

void append_keys_and_values(const AttentionCall& call, int32_t token, const TokenRow& row) {
  const streamo_attention& a = call.arguments;
  const int32_t width = a.head_dim;
  const bool int8 = a.kv_type == STREAMO_KV_INT8;
  alignas(64) float key[kMaxHeadDim], value[kMaxHeadDim];
  for (int32_t head = 0; head < a.kv_heads; ++head) {
    const size_t key_column = (static_cast<size_t>(a.query_heads) + head) * width;
    const size_t value_column = key_column + static_cast<size_t>(a.kv_heads) * width;
    const bool biased = row.bias != nullptr;
    add_bias(row.qkv + key_column, biased ? row.bias + key_column : nullptr,
             a.key_offset == nullptr ? nullptr : a.key_offset + static_cast<size_t>(head) * width, width, key);
    call.kernels.turn(key, row.cosine, row.sine, width / 2, key);
    // An int8 cache holds values without their bias: the output gets it, as the weights sum to 1.
    add_bias(row.qkv + value_column, biased && !int8 ? row.bias + value_column : nullptr, nullptr, width, value);
    const size_t cache_row = static_cast<size_t>(head) * a.capacity + a.new_slots[token];
    (int8 ? append_int8 : append_float)(call, cache_row, key, value);
  }
}

}  // namespace

void append_token(const AttentionCall& call, int32_t token) {
  const streamo_attention& a = call.arguments;
  const size_t row_width = (static_cast<size_t>(a.query_heads) + 2 * static_cast<size_t>(a.kv_heads)) * a.head_dim;
  const size_t half = static_cast<size_t>(a.head_dim) / 2;
  const TokenRow row = {a.qkv + token * row_width, a.qkv_bias, a.rope_cos + token * half, a.rope_sin + token * half};
  append_queries(call, token, row);
  append_keys_and_values(call, token, row);
}

}  // namespace streamo
