// Attention of few query rows for AVX512 with VNNI.
#include <cmath>

#include "attention/carve.h"
#include "attention/few_rows.h"
#include "attention/intrinsics_avx512.h"
#include "attention/tiles.h"

namespace streamo {
namespace {

using F = __m512;
using I = __m512i;

constexpr int kBlockKeys = 16;              // keys whose scores are summed at once
constexpr int kRowBytes = kMaxHeadDim;      // of a block's keys, one behind the other
constexpr int kGroups = kTileKeys / 4;      // of four keys, which one dword of weights covers
constexpr int kPieceVectors = 4;            // vectors of sums of a piece of columns
alignas(64) constexpr int8_t kZeroRow[kMaxHeadDim] = {};

struct Workspace {
  uint8_t* keys;   /* (kBlockKeys, kRowBytes) codes of a block, with their zero point */
  float* scores;   /* (kTileKeys / lanes a row, kLanes), later weights */
  float* scales;   /* (2, kTileKeys, 2 .. 4) of keys and of values, each as often as four lanes need it */
  uint8_t* weights; /* (kTileKeys, kLanes / lanes a row) in dwords of four keys */
  int8_t* panel;   /* (pieces, kGroups, kPieceVectors, 64) values interleaved by four keys */
  float *keep, *step; /* (kLanes) */

  static size_t bytes(int32_t head_dim) {
    const size_t pieces = (static_cast<size_t>(head_dim) + kPieceBytes - 1) / kPieceBytes;
    return kBlockKeys * kRowBytes + kTileKeys * kLanes * 4 + 2 * kTileKeys * 4 * 4 + kTileKeys * kLanes +
           pieces * kGroups * kPieceVectors * 64 + 2 * Carve::bytes_of<float>(kLanes);
  }

  explicit Workspace(void* memory, int32_t head_dim) {
    Carve carve(memory);
    const size_t pieces = (static_cast<size_t>(head_dim) + kPieceBytes - 1) / kPieceBytes;
    keys = carve.take<uint8_t>(kBlockKeys * kRowBytes);
    scores = carve.take<float>(kTileKeys * kLanes);
    scales = carve.take<float>(2 * kTileKeys * 4);
    weights = carve.take<uint8_t>(kTileKeys * kLanes);
    panel = carve.take<int8_t>(pieces * kGroups * kPieceVectors * 64);
    keep = carve.take<float>(kLanes);
    step = carve.take<float>(kLanes);
  }
};

// As an instruction, because GCC 12 copies every accumulator around the intrinsic and spills them.
inline I dot(I sum, I without_sign, I with_sign) {
  __asm__("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(without_sign), "v"(with_sign));
  return sum;
}

template <int Lanes>
inline I broadcast(const void* from) {
  if constexpr (Lanes == 2) {
    int64_t dwords;
    std::memcpy(&dwords, from, 8);
    return _mm512_set1_epi64(dwords);
  } else {
    int32_t dword;
    std::memcpy(&dword, from, 4);
    return _mm512_set1_epi32(dword);
  }
}

template <int Count>
inline F exp2(F x, const float (&coefficients)[Count]) {
  const F f = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF);
  F sum = _mm512_set1_ps(coefficients[Count - 1]);
  STREAMO_UNROLL
  for (int i = Count - 2; i >= 0; --i) sum = _mm512_fmadd_ps(sum, f, _mm512_set1_ps(coefficients[i]));
  return _mm512_scalef_ps(sum, x);
}

// The other lane of the same row that has a score of the next key.
template <int Lanes>
inline F max_of_row(F x) {
  return Lanes == 1 ? x : _mm512_max_ps(x, _mm512_permute_ps(x, 0x4E));
}

inline const int8_t* row_at(const RowSource<int8_t>& rows, int key) {
  return key < rows.count ? rows.base + rows.slots[key] * rows.stride : kZeroRow;
}

// Asks for row `index` of `rows`, if there is one. Inlined always: GCC drops calls of functions that only prefetch.
template <typename Element>
STREAMO_INLINE inline void prefetch(const RowSource<Element>& rows, int index, int width) {
  if (index >= rows.count) return;
  const char* row = reinterpret_cast<const char*>(rows.base + rows.slots[index] * rows.stride);
  const int bytes = width * static_cast<int>(sizeof(Element));
  for (int byte = 0; byte < bytes; byte += 64) _mm_prefetch(row + byte, _MM_HINT_T1);
}

// Which bytes of piece `piece` a row of `width` bytes has.
inline __mmask64 piece_mask(int piece, int width) {
  const int left = width - piece * kPieceBytes;
  return left >= 64 ? ~__mmask64{0} : (__mmask64{1} << left) - 1;
}

template <int Lanes>
class TileOfFewRows {
 public:
  explicit TileOfFewRows(const FewRowsTile& tile)
      : t_(tile), work_(tile.workspace, tile.head_dim), pieces_((tile.head_dim + kPieceBytes - 1) / kPieceBytes) {}

