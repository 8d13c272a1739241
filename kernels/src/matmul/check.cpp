// Arguments of the matrix product that do not fit, and what is said of them.
#include "common/status.h"
#include "matmul/weights.h"

namespace streamo {
namespace {
// Far above any model, and low enough that no index below overflows.
constexpr std::int32_t most_inputs = 1 << 24, most_outputs = 1 << 30, most_rows = 1 << 24;
}  // namespace

streamo_status check_weights_source(const streamo_weights_source* source) {
  const auto bad = STREAMO_BAD_ARGUMENT;
  if (source == nullptr) return refuse(bad, "weights: expected a source, found NULL");
  if (source->codes == nullptr) return refuse(bad, "weights: expected codes, found NULL");
  if (source->scales == nullptr) return refuse(bad, "weights: expected scales, found NULL");
  if (source->inputs < 1) return refuse(bad, "weights: expected at least 1 input (K), found %d", source->inputs);
  if (source->outputs < 1) return refuse(bad, "weights: expected at least 1 output (N), found %d", source->outputs);
  if (source->inputs > most_inputs || source->outputs > most_outputs) {
    return refuse(STREAMO_UNSUPPORTED, "weights: expected at most %d inputs and %d outputs, found %d and %d",
                  most_inputs, most_outputs, source->inputs, source->outputs);
  }
  if (source->bits != 4 && source->bits != 8) {
    return refuse(bad, "weights: expected codes of 4 or 8 bits, found %d bits", source->bits);
  }
  if (source->block < 16 || source->block > 256 || source->block % 16 != 0) {
    return refuse(bad, "weights: expected a block that is a multiple of 16 from 16 to 256, found %d", source->block);
  }
  if (source->gated != 0 && source->gated != 1) {
    return refuse(bad, "weights: expected gated to be 0 or 1, found %d", source->gated);
  }
  if ((source->bits == 4 || source->gated) && source->outputs % 2 != 0) {
    return refuse(bad, "weights: expected an even number of outputs (N) for %s, found %d",
                  source->bits == 4 ? "4-bit codes" : "gate and up", source->outputs);
  }
  return STREAMO_OK;
}

streamo_status check_matmul(const streamo_matmul* arguments, std::int32_t inputs, std::int32_t width) {
  const auto bad = STREAMO_BAD_ARGUMENT;
  if (arguments == nullptr) return refuse(bad, "matmul: expected arguments, found NULL");
  if (arguments->rows < 1) return refuse(bad, "matmul: expected at least 1 row, found %d", arguments->rows);
  if (arguments->rows > most_rows) {
    return refuse(STREAMO_UNSUPPORTED, "matmul: expected at most %d rows, found %d", most_rows, arguments->rows);
  }
  if (arguments->input == nullptr) return refuse(bad, "matmul: expected an input, found NULL");
  if (arguments->output == nullptr) return refuse(bad, "matmul: expected an output, found NULL");
  if (arguments->input_stride < inputs) {
    return refuse(bad, "matmul: expected an input stride of at least %d elements, found %lld", inputs,
                  static_cast<long long>(arguments->input_stride));
  }
  if (arguments->output_stride < width) {
    return refuse(bad, "matmul: expected an output stride of at least %d elements, found %lld", width,
                  static_cast<long long>(arguments->output_stride));
  }
  return STREAMO_OK;
}

}  // namespace streamo
