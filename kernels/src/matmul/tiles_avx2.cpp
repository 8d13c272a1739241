// The quantised matrix product with AVX2, in strips of a panel: rows times registers of outputs make 6 or 8 sums.
//
// AVX2 multiplies unsigned by signed bytes into 16-bit sums of two, which saturate. Codes of 4 bits (0 .. 15) leave
// room to add 8 of those before widening. Codes of 8 bits are kept signed: |weight| times sign(input, weight) stays
// below the limit (2 * 128 * 127), and is widened at once.
#include <immintrin.h>

#include "matmul/finish_rows.h"
#include "matmul/kernels.h"
#include "matmul/quantise_rows.h"

namespace streamo {
namespace {

constexpr int panel = 64;
constexpr int group = 4;
constexpr int tile_rows = 4;
constexpr int few_rows = 1;
constexpr std::size_t group_codes = panel * group;
constexpr int prefetch_bytes = 1024;  // how far ahead a stream of packed codes is asked for
constexpr std::int32_t narrow_groups = 8;  // 8 * 2 * 15 * 127 fits 16 bits

inline __m256i broadcast_group(const std::int8_t* input) {
  std::int32_t value;
  __builtin_memcpy(&value, input, sizeof value);
  return _mm256_set1_epi32(value);
}

inline __m256i load(const std::uint8_t* bytes) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(bytes)); }

// 32 bytes of nibbles are 2 registers of weights.
template <int Columns>
inline void load_nibbles(const std::uint8_t* nibbles, __m256i weights[Columns]) {
  const __m256i low = _mm256_set1_epi8(15);
  for (int c = 0; c < Columns; c += 2) {
    const __m256i pairs = load(nibbles + 16 * c);
    weights[c] = _mm256_and_si256(pairs, low);
    weights[c + 1] = _mm256_and_si256(_mm256_srli_epi16(pairs, 4), low);
  }
}

void unpack(const std::uint8_t* nibbles, std::uint8_t* codes, std::size_t groups) {
  for (std::size_t i = 0; i < groups * group_codes / 2; i += 32) {
    __m256i weights[2];
    load_nibbles<2>(nibbles + i, weights);
    for (int c = 0; c < 2; ++c) {
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(codes + 2 * i + 32 * c), weights[c]);
    }
  }
}

// dots += codes (0 .. 15) . input over `groups` groups. `dots` lie in memory, out of the way of the 16-bit sums: the
// empty assembly keeps the compiler from moving them to registers and those sums out of them.
template <int Rows, int Columns, bool Nibbles>
inline void add_narrow(const std::uint8_t* codes, const std::int8_t* input, std::int32_t groups,
                       __m256i (&dots)[Rows][Columns]) {
  constexpr std::size_t group_bytes = Nibbles ? group_codes / 2 : group_codes;
  const __m256i ones = _mm256_set1_epi16(1);
  for (std::int32_t first = 0; first < groups; first += narrow_groups) {
    const std::int32_t count = groups - first < narrow_groups ? groups - first : narrow_groups;
    __m256i pairs[Rows][Columns];
    for (int row = 0; row < Rows; ++row) {
      for (int c = 0; c < Columns; ++c) pairs[row][c] = _mm256_setzero_si256();
    }
    for (std::int32_t g = 0; g < count; ++g, codes += group_bytes, input += tile_rows * group) {
      __m256i weights[Columns];
      if (Nibbles) {
        for (int i = 0; i < Columns * 16; i += 64) {
          _mm_prefetch(reinterpret_cast<const char*>(codes + prefetch_bytes + i), _MM_HINT_T0);
        }
        load_nibbles<Columns>(codes, weights);
      } else {
        for (int c = 0; c < Columns; ++c) weights[c] = load(codes + 32 * c);
      }
      for (int row = 0; row < Rows; ++row) {
        const __m256i value = broadcast_group(input + row * group);
        for (int c = 0; c < Columns; ++c) {
          pairs[row][c] = _mm256_add_epi16(pairs[row][c], _mm256_maddubs_epi16(weights[c], value));
        }
      }
    }
    asm volatile("" : : "r"(dots) : "memory");
    for (int row = 0; row < Rows; ++row) {
      for (int c = 0; c < Columns; ++c) {
        dots[row][c] = _mm256_add_epi32(dots[row][c], _mm256_madd_epi16(pairs[row][c], ones));
      }
    }
  }
}