  void run() {
    spread_scales(t_.keys.slots, t_.key_scales, key_scales());
    spread_scales(t_.values.slots, t_.value_scales, value_scales());
    F largest = _mm512_set1_ps(-FLT_MAX);
    for (int key = 0; key < t_.keys.count; key += kBlockKeys) largest = _mm512_max_ps(largest, score_block(key));
    weigh(largest);
    interleave();
    for (int row = 0; row < t_.rows; row += 8) {
      with_constant<8>(t_.rows - row < 8 ? t_.rows - row : 8, [&](auto rows) { add_values<rows.value>(row); });
    }
  }

 private:
  static constexpr int vectors_a_block = kBlockKeys / Lanes;

  float* key_scales() const { return work_.scales; }
  float* value_scales() const { return work_.scales + 4 * kTileKeys; }
  int vectors() const { return (t_.keys.count + kBlockKeys - 1) / kBlockKeys * vectors_a_block; }
  static F four_lanes(const float* from) { return _mm512_broadcast_f32x4(_mm_loadu_ps(from)); }

  // Each key's scale 4 / Lanes times: four lanes of scores hold Lanes keys.
  void spread_scales(const int32_t* slots, const float* scales, float* out) const {
    const int padded = (t_.keys.count + kBlockKeys - 1) / kBlockKeys * kBlockKeys;
    for (int key = 0; key < padded; ++key) {
      const float scale = key < t_.keys.count ? scales[slots[key]] : 0.0f;
      for (int i = 0; i < 4 / Lanes; ++i) out[key * (4 / Lanes) + i] = scale;
    }
  }

  // Asks for one more row of the next tile. Called between products, so that memory never waits for arithmetic.
  STREAMO_INLINE void ask_ahead() {
    if (ahead_ % 2 == 0) {
      prefetch(t_.next_keys, ahead_ / 2, t_.head_dim);
    } else {
      prefetch(t_.next_values, ahead_ / 2, t_.head_dim);
    }
    ++ahead_;
  }

  // A block of keys, its codes without their sign.
  void copy_keys(int first) {
    const I flip = _mm512_set1_epi8(static_cast<char>(0x80));
    const __mmask64 last_mask = piece_mask(pieces_ - 1, t_.head_dim);
    for (int key = 0; key < kBlockKeys; ++key) {
      const int8_t* row = row_at(t_.keys, first + key);
      uint8_t* out = work_.keys + key * kRowBytes;
      if (key % 2 == 0) ask_ahead();
      for (int left = pieces_ - 1; left > 0; --left, row += kPieceBytes, out += kPieceBytes) {
        _mm512_store_si512(out, _mm512_xor_si512(_mm512_loadu_si512(row), flip));
      }
      _mm512_store_si512(out, _mm512_xor_si512(_mm512_maskz_loadu_epi8(last_mask, row), flip));
    }
  }

