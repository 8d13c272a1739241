#include <arm_neon.h>

#include "common/peaks.h"

namespace streamo {

double int8_peak_i8mm(std::int64_t rounds) {
  constexpr int chains = 16;
  int32x4_t sums[chains];
  for (int c = 0; c < chains; ++c) sums[c] = vdupq_n_s32(c);
  const int8x16_t left = vdupq_n_s8(static_cast<std::int8_t>(rounds & 3));
  const int8x16_t right = vdupq_n_s8(static_cast<std::int8_t>(rounds & 1));
  for (std::int64_t round = 0; round < rounds; ++round) {
    for (int c = 0; c < chains; ++c) sums[c] = vmmlaq_s32(sums[c], left, right);
  }
  for (int c = 1; c < chains; ++c) sums[0] = vaddq_s32(sums[0], sums[c]);
  peak_sink = vaddvq_s32(sums[0]);
  return 2.0 * 32 * chains * static_cast<double>(rounds);
}

}  // namespace streamo
