// Attention's inner kernels for AVX2 with FMA.
#include "attention/tiles.h"

#include <immintrin.h>

namespace streamo {
namespace {

struct Avx2 : PlainPacking {
  static constexpr int width = 8, narrow_width = 8, rows = 6, columns = 2;
  static constexpr int weight_levels = 255, weight_vectors = 1, key_zero_point = 0;
  using F = __m256;
  using I = __m256i;

  static F load(const float* from) { return _mm256_loadu_ps(from); }
  static void store(float* to, F a) { _mm256_storeu_ps(to, a); }
  static F set(float x) { return _mm256_set1_ps(x); }
  static F zero() { return _mm256_setzero_ps(); }
  static F add(F a, F b) { return _mm256_add_ps(a, b); }
  static F sub(F a, F b) { return _mm256_sub_ps(a, b); }
  static F mul(F a, F b) { return _mm256_mul_ps(a, b); }
  static F div(F a, F b) { return _mm256_div_ps(a, b); }
  static F max(F a, F b) { return _mm256_max_ps(a, b); }
  static F min(F a, F b) { return _mm256_min_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
  static F fms(F a, F b, F c) { return _mm256_fmsub_ps(a, b, c); }
  static F abs(F a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a); }
  static F first(F a, int count, F other) {
    const I lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return _mm256_blendv_ps(other, a, _mm256_castsi256_ps(_mm256_cmpgt_epi32(_mm256_set1_epi32(count), lane)));
  }
  static float reduce_max(F a) {
    __m128 x = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    x = _mm_max_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)));
  }
  static float reduce_add(F a) {
    __m128 x = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    x = _mm_add_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)));
  }

  // Exponents below the smallest normal number count as -126, and give 0.
  static F whole(F x) { return _mm256_floor_ps(_mm256_max_ps(x, _mm256_set1_ps(-126.0f))); }
  static F fraction(F x) { return _mm256_sub_ps(_mm256_max_ps(x, _mm256_set1_ps(-126.0f)), whole(x)); }
  static F times_power_of_two(F a, F x) {
    const I exponent = _mm256_add_epi32(_mm256_cvtps_epi32(whole(x)), _mm256_set1_epi32(127));
    const F power = _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23));
    const F counts = _mm256_cmp_ps(x, _mm256_set1_ps(-126.0f), _CMP_GT_OQ);
    return _mm256_and_ps(_mm256_mul_ps(a, power), counts);
  }

  static F load_narrow(const float* from) { return load(from); }
  static void store_narrow(float* to, F a) { store(to, a); }
  static F add_narrow(F a, F b) { return add(a, b); }
  static F sub_narrow(F a, F b) { return sub(a, b); }
  static F mul_narrow(F a, F b) { return _mm256_mul_ps(a, b); }

  static I load_int(const void* from) { return _mm256_loadu_si256(static_cast<const I*>(from)); }
  static void store_int(int32_t* to, I a) { _mm256_storeu_si256(reinterpret_cast<I*>(to), a); }
  static I set_int(int32_t x) { return _mm256_set1_epi32(x); }
  static I broadcast_dword(const void* from) {
    int32_t dword;
    std::memcpy(&dword, from, 4);
    return _mm256_set1_epi32(dword);
  }
  static F to_float(I a) { return _mm256_cvtepi32_ps(a); }
  static I add_pairs(I sum, I products) {
    return _mm256_add_epi32(sum, _mm256_madd_epi16(products, _mm256_set1_epi16(1)));
  }
  // vpmaddubsw adds two products in 16 bits, and 127 * 128 * 2 fits: |query| * (key with the query's sign).
  static I dot_keys(I sum, I keys, I query) {
    return add_pairs(sum, _mm256_maddubs_epi16(_mm256_abs_epi8(query), _mm256_sign_epi8(keys, query)));
  }
  // 255 * 128 * 2 would not fit: the even weights first, then the odd ones.
  static I dot_values(I sum, I weights, I values) {
    const I even = _mm256_and_si256(weights, _mm256_set1_epi16(0xff));
    const I odd = _mm256_andnot_si256(_mm256_set1_epi16(0xff), weights);
    sum = add_pairs(sum, _mm256_maddubs_epi16(even, values));
    return add_pairs(sum, _mm256_maddubs_epi16(odd, values));
  }

  static __m128i to_words(F a) {
    const I dwords = _mm256_cvtps_epi32(a);
    return _mm_packs_epi32(_mm256_castsi256_si128(dwords), _mm256_extracti128_si256(dwords, 1));
  }
  static void store_codes(int8_t* to, F a) {
    const __m128i words = to_words(a);
    _mm_storel_epi64(reinterpret_cast<__m128i*>(to), _mm_packs_epi16(words, words));
  }
  static void store_weights(uint8_t* to, F a) {
    const __m128i words = to_words(a);
    _mm_storel_epi64(reinterpret_cast<__m128i*>(to), _mm_packus_epi16(words, words));
  }
};

}  // namespace

const AttentionKernels attention_kernels_avx2 = Tiles<Avx2>::table("avx2");

}  // namespace streamo
