// The inner kernels of attention, written once over a small set of vector operations `V`.
//
// Everything sits in an anonymous namespace: each instruction set's file compiles its own copy with its own flags, and
// none of it can be linked into another's. A `V` offers
//   F, I            float and int32 vectors of `width` lanes (at most 16)
//   rows, columns   the register tile: rows * columns accumulators, `columns` operands and one broadcast must fit
//   narrow_width    lanes of the vectors that load_narrow and its like handle; divides 8
//   weight_levels   the largest 8-bit weight that dot_values takes (255, or 127)
//   weight_vectors  how many vectors store_weights takes at once; divides a tile's
//   key_zero_point  what pack adds to key codes (128, or 0)
// and the functions used below; PlainPacking has those that pack. Packed keys are [panel of width * columns keys]
// [head_dim / 4][keys][4 codes] (int8) and [panel][head_dim][keys] (float); packed values [keys / 4][head_dim][4 keys].
#pragma once

#include <math.h>

#include <cfloat>
#include <cstring>
#include <type_traits>
#include <utility>

#include "attention/exp2_coefficients.h"
#include "attention/kernels.h"
#include "attention/pack_plain.h"

namespace streamo {
namespace {

#define STREAMO_UNROLL _Pragma("GCC unroll 16")
#define STREAMO_INLINE __attribute__((always_inline))

template <typename Body, int... Index>
STREAMO_INLINE inline void repeat(const Body& body, std::integer_sequence<int, Index...>) {
  (body(std::integral_constant<int, Index>{}), ...);
}

// body(0), .. body(Count - 1) with constant indices: unlike an unrolled loop over an array of vectors, the compiler
// keeps such an array in registers.
template <int Count, typename Body>
STREAMO_INLINE inline void repeat(const Body& body) {
  repeat(body, std::make_integer_sequence<int, Count>{});
}

// Calls body(integral_constant<int, n>) for n in 1 .. Most.
template <int Most, typename Body>
inline void with_constant(int n, const Body& body) {
  if constexpr (Most > 1) {
    if (n < Most) return with_constant<Most - 1>(n, body);
  }
  body(std::integral_constant<int, Most>{});
}

// Splits `total` into parts of at most Most, as even as can be: body(begin, integral_constant<int, size>).
template <int Most, typename Body>
inline void in_even_parts(int total, const Body& body) {
  int parts = (total + Most - 1) / Most;
  for (int begin = 0; parts > 0; --parts) {
    const int size = (total - begin + parts - 1) / parts;
    with_constant<Most>(size, [&](auto constant) { body(begin, constant); });
    begin += size;
  }
}

template <typename V>
struct Tiles {
  using F = typename V::F;
  using I = typename V::I;
  static constexpr int width = V::width;
  static constexpr int panel_keys = V::width * V::columns;
  static constexpr int tile_vectors = kTileKeys / V::width;
  static_assert(kTileKeys % panel_keys == 0 && width <= 16 && kPaddedKeys % (width * V::weight_vectors) == 0);

  // 2^x by polynomial; coefficients from the constant up.
  template <int Count>
  static F exp2(F x, const float (&coefficients)[Count]) {
    const F f = V::fraction(x);
    F sum = V::set(coefficients[Count - 1]);
    STREAMO_UNROLL
    for (int i = Count - 2; i >= 0; --i) sum = V::fma(sum, f, V::set(coefficients[i]));
    return V::times_power_of_two(sum, x);
  }

  // The library is built with -ffp-contract=off: a product rounds before the sum that follows takes it.
  static void turn(const float* x, const float* cosine, const float* sine, int32_t half, float* out) {
    for (int i = 0; i < half; i += V::narrow_width) {
      const auto a = V::load_narrow(x + i), b = V::load_narrow(x + half + i);
      const auto c = V::load_narrow(cosine + i), s = V::load_narrow(sine + i);
      V::store_narrow(out + i, V::sub_narrow(V::mul_narrow(a, c), V::mul_narrow(b, s)));
      V::store_narrow(out + half + i, V::add_narrow(V::mul_narrow(b, c), V::mul_narrow(a, s)));
    }
  }

