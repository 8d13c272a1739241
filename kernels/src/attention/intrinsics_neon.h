// The vector operations of attention's tiles for NEON, but for the integer dot products, which differ by instruction
// set. Internal linkage: every file that includes this compiles its own copy with its own flags.
#pragma once

#include <arm_neon.h>

#include <cstring>

#include "attention/tiles.h"

namespace streamo {
namespace {

struct Neon {
  // 20 sums, 4 operands and 5 broadcasts: 29 of the 32 registers.
  static constexpr int width = 4, narrow_width = 4, rows = 5, columns = 4;
  static constexpr int key_zero_point = 0;
  using F = float32x4_t;
  using I = int32x4_t;

  static F load(const float* from) { return vld1q_f32(from); }
  static void store(float* to, F a) { vst1q_f32(to, a); }
  static F set(float x) { return vdupq_n_f32(x); }
  static F zero() { return vdupq_n_f32(0.0f); }
  static F add(F a, F b) { return vaddq_f32(a, b); }
  static F sub(F a, F b) { return vsubq_f32(a, b); }
  static F mul(F a, F b) { return vmulq_f32(a, b); }
  static F div(F a, F b) { return vdivq_f32(a, b); }
  static F max(F a, F b) { return vmaxq_f32(a, b); }
  static F min(F a, F b) { return vminq_f32(a, b); }
  static F fma(F a, F b, F c) { return vfmaq_f32(c, a, b); }
  static F fms(F a, F b, F c) { return vfmaq_f32(vnegq_f32(c), a, b); }
  static F abs(F a) { return vabsq_f32(a); }
  static F first(F a, int count, F other) {
    const int32_t lanes[4] = {0, 1, 2, 3};
    return vbslq_f32(vcltq_s32(vld1q_s32(lanes), vdupq_n_s32(count)), a, other);
  }
  static float reduce_max(F a) { return vmaxvq_f32(a); }
  static float reduce_add(F a) { return vaddvq_f32(a); }

  // Exponents below the smallest normal number count as -126, and give 0; there are none far above 0.
  static F clamped(F x) { return vminq_f32(vmaxq_f32(x, vdupq_n_f32(-126.0f)), vdupq_n_f32(126.0f)); }
  static F fraction(F x) { return vsubq_f32(clamped(x), vrndmq_f32(clamped(x))); }
  static F times_power_of_two(F a, F x) {
    const I exponent = vaddq_s32(vcvtmq_s32_f32(clamped(x)), vdupq_n_s32(127));
    const F product = vmulq_f32(a, vreinterpretq_f32_s32(vshlq_n_s32(exponent, 23)));
    const uint32x4_t counts = vcgtq_f32(x, vdupq_n_f32(-126.0f));
    return vreinterpretq_f32_u32(vandq_u32(vreinterpretq_u32_f32(product), counts));
  }

  static F load_narrow(const float* from) { return load(from); }
  static void store_narrow(float* to, F a) { store(to, a); }
  static F add_narrow(F a, F b) { return add(a, b); }
  static F sub_narrow(F a, F b) { return sub(a, b); }
  static F mul_narrow(F a, F b) { return mul(a, b); }

  static I load_int(const void* from) { return vreinterpretq_s32_s8(vld1q_s8(static_cast<const int8_t*>(from))); }
  static void store_int(int32_t* to, I a) { vst1q_s32(to, a); }
  static I set_int(int32_t x) { return vdupq_n_s32(x); }
  static F to_float(I a) { return vcvtq_f32_s32(a); }

  // Rounded half to even, saturated to 8 bits.
  static void store_codes(int8_t* to, F a) {
    const int16x4_t words = vqmovn_s32(vcvtnq_s32_f32(a));
    const int8x8_t bytes = vqmovn_s16(vcombine_s16(words, words));
    const uint32_t dword = vget_lane_u32(vreinterpret_u32_s8(bytes), 0);
    std::memcpy(to, &dword, sizeof dword);
  }
  static void store_weights(uint8_t* to, F a) {
    const uint16x4_t words = vqmovun_s32(vcvtnq_s32_f32(a));
    const uint8x8_t bytes = vqmovn_u16(vcombine_u16(words, words));
    const uint32_t dword = vget_lane_u32(vreinterpret_u32_u8(bytes), 0);
    std::memcpy(to, &dword, sizeof dword);
  }

  template <typename Element>
  static void pack_dwords(const RowSource<Element>& rows, int dwords, int panel_keys, uint32_t, void* out) {
    pack_dwords_neon(rows, dwords, panel_keys, out);
  }
  static void pack_angles(const RowSource<float>& cosines, const RowSource<float>& sines, const int32_t* pairs,
                          int pair_count, int panel_keys, float* out) {
    PlainPacking::pack_angles(cosines, sines, pairs, pair_count, panel_keys, out);
  }

 private:
  // Four rows at a time, 4 x 4 dwords transposed; `dwords` is a multiple of 4, and keys behind the last are zero.
  template <typename Element>
  static void pack_dwords_neon(const RowSource<Element>& rows, int dwords, int panel_keys, void* out) {
    const int padded = (rows.count + panel_keys - 1) / panel_keys * panel_keys;
    const size_t step = static_cast<size_t>(panel_keys) * 4;
    for (int key = 0; key < padded; key += 4) {
      uint8_t* block = static_cast<uint8_t*>(out) + key / panel_keys * dwords * step + key % panel_keys * 4;
      const uint8_t* from[4];
      for (int i = 0; i < 4; ++i) {
        const int index = key + i < rows.count ? key + i : 0;
        from[i] = reinterpret_cast<const uint8_t*>(rows.base + rows.slots[index] * rows.stride);
      }
      for (int dword = 0; dword < dwords; dword += 4, block += 4 * step) {
        uint32x4_t lanes[4];
        for (int i = 0; i < 4; ++i) {
          lanes[i] = vreinterpretq_u32_u8(vld1q_u8(from[i] + 4 * dword));
          if (key + i >= rows.count) lanes[i] = vdupq_n_u32(0);
        }
        const uint64x2_t even01 = vreinterpretq_u64_u32(vtrn1q_u32(lanes[0], lanes[1]));
        const uint64x2_t odd01 = vreinterpretq_u64_u32(vtrn2q_u32(lanes[0], lanes[1]));
        const uint64x2_t even23 = vreinterpretq_u64_u32(vtrn1q_u32(lanes[2], lanes[3]));
        const uint64x2_t odd23 = vreinterpretq_u64_u32(vtrn2q_u32(lanes[2], lanes[3]));
        vst1q_u8(block, vreinterpretq_u8_u64(vtrn1q_u64(even01, even23)));
        vst1q_u8(block + step, vreinterpretq_u8_u64(vtrn1q_u64(odd01, odd23)));
        vst1q_u8(block + 2 * step, vreinterpretq_u8_u64(vtrn2q_u64(even01, even23)));
        vst1q_u8(block + 3 * step, vreinterpretq_u8_u64(vtrn2q_u64(odd01, odd23)));
      }
    }
  }
};

}  // namespace
}  // namespace streamo
