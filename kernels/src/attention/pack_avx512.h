// Packing gathered rows into tiles with AVX512: a transpose of dwords for keys, of bytes for values.
#pragma once

#include "attention/intrinsics_avx512.h"

#include "attention/kernels.h"

namespace streamo {
namespace {

// rows[i] lane j  ->  rows[j] lane i, for 16 x 16 dwords.
inline void transpose_dwords(__m512i (&rows)[16]) {
  __m512i pairs[16], quads[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; i += 2) {
    pairs[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
    pairs[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 16; i += 4) {
    quads[i] = _mm512_unpacklo_epi64(pairs[i], pairs[i + 2]);
    quads[i + 1] = _mm512_unpackhi_epi64(pairs[i], pairs[i + 2]);
    quads[i + 2] = _mm512_unpacklo_epi64(pairs[i + 1], pairs[i + 3]);
    quads[i + 3] = _mm512_unpackhi_epi64(pairs[i + 1], pairs[i + 3]);
  }
  // quads[4 g + j] lane group l: dwords 4 l + j of rows 4 g .. 4 g + 3.
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    const __m512i low01 = _mm512_shuffle_i32x4(quads[j], quads[4 + j], 0x44);
    const __m512i high01 = _mm512_shuffle_i32x4(quads[j], quads[4 + j], 0xee);
    const __m512i low23 = _mm512_shuffle_i32x4(quads[8 + j], quads[12 + j], 0x44);
    const __m512i high23 = _mm512_shuffle_i32x4(quads[8 + j], quads[12 + j], 0xee);
    rows[j] = _mm512_shuffle_i32x4(low01, low23, 0x88);
    rows[4 + j] = _mm512_shuffle_i32x4(low01, low23, 0xdd);
    rows[8 + j] = _mm512_shuffle_i32x4(high01, high23, 0x88);
    rows[12 + j] = _mm512_shuffle_i32x4(high01, high23, 0xdd);
  }
}

// `depth`: dwords from one panel to the next, at least `dwords`.
template <typename Element>
inline void pack_dwords_avx512(const RowSource<Element>& rows, int dwords, int depth, int panel_keys, uint32_t flip,
                               void* out) {
  const __m512i flips = _mm512_set1_epi32(static_cast<int32_t>(flip));
  const int padded = (rows.count + panel_keys - 1) / panel_keys * panel_keys;
  const size_t step = static_cast<size_t>(panel_keys) * 4;
  for (int key = 0; key < padded; key += 16) {
    char* block = static_cast<char*>(out) + key / panel_keys * depth * step + key % panel_keys * 4;
    const char* from[16];
    for (int i = 0; i < 16; ++i) {
      const int index = key + i < rows.count ? key + i : 0;
      from[i] = reinterpret_cast<const char*>(rows.base + rows.slots[index] * rows.stride);
    }
    for (int dword = 0; dword < dwords; dword += 16) {
      const int left = dwords - dword < 16 ? dwords - dword : 16;
      const auto mask = static_cast<__mmask16>((1u << left) - 1u);
      __m512i lanes[16];
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) lanes[i] = _mm512_maskz_loadu_epi32(mask, from[i] + 4 * dword);
      transpose_dwords(lanes);
      if (left == 16) {
#pragma GCC unroll 16
        for (int i = 0; i < 16; ++i) _mm512_storeu_si512(block + (dword + i) * step, _mm512_xor_si512(lanes[i], flips));
      } else {
#pragma GCC unroll 16
        for (int i = 0; i < 16; ++i) {
          if (i < left) _mm512_storeu_si512(block + (dword + i) * step, _mm512_xor_si512(lanes[i], flips));
        }
      }
    }
  }
}

// Only where the pairs lie side by side, which they do where every channel of the keys has an offset.
inline void pack_angles_avx512(const RowSource<float>& cosines, const RowSource<float>& sines, int first_pair,
                               int pair_count, int panel_keys, float* out) {
  const int depth = 2 * pair_count;
  const RowSource<float> first = {cosines.base + first_pair, cosines.stride, cosines.slots, cosines.count};
  const RowSource<float> second = {sines.base + first_pair, sines.stride, sines.slots, sines.count};
  pack_dwords_avx512(first, pair_count, depth, panel_keys, 0u, out);
  pack_dwords_avx512(second, pair_count, depth, panel_keys, 0u, out + static_cast<size_t>(pair_count) * panel_keys);
}

// Four rows interleaved by byte, 16 columns at a time: [keys / 4][head_dim][4], with zeros up to 16 keys.
inline void pack_values_avx512(const RowSource<int8_t>& rows, int head_dim, int8_t* out) {
  const __m512i gather_rows = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  const __m512i interleave = _mm512_broadcast_i32x4(
      _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
  const int padded = (rows.count + 15) / 16 * 16;
  for (int key = 0; key < padded; key += 4) {
    int8_t* block = out + static_cast<size_t>(key) * head_dim;
    const int8_t* from[4];
    __mmask8 real[4];
    for (int i = 0; i < 4; ++i) {
      real[i] = key + i < rows.count ? 0xff : 0;
      from[i] = rows.base + rows.slots[real[i] ? key + i : 0] * rows.stride;
    }
    for (int column = 0; column < head_dim; column += 16) {
      const auto load = [&](int i) {
        return _mm_maskz_loadu_epi64(static_cast<__mmask8>(real[i] & 3), from[i] + column);
      };
      __m512i lanes = _mm512_castsi128_si512(load(0));
      lanes = _mm512_inserti64x2(lanes, load(1), 1);
      lanes = _mm512_inserti64x2(lanes, load(2), 2);
      lanes = _mm512_inserti64x2(lanes, load(3), 3);
      lanes = _mm512_shuffle_epi8(_mm512_permutexvar_epi32(gather_rows, lanes), interleave);
      _mm512_storeu_si512(block + 4 * column, lanes);
    }
  }
}

}  // namespace
}  // namespace streamo
