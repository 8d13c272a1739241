// The oracle of attention: plain loops, double precision, no tiles.
// The cache rows it writes follow the header's rule in float, so that they equal the kernels' bit by bit.
#include <algorithm>
#include <cfloat>
#include <cmath>
#include <new>
#include <vector>

#include "attention/validate.h"
#include "common/status.h"

namespace streamo {
namespace {

// Pairs (i, i + half) turned; in float for what a cache keeps, in double for what is only looked at.
template <typename Real>
std::vector<Real> turned(const std::vector<Real>& x, const float* cosine, const float* sine) {
  const size_t half = x.size() / 2;
  std::vector<Real> out(x.size());
  for (size_t i = 0; i < half; ++i) {
    const Real c = cosine[i], s = sine[i];
    out[i] = x[i] * c - x[i + half] * s;
    out[i + half] = x[i + half] * c + x[i] * s;
  }
  return out;
}

float quantise_row(const std::vector<float>& x, int8_t* codes) {
  float largest = 0.0f;
  for (const float value : x) largest = std::fmax(largest, std::fabs(value));
  const float scale = largest / 127.0f;
  for (size_t i = 0; i < x.size(); ++i) {
    const float code = scale > 0.0f ? std::nearbyint(x[i] / scale) : 0.0f;
    codes[i] = static_cast<int8_t>(std::fmin(127.0f, std::fmax(-127.0f, code)));
  }
  return scale;
}

class Oracle {
 public:
  explicit Oracle(const streamo_attention& arguments)
      : a_(arguments),
        width_(static_cast<size_t>(arguments.head_dim)),
        half_(width_ / 2),
        int8_(arguments.kv_type == STREAMO_KV_INT8) {}

  void append(size_t token) {
    const float *cosine = a_.rope_cos + token * half_, *sine = a_.rope_sin + token * half_;
    for (size_t head = 0; head < static_cast<size_t>(a_.kv_heads); ++head) {
      const size_t key_head = a_.query_heads + head, value_head = key_head + a_.kv_heads;
      std::vector<float> key(width_), value(width_);
      for (size_t i = 0; i < width_; ++i) {
        key[i] = qkv(token, key_head, i) + bias(key_head, i);
        if (a_.key_offset != nullptr) key[i] -= a_.key_offset[head * width_ + i];
        value[i] = qkv(token, value_head, i) + (int8_ ? 0.0f : bias(value_head, i));
      }
      key = turned(key, cosine, sine);
      const size_t row = head * a_.capacity + a_.new_slots[token];
      if (int8_) {
        a_.key_scales[row] = quantise_row(key, static_cast<int8_t*>(a_.key_cache) + row * width_);
        a_.value_scales[row] = quantise_row(value, static_cast<int8_t*>(a_.value_cache) + row * width_);
      } else {
        std::copy(key.begin(), key.end(), static_cast<float*>(a_.key_cache) + row * width_);
        std::copy(value.begin(), value.end(), static_cast<float*>(a_.value_cache) + row * width_);
      }
    }
  }

  void attend(size_t token, size_t head) {
    const size_t kv_head = head / (a_.query_heads / a_.kv_heads);
    std::vector<double> query(width_);
    for (size_t i = 0; i < width_; ++i) query[i] = static_cast<double>(qkv(token, head, i)) + bias(head, i);
    query = turned(query, a_.rope_cos + token * half_, a_.rope_sin + token * half_);

    std::vector<size_t> rows;
    std::vector<double> scores;
    for (int32_t i = 0; i < a_.span_count; ++i) {
      const streamo_span& span = a_.spans[i];
      if (span.length == 0) continue;
      const std::vector<double> moved = turned(query, a_.run_cos + span.run * half_, a_.run_sin + span.run * half_);
      for (int32_t slot = span.slot; slot < span.slot + span.length; ++slot) {
        rows.push_back(static_cast<size_t>(slot));
        scores.push_back(score(moved, kv_head, static_cast<size_t>(slot)));
      }
    }
    for (size_t other = 0; other <= token; ++other) {
      rows.push_back(static_cast<size_t>(a_.new_slots[other]));
      scores.push_back(score(query, kv_head, rows.back()));
    }
    write_weighted_values(token, head, kv_head, rows, scores);
  }

 private:
  float qkv(size_t token, size_t head, size_t i) const {
    return a_.qkv[(token * (a_.query_heads + 2 * static_cast<size_t>(a_.kv_heads)) + head) * width_ + i];
  }
  float bias(size_t head, size_t i) const { return a_.qkv_bias == nullptr ? 0.0f : a_.qkv_bias[head * width_ + i]; }

  double cached(const void* cache, const float* scales, size_t row, size_t i) const {
    if (!int8_) return static_cast<const float*>(cache)[row * width_ + i];
    return static_cast<double>(static_cast<const int8_t*>(cache)[row * width_ + i]) * scales[row];
  }

  double score(const std::vector<double>& query, size_t head, size_t slot) const {
    double sum = 0.0;
    for (size_t i = 0; i < width_; ++i) {
      sum += query[i] * cached(a_.key_cache, a_.key_scales, head * a_.capacity + slot, i);
    }
    if (a_.key_offset != nullptr) {
      const float* first = a_.key_offset + head * width_;
      const std::vector<double> offset =
          turned(std::vector<double>(first, first + width_), a_.slot_cos + slot * half_, a_.slot_sin + slot * half_);
      for (size_t i = 0; i < width_; ++i) sum += query[i] * offset[i];
    }
    return sum * a_.scale;
  }

  void write_weighted_values(size_t token, size_t head, size_t kv_head, const std::vector<size_t>& rows,
                             const std::vector<double>& scores) {
    double maximum = -DBL_MAX, total = 0.0;
    for (const double value : scores) maximum = std::fmax(maximum, value);
    std::vector<double> sums(width_, 0.0);
    for (size_t k = 0; k < rows.size(); ++k) {
      const double weight = std::exp(scores[k] - maximum);
      total += weight;
      for (size_t i = 0; i < width_; ++i) {
        sums[i] += weight * cached(a_.value_cache, a_.value_scales, kv_head * a_.capacity + rows[k], i);
      }
    }
    const size_t value_head = static_cast<size_t>(a_.query_heads) + a_.kv_heads + kv_head;
    for (size_t i = 0; i < width_; ++i) {
      a_.output[(token * a_.query_heads + head) * width_ + i] =
          static_cast<float>(sums[i] / total + (int8_ ? bias(value_head, i) : 0.0f));
    }
  }

  const streamo_attention& a_;
  size_t width_, half_;
  bool int8_;
};

}  // namespace
}  // namespace streamo

extern "C" streamo_status streamo_attention_reference(const streamo_attention* arguments) {
  using namespace streamo;
  clear_error();
  try {
    if (const streamo_status status = validate(arguments)) return status;
    Oracle oracle(*arguments);
    for (int32_t token = 0; token < arguments->new_tokens; ++token) oracle.append(static_cast<size_t>(token));
    for (int32_t token = 0; token < arguments->new_tokens; ++token) {
      for (int32_t head = 0; head < arguments->query_heads; ++head) {
        oracle.attend(static_cast<size_t>(token), static_cast<size_t>(head));
      }
    }
    return STREAMO_OK;
  } catch (const std::bad_alloc&) {
    return refuse(STREAMO_OUT_OF_MEMORY, "the reference found no memory for its scores");
  }
}
