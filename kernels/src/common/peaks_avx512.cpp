#include <immintrin.h>

#include <cstring>

#include "common/peaks.h"

namespace streamo {
namespace {

constexpr int chains = 16;  // more than latency times ports, few enough for the registers

// The sum of the lanes, through memory: GCC 12's own reductions warn about themselves.
template <typename Lane, typename Vector>
double sum_of(Vector values) {
  alignas(64) Lane lanes[16];
  std::memcpy(lanes, &values, sizeof lanes);
  double sum = 0;
  for (Lane lane : lanes) sum += static_cast<double>(lane);
  return sum;
}

}  // namespace

double int8_peak_avx512vnni(std::int64_t rounds) {
  __m512i sums[chains];
  for (int c = 0; c < chains; ++c) sums[c] = _mm512_set1_epi32(c);
  const __m512i left = _mm512_set1_epi8(static_cast<char>(rounds & 3));
  const __m512i right = _mm512_set1_epi8(static_cast<char>(rounds & 1));
  for (std::int64_t round = 0; round < rounds; ++round) {
    for (int c = 0; c < chains; ++c) sums[c] = _mm512_dpbusd_epi32(sums[c], left, right);
  }
  for (int c = 1; c < chains; ++c) sums[0] = _mm512_add_epi32(sums[0], sums[c]);
  peak_sink = sum_of<std::int32_t>(sums[0]);
  return 2.0 * 64 * chains * static_cast<double>(rounds);
}

double float_peak_avx512vnni(std::int64_t rounds) {
  __m512 sums[chains];
  for (int c = 0; c < chains; ++c) sums[c] = _mm512_set1_ps(static_cast<float>(c));
  const __m512 factor = _mm512_set1_ps(rounds & 1 ? 0.5F : 0.25F);
  for (std::int64_t round = 0; round < rounds; ++round) {
    for (int c = 0; c < chains; ++c) sums[c] = _mm512_fmadd_ps(sums[c], factor, factor);
  }
  for (int c = 1; c < chains; ++c) sums[0] = _mm512_add_ps(sums[0], sums[c]);
  peak_sink = sum_of<float>(sums[0]);
  return 2.0 * 16 * chains * static_cast<double>(rounds);
}

}  // namespace streamo
