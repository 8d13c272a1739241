#include "gpu/resize_table.h"

#include <algorithm>
#include <cmath>

namespace streamo::gpu {
namespace {

constexpr double kReach = 2.0;           // of the cubic filter, in pixels of the coarser side
constexpr double kOne = 1 << 22;         // fixed point: 32 bits less 8 of the pixel and 2 of overshoot

// Keys' cubic with a = -1/2.
double cubic(double x) {
  constexpr double a = -0.5;
  x = std::fabs(x);
  if (x < 1.0) return ((a + 2.0) * x - (a + 3.0)) * x * x + 1.0;
  if (x < 2.0) return (((x - 5.0) * x + 8.0) * x - 4.0) * a;
  return 0.0;
}

int32_t to_fixed(double weight) {
  return static_cast<int32_t>(weight < 0 ? weight * kOne - 0.5 : weight * kOne + 0.5);
}

}  // namespace

ResizeTable make_resize_table(int32_t size, int32_t new_size) {
  ResizeTable table;
  table.size = size;
  table.new_size = new_size;
  const double scale = static_cast<double>(size) / new_size;
  const double stretch = std::max(scale, 1.0);  // the filter widens where the picture shrinks
  const double reach = kReach * stretch;
  table.taps = static_cast<int32_t>(std::ceil(reach)) * 2 + 1;
  table.starts.resize(new_size);
  table.counts.resize(new_size);
  table.weights.assign(static_cast<size_t>(table.taps) * new_size, 0);
  std::vector<double> weights(table.taps);
  for (int32_t place = 0; place < new_size; ++place) {
    const double centre = (place + 0.5) * scale;
    const int32_t start = std::max(static_cast<int32_t>(centre - reach + 0.5), 0);
    const int32_t count = std::min(static_cast<int32_t>(centre + reach + 0.5), size) - start;
    double sum = 0.0;
    for (int32_t tap = 0; tap < count; ++tap) {
      weights[tap] = cubic((tap + start - centre + 0.5) * (1.0 / stretch));
      sum += weights[tap];
    }
    for (int32_t tap = 0; tap < count; ++tap) {
      const double share = sum != 0.0 ? weights[tap] / sum : weights[tap];
      table.weights[static_cast<size_t>(tap) * new_size + place] = to_fixed(share);
    }
    table.starts[place] = start;
    table.counts[place] = count;
  }
  return table;
}

}  // namespace streamo::gpu
