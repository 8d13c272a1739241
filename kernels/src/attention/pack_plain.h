// Packing gathered rows into tiles without any instruction set: a base for those whose vectors gain nothing there.
#pragma once

#include <cstring>

#include "attention/kernels.h"

namespace streamo {
namespace {

struct PlainPacking {
  // Dwords of gathered rows, transposed to [panel][dword][key]; keys behind `count` become zero up to the panel's end.
  template <typename Element>
  static void pack_dwords(const RowSource<Element>& rows, int dwords, int panel_keys, uint32_t flip, void* out) {
    const int padded = (rows.count + panel_keys - 1) / panel_keys * panel_keys;
    const size_t step = static_cast<size_t>(panel_keys) * 4;
    for (int key = 0; key < padded; ++key) {
      char* column = static_cast<char*>(out) + key / panel_keys * dwords * step + key % panel_keys * 4;
      const void* row = key < rows.count ? rows.base + rows.slots[key] * rows.stride : nullptr;
      for (int i = 0; i < dwords; ++i) {
        uint32_t dword = 0;
        if (row != nullptr) std::memcpy(&dword, static_cast<const char*>(row) + 4 * i, 4);
        dword ^= flip;
        std::memcpy(column + i * step, &dword, 4);
      }
    }
  }

  // Four rows interleaved by byte: [keys / 4][width][4], keys behind `count` zero.
  static void pack_values(const RowSource<int8_t>& rows, int width, int8_t* out) {
    for (int key = 0; key < rows.count; key += 4) {
      int8_t* block = out + static_cast<size_t>(key) * width;
      for (int lane = 0; lane < 4; ++lane) {
        if (key + lane >= rows.count) {
          for (int i = 0; i < width; ++i) block[4 * i + lane] = 0;
          continue;
        }
        const int8_t* row = rows.base + rows.slots[key + lane] * rows.stride;
        for (int i = 0; i < width; ++i) block[4 * i + lane] = row[i];
      }
    }
  }

  static void pack_angles(const RowSource<float>& cosines, const RowSource<float>& sines, const int32_t* pairs,
                          int pair_count, int panel_keys, float* out) {
    const int depth = 2 * pair_count;
    const int padded = (cosines.count + panel_keys - 1) / panel_keys * panel_keys;
    for (int key = 0; key < padded; ++key) {
      float* column = out + static_cast<size_t>(key / panel_keys) * panel_keys * depth + key % panel_keys;
      const bool real = key < cosines.count;
      const std::ptrdiff_t row = real ? cosines.slots[key] * cosines.stride : 0;
      for (int i = 0; i < pair_count; ++i) {
        column[static_cast<size_t>(i) * panel_keys] = real ? cosines.base[row + pairs[i]] : 0.0f;
        column[static_cast<size_t>(pair_count + i) * panel_keys] = real ? sines.base[row + pairs[i]] : 0.0f;
      }
    }
  }
};

}  // namespace
}  // namespace streamo