  // Exact: each quotient is rounded as a division rounds it, before it is rounded to a code.
  template <bool Exact>
  static float quantise(const float* x, int32_t count, int8_t* codes) {
    F largest = V::zero();
    for (int i = 0; i < count; i += width) largest = V::max(largest, V::abs(V::load(x + i)));
    const float scale = V::reduce_max(largest) / 127.0f;
    if (!(scale > (Exact ? 0.0f : FLT_MIN))) {
      std::memset(codes, 0, static_cast<size_t>(count));
      return 0.0f;
    }
    const F factor = V::set(Exact ? scale : 1.0f / scale), low = V::set(-127.0f), high = V::set(127.0f);
    for (int i = 0; i < count; i += width) {
      const F scaled = Exact ? V::div(V::load(x + i), factor) : V::mul(V::load(x + i), factor);
      V::store_codes(codes + i, V::min(high, V::max(low, scaled)));
    }
    return scale;
  }

  // ------------------------------------------------------------------------------------------------- scores

  template <int Rows>
  static void score_panel_float(const float* queries, int depth, const float* panel, float* scores) {
    F sums[Rows][V::columns];
    repeat<Rows>([&](auto r) STREAMO_INLINE {
      repeat<V::columns>([&](auto c) STREAMO_INLINE { sums[r][c] = V::zero(); });
    });
    for (int i = 0; i < depth; ++i) {
      F keys[V::columns];
      repeat<V::columns>([&](auto c) STREAMO_INLINE { keys[c] = V::load(panel + i * panel_keys + c * width); });
      repeat<Rows>([&](auto r) STREAMO_INLINE {
        const F query = V::set(queries[r * depth + i]);
        repeat<V::columns>([&](auto c) STREAMO_INLINE { sums[r][c] = V::fma(query, keys[c], sums[r][c]); });
      });
    }
    repeat<Rows>([&](auto r) STREAMO_INLINE {
      repeat<V::columns>([&](auto c) STREAMO_INLINE { V::store(scores + r * kTileKeys + c * width, sums[r][c]); });
    });
  }

  static void scores_float(const float* queries, int32_t rows, int32_t depth, const float* panel, int32_t count,
                           float* scores) {
    for (int key = 0; key < count; key += panel_keys) {
      in_even_parts<V::rows>(rows, [&](int row, auto part) {
        score_panel_float<part.value>(queries + static_cast<size_t>(row) * depth, depth,
                                      panel + static_cast<size_t>(key) * depth, scores + row * kTileKeys + key);
      });
    }
  }

  template <int Rows>
  static void score_panel_int8(const int8_t* queries, const int32_t* query_sums, int head_dim, const uint8_t* panel,
                               int32_t* scores) {
    I sums[Rows][V::columns];
    repeat<Rows>([&](auto r) STREAMO_INLINE {
      const I start = V::set_int(-V::key_zero_point * query_sums[r]);
      repeat<V::columns>([&](auto c) STREAMO_INLINE { sums[r][c] = start; });
    });
    for (int i = 0; i < head_dim; i += 4) {
      I keys[V::columns];
      repeat<V::columns>([&](auto c) STREAMO_INLINE {
        keys[c] = V::load_int(panel + (i * panel_keys + 4 * c * width));
      });
      repeat<Rows>([&](auto r) STREAMO_INLINE {
        const I query = V::broadcast_dword(queries + r * head_dim + i);
        repeat<V::columns>([&](auto c) STREAMO_INLINE { sums[r][c] = V::dot_keys(sums[r][c], keys[c], query); });
      });
    }
    repeat<Rows>([&](auto r) STREAMO_INLINE {
      repeat<V::columns>([&](auto c) STREAMO_INLINE {
        V::store_int(scores + r * kTileKeys + c * width, sums[r][c]);
      });
    });
  }

