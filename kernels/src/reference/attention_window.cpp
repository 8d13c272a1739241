// The oracle of window attention: plain loops, double precision.
#include <cfloat>
#include <cmath>
#include <new>
#include <vector>

#include "attention/validate.h"
#include "common/status.h"

namespace streamo {
namespace {

// A head's row of `part` (0 queries, 1 keys), turned.
std::vector<double> turned(const streamo_window_attention& a, size_t row, size_t part, size_t head) {
  const size_t width = static_cast<size_t>(a.head_dim), half = width / 2, heads = static_cast<size_t>(a.heads);
  const float* x = a.qkv + ((row * 3 + part) * heads + head) * width;
  std::vector<double> out(width);
  for (size_t i = 0; i < half; ++i) {
    const double c = a.rope_cos[row * half + i], s = a.rope_sin[row * half + i];
    out[i] = x[i] * c - x[i + half] * s;
    out[i + half] = x[i + half] * c + x[i] * s;
  }
  return out;
}

void attend(const streamo_window_attention& a, size_t head, size_t row, size_t begin, size_t end,
            const std::vector<std::vector<double>>& keys) {
  const size_t width = static_cast<size_t>(a.head_dim), heads = static_cast<size_t>(a.heads);
  const std::vector<double> query = turned(a, row, 0, head);
  std::vector<double> scores(end - begin, 0.0);
  double maximum = -DBL_MAX, total = 0.0;
  for (size_t k = begin; k < end; ++k) {
    for (size_t i = 0; i < width; ++i) scores[k - begin] += query[i] * keys[k - begin][i];
    scores[k - begin] *= a.scale;
    maximum = std::fmax(maximum, scores[k - begin]);
  }
  std::vector<double> sums(width, 0.0);
  for (size_t k = begin; k < end; ++k) {
    const double weight = std::exp(scores[k - begin] - maximum);
    const float* value = a.qkv + ((k * 3 + 2) * heads + head) * width;
    total += weight;
    for (size_t i = 0; i < width; ++i) sums[i] += weight * value[i];
  }
  for (size_t i = 0; i < width; ++i) a.output[(row * heads + head) * width + i] = static_cast<float>(sums[i] / total);
}

}  // namespace
}  // namespace streamo

extern "C" streamo_status streamo_window_attention_reference(const streamo_window_attention* arguments) {
  using namespace streamo;
  clear_error();
  try {
    if (const streamo_status status = validate(arguments)) return status;
    const streamo_window_attention& a = *arguments;
    for (int32_t window = 0; window < a.window_count; ++window) {
      const size_t begin = static_cast<size_t>(a.window_starts[window]);
      const size_t end = static_cast<size_t>(a.window_starts[window + 1]);
      for (size_t head = 0; head < static_cast<size_t>(a.heads); ++head) {
        std::vector<std::vector<double>> keys;
        for (size_t row = begin; row < end; ++row) keys.push_back(turned(a, row, 1, head));
        for (size_t row = begin; row < end; ++row) attend(a, head, row, begin, end, keys);
      }
    }
    return STREAMO_OK;
  } catch (const std::bad_alloc&) {
    return refuse(STREAMO_OUT_OF_MEMORY, "the reference found no memory for its scores");
  }
}
