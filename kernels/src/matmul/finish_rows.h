// Sums of a panel to the output: bias, SwiGLU, residual. In plain loops that compilers vectorise; each instruction set
// compiles its own copy (internal linkage).
#pragma once

#include <cstring>

#include "matmul/kernels.h"

namespace streamo {
namespace {

// Vectors as the compiler knows them, as wide as the instruction set has them: comparisons would otherwise keep it from
// vectorising.
#if defined(__AVX512F__)
constexpr int lane_count = 16;
#elif defined(__AVX__)
constexpr int lane_count = 8;
#else
constexpr int lane_count = 4;
#endif
typedef float Lanes __attribute__((vector_size(lane_count * 4)));
typedef std::uint32_t LaneBits __attribute__((vector_size(lane_count * 4)));

// exp(x), relative error about 1e-7, x clamped to [-87, 88]; a NaN stays one.
inline Lanes fast_exp(Lanes x) {
  constexpr float shift = 12582912.0f;  // rounds to an integer, kept in the low bits
  const Lanes lowest = Lanes{} - 87.0f;
  const Lanes highest = Lanes{} + 88.0f;
  x = x < lowest ? lowest : x;
  x = x > highest ? highest : x;
  const Lanes shifted = x * 1.44269504f + shift;
  const Lanes n = shifted - shift;
  const Lanes r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  Lanes p = r * (1.0f / 720.0f) + 1.0f / 120.0f;
  p = p * r + 1.0f / 24.0f;
  p = p * r + 1.0f / 6.0f;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  LaneBits bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  bits = (bits + 127u) << 23;  // the shift's own bits fall out at the top
  Lanes power;
  std::memcpy(&power, &bits, sizeof power);
  return p * power;
}

// gate[i] = silu(gate[i]) * up[i]
template <int Count>
inline void gate_lanes(float* gate, const float* up) {
  static_assert(Count % lane_count == 0, "a panel holds whole vectors");
  for (int i = 0; i < Count; i += lane_count) {
    Lanes x, y;
    std::memcpy(&x, gate + i, sizeof x);
    std::memcpy(&y, up + i, sizeof y);
    x = x / (fast_exp(-x) + 1.0f) * y;
    std::memcpy(gate + i, &x, sizeof x);
  }
}

// dst[i] += src[i] for i < count, at full width where that is all of it.
template <int Width>
inline void add_lanes(float* dst, const float* src, std::int32_t count) {
  if (count == Width) {
    for (int i = 0; i < Width; ++i) dst[i] += src[i];
  } else {
    for (std::int32_t i = 0; i < count; ++i) dst[i] += src[i];
  }
}

template <int Panel>
inline void finish_rows(const FinishArguments& a) {
  constexpr int Half = Panel / 2;
  for (std::int32_t row = 0; row < a.rows; ++row) {
    alignas(64) float lanes[Panel];
    std::memcpy(lanes, a.sums + static_cast<std::size_t>(row) * Panel, sizeof lanes);
    float* output = a.output + row * a.output_stride;
    const float* residual = a.residual == nullptr ? nullptr : a.residual + row * a.output_stride;
    if (a.gated) {
      if (a.bias != nullptr) {
        add_lanes<Half>(lanes, a.bias, a.width);
        add_lanes<Half>(lanes + Half, a.bias_up, a.width);
      }
      gate_lanes<Half>(lanes, lanes + Half);
      if (residual != nullptr) add_lanes<Half>(lanes, residual, a.width);
    } else {
      if (a.bias != nullptr) add_lanes<Panel>(lanes, a.bias, a.width);
      if (residual != nullptr) add_lanes<Panel>(lanes, residual, a.width);
    }
    constexpr int full = 4 * Half;  // bytes of the width that gated weights have when nothing is ragged
    if (a.width == Panel) {
      std::memcpy(output, lanes, 2 * full);
    } else if (a.width == Half) {
      std::memcpy(output, lanes, full);
    } else {
      std::memcpy(output, lanes, static_cast<std::size_t>(a.width) * sizeof(float));
    }
  }
}

}  // namespace
}  // namespace streamo
