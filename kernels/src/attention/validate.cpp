#include "attention/validate.h"

#include <cmath>
#include <cstring>

#include "attention/kernels.h"
#include "common/scratch.h"
#include "common/status.h"

namespace streamo {
namespace {

constexpr int64_t kMostElements = INT64_C(1) << 48;

streamo_status validate_head_dim(int32_t head_dim) {
  if (head_dim < 16 || head_dim % 16 != 0 || head_dim > kMaxHeadDim) {
    return refuse(STREAMO_UNSUPPORTED, "head_dim must be a multiple of 16 and at most %d, found %d", kMaxHeadDim,
                  head_dim);
  }
  return STREAMO_OK;
}

struct NamedPointer {
  const void* pointer;
  const char* name;
};

template <int Count>
streamo_status refuse_missing(const NamedPointer (&pointers)[Count]) {
  for (const NamedPointer& entry : pointers) {
    if (entry.pointer == nullptr) return refuse(STREAMO_BAD_ARGUMENT, "%s must not be NULL", entry.name);
  }
  return STREAMO_OK;
}

}  // namespace

streamo_status validate_sizes(const streamo_attention& a) {
  if (a.query_heads < 1 || a.kv_heads < 1 || a.query_heads % a.kv_heads != 0) {
    return refuse(STREAMO_BAD_ARGUMENT, "query_heads must be a positive multiple of kv_heads, found %d and %d",
                  a.query_heads, a.kv_heads);
  }
  if (const streamo_status status = validate_head_dim(a.head_dim)) return status;
  if (a.new_tokens < 1 || a.capacity < 1) {
    return refuse(STREAMO_BAD_ARGUMENT, "new_tokens and capacity must be at least 1, found %d and %d", a.new_tokens,
                  a.capacity);
  }
  if (a.new_tokens > a.capacity) {
    return refuse(STREAMO_BAD_ARGUMENT, "new_tokens must be at most the capacity of %d rows, found %d", a.capacity,
                  a.new_tokens);
  }
  const int64_t heads = int64_t{a.query_heads} + 2 * int64_t{a.kv_heads};
  if (heads > INT32_MAX / a.head_dim || int64_t{a.kv_heads} * a.capacity > kMostElements / a.head_dim ||
      int64_t{a.new_tokens} * (a.query_heads / a.kv_heads) > INT32_MAX) {
    return refuse(STREAMO_UNSUPPORTED, "%d query heads, %d kv heads, %d new tokens and %d rows are too many",
                  a.query_heads, a.kv_heads, a.new_tokens, a.capacity);
  }
  if (a.kv_type != STREAMO_KV_F32 && a.kv_type != STREAMO_KV_INT8) {
    return refuse(STREAMO_BAD_ARGUMENT, "kv_type must be 0 (float32) or 1 (int8), found %d",
                  static_cast<int>(a.kv_type));
  }
  if (!std::isfinite(a.scale)) return refuse(STREAMO_BAD_ARGUMENT, "scale must be finite");
  if (a.span_count < 0 || a.run_count < 0) {
    return refuse(STREAMO_BAD_ARGUMENT, "span_count and run_count must not be negative, found %d and %d", a.span_count,
                  a.run_count);
  }
  return STREAMO_OK;
}

namespace {

streamo_status validate_pointers(const streamo_attention& a) {
  if (const streamo_status status = refuse_missing({{a.qkv, "qkv"},
                                                    {a.rope_cos, "rope_cos"},
                                                    {a.rope_sin, "rope_sin"},
                                                    {a.key_cache, "key_cache"},
                                                    {a.value_cache, "value_cache"},
                                                    {a.new_slots, "new_slots"},
                                                    {a.output, "output"}})) {
    return status;
  }
  if (a.kv_type == STREAMO_KV_INT8) {
    if (const streamo_status status = refuse_missing({{a.key_scales, "key_scales of an int8 cache"},
                                                      {a.value_scales, "value_scales of an int8 cache"}})) {
      return status;
    }
  }
  if (a.key_offset != nullptr) {
    if (a.kv_type != STREAMO_KV_INT8) {
      return refuse(STREAMO_BAD_ARGUMENT, "key_offset belongs to an int8 cache; a float cache takes none");
    }
    if (const streamo_status status = refuse_missing({{a.slot_cos, "slot_cos beside key_offset"},
                                                      {a.slot_sin, "slot_sin beside key_offset"}})) {
      return status;
    }
  }
  if (a.span_count > 0 && a.spans == nullptr) {
    return refuse(STREAMO_BAD_ARGUMENT, "spans must not be NULL where span_count is %d", a.span_count);
  }
  if (a.run_count > 0) return refuse_missing({{a.run_cos, "run_cos"}, {a.run_sin, "run_sin"}});
  return STREAMO_OK;
}

// Which rows are named already, a bit each.
class NamedRows {
 public:
  explicit NamedRows(int32_t capacity) {
    thread_local Scratch scratch;
    const size_t words = (static_cast<size_t>(capacity) + 63) / 64;
    words_ = scratch.reserve_of<uint64_t>(words);
    std::memset(words_, 0, words * sizeof(uint64_t));
  }

