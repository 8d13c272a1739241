// Attention's inner kernels without any instruction set: four lanes as plain loops, for every CPU.
#include <algorithm>
#include <cmath>

#include "attention/tiles.h"

namespace streamo {
namespace {

struct Portable : PlainPacking {
  static constexpr int width = 4, narrow_width = 4, rows = 2, columns = 2;
  static constexpr int weight_levels = 255, weight_vectors = 1, key_zero_point = 0;
  struct F {
    float lane[4];
  };
  struct I {
    int32_t lane[4];
  };

  template <typename Operation>
  static F map(F a, F b, Operation operation) {
    F out;
    for (int i = 0; i < 4; ++i) out.lane[i] = operation(a.lane[i], b.lane[i]);
    return out;
  }

  static F load(const float* from) {
    F out;
    std::memcpy(&out, from, sizeof out);
    return out;
  }
  static void store(float* to, F a) { std::memcpy(to, &a, sizeof a); }
  static F set(float x) { return {{x, x, x, x}}; }
  static F zero() { return set(0.0f); }
  static F add(F a, F b) {
    return map(a, b, [](float x, float y) { return x + y; });
  }
  static F sub(F a, F b) {
    return map(a, b, [](float x, float y) { return x - y; });
  }
  static F mul(F a, F b) {
    return map(a, b, [](float x, float y) { return x * y; });
  }
  static F div(F a, F b) {
    return map(a, b, [](float x, float y) { return x / y; });
  }
  static F max(F a, F b) {
    return map(a, b, [](float x, float y) { return x > y ? x : y; });
  }
  static F min(F a, F b) {
    return map(a, b, [](float x, float y) { return x < y ? x : y; });
  }
  static F fma(F a, F b, F c) { return add(mul(a, b), c); }
  static F fms(F a, F b, F c) { return sub(mul(a, b), c); }
  static F abs(F a) {
    return map(a, a, [](float x, float) { return std::fabs(x); });
  }
  static F first(F a, int count, F other) {
    for (int i = count; i < 4; ++i) a.lane[i] = other.lane[i];
    return a;
  }
  static float reduce_max(F a) {
    return std::max(std::max(a.lane[0], a.lane[1]), std::max(a.lane[2], a.lane[3]));
  }
  static float reduce_add(F a) { return (a.lane[0] + a.lane[1]) + (a.lane[2] + a.lane[3]); }

  // Exponents below the smallest normal number count as -126, where a weight no longer matters.
  static float clamped(float x) { return x > -126.0f ? (x < 126.0f ? x : 126.0f) : -126.0f; }
  static F fraction(F x) {
    return map(x, x, [](float a, float) { return clamped(a) - std::floor(clamped(a)); });
  }
  static F times_power_of_two(F a, F x) {
    return map(a, x, [](float value, float exponent) {
      const uint32_t bits = static_cast<uint32_t>(static_cast<int32_t>(std::floor(clamped(exponent))) + 127) << 23;
      float power;
      std::memcpy(&power, &bits, 4);
      return exponent > -126.0f ? value * power : 0.0f;
    });
  }

  static F load_narrow(const float* from) { return load(from); }
  static void store_narrow(float* to, F a) { store(to, a); }
  static F mul_narrow(F a, F b) { return mul(a, b); }
  static F add_narrow(F a, F b) { return add(a, b); }
  static F sub_narrow(F a, F b) { return sub(a, b); }

  static I load_int(const void* from) {
    I out;
    std::memcpy(&out, from, sizeof out);
    return out;
  }
  static void store_int(int32_t* to, I a) { std::memcpy(to, &a, sizeof a); }
  static I set_int(int32_t x) { return {{x, x, x, x}}; }
  static I broadcast_dword(const void* from) {
    int32_t dword;
    std::memcpy(&dword, from, 4);
    return set_int(dword);
  }
  static F to_float(I a) {
    F out;
    for (int i = 0; i < 4; ++i) out.lane[i] = static_cast<float>(a.lane[i]);
    return out;
  }
  static I dot_keys(I sum, I keys, I query) {
    int8_t k[16], q[16];
    std::memcpy(k, &keys, 16);
    std::memcpy(q, &query, 16);
    for (int i = 0; i < 16; ++i) sum.lane[i / 4] += k[i] * q[i];
    return sum;
  }
  static I dot_values(I sum, I weights, I values) {
    uint8_t w[16];
    int8_t v[16];
    std::memcpy(w, &weights, 16);
    std::memcpy(v, &values, 16);
    for (int i = 0; i < 16; ++i) sum.lane[i / 4] += w[i] * v[i];
    return sum;
  }
  // A comparison that NaN fails comes first: converting NaN to an integer is undefined.
  static void store_codes(int8_t* to, F a) {
    for (int i = 0; i < 4; ++i) {
      to[i] = static_cast<int8_t>(a.lane[i] >= -127.0f ? std::nearbyint(std::min(a.lane[i], 127.0f)) : -127.0f);
    }
  }
  static void store_weights(uint8_t* to, F a) {
    for (int i = 0; i < 4; ++i) {
      to[i] = static_cast<uint8_t>(a.lane[i] > 0.0f ? std::nearbyint(std::min(a.lane[i], 255.0f)) : 0.0f);
    }
  }
};

}  // namespace

const AttentionKernels attention_kernels_portable = Tiles<Portable>::table("portable");

}  // namespace streamo
