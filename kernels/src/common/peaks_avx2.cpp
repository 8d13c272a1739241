#include <immintrin.h>

#include "common/peaks.h"

namespace streamo {
namespace {

constexpr int chains = 10;

double sum_of(__m256 values) {
  alignas(32) float lanes[8];
  _mm256_store_ps(lanes, values);
  double sum = 0;
  for (float lane : lanes) sum += lane;
  return sum;
}

}  // namespace

double int8_peak_avx2(std::int64_t rounds) {
  __m256i sums[chains];
  for (int c = 0; c < chains; ++c) sums[c] = _mm256_set1_epi32(c);
  __m256i left = _mm256_set1_epi8(static_cast<char>(rounds & 3));
  const __m256i right = _mm256_set1_epi8(static_cast<char>(rounds & 1));
  const __m256i ones = _mm256_set1_epi16(1);
  for (std::int64_t round = 0; round < rounds; ++round) {
    for (int c = 0; c < chains; ++c) {
      __asm__ volatile("" : "+x"(left));  // or the products would be computed once for all
      const __m256i pairs = _mm256_maddubs_epi16(left, right);
      sums[c] = _mm256_add_epi32(sums[c], _mm256_madd_epi16(pairs, ones));
    }
  }
  for (int c = 1; c < chains; ++c) sums[0] = _mm256_add_epi32(sums[0], sums[c]);
  peak_sink = sum_of(_mm256_cvtepi32_ps(sums[0]));
  return 2.0 * 32 * chains * static_cast<double>(rounds);
}

double float_peak_avx2(std::int64_t rounds) {
  __m256 sums[chains];
  for (int c = 0; c < chains; ++c) sums[c] = _mm256_set1_ps(static_cast<float>(c));
  const __m256 factor = _mm256_set1_ps(rounds & 1 ? 0.5F : 0.25F);
  for (std::int64_t round = 0; round < rounds; ++round) {
    for (int c = 0; c < chains; ++c) sums[c] = _mm256_fmadd_ps(sums[c], factor, factor);
  }
  for (int c = 1; c < chains; ++c) sums[0] = _mm256_add_ps(sums[0], sums[c]);
  peak_sink = sum_of(sums[0]);
  return 2.0 * 8 * chains * static_cast<double>(rounds);
}

}  // namespace streamo
