// What the checks of the three operations share: the error measure, random numbers, angles, and how failures are kept.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "case.h"
#include "streamo_kernels.h"

constexpr double kFloatNmse = 1e-9;  // float32 against double
constexpr double kInt8Nmse = 5e-4;   // 8-bit codes against double
constexpr double kThetaBase = 1e6;   // of the rotary angles, as in Qwen2.5

using Floats = std::vector<float>;

// What a check needs besides its case.
struct Bench {
  std::vector<std::string> sets;  // instruction sets to check; all of them are available
  streamo_threads* two_threads;
};

// What was wrong with a case, a sentence each.
using Complaints = std::vector<std::string>;

Complaints check_attention(const Case& given, const Bench& bench);
Complaints check_matmul(const Case& given, const Bench& bench);
Complaints check_window_attention(const Case& given, const Bench& bench);

// Says so in `complaints` unless a call succeeded.
inline bool succeeded(streamo_status status, const std::string& what, Complaints& complaints) {
  if (status != STREAMO_OK) complaints.push_back(what + ": refused: " + streamo_last_error());
  return status == STREAMO_OK;
}

// Mean squared error over the mean square of what is expected; infinite where a number is not finite.
inline double nmse(const float* found, const float* expected, std::size_t count) {
  double error = 0, square = 0;
  for (std::size_t i = 0; i < count; ++i) {
    if (!std::isfinite(found[i])) return INFINITY;
    const double difference = static_cast<double>(found[i]) - expected[i];
    error += difference * difference;
    square += static_cast<double>(expected[i]) * expected[i];
  }
  return error / std::fmax(square, 1e-30 * static_cast<double>(count));
}

inline void expect_near(double error, double limit, const std::string& what, Complaints& complaints) {
  if (error <= limit) return;
  std::ostringstream sentence;
  sentence << what << ": expected an NMSE of at most " << limit << ", found " << error;
  complaints.push_back(sentence.str());
}

template <typename T>
bool same_bytes(const std::vector<T>& a, const std::vector<T>& b) {
  return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0);
}

// The same numbers on every machine, which the standard's distributions do not promise.
class Random {
 public:
  explicit Random(std::uint32_t seed = 0) : bits_(seed) {}

  double uniform() { return (bits_() + 0.5) / 4294967296.0; }  // in (0, 1)
  double normal() { return std::sqrt(-2 * std::log(uniform())) * std::cos(2 * 3.14159265358979323846 * uniform()); }
  std::int32_t below(std::int32_t end) { return static_cast<std::int32_t>(uniform() * end); }
  Floats normals(std::size_t count) {
    Floats values(count);
    for (float& value : values) value = static_cast<float>(normal());
    return values;
  }

 private:
  std::mt19937 bits_;
};

// Cosines and sines (positions, D / 2) of the rotary angles.
struct Angles {
  Floats cosines, sines;

  Angles(const std::vector<std::int64_t>& positions, std::int32_t head_dim) {
    const std::int32_t half = head_dim / 2;
    for (const std::int64_t position : positions) {
      for (std::int32_t i = 0; i < half; ++i) {
        const double angle = static_cast<double>(position) * std::pow(kThetaBase, -static_cast<double>(i) / half);
        cosines.push_back(static_cast<float>(std::cos(angle)));
        sines.push_back(static_cast<float>(std::sin(angle)));
      }
    }
  }
};
