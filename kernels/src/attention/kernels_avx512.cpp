// Attention's inner kernels for AVX512 with VNNI.
#include "attention/few_rows.h"
#include "attention/intrinsics_avx512.h"
#include "attention/pack_avx512.h"
#include "attention/tiles.h"

namespace streamo {
namespace {

struct Avx512 {
  static constexpr int width = 16, narrow_width = 8, rows = 6, columns = 4;
  static constexpr int weight_levels = 255, weight_vectors = 4;
  static constexpr int key_zero_point = 128;  // vpdpbusd wants one operand without a sign
  using F = __m512;
  using I = __m512i;

  static F load(const float* from) { return _mm512_loadu_ps(from); }
  static void store(float* to, F a) { _mm512_storeu_ps(to, a); }
  static F set(float x) { return _mm512_set1_ps(x); }
  static F zero() { return _mm512_setzero_ps(); }
  static F add(F a, F b) { return _mm512_add_ps(a, b); }
  static F sub(F a, F b) { return _mm512_sub_ps(a, b); }
  static F mul(F a, F b) { return _mm512_mul_ps(a, b); }
  static F div(F a, F b) { return _mm512_div_ps(a, b); }
  static F max(F a, F b) { return _mm512_max_ps(a, b); }
  static F min(F a, F b) { return _mm512_min_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  static F fms(F a, F b, F c) { return _mm512_fmsub_ps(a, b, c); }
  static F abs(F a) { return _mm512_abs_ps(a); }
  static F first(F a, int count, F other) {
    return _mm512_mask_mov_ps(other, static_cast<__mmask16>((1u << count) - 1u), a);
  }
  static float reduce_max(F a) { return _mm512_reduce_max_ps(a); }
  static float reduce_add(F a) { return _mm512_reduce_add_ps(a); }

  // Both are exact at minus infinity: fraction 0, power 0.
  static F fraction(F x) { return _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF); }
  static F times_power_of_two(F a, F x) { return _mm512_scalef_ps(a, x); }

  static __m256 load_narrow(const float* from) { return _mm256_loadu_ps(from); }
  static void store_narrow(float* to, __m256 a) { _mm256_storeu_ps(to, a); }
  static __m256 add_narrow(__m256 a, __m256 b) { return _mm256_add_ps(a, b); }
  static __m256 sub_narrow(__m256 a, __m256 b) { return _mm256_sub_ps(a, b); }
  static __m256 mul_narrow(__m256 a, __m256 b) { return _mm256_mul_ps(a, b); }

  static I load_int(const void* from) { return _mm512_loadu_si512(from); }
  static void store_int(int32_t* to, I a) { _mm512_storeu_si512(to, a); }
  static I set_int(int32_t x) { return _mm512_set1_epi32(x); }
  static I broadcast_dword(const void* from) {
    int32_t dword;
    std::memcpy(&dword, from, 4);
    return _mm512_set1_epi32(dword);
  }
  static F to_float(I a) { return _mm512_cvtepi32_ps(a); }
  static I dot_keys(I sum, I keys, I query) { return _mm512_dpbusd_epi32(sum, keys, query); }
  // As an instruction, because GCC 12 copies every accumulator around the intrinsic here and spills them.
  static I dot_values(I sum, I weights, I values) {
    __asm__("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(weights), "v"(values));
    return sum;
  }
  static void store_codes(int8_t* to, F a) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(a)));
  }
  // Saturating packs interleave the vectors: of 16 dwords of 4 keys, dword 4 l + j is dword l of vector j.
  static void store_weights(uint8_t* to, const F (&a)[weight_vectors]) {
    const I low = _mm512_packus_epi32(_mm512_cvtps_epi32(a[0]), _mm512_cvtps_epi32(a[1]));
    const I high = _mm512_packus_epi32(_mm512_cvtps_epi32(a[2]), _mm512_cvtps_epi32(a[3]));
    _mm512_storeu_si512(to, _mm512_packus_epi16(low, high));
  }

  template <typename Element>
  static void pack_dwords(const RowSource<Element>& rows, int dwords, int panel_keys, uint32_t flip, void* out) {
    pack_dwords_avx512(rows, dwords, dwords, panel_keys, flip, out);
  }
  static void pack_values(const RowSource<int8_t>& rows, int head_dim, int8_t* out) {
    pack_values_avx512(rows, head_dim, out);
  }
  static void pack_angles(const RowSource<float>& cosines, const RowSource<float>& sines, const int32_t* pairs,
                          int pair_count, int panel_keys, float* out) {
    if (pairs[pair_count - 1] - pairs[0] == pair_count - 1) {
      pack_angles_avx512(cosines, sines, pairs[0], pair_count, panel_keys, out);
    } else {
      PlainPacking::pack_angles(cosines, sines, pairs, pair_count, panel_keys, out);
    }
  }
};

}  // namespace

const AttentionKernels attention_kernels_avx512 = Tiles<Avx512>::table("avx512vnni", &few_rows_avx512);

}  // namespace streamo