  // Names rows begin .. end - 1; false if one of them was named before.
  bool add(int32_t begin, int32_t end) {
    uint64_t seen = 0;
    for (int32_t row = begin; row < end;) {
      const int32_t bit = row % 64;
      const int32_t count = end - row < 64 - bit ? end - row : 64 - bit;
      const uint64_t mask = (count == 64 ? ~uint64_t{0} : (uint64_t{1} << count) - 1) << bit;
      seen |= words_[row / 64] & mask;
      words_[row / 64] |= mask;
      row += count;
    }
    return seen == 0;
  }

 private:
  uint64_t* words_;
};

}  // namespace

streamo_status validate_layout(const streamo_attention& arguments) {
  if (const streamo_status status = validate_sizes(arguments)) return status;
  return validate_pointers(arguments);
}

streamo_status validate_rows(const streamo_attention& a) {
  NamedRows named(a.capacity);
  for (int32_t i = 0; i < a.span_count; ++i) {
    const streamo_span& span = a.spans[i];
    if (span.length < 0) {
      return refuse(STREAMO_BAD_ARGUMENT, "span %d has a length of %d, expected at least 0", i, span.length);
    }
    if (span.slot < 0 || int64_t{span.slot} + span.length > a.capacity) {
      return refuse(STREAMO_BAD_ARGUMENT, "span %d names rows %d to %lld, of a cache of %d rows", i, span.slot,
                    static_cast<long long>(span.slot) + span.length - 1, a.capacity);
    }
    if (span.length == 0) continue;
    if (span.run < 0 || span.run >= a.run_count) {
      return refuse(STREAMO_BAD_ARGUMENT, "span %d is of run %d, expected one of %d runs", i, span.run, a.run_count);
    }
    if (!named.add(span.slot, span.slot + span.length)) {
      return refuse(STREAMO_BAD_ARGUMENT, "span %d (rows %d to %d) names a row that an earlier span names too", i,
                    span.slot, span.slot + span.length - 1);
    }
  }
  for (int32_t i = 0; i < a.new_tokens; ++i) {
    const int32_t slot = a.new_slots[i];
    if (slot < 0 || slot >= a.capacity) {
      return refuse(STREAMO_BAD_ARGUMENT, "new_slots[%d] is %d, of a cache of %d rows", i, slot, a.capacity);
    }
    if (!named.add(slot, slot + 1)) {
      return refuse(STREAMO_BAD_ARGUMENT, "new_slots[%d] is row %d, which a span or an earlier token has taken", i,
                    slot);
    }
  }
  return STREAMO_OK;
}

streamo_status validate(const streamo_attention* arguments) {
  if (arguments == nullptr) return refuse(STREAMO_BAD_ARGUMENT, "arguments must not be NULL");
  if (const streamo_status status = validate_layout(*arguments)) return status;
  return validate_rows(*arguments);
}

streamo_status validate(const streamo_window_attention* arguments) {
  if (arguments == nullptr) return refuse(STREAMO_BAD_ARGUMENT, "arguments must not be NULL");
  const streamo_window_attention& a = *arguments;
  if (a.heads < 1) return refuse(STREAMO_BAD_ARGUMENT, "heads must be at least 1, found %d", a.heads);
  if (const streamo_status status = validate_head_dim(a.head_dim)) return status;
  if (a.heads > INT32_MAX / 3 / a.head_dim) return refuse(STREAMO_UNSUPPORTED, "%d heads are too many", a.heads);
  if (a.rows < 1 || a.window_count < 1) {
    return refuse(STREAMO_BAD_ARGUMENT, "rows and window_count must be at least 1, found %d and %d", a.rows,
                  a.window_count);
  }
  if (!std::isfinite(a.scale)) return refuse(STREAMO_BAD_ARGUMENT, "scale must be finite");
  if (const streamo_status status = refuse_missing({{a.qkv, "qkv"},
                                                    {a.rope_cos, "rope_cos"},
                                                    {a.rope_sin, "rope_sin"},
                                                    {a.window_starts, "window_starts"},
                                                    {a.output, "output"}})) {
    return status;
  }
  if (a.window_starts[0] != 0 || a.window_starts[a.window_count] != a.rows) {
    return refuse(STREAMO_BAD_ARGUMENT, "window_starts must rise from 0 to %d rows, found %d to %d", a.rows,
                  a.window_starts[0], a.window_starts[a.window_count]);
  }
  for (int32_t i = 0; i < a.window_count; ++i) {
    if (a.window_starts[i + 1] < a.window_starts[i]) {
      return refuse(STREAMO_BAD_ARGUMENT, "window_starts must rise, found %d behind %d at window %d",
                    a.window_starts[i + 1], a.window_starts[i], i);
    }
  }
  return STREAMO_OK;
}

streamo_status validate(const streamo_threads* threads) {
  if (threads == nullptr) return STREAMO_OK;
  if (threads->count < 1 || threads->run == nullptr) {
    return refuse(STREAMO_BAD_ARGUMENT, "threads need a count of at least 1 and a run function, found a count of %d",
                  threads->count);
  }
  return STREAMO_OK;
}

}  // namespace streamo