  void dot_block(const LaneCodes& queries, I (&out)[vectors_a_block]) {
    I sums[kBlockKeys];
    const I start = _mm512_load_si512(queries.start);
    repeat<kBlockKeys>([&](auto k) STREAMO_INLINE { sums[k] = start; });
    const uint8_t* keys = work_.keys;
    const int8_t* codes = queries.codes;
    for (int i = 0; i < t_.head_dim; i += 4 * Lanes, codes += 64, keys += 4 * Lanes) {
      const I query = _mm512_load_si512(codes);
      if (i % (8 * Lanes) == 0) ask_ahead();
      repeat<kBlockKeys>([&](auto k) STREAMO_INLINE {
        sums[k] = dot(sums[k], broadcast<Lanes>(keys + k * kRowBytes), query);
      });
    }
    repeat<vectors_a_block>([&](auto v) STREAMO_INLINE {
      if constexpr (Lanes == 1) {
        out[v] = sums[v];
      } else {
        const F a = _mm512_castsi512_ps(sums[2 * v]), b = _mm512_castsi512_ps(sums[2 * v + 1]);
        out[v] = _mm512_add_epi32(_mm512_castps_si512(_mm512_shuffle_ps(a, b, 0x88)),
                                  _mm512_castps_si512(_mm512_shuffle_ps(a, b, 0xDD)));
      }
    });
  }

  // What the keys' offset adds to the scores of eight keys.
  void offset_scores(int first, F* out) const {
    const size_t half = static_cast<size_t>(t_.head_dim) / 2;
    size_t rows[8];
    F sums[8];
    repeat<8>([&](auto k) STREAMO_INLINE {
      const int key = first + k < t_.keys.count ? first + k : t_.keys.count - 1;
      rows[k] = t_.keys.slots[key] * half;
      sums[k] = _mm512_setzero_ps();
    });
    for (int i = 0; i < t_.pair_count; ++i) {
      const F of_cosine = _mm512_load_ps(t_.factors + i * kLanes);
      const F of_sine = _mm512_load_ps(t_.factors + (t_.pair_count + i) * kLanes);
      const float *cosines = t_.slot_cos + t_.pairs[i], *sines = t_.slot_sin + t_.pairs[i];
      repeat<8>([&](auto k) STREAMO_INLINE {
        sums[k] = _mm512_fmadd_ps(of_cosine, _mm512_set1_ps(cosines[rows[k]]), sums[k]);
        sums[k] = _mm512_fmadd_ps(of_sine, _mm512_set1_ps(sines[rows[k]]), sums[k]);
      });
    }
    repeat<8 / Lanes>([&](auto v) STREAMO_INLINE {
      out[v] = Lanes == 1 ? sums[v] : _mm512_mask_mov_ps(sums[Lanes * v], 0xCCCC, sums[Lanes * v + Lanes - 1]);
    });
  }

  // Lanes whose row does not see its key of vector `vector`.
  __mmask16 hidden(int vector) const {
    const I lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const I odd = _mm512_and_si512(_mm512_srli_epi32(lane, 1), _mm512_set1_epi32(1));
    const I second = Lanes == 1 ? _mm512_setzero_si512() : odd;
    const I key = _mm512_add_epi32(_mm512_set1_epi32(vector * Lanes), second);
    return _mm512_cmpge_epi32_mask(key, _mm512_loadu_si512(t_.visible));
  }

  // Scores of a block, stored; returns the largest of each lane.
  F score_block(int first) {
    copy_keys(first);
    I dots[vectors_a_block], lost[vectors_a_block];
    F offsets[vectors_a_block];
    dot_block(t_.queries, dots);
    const bool corrected = t_.pair_count > 0;
    if (corrected) {
      dot_block(t_.remainder, lost);
      offset_scores(first, offsets);
      offset_scores(first + 8, offsets + vectors_a_block / 2);
    }
    const F scale = _mm512_load_ps(t_.queries.scales), lost_scale = _mm512_load_ps(t_.remainder.scales);
    F largest = _mm512_set1_ps(-FLT_MAX);
    for (int i = 0; i < vectors_a_block; ++i) {
      const int vector = first / Lanes + i;
      const F key_scale = four_lanes(key_scales() + 4 * vector);
      F score = _mm512_mul_ps(_mm512_cvtepi32_ps(dots[i]), _mm512_mul_ps(key_scale, scale));
      if (corrected) {
        score = _mm512_fmadd_ps(_mm512_cvtepi32_ps(lost[i]), _mm512_mul_ps(key_scale, lost_scale), score);
        score = _mm512_add_ps(score, offsets[i]);
      }
      if (t_.visible != nullptr) score = _mm512_mask_mov_ps(score, hidden(vector), _mm512_set1_ps(-INFINITY));
      _mm512_store_ps(work_.scores + vector * kLanes, score);
      largest = _mm512_max_ps(largest, score);
    }
    return largest;
  }