  static void scores_int8(const int8_t* queries, const int32_t* query_sums, int32_t rows, int32_t head_dim,
                          const uint8_t* panel, int32_t count, int32_t* scores) {
    for (int key = 0; key < count; key += panel_keys) {
      in_even_parts<V::rows>(rows, [&](int row, auto part) {
        score_panel_int8<part.value>(queries + static_cast<size_t>(row) * head_dim, query_sums + row, head_dim,
                                     panel + static_cast<size_t>(key) * head_dim, scores + row * kTileKeys + key);
      });
    }
  }

  // ------------------------------------------------------------------------------------------------ softmax

  // Raises the row's maximum to `maximum`; returns what the older sums are multiplied by.
  static float raise_maximum(const RowState& state, int row, float maximum) {
    const float before = state.maximum[row];
    if (maximum <= before) return 1.0f;
    state.maximum[row] = maximum;
    return exp2f(before - maximum);
  }

  static void softmax_float(const FloatSoftmax& tile) {
    const F lowest = V::set(-FLT_MAX);
    for (int row = 0; row < tile.rows; ++row) {
      float* scores = tile.scores + row * kTileKeys;
      const int visible = tile.visible != nullptr ? tile.visible[row] : tile.count;
      const int whole = visible / width * width;
      F largest = lowest;
      for (int i = 0; i < whole; i += width) largest = V::max(largest, V::load(scores + i));
      if (whole < visible) largest = V::max(largest, V::first(V::load(scores + whole), visible - whole, lowest));
      tile.keep[row] = raise_maximum(tile.state, row, V::reduce_max(largest));

      const F maximum = V::set(tile.state.maximum[row]);
      F sum = V::zero();
      for (int i = 0; i < whole; i += width) {
        const F weight = exp2(V::sub(V::load(scores + i), maximum), kExp2Fine);
        V::store(scores + i, weight);
        sum = V::add(sum, weight);
      }
      int end = whole;
      if (whole < visible) {
        const F weight =
            V::first(exp2(V::sub(V::load(scores + whole), maximum), kExp2Fine), visible - whole, V::zero());
        V::store(scores + whole, weight);
        sum = V::add(sum, weight);
        end += width;
      }
      for (; end < tile.count; end += width) V::store(scores + end, V::zero());
      tile.state.sum[row] = tile.state.sum[row] * tile.keep[row] + V::reduce_add(sum);
    }
  }

  // Rows of int8 scores that are worked on together: enough that one row's reductions hide behind another's.
  static constexpr int softmax_rows = 8;
  static constexpr int softmax_lanes = softmax_rows < width ? width : softmax_rows;

  // scaled = score + log2(value scale), minus infinity where hidden; returns the largest. `Whole`: all of a full tile
  // is visible. Writes up to the end of the last group of weights.
  template <bool Whole, bool Corrected>
  static float scale_int8_row(const Int8Softmax& tile, int row, int visible, float* scaled) {
    const int vectors = Whole ? tile_vectors : (visible + width - 1) / width;
    const int32_t* dots = tile.scores + row * kTileKeys;
    const F query_scale = V::set(tile.query_scales[row]);
    F largest = V::set(-FLT_MAX);
    STREAMO_UNROLL
    for (int i = 0; i < vectors; ++i) {
      const F dot = V::to_float(V::load_int(dots + i * width)), key_scale = V::load(tile.key_scales + i * width);
      const F added = V::load(tile.value_logarithms + i * width);
      F sum;
      if constexpr (Corrected) {
        const int at = row * kTileKeys + i * width;
        const F lost = V::mul(V::to_float(V::load_int(tile.remainders + at)), V::set(tile.remainder_scales[row]));
        sum = V::fma(V::fma(dot, query_scale, lost), key_scale, V::add(added, V::load(tile.corrections + at)));
      } else {
        sum = V::fma(V::mul(dot, key_scale), query_scale, added);
      }
      if (!Whole && (i + 1) * width > visible) sum = V::first(sum, visible - i * width, V::set(-INFINITY));
      V::store(scaled + i * width, sum);
      largest = V::max(largest, sum);
    }
    if (!Whole) {
      for (int i = vectors; i % V::weight_vectors != 0; ++i) V::store(scaled + i * width, V::set(-INFINITY));
    }
    return V::reduce_max(largest);
  }

