// Packed weights into NEON registers, which SDOT and SMMLA read alike: 16 codes a register, signed bytes, where those
// of 4 bits are 0 .. 15. Internal linkage: every file that includes this compiles its own copy with its own flags.
#pragma once

#include <arm_neon.h>

#include <cstddef>
#include <cstdint>

#define STREAMO_UNROLL _Pragma("GCC unroll 8")

namespace streamo {
namespace {

constexpr int nibble_span = 16;  // MatmulKernels::nibble_span

inline int8x16_t low_nibbles(uint8x16_t pairs) { return vreinterpretq_s8_u8(vandq_u8(pairs, vdupq_n_u8(15))); }
inline int8x16_t high_nibbles(uint8x16_t pairs) { return vreinterpretq_s8_u8(vshrq_n_u8(pairs, 4)); }

// weights[c] = codes 16 c .. 16 c + 15, from bytes or from nibbles.
template <int Columns, bool Nibbles>
inline void load_weights(const std::uint8_t* codes, int8x16_t (&weights)[Columns]) {
  if constexpr (Nibbles) {
    static_assert(Columns % 2 == 0);
    STREAMO_UNROLL
    for (int c = 0; c < Columns; c += 2) {
      const uint8x16_t pairs = vld1q_u8(codes + 8 * c);
      weights[c] = low_nibbles(pairs);
      weights[c + 1] = high_nibbles(pairs);
    }
  } else {
    STREAMO_UNROLL
    for (int c = 0; c < Columns; ++c) weights[c] = vreinterpretq_s8_u8(vld1q_u8(codes + 16 * c));
  }
}

// MatmulKernels::unpack of groups with `GroupCodes` codes.
template <std::size_t GroupCodes>
inline void unpack_nibbles(const std::uint8_t* nibbles, std::uint8_t* codes, std::size_t groups) {
  for (std::size_t i = 0; i < groups * GroupCodes; i += 2 * nibble_span) {
    int8x16_t pair[2];
    load_weights<2, true>(nibbles + i / 2, pair);
    vst1q_u8(codes + i, vreinterpretq_u8_s8(pair[0]));
    vst1q_u8(codes + i + nibble_span, vreinterpretq_u8_s8(pair[1]));
  }
}

}  // namespace
}  // namespace streamo
