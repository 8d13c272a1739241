// The quantised matrix product in plain C++, for any CPU.
#include "matmul/finish_rows.h"
#include "matmul/kernels.h"
#include "matmul/quantise_rows.h"

namespace streamo {
namespace {

constexpr int panel = 16;
constexpr int group = 4;
constexpr int span = 16;
constexpr int tile_rows = 4;
constexpr std::size_t group_codes = panel * group;

inline void unpack_group(const std::uint8_t* nibbles, std::uint8_t* codes) {
  for (std::size_t first = 0; first < group_codes; first += 2 * span, nibbles += span, codes += 2 * span) {
    for (int i = 0; i < span; ++i) {
      codes[i] = nibbles[i] & 15;
      codes[span + i] = nibbles[i] >> 4;
    }
  }
}

void unpack(const std::uint8_t* nibbles, std::uint8_t* codes, std::size_t groups) {
  for (std::size_t g = 0; g < groups; ++g) unpack_group(nibbles + g * group_codes / 2, codes + g * group_codes);
}

// sums[lane] += codes . input over one group; codes are signed bytes (4-bit ones are 0 .. 15).
inline void add_group(const std::uint8_t* codes, const std::int8_t* input, std::int32_t* sums) {
  for (int lane = 0; lane < panel; ++lane) {
    std::int32_t sum = sums[lane];
    for (int k = 0; k < group; ++k) sum += static_cast<std::int8_t>(codes[lane * group + k]) * input[k];
    sums[lane] = sum;
  }
}

template <bool Nibbles>
void run_tile(const TileArguments& a) {
  const std::int8_t* input = a.input;
  for (std::int32_t b = 0; b < a.blocks; ++b) {
    const std::uint8_t* codes = a.codes + b * a.codes_stride;
    const float* scales = reinterpret_cast<const float*>(a.scales + b * a.scales_stride);
    std::int32_t sums[tile_rows][panel];
    for (std::int32_t row = 0; row < a.rows; ++row) {
      for (int lane = 0; lane < panel; ++lane) sums[row][lane] = a.starts[b * tile_rows + row];
    }
    for (std::int32_t g = 0; g < a.groups; ++g, input += tile_rows * group) {
      std::uint8_t unpacked[group_codes];
      const std::uint8_t* bytes = codes + g * group_codes;
      if (Nibbles) {
        unpack_group(codes + g * group_codes / 2, unpacked);
        bytes = unpacked;
      }
      for (std::int32_t row = 0; row < a.rows; ++row) add_group(bytes, input + row * group, sums[row]);
    }
    for (std::int32_t row = 0; row < a.rows; ++row) {
      const float input_scale = a.input_scales[b * tile_rows + row];
      float* out = a.sums + row * panel;
      for (int lane = 0; lane < panel; ++lane) {
        out[lane] += static_cast<float>(sums[row][lane]) * (scales[lane] * input_scale);
      }
    }
  }
}

void from_bytes(const TileArguments& a, std::int32_t) { run_tile<false>(a); }

}  // namespace

const MatmulKernels matmul_portable = {
    panel,       group,      span,
    0,           tile_rows,  tile_rows,
    quantise_rows<tile_rows, group>,
    unpack,      from_bytes, run_tile<true>,
    finish_rows<panel>,
};

}  // namespace streamo