// dots += codes (signed bytes) . input over `groups` groups.
template <int Rows, int Columns>
inline void add_wide(const std::uint8_t* codes, const std::int8_t* input, std::int32_t groups,
                     __m256i (&dots)[Rows][Columns]) {
  const __m256i ones = _mm256_set1_epi16(1);
  for (std::int32_t g = 0; g < groups; ++g, codes += group_codes, input += tile_rows * group) {
    for (int c = 0; c < Columns; ++c) {
      const __m256i weights = load(codes + 32 * c);
      const __m256i magnitudes = _mm256_abs_epi8(weights);
      for (int row = 0; row < Rows; ++row) {
        const __m256i value = _mm256_sign_epi8(broadcast_group(input + row * group), weights);
        const __m256i pairs = _mm256_maddubs_epi16(magnitudes, value);
        dots[row][c] = _mm256_add_epi32(dots[row][c], _mm256_madd_epi16(pairs, ones));
      }
    }
  }
}

enum class Codes { nibbles, narrow, wide };

// One strip over all blocks; `codes` and `scales` are already those of the strip.
template <int Rows, int Columns, Codes Kind>
inline void run_strip(const TileArguments& a, const std::uint8_t* codes, const std::uint8_t* scales, float* sums) {
  const std::int8_t* input = a.input;
  for (std::int32_t b = 0; b < a.blocks; ++b, codes += a.codes_stride, scales += a.scales_stride) {
    __m256i dots[Rows][Columns];
    for (int row = 0; row < Rows; ++row) {
      for (int c = 0; c < Columns; ++c) dots[row][c] = _mm256_set1_epi32(a.starts[b * tile_rows + row]);
    }
    if constexpr (Kind == Codes::wide) {
      add_wide<Rows, Columns>(codes, input, a.groups, dots);
    } else {
      add_narrow<Rows, Columns, Kind == Codes::nibbles>(codes, input, a.groups, dots);
    }
    input += static_cast<std::size_t>(a.groups) * tile_rows * group;
    for (int c = 0; c < Columns; ++c) {
      const __m256 scale = _mm256_loadu_ps(reinterpret_cast<const float*>(scales) + 8 * c);
      for (int row = 0; row < Rows; ++row) {
        float* sum = sums + row * panel + 8 * c;
        const __m256 both = _mm256_mul_ps(scale, _mm256_set1_ps(a.input_scales[b * tile_rows + row]));
        _mm256_store_ps(sum, _mm256_fmadd_ps(_mm256_cvtepi32_ps(dots[row][c]), both, _mm256_load_ps(sum)));
      }
    }
  }
}

template <int Rows, int Columns, Codes Kind>
void run_tile(const TileArguments& a) {
  constexpr int strip = 8 * Columns;
  constexpr int strip_bytes = Kind == Codes::nibbles ? strip * group / 2 : strip * group;
  for (int s = 0; s < panel / strip; ++s) {
    run_strip<Rows, Columns, Kind>(a, a.codes + s * strip_bytes, a.scales + s * strip * sizeof(float),
                                   a.sums + s * strip);
  }
}

template <Codes Kind>
void run_rows(const TileArguments& a) {
  switch (a.rows) {
    case 1:
      return run_tile<1, 8, Kind>(a);
    case 2:
      return run_tile<2, 4, Kind>(a);
    case 3:
      return run_tile<3, 2, Kind>(a);
    default:
      return run_tile<4, 2, Kind>(a);
  }
}

void from_bytes(const TileArguments& a, std::int32_t bits) {
  if (bits == 4) {
    run_rows<Codes::narrow>(a);
  } else {
    run_rows<Codes::wide>(a);
  }
}

}  // namespace

const MatmulKernels matmul_avx2 = {
    panel,       group,      32,
    0,           tile_rows,  few_rows,
    quantise_rows<tile_rows, group>,
    unpack,      from_bytes, run_rows<Codes::nibbles>,
    finish_rows<panel>,
};

}  // namespace streamo
