// The matrix product with quantised weights in plain loops and double precision: the oracle of the kernels.
// Reads the bundle's codes directly and leaves the input as it is, so it shares nothing with packing or quantising.
#include <algorithm>
#include <cmath>
#include <new>
#include <vector>

#include "common/status.h"
#include "matmul/weights.h"

namespace streamo {
namespace {

double weight(const streamo_weights_source& source, std::int32_t k, std::int32_t column) {
  const std::size_t index = static_cast<std::size_t>(k) * source.outputs + column;
  const double scale = source.scales[static_cast<std::size_t>(k / source.block) * source.outputs + column];
  if (source.bits == 8) return scale * static_cast<const std::int8_t*>(source.codes)[index];
  const int byte = static_cast<const std::uint8_t*>(source.codes)[index / 2];
  const int nibble = index % 2 == 0 ? byte & 15 : byte >> 4;
  return scale * (nibble < 8 ? nibble : nibble - 16);
}

// sums[row] = input . column + bias, for every row.
void multiply_column(const streamo_weights_source& source, const streamo_matmul& call, std::int32_t column,
                     std::vector<double>& sums) {
  std::fill(sums.begin(), sums.end(), call.bias == nullptr ? 0.0 : call.bias[column]);
  std::vector<double> weights(source.inputs);
  for (std::int32_t k = 0; k < source.inputs; ++k) weights[k] = weight(source, k, column);
  for (std::int32_t row = 0; row < call.rows; ++row) {
    const float* x = call.input + row * call.input_stride;
    double sum = 0.0;
    for (std::int32_t k = 0; k < source.inputs; ++k) sum += x[k] * weights[k];
    sums[row] += sum;
  }
}

void multiply(const streamo_weights_source& source, const streamo_matmul& call) {
  const std::int32_t width = source.gated ? source.outputs / 2 : source.outputs;
  std::vector<double> values(call.rows), up(source.gated ? call.rows : 0);
  for (std::int32_t column = 0; column < width; ++column) {
    multiply_column(source, call, column, values);
    if (source.gated) {
      multiply_column(source, call, column + width, up);
      for (std::int32_t row = 0; row < call.rows; ++row) values[row] *= up[row] / (1.0 + std::exp(-values[row]));
    }
    for (std::int32_t row = 0; row < call.rows; ++row) {
      const std::int64_t at = row * call.output_stride + column;
      if (call.residual != nullptr) values[row] += call.residual[at];
      call.output[at] = static_cast<float>(values[row]);
    }
  }
}

}  // namespace
}  // namespace streamo

extern "C" streamo_status streamo_matmul_reference(const streamo_weights_source* source,
                                                   const streamo_matmul* arguments) {
  using namespace streamo;
  clear_error();
  streamo_status status = check_weights_source(source);
  if (status != STREAMO_OK) return status;
  status = check_matmul(arguments, source->inputs, source->gated ? source->outputs / 2 : source->outputs);
  if (status != STREAMO_OK) return status;
  try {
    multiply(*source, *arguments);
  } catch (const std::bad_alloc&) {
    return refuse(STREAMO_OUT_OF_MEMORY, "matmul: no memory for the reference's %d sums", arguments->rows);
  }
  return STREAMO_OK;
}
