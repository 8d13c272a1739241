// The quantised matrix product with AVX512-VNNI: 64 outputs in 4 registers, up to 6 rows, 24 integer sums in registers.
//
// A dot product takes unsigned weights and a signed input broadcast to all lanes. Each step loads 4 registers of
// weights and 6 broadcasts for 24 dot products, so the two load ports keep up with the two multipliers.
#include <immintrin.h>

#include "matmul/finish_rows.h"
#include "matmul/kernels.h"
#include "matmul/quantise_rows.h"

namespace streamo {
namespace {

constexpr int panel = 64;
constexpr int group = 4;
constexpr int columns = 4;  // registers of a panel
constexpr int tile_rows = 6;
constexpr int few_rows = 18;
constexpr std::size_t group_codes = panel * group;
constexpr std::int32_t short_groups = 8;  // blocks so short that sums kept in registers beat more rows
constexpr int prefetch_bytes = 2048;  // how far ahead a stream of packed codes is asked for

inline __m512i broadcast_group(const std::int8_t* input) {
  std::int32_t value;
  __builtin_memcpy(&value, input, sizeof value);
  return _mm512_set1_epi32(value);
}

// sums += weights . input. As assembly, because GCC 12 copies the sums of the intrinsic about until registers run out.
inline void dot(__m512i& sums, __m512i weights, __m512i input) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sums) : "v"(weights), "v"(input));
}

inline void load_nibbles(const std::uint8_t* nibbles, __m512i weights[columns]) {
  const __m512i low = _mm512_set1_epi8(15);
  for (int half = 0; half < 2; ++half) {
    const __m512i pairs = _mm512_loadu_si512(nibbles + 64 * half);
    weights[2 * half] = _mm512_and_si512(pairs, low);
    weights[2 * half + 1] = _mm512_and_si512(_mm512_srli_epi16(pairs, 4), low);
  }
}

void unpack(const std::uint8_t* nibbles, std::uint8_t* codes, std::size_t groups) {
  for (std::size_t g = 0; g < groups; ++g, nibbles += group_codes / 2, codes += group_codes) {
    __m512i weights[columns];
    load_nibbles(nibbles, weights);
    for (int c = 0; c < columns; ++c) _mm512_storeu_si512(codes + 64 * c, weights[c]);
  }
}

// Not _mm512_cvtepi32_ps: GCC 12 warns of an uninitialised value inside it.
inline __m512 to_float(__m512i integers) {
  return reinterpret_cast<__m512>(__builtin_convertvector(reinterpret_cast<__v16si>(integers), __v16sf));
}

// Integer sums of one block; `codes` and `input` move to the next.
template <int Rows, bool Nibbles>
inline void multiply_block(const std::uint8_t*& codes, const std::int8_t*& input, std::int32_t groups,
                           const std::int32_t* starts, __m512i (&dots)[Rows][columns]) {
  constexpr std::size_t group_bytes = Nibbles ? group_codes / 2 : group_codes;
  for (int row = 0; row < Rows; ++row) {
    for (int c = 0; c < columns; ++c) dots[row][c] = _mm512_set1_epi32(starts[row]);
  }
  for (std::int32_t g = 0; g < groups; ++g, codes += group_bytes, input += tile_rows * group) {
    __m512i weights[columns];
    if (Nibbles) {
      load_nibbles(codes, weights);
    } else {
      for (int c = 0; c < columns; ++c) weights[c] = _mm512_loadu_si512(codes + 64 * c);
    }
    if (Nibbles || Rows == 1) {
      for (std::size_t i = 0; i < group_bytes; i += 64) {
        _mm_prefetch(reinterpret_cast<const char*>(codes + prefetch_bytes + i), _MM_HINT_T0);
      }
    }
    for (int row = 0; row < Rows; ++row) {
      const __m512i value = broadcast_group(input + row * group);
      for (int c = 0; c < columns; ++c) dot(dots[row][c], weights[c], value);
    }
  }
}