  // Weights of a row, 2^(scaled - base); returns their sum, each over its value scale.
  template <bool Whole>
  static float weigh_int8_row(const Int8Softmax& tile, int visible, const float* scaled, float base,
                              uint8_t* weights) {
    const int vectors = Whole ? tile_vectors : (visible + width - 1) / width;
    const F subtrahend = V::set(base);
    F sum = V::zero();
    STREAMO_UNROLL
    for (int i = 0; i < vectors; i += V::weight_vectors) {
      F group[V::weight_vectors];
      repeat<V::weight_vectors>([&](auto j) STREAMO_INLINE {
        group[j] = exp2(V::sub(V::load(scaled + (i + j) * width), subtrahend), kExp2Coarse);
        sum = V::fma(group[j], V::load(tile.value_inverses + (i + j) * width), sum);
      });
      if constexpr (V::weight_vectors == 1) {
        V::store_weights(weights + i * width, group[0]);
      } else {
        V::store_weights(weights + i * width, group);
      }
    }
    if (!Whole) {
      const int written = (vectors + V::weight_vectors - 1) / V::weight_vectors * V::weight_vectors * width;
      std::memset(weights + written, 0, static_cast<size_t>(kTileKeys - written));
    }
    return V::reduce_add(sum);
  }

  // Weights are scaled by the tile's own heaviest: by the running one, long tails would all round to zero. The value
  // scales go into the exponent, so that the heaviest is known before any power is taken.
  template <bool Corrected>
  static void softmax_int8_group(const Int8Softmax& tile, int first, int rows) {
    alignas(64) float scaled[softmax_rows * kTileKeys];
    alignas(64) float tops[softmax_lanes] = {}, before[softmax_lanes] = {}, keep[softmax_lanes], step[softmax_lanes];
    const auto visible = [&](int r) { return tile.visible != nullptr ? tile.visible[first + r] : tile.count; };
    for (int r = 0; r < rows; ++r) {
      float* to = scaled + r * kTileKeys;
      tops[r] = visible(r) == kTileKeys ? scale_int8_row<true, Corrected>(tile, first + r, kTileKeys, to)
                                        : scale_int8_row<false, Corrected>(tile, first + r, visible(r), to);
      before[r] = tile.state.maximum[first + r];
    }
    for (int r = 0; r < rows; r += width) {
      const F top = V::load(tops + r), older = V::load(before + r), maximum = V::max(top, older);
      V::store(keep + r, exp2(V::sub(older, maximum), kExp2Fine));
      V::store(step + r, V::mul(exp2(V::sub(top, maximum), kExp2Fine), V::set(1.0f / V::weight_levels)));
    }
    constexpr float level_bits = V::weight_levels == 255 ? 7.99435344f : 6.98868469f;  // log2(weight_levels)
    static_assert(V::weight_levels == 255 || V::weight_levels == 127);
    for (int r = 0; r < rows; ++r) {
      const int row = first + r;
      uint8_t* weights = tile.weights + row * kTileKeys;
      const float* from = scaled + r * kTileKeys;
      const float base = tops[r] - level_bits;
      const float sum = visible(r) == kTileKeys ? weigh_int8_row<true>(tile, kTileKeys, from, base, weights)
                                                : weigh_int8_row<false>(tile, visible(r), from, base, weights);
      const bool raised = tops[r] > before[r];
      if (raised) tile.state.maximum[row] = tops[r];
      tile.keep[row] = raised ? keep[r] : 1.0f;
      tile.step[row] = step[r];
      tile.state.sum[row] = tile.state.sum[row] * tile.keep[row] + sum * step[r];
    }
  }