  // Raises the running maximum; returns what older sums are multiplied by.
  F raise_maximum(F largest) const {
    const F before = _mm512_load_ps(t_.maximum), maximum = _mm512_max_ps(before, max_of_row<Lanes>(largest));
    const __mmask16 higher = _mm512_cmp_ps_mask(maximum, before, _CMP_GT_OQ);
    _mm512_store_ps(t_.maximum, maximum);
    return _mm512_mask_mov_ps(_mm512_set1_ps(1.0f), higher, exp2(_mm512_sub_ps(before, maximum), kExp2Fine));
  }

  // Scores to weights of 8 bits, scaled by the tile's own heaviest: by the running one, long tails would round to zero.
  void weigh(F largest) {
    const F keep = raise_maximum(largest), maximum = _mm512_load_ps(t_.maximum);
    F sum = _mm512_setzero_ps(), heaviest = _mm512_setzero_ps();
    const int count = vectors();
    for (int i = 0; i < count; ++i) {
      if (i % 2 == 0) ask_ahead();
      const F weight = exp2(_mm512_sub_ps(_mm512_load_ps(work_.scores + i * kLanes), maximum), kExp2Coarse);
      sum = _mm512_add_ps(sum, weight);
      const F scaled = _mm512_mul_ps(weight, four_lanes(value_scales() + 4 * i));
      heaviest = _mm512_max_ps(heaviest, scaled);
      _mm512_store_ps(work_.scores + i * kLanes, scaled);
    }
    _mm512_store_ps(t_.sum, _mm512_fmadd_ps(_mm512_load_ps(t_.sum), keep, sum));
    const F top = max_of_row<Lanes>(heaviest);
    const __mmask16 some = _mm512_cmp_ps_mask(top, _mm512_set1_ps(1e-30f), _CMP_GT_OQ);
    const F levels = _mm512_maskz_div_ps(some, _mm512_set1_ps(255.0f), top);
    _mm512_store_ps(work_.keep, keep);
    _mm512_store_ps(work_.step, _mm512_maskz_mul_ps(some, top, _mm512_set1_ps(1.0f / 255.0f)));
    for (int i = 0; i < count; i += 4) pack_weights(i, levels);
  }

  I weights_at(int vector, F levels) const {
    return _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_load_ps(work_.scores + vector * kLanes), levels));
  }

