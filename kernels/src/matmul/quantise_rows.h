// Rows of the input to 8-bit codes, one scale for each row and block. In plain loops that compilers vectorise; each
// instruction set compiles its own copy (internal linkage).
#pragma once

#include <cstring>

#include "matmul/kernels.h"

namespace streamo {
namespace {

// Below this a block counts as zeros: 127 / max would not be a float any more.
constexpr float smallest_block_max = 1e-36f;

// Bits of the largest |x|; of an infinity or a NaN where there is one. Integers, since they order as the floats do.
inline std::uint32_t largest_magnitude_bits(const float* x, std::int32_t count) {
  std::int32_t largest = 0;
  for (std::int32_t i = 0; i < count; ++i) {
    std::int32_t bits;
    std::memcpy(&bits, x + i, sizeof bits);
    bits &= 0x7fffffff;
    largest = bits > largest ? bits : largest;
  }
  return static_cast<std::uint32_t>(largest);
}

// Codes of one block of one row into `codes`; returns their sum. |x * inverse| is at most 127 and a rounding.
inline std::int32_t quantise_block(const float* x, std::int32_t count, float inverse, std::int8_t* codes) {
  constexpr float shift = 12582912.0f;  // 1.5 * 2^23: adding it rounds half to even, and leaves the integer in the bits
  constexpr std::int32_t shift_bits = 0x4B400000;
  std::int32_t sum = 0;
  for (std::int32_t i = 0; i < count; ++i) {
    const float shifted = x[i] * inverse + shift;
    std::int32_t code;
    std::memcpy(&code, &shifted, sizeof code);
    code -= shift_bits;
    codes[i] = static_cast<std::int8_t>(code);
    sum += code;
  }
  return sum;
}

template <int TileRows, int Group>
inline void quantise_rows(const QuantiseArguments& a) {
  std::int8_t* tile = a.codes;
  float* scales = a.scales;
  std::int32_t* starts = a.starts;
  for (std::int32_t k = 0; k < a.inputs; k += a.block) {
    const std::int32_t count = a.inputs - k < a.block ? a.inputs - k : a.block;
    const std::int32_t groups = (count + Group - 1) / Group;
    for (int row = 0; row < TileRows; ++row) {
      alignas(64) std::int8_t codes[256];
      float scale = 0.0f;
      std::int32_t sum = 0;
      bool zeros = true;
      if (row < a.rows) {
        const float* x = a.input + row * a.stride + k;
        const std::uint32_t bits = largest_magnitude_bits(x, count);
        float largest;
        std::memcpy(&largest, &bits, sizeof largest);
        if (bits >= 0x7f800000u) {
          const std::uint32_t nan_bits = 0x7fc00000u;
          std::memcpy(&scale, &nan_bits, sizeof scale);
        } else if (largest >= smallest_block_max) {
          scale = largest / 127.0f;
          sum = quantise_block(x, count, 127.0f / largest, codes);
          for (std::int32_t i = count; i < groups * Group; ++i) codes[i] = 0;
          zeros = false;
        }
      }
      if (zeros) std::memset(codes, 0, sizeof codes);
      for (std::int32_t g = 0; g < groups; ++g) {
        std::memcpy(tile + (static_cast<std::size_t>(g) * TileRows + row) * Group, codes + g * Group, Group);
      }
      scales[row] = scale;
      starts[row] = -a.zero * sum;
    }
    tile += static_cast<std::size_t>(groups) * TileRows * Group;
    scales += TileRows;
    starts += TileRows;
  }
}

}  // namespace
}  // namespace streamo