  template <bool Corrected>
  static void softmax_int8_rows(const Int8Softmax& tile) {
    for (int row = 0; row < tile.rows; row += softmax_rows) {
      softmax_int8_group<Corrected>(tile, row, tile.rows - row < softmax_rows ? tile.rows - row : softmax_rows);
    }
  }

  static void softmax_int8(const Int8Softmax& tile) {
    if (tile.corrections != nullptr) {
      softmax_int8_rows<true>(tile);
    } else {
      softmax_int8_rows<false>(tile);
    }
  }

  // ------------------------------------------------------------------------------------------------- values

  template <int Rows, int Columns>
  static void value_block_float(const float* weights, const float* keep, const RowSource<float>& values, int begin,
                                int end, int column, int head_dim, float* sums) {
    F block[Rows][Columns];
    repeat<Rows>([&](auto r) STREAMO_INLINE {
      const F factor = V::set(begin == 0 ? keep[r] : 1.0f);
      repeat<Columns>([&](auto c) STREAMO_INLINE {
        block[r][c] = V::mul(V::load(sums + r * head_dim + column + c * width), factor);
      });
    });
    int key = begin;
    do {
      const float* row = values.base + values.slots[key] * values.stride + column;
      F lanes[Columns];
      repeat<Columns>([&](auto c) STREAMO_INLINE { lanes[c] = V::load(row + c * width); });
      repeat<Rows>([&](auto r) STREAMO_INLINE {
        const F weight = V::set(weights[r * kTileKeys + key]);
        repeat<Columns>([&](auto c) STREAMO_INLINE { block[r][c] = V::fma(weight, lanes[c], block[r][c]); });
      });
      ++key;
    } while (key < end);
    repeat<Rows>([&](auto r) STREAMO_INLINE {
      repeat<Columns>([&](auto c) STREAMO_INLINE {
        V::store(sums + r * head_dim + column + c * width, block[r][c]);
      });
    });
  }

  static void values_float(const float* weights, const float* keep, int32_t rows, const RowSource<float>& values,
                           int32_t head_dim, float* sums) {
    constexpr int kBlockKeys = 64;  // of 64 columns: what a first-level cache holds
    for (int begin = 0; begin < values.count; begin += kBlockKeys) {
      const int end = values.count < begin + kBlockKeys ? values.count : begin + kBlockKeys;
      in_even_parts<V::columns>(head_dim / width, [&](int vector, auto columns) {
        in_even_parts<V::rows>(rows, [&](int row, auto part) {
          value_block_float<part.value, columns.value>(weights + row * kTileKeys, keep + row, values, begin, end,
                                                       vector * width, head_dim, sums + row * head_dim);
        });
      });
    }
  }

  // `weights` points at the dword of four keys' weights, `panel` at the values of those keys.
  template <int Rows, int Columns>
  STREAMO_INLINE static inline void add_products(I (&block)[Rows][Columns], const uint8_t* weights,
                                                 const int8_t* panel) {
    I lanes[Columns];
    repeat<Columns>([&](auto c) STREAMO_INLINE { lanes[c] = V::load_int(panel + 4 * c * width); });
    repeat<Rows>([&](auto r) STREAMO_INLINE {
      const I weight = V::broadcast_dword(weights + r * kTileKeys);
      repeat<Columns>([&](auto c) STREAMO_INLINE { block[r][c] = V::dot_values(block[r][c], weight, lanes[c]); });
    });
  }

