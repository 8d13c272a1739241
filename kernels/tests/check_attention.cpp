// Cases of attention over a cache; the fields are those of AttentionCase in apps/bench/kernel_cases.py, pieces being
// length:run:gap. The cache holds rows that really were rotated, shifted and quantised, and elsewhere what would spoil
// every sum: the largest code, or NaN.
#include <algorithm>

#include "check.h"

namespace {

constexpr std::int32_t kLoudChannels = 8;  // of a strong key bias

// The caches of a call, which it changes.
struct Caches {
  Floats float_keys, float_values, key_scales, value_scales;
  std::vector<std::int8_t> keys, values;

  bool operator==(const Caches& other) const {
    return same_bytes(float_keys, other.float_keys) && same_bytes(float_values, other.float_values) &&
           same_bytes(keys, other.keys) && same_bytes(values, other.values) &&
           same_bytes(key_scales, other.key_scales) && same_bytes(value_scales, other.value_scales);
  }
};

// Rounds a row as the header says; returns the scale.
float quantise(const Floats& row, std::int8_t* codes) {
  float largest = 0;
  for (const float x : row) largest = std::max(largest, std::fabs(x));
  const float scale = largest / 127.0f;
  for (std::size_t i = 0; i < row.size(); ++i) {
    const float code = scale > 0 ? std::nearbyint(row[i] / scale) : 0.0f;
    codes[i] = static_cast<std::int8_t>(std::max(-127.0f, std::min(127.0f, code)));
  }
  return scale;
}

class AttentionData {
 public:
  explicit AttentionData(const Case& given)
      : int8_(given.text("kv") == "int8"), first_position_(given.integer("first_position")) {
    a_.query_heads = given.integer("query_heads");
    a_.kv_heads = given.integer("kv_heads");
    a_.head_dim = given.integer("head_dim");
    a_.new_tokens = given.integer("new_tokens");
    a_.kv_type = int8_ ? STREAMO_KV_INT8 : STREAMO_KV_F32;
    a_.scale = 1 / std::sqrt(static_cast<float>(a_.head_dim));
    for (const std::int32_t shift : given.integers("shifts")) shifts_.push_back(shift);
    lay_out(given.table("pieces"), given.integer("spare_rows"));
    qkv_ = random_.normals(row_width() * a_.new_tokens);
    fill_ties();
    bias_.assign(row_width(), 0.0f);
    if (given.integer("bias") != 0) fill_bias(given.number("key_bias"));
    fill_caches(given.integer("offset") != 0);
    point(given.integer("bias") != 0, given.integer("offset") != 0);
  }

  bool int8() const { return int8_; }
  const Caches& caches() const { return caches_; }
  std::size_t output_size() const { return static_cast<std::size_t>(a_.new_tokens) * a_.query_heads * a_.head_dim; }

  // A call on these caches.
  streamo_attention call(Caches& caches, Floats& output) const {
    streamo_attention a = a_;
    a.key_cache = int8_ ? static_cast<void*>(caches.keys.data()) : caches.float_keys.data();
    a.value_cache = int8_ ? static_cast<void*>(caches.values.data()) : caches.float_values.data();
    a.key_scales = int8_ ? caches.key_scales.data() : nullptr;
    a.value_scales = int8_ ? caches.value_scales.data() : nullptr;
    output.assign(output_size(), NAN);
    a.output = output.data();
    return a;
  }

 private:
  std::size_t row_width() const { return static_cast<std::size_t>(a_.query_heads + 2 * a_.kv_heads) * a_.head_dim; }

  // Spans, the rows they name, where each row was written, and rows for the new tokens, in no order.
  void lay_out(const std::vector<std::vector<std::int32_t>>& pieces, std::int32_t spare) {
    std::vector<std::int32_t> free;
    std::int32_t slot = 0;
    for (const auto& piece : pieces) {
      const std::int32_t length = piece.at(0), run = piece.at(1), gap = piece.at(2);
      for (std::int32_t i = 0; i < gap; ++i) free.push_back(slot++);
      written_.resize(slot + length, 0);
      spans_.push_back({slot, length, run});
      for (std::int32_t i = 0; i < length; ++i, ++slot) {
        written_[slot] = first_position_ + static_cast<std::int64_t>(rows_.size()) + shifts_.at(run);
        rows_.push_back(slot);
      }
    }
    for (std::int32_t i = 0; i < a_.new_tokens + spare; ++i) free.push_back(slot++);
    a_.capacity = slot;
    written_.resize(slot, 0);
    for (std::int32_t token = 0; token < a_.new_tokens; ++token) {
      std::swap(free[token], free[token + random_.below(static_cast<std::int32_t>(free.size()) - token)]);
      new_slots_.push_back(free[token]);
      new_positions_.push_back(first_position_ + static_cast<std::int64_t>(rows_.size()) + token);
      written_[free[token]] = new_positions_.back();
    }
  }

  // The first new token's values lie halfway between two codes, which random numbers never do.
  void fill_ties() {
    constexpr float kScale = 1.0f / 64;
    const std::size_t values = static_cast<std::size_t>(a_.kv_heads) * a_.head_dim, first = row_width() - values;
    for (std::size_t i = 0; i < values; ++i) {
      const std::int32_t column = static_cast<std::int32_t>(i) % a_.head_dim;
      qkv_[first + i] = (column == 0 ? 127.0f : static_cast<float>(column * 7 % 64 - 32) + 0.5f) * kScale;
    }
  }