  // Four vectors to one of bytes, in which four keys of a row lie side by side.
  void pack_weights(int vector, F levels) const {
    const I low = _mm512_packus_epi32(weights_at(vector, levels), weights_at(vector + 1, levels));
    const I high = _mm512_packus_epi32(weights_at(vector + 2, levels), weights_at(vector + 3, levels));
    const I order = _mm512_broadcast_i32x4(
        Lanes == 1 ? _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15)
                   : _mm_setr_epi8(0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15));
    _mm512_store_si512(work_.weights + vector * 16, _mm512_shuffle_epi8(_mm512_packus_epi16(low, high), order));
  }

  // Where row `row`'s dword of weights lies in the 64 bytes of keys 8 n .. 8 n + 7 (Lanes 2) or 4 n .. 4 n + 3.
  static constexpr int weight_at(int row, int group) {
    return Lanes == 1 ? 64 * group + 4 * row : 4 * (4 * (row / 2) + row % 2 + 2 * group);
  }

  // Values of the tile, interleaved by byte in groups of four keys.
  void interleave() {
    const size_t piece_bytes = size_t{kGroups} * kPieceVectors * 64;
    for (int key = 0; key < t_.values.count; key += 4) {
      const int8_t* rows[4];
      for (int i = 0; i < 4; ++i) rows[i] = row_at(t_.values, key + i);
      ask_ahead();
      for (int piece = 0; piece < pieces_; ++piece) {
        const __mmask64 mask = piece_mask(piece, t_.head_dim);
        I in[4];
        repeat<4>([&](auto i) STREAMO_INLINE { in[i] = _mm512_maskz_loadu_epi8(mask, rows[i] + piece * kPieceBytes); });
        const I low01 = _mm512_unpacklo_epi8(in[0], in[1]), high01 = _mm512_unpackhi_epi8(in[0], in[1]);
        const I low23 = _mm512_unpacklo_epi8(in[2], in[3]), high23 = _mm512_unpackhi_epi8(in[2], in[3]);
        int8_t* out = work_.panel + piece * piece_bytes + key / 4 * (kPieceVectors * 64);
        _mm512_store_si512(out, _mm512_unpacklo_epi16(low01, low23));
        _mm512_store_si512(out + 64, _mm512_unpackhi_epi16(low01, low23));
        _mm512_store_si512(out + 128, _mm512_unpacklo_epi16(high01, high23));
        _mm512_store_si512(out + 192, _mm512_unpackhi_epi16(high01, high23));
      }
    }
    if (t_.values.count % 8 == 0 || t_.values.count % 8 > 4) return;
    for (int piece = 0; piece < pieces_; ++piece) {  // add_values takes two groups at once
      int8_t* out = work_.panel + piece * piece_bytes + (t_.values.count / 8 * 2 + 1) * (kPieceVectors * 64);
      for (int i = 0; i < kPieceVectors; ++i) _mm512_store_si512(out + 64 * i, _mm512_setzero_si512());
    }
  }

  template <int Rows>
  void add_values(int row) {
    constexpr int columns = Rows <= 4 ? 4 : 2;
    for (int piece = 0; piece < pieces_; ++piece) {
      for (int column = 0; column < kPieceVectors; column += columns) add_columns<Rows, columns>(row, piece, column);
    }
  }

  template <int Rows, int Columns>
  void add_columns(int row, int piece, int column) {
    I sums[Rows][Columns];
    repeat<Rows>([&](auto r) STREAMO_INLINE {
      repeat<Columns>([&](auto c) STREAMO_INLINE { sums[r][c] = _mm512_setzero_si512(); });
    });
    const int8_t* panel = work_.panel + (piece * kGroups * kPieceVectors + column) * 64;
    const uint8_t* weights = work_.weights + 4 * row;  // with two lanes a row, row is 0
    for (int key = 0; key < t_.values.count; key += 8) {
      ask_ahead();
      repeat<2>([&](auto g) STREAMO_INLINE {
        I values[Columns];
        repeat<Columns>([&](auto c) STREAMO_INLINE {
          values[c] = _mm512_load_si512(panel + (g * kPieceVectors + c) * 64);
        });
        repeat<Rows>([&](auto r) STREAMO_INLINE {
          const I weight = broadcast<1>(weights + weight_at(r, g));
          repeat<Columns>([&](auto c) STREAMO_INLINE { sums[r][c] = dot(sums[r][c], weight, values[c]); });
        });
      });
      panel += 2 * kPieceVectors * 64;
      weights += 128 / Lanes;
    }
    repeat<Rows>([&](auto r) STREAMO_INLINE {
      const int lane = Lanes == 1 ? row + r : 4 * (r / 2) + r % 2;
      const F keep = _mm512_set1_ps(work_.keep[lane]), step = _mm512_set1_ps(work_.step[lane]);
      float* out = t_.sums + (static_cast<size_t>(row + r) * pieces_ + piece) * kPieceBytes + column * 16;
      repeat<Columns>([&](auto c) STREAMO_INLINE {
        const F older = _mm512_mul_ps(_mm512_load_ps(out + c * 16), keep);
        _mm512_store_ps(out + c * 16, _mm512_fmadd_ps(_mm512_cvtepi32_ps(sums[r][c]), step, older));
      });
    });
  }

  const FewRowsTile& t_;
  Workspace work_;
  int pieces_;
  int ahead_ = 0; /* rows of the next tile that were asked for, keys and values in turn */
};