inline __m512 scaled(__m512i dots, __m512 scale, float input_scale, __m512 sum) {
  return _mm512_fmadd_ps(to_float(dots), _mm512_mul_ps(scale, _mm512_set1_ps(input_scale)), sum);
}

// Up to 3 rows from row `first` of the tile: their float sums fit in registers beside the integer ones.
template <int Rows, bool Nibbles>
void run_low_tile(const TileArguments& a, int first) {
  __m512 sums[Rows][columns];
  float* out = a.sums + first * panel;
  for (int row = 0; row < Rows; ++row) {
    for (int c = 0; c < columns; ++c) sums[row][c] = _mm512_load_ps(out + row * panel + 16 * c);
  }
  const std::int8_t* input = a.input + first * group;
  for (std::int32_t b = 0; b < a.blocks; ++b) {
    const std::uint8_t* codes = a.codes + b * a.codes_stride;
    __m512i dots[Rows][columns];
    multiply_block<Rows, Nibbles>(codes, input, a.groups, a.starts + b * tile_rows + first, dots);
    const float* scales = reinterpret_cast<const float*>(a.scales + b * a.scales_stride);
    const float* input_scales = a.input_scales + b * tile_rows + first;
    for (int row = 0; row < Rows; ++row) {
      for (int c = 0; c < columns; ++c) {
        sums[row][c] = scaled(dots[row][c], _mm512_loadu_ps(scales + 16 * c), input_scales[row], sums[row][c]);
      }
    }
  }
  for (int row = 0; row < Rows; ++row) {
    for (int c = 0; c < columns; ++c) _mm512_store_ps(out + row * panel + 16 * c, sums[row][c]);
  }
}

// 4 to 6 rows: the float sums stay in the first-level cache.
template <int Rows, bool Nibbles>
void run_high_tile(const TileArguments& a) {
  const std::int8_t* input = a.input;
  for (std::int32_t b = 0; b < a.blocks; ++b) {
    const std::uint8_t* codes = a.codes + b * a.codes_stride;
    __m512i dots[Rows][columns];
    multiply_block<Rows, Nibbles>(codes, input, a.groups, a.starts + b * tile_rows, dots);
    const float* from = reinterpret_cast<const float*>(a.scales + b * a.scales_stride);
    __m512 scales[columns];
    for (int c = 0; c < columns; ++c) scales[c] = _mm512_loadu_ps(from + 16 * c);
    for (int row = 0; row < Rows; ++row) {
      for (int c = 0; c < columns; ++c) {
        float* sum = a.sums + row * panel + 16 * c;
        _mm512_store_ps(sum, scaled(dots[row][c], scales[c], a.input_scales[b * tile_rows + row], _mm512_load_ps(sum)));
      }
    }
  }
}

template <bool Nibbles>
void run_low_rows(const TileArguments& a, int first, int rows) {
  switch (rows) {
    case 1:
      return run_low_tile<1, Nibbles>(a, first);
    case 2:
      return run_low_tile<2, Nibbles>(a, first);
    default:
      return run_low_tile<3, Nibbles>(a, first);
  }
}

template <bool Nibbles>
void run_rows(const TileArguments& a) {
  if (a.rows <= 3) return run_low_rows<Nibbles>(a, 0, a.rows);
  if (!Nibbles && a.groups <= short_groups) {
    run_low_tile<3, Nibbles>(a, 0);
    return run_low_rows<Nibbles>(a, 3, a.rows - 3);
  }
  switch (a.rows) {
    case 4:
      return run_high_tile<4, Nibbles>(a);
    case 5:
      return run_high_tile<5, Nibbles>(a);
    default:
      return run_high_tile<6, Nibbles>(a);
  }
}

void from_bytes(const TileArguments& a, std::int32_t) { run_rows<false>(a); }

}  // namespace

const MatmulKernels matmul_avx512 = {
    panel,       group,      64,
    128,         tile_rows,  few_rows,
    quantise_rows<tile_rows, group>,
    unpack,      from_bytes, run_rows<true>,
    finish_rows<panel>,
};

}  // namespace streamo