  template <int Rows, int Columns>
  static void value_block_int8(const uint8_t* weights, const float* keep, const float* step, const int8_t* panel,
                               int count, int column, int head_dim, float* sums) {
    I block[Rows][Columns];
    repeat<Rows>([&](auto r) STREAMO_INLINE {
      repeat<Columns>([&](auto c) STREAMO_INLINE { block[r][c] = V::set_int(0); });
    });
    const int8_t* values = panel + 4 * column;
    const std::ptrdiff_t stride = 4 * head_dim;
    if constexpr (V::weight_vectors == 1) {
      for (int key = 0; key < count; key += 4, values += stride) add_products(block, weights + key, values);
    } else {
      // Four dwords of one vector of weights lie as far apart as there were vectors, see store_weights.
      static_assert(V::weight_vectors == 4 && width == 16);
      for (int key = 0; key < count; key += 16) {
        const uint8_t* from = weights + (key & ~63) + (key & 48) / 4;
        repeat<4>([&](auto i) STREAMO_INLINE {
          add_products(block, from + 16 * i, values);
          values += stride;
        });
      }
    }
    repeat<Rows>([&](auto r) STREAMO_INLINE {
      const F unit = V::set(step[r]);
      float* sum = sums + r * head_dim + column;
      if (keep[r] == 1.0f) {  // no new maximum: the rule, after the first tiles
        repeat<Columns>([&](auto c) STREAMO_INLINE {
          V::store(sum + c * width, V::fma(V::to_float(block[r][c]), unit, V::load(sum + c * width)));
        });
      } else {
        const F kept = V::set(keep[r]);
        repeat<Columns>([&](auto c) STREAMO_INLINE {
          const F older = V::mul(V::load(sum + c * width), kept);
          V::store(sum + c * width, V::fma(V::to_float(block[r][c]), unit, older));
        });
      }
    });
  }

  static void values_int8(const uint8_t* weights, const float* keep, const float* step, int32_t rows,
                          const int8_t* panel, int32_t count, int32_t head_dim, float* sums) {
    in_even_parts<V::columns>(head_dim / width, [&](int vector, auto columns) {
      in_even_parts<V::rows>(rows, [&](int row, auto part) {
        value_block_int8<part.value, columns.value>(weights + row * kTileKeys, keep + row, step + row, panel, count,
                                                    vector * width, head_dim, sums + row * head_dim);
      });
    });
  }

  // ------------------------------------------------------------------------------------------------- packing

  static void pack_keys_float(const RowSource<float>& keys, int32_t depth, float* panel) {
    V::pack_dwords(keys, depth, panel_keys, 0u, panel);
  }

  static void pack_keys_int8(const RowSource<int8_t>& keys, int32_t head_dim, uint8_t* panel) {
    V::pack_dwords(keys, head_dim / 4, panel_keys, V::key_zero_point * 0x01010101u, panel);
  }

  static void pack_values_int8(const RowSource<int8_t>& values, int32_t head_dim, int8_t* panel) {
    V::pack_values(values, head_dim, panel);
  }

  static void pack_angles(const RowSource<float>& cosines, const RowSource<float>& sines, const int32_t* pairs,
                          int32_t pair_count, float* panel) {
    V::pack_angles(cosines, sines, pairs, pair_count, panel_keys, panel);
  }

  static constexpr AttentionKernels table(const char* name, const FewRowsKernels* few_rows = nullptr) {
    return table_with(name, pack_keys_int8, pack_values_int8, scores_int8, values_int8, few_rows);
  }

  // The same for an instruction set with products of bytes, and an order of them, of its own.
  static constexpr AttentionKernels table_with(const char* name,
                                               decltype(AttentionKernels::pack_keys_int8) pack_keys,
                                               decltype(AttentionKernels::pack_values_int8) pack_values,
                                               decltype(AttentionKernels::scores_int8) scores,
                                               decltype(AttentionKernels::values_int8) values,
                                               const FewRowsKernels* few_rows = nullptr) {
    return {name,          turn,         quantise<true>, quantise<false>, pack_keys_float, pack_angles, scores_float,
            softmax_float, values_float, pack_keys,      pack_values,     scores,          softmax_int8, values,
            few_rows};
  }
};

}  // namespace
}  // namespace streamo