void attend_int8(const FewRowsTile& tile) {
  if (lanes_per_row(tile.rows) == 2) {
    TileOfFewRows<2>(tile).run();
  } else {
    TileOfFewRows<1>(tile).run();
  }
}

// Unpacking leaves columns 16 j + 4 c .. + 3 of a piece in lanes 4 j .. 4 j + 3 of vector c.
void order_columns(const float* sums, int32_t head_dim, float* out) {
  for (int32_t i = 0; i < head_dim; i += 4) {
    const int32_t piece = i / kPieceBytes * kPieceBytes, lane = i % kPieceBytes / 16, vector = i % 16 / 4;
    std::memcpy(out + i, sums + piece + vector * 16 + lane * 4, 4 * sizeof(float));
  }
}

// ---------------------------------------------------------------------------------------------------- float

// Asks for the next tile, two cache lines of keys and of values a call: depth / 8 calls for two rows.
STREAMO_INLINE inline void ask_ahead(const FewRowsFloatTile& t, int call) {
  const int calls_a_row = t.head_dim / 16, row = call / calls_a_row;
  if (row >= t.next_keys.count) return;
  const std::ptrdiff_t at = t.next_keys.slots[row] * t.next_keys.stride + call % calls_a_row * 16;
  _mm_prefetch(reinterpret_cast<const char*>(t.next_keys.base + at), _MM_HINT_T1);
  _mm_prefetch(reinterpret_cast<const char*>(t.next_values.base + at), _MM_HINT_T1);
}

// Two lanes a row: sums of even and of odd columns.
template <int Lanes>
void scores_float_in_lanes(const FewRowsFloatTile& t) {
  const RowSource<float>& keys = t.keys;
  const int depth = t.head_dim;
  constexpr int row_lanes = kLanes / Lanes;
  for (int first = 0; first < keys.count; first += 8) {
    const float* row[8];
    int line = first * (depth / 16);
    F sums[8];
    repeat<8>([&](auto k) STREAMO_INLINE {
      row[k] = keys.base + keys.slots[first + k < keys.count ? first + k : keys.count - 1] * keys.stride;
      sums[k] = _mm512_setzero_ps();
    });
    for (int i = 0; i < depth; i += Lanes) {
      const F query = _mm512_load_ps(t.queries + i * row_lanes);
      if (i % 2 == 0) ask_ahead(t, line++);
      repeat<8>([&](auto k) STREAMO_INLINE {
        sums[k] = _mm512_fmadd_ps(query, _mm512_castsi512_ps(broadcast<Lanes>(row[k] + i)), sums[k]);
      });
    }
    alignas(64) float columns[8][kLanes];
    repeat<8>([&](auto k) STREAMO_INLINE {
      _mm512_store_ps(columns[k], Lanes == 1 ? sums[k] : _mm512_add_ps(sums[k], _mm512_permute_ps(sums[k], 0xB1)));
    });
    const __m256i index = _mm256_setr_epi32(0, 16, 32, 48, 64, 80, 96, 112);
    for (int r = 0; r < t.rows; ++r) {
      _mm256_storeu_ps(t.scores + r * kTileKeys + first, _mm256_i32gather_ps(columns[0] + r * Lanes, index, 4));
    }
  }
}

void scores_float(const FewRowsFloatTile& tile) {
  if (lanes_per_row(tile.rows) == 2) {
    scores_float_in_lanes<2>(tile);
  } else {
    scores_float_in_lanes<1>(tile);
  }
}

}  // namespace

const FewRowsKernels few_rows_avx512 = {Workspace::bytes, attend_int8, order_columns, scores_float};

}  // namespace streamo