  void fill_bias(double key_bias) {
    for (float& x : bias_) x = static_cast<float>(0.3 * random_.normal());
    if (key_bias == 0) return;
    const std::size_t width = a_.head_dim, queries = a_.query_heads * width;
    std::fill_n(bias_.begin(), queries, 0.0f);  // else one key would get all the weight
    for (std::int32_t head = 0; head < a_.kv_heads; ++head) {
      for (std::int32_t i = 0; i < kLoudChannels; ++i) {
        const double size = key_bias / std::sqrt(static_cast<double>(kLoudChannels));
        bias_[queries + head * width + random_.below(a_.head_dim)] =
            static_cast<float>(random_.uniform() < 0.5 ? -size : size);
      }
    }
  }

  // Row `slot`: x + bias, turned as it was written if it is a key.
  Floats cached_row(const float* bias, std::int32_t slot, const Angles* angles) {
    const std::size_t width = a_.head_dim, half = width / 2;
    Floats row = random_.normals(width);
    for (std::size_t i = 0; bias != nullptr && i < width; ++i) row[i] += bias[i];
    for (std::size_t i = 0; angles != nullptr && i < half; ++i) {
      const float c = angles->cosines[slot * half + i], s = angles->sines[slot * half + i];
      const float first = row[i], second = row[i + half];
      row[i] = first * c - second * s;
      row[i + half] = second * c + first * s;
    }
    return row;
  }

  void fill_caches(bool offset) {
    const std::size_t width = a_.head_dim, all = static_cast<std::size_t>(a_.kv_heads) * a_.capacity;
    const Angles angles(written_, a_.head_dim);
    if (int8_) {
      caches_.keys.assign(all * width, 127);
      caches_.values.assign(all * width, 127);
      caches_.key_scales.assign(all, NAN);
      caches_.value_scales.assign(all, NAN);
    } else {
      caches_.float_keys.assign(all * width, NAN);
      caches_.float_values.assign(all * width, NAN);
    }
    const float* key_bias = bias_.data() + a_.query_heads * width;
    const float* value_bias = key_bias + a_.kv_heads * width;
    for (std::int32_t head = 0; head < a_.kv_heads; ++head) {
      for (const std::int32_t slot : rows_) {
        const Floats key = cached_row(offset ? nullptr : key_bias + head * width, slot, &angles);
        const Floats value = cached_row(int8_ ? nullptr : value_bias + head * width, slot, nullptr);
        const std::size_t row = static_cast<std::size_t>(head) * a_.capacity + slot;
        if (int8_) {
          caches_.key_scales[row] = quantise(key, caches_.keys.data() + row * width);
          caches_.value_scales[row] = quantise(value, caches_.values.data() + row * width);
        } else {
          std::copy(key.begin(), key.end(), caches_.float_keys.begin() + row * width);
          std::copy(value.begin(), value.end(), caches_.float_values.begin() + row * width);
        }
      }
    }
  }

  void point(bool biased, bool offset) {
    a_.qkv = qkv_.data();
    a_.qkv_bias = biased ? bias_.data() : nullptr;
    a_.rope_cos = here_.emplace_back(new_positions_, a_.head_dim).cosines.data();
    a_.rope_sin = here_.back().sines.data();
    a_.run_cos = moved_.emplace_back(shifts_, a_.head_dim).cosines.data();
    a_.run_sin = moved_.back().sines.data();
    a_.run_count = static_cast<std::int32_t>(shifts_.size());
    a_.new_slots = new_slots_.data();
    a_.spans = spans_.data();
    a_.span_count = static_cast<std::int32_t>(spans_.size());
    if (!offset) return;
    a_.key_offset = bias_.data() + static_cast<std::size_t>(a_.query_heads) * a_.head_dim;
    a_.slot_cos = slots_.emplace_back(written_, a_.head_dim).cosines.data();
    a_.slot_sin = slots_.back().sines.data();
  }

  Random random_;
  bool int8_;
  std::int64_t first_position_;
  streamo_attention a_ = {};
  std::vector<std::int64_t> shifts_, written_, new_positions_;
  std::vector<std::int32_t> rows_, new_slots_;
  std::vector<streamo_span> spans_;
  Floats qkv_, bias_;
  std::vector<Angles> here_, moved_, slots_;
  Caches caches_;
};

}  // namespace

Complaints check_attention(const Case& given, const Bench& bench) {
  const AttentionData data(given);
  Complaints complaints;
  Caches appended = data.caches();
  Floats expected;
  const streamo_attention oracle = data.call(appended, expected);
  if (!succeeded(streamo_attention_reference(&oracle), "oracle", complaints)) return complaints;
  for (const std::string& set : bench.sets) {
    streamo_select_instruction_set(set.c_str());
    Caches alone = data.caches(), shared = data.caches();
    Floats found, found_shared;
    const streamo_attention with_one = data.call(alone, found), with_two = data.call(shared, found_shared);
    if (!succeeded(streamo_attention_run(&with_one, nullptr), set, complaints)) continue;
    if (!succeeded(streamo_attention_run(&with_two, bench.two_threads), set, complaints)) continue;
    const double error = nmse(found.data(), expected.data(), found.size());
    expect_near(error, data.int8() ? kInt8Nmse : kFloatNmse, set, complaints);
    if (!(alone == appended)) complaints.push_back(set + ": wrote another cache than the oracle");
    if (!(shared == alone) || !same_bytes(found, found_shared)) {
      complaints.push_back(set + ": two threads give other bits than one");
    }
  }
  return complaints;
}
