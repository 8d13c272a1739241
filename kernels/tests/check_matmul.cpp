// Cases of the product with quantised weights: inputs, outputs, rows, bits, block, gated, bias, residual, padding.
//
// `padding` elements, which nobody may read or write, follow each row of input and output.
#include "check.h"

namespace {

constexpr double kRoundedNmse = 1e-9;  // against another kernel, which rounds the input to the same codes
constexpr float kUntouched = 12345.0f;

class Product {
 public:
  explicit Product(const Case& given) : padding_(given.integer("padding")) {
    source_.inputs = given.integer("inputs");
    source_.outputs = given.integer("outputs");
    source_.bits = given.integer("bits");
    source_.block = given.integer("block");
    source_.gated = given.integer("gated");
    fill_weights();
    call_.rows = given.integer("rows");
    call_.input_stride = source_.inputs + padding_;
    call_.output_stride = width() + padding_;
    fill_input();
    if (given.integer("bias") != 0) bias_ = random_.normals(source_.outputs);
    residual_ = random_.normals(call_.output_stride * call_.rows);
    call_.input = input_.data();
    call_.bias = bias_.empty() ? nullptr : bias_.data();
    call_.residual = given.integer("residual") != 0 ? residual_.data() : nullptr;
  }

  const streamo_weights_source& source() const { return source_; }
  streamo_matmul call(Floats& output) {
    output.assign(call_.output_stride * call_.rows, kUntouched);
    call_.output = output.data();
    return call_;
  }

  // NMSE of the row that is worst: rows differ in size a thousandfold.
  double worst_row(const Floats& found, const Floats& expected) const {
    double worst = 0;
    for (std::int32_t row = 0; row < call_.rows; ++row) {
      const std::size_t at = row * call_.output_stride;
      worst = std::fmax(worst, nmse(found.data() + at, expected.data() + at, width()));
    }
    return worst;
  }
  double error(const Floats& found, const Floats& expected) const {
    return nmse(found.data(), expected.data(), found.size());  // what lies between the rows is equal
  }
  bool padding_untouched(const Floats& output) const {
    for (std::size_t i = 0; i < output.size(); ++i) {
      if (i % call_.output_stride >= static_cast<std::size_t>(width()) && output[i] != kUntouched) return false;
    }
    return true;
  }

 private:
  std::int32_t width() const { return source_.gated != 0 ? source_.outputs / 2 : source_.outputs; }

  void fill_weights() {
    const std::size_t count = static_cast<std::size_t>(source_.inputs) * source_.outputs;
    const std::int32_t highest = source_.bits == 4 ? 7 : 127, lowest = source_.bits == 4 ? -8 : -127;
    codes_.assign((count * source_.bits + 7) / 8, 0);
    for (std::size_t i = 0; i < count; ++i) {
      const std::int32_t code = lowest + random_.below(highest - lowest + 1);
      if (source_.bits == 8) {
        codes_[i] = static_cast<std::uint8_t>(code);
      } else {
        codes_[i / 2] |= static_cast<std::uint8_t>((code & 15) << (i % 2 * 4));
      }
    }
    const std::int32_t blocks = (source_.inputs + source_.block - 1) / source_.block;
    for (std::int32_t i = 0; i < blocks * source_.outputs; ++i) {
      scales_.push_back(static_cast<float>((0.5 + random_.uniform()) / highest));
    }
    source_.codes = codes_.data();
    source_.scales = scales_.data();
  }

  // Rows differ in size, and a few blocks are zero.
  void fill_input() {
    for (std::int32_t row = 0; row < call_.rows; ++row) {
      const double size = std::pow(10.0, 4 * random_.uniform() - 2);
      bool zero = false;
      for (std::int32_t i = 0; i < source_.inputs; ++i) {
        if (i % source_.block == 0) zero = random_.uniform() < 0.05;
        input_.push_back(zero ? 0.0f : static_cast<float>(size * random_.normal()));
      }
      input_.insert(input_.end(), padding_, NAN);
    }
  }

  Random random_;
  std::int32_t padding_;
  streamo_weights_source source_ = {};
  streamo_matmul call_ = {};
  std::vector<std::uint8_t> codes_;
  Floats scales_, input_, bias_, residual_;
};

// The product with the instruction set in use; packed with the threads it runs on.
bool multiply(Product& product, const streamo_threads* threads, const std::string& set, Floats& output,
              Complaints& complaints) {
  streamo_weights* weights = nullptr;
  if (!succeeded(streamo_weights_pack(&product.source(), threads, &weights), set, complaints)) return false;
  const streamo_matmul call = product.call(output);
  const bool done = succeeded(streamo_matmul_run(weights, &call, threads), set, complaints);
  streamo_weights_destroy(weights);
  return done;
}

}  // namespace

Complaints check_matmul(const Case& given, const Bench& bench) {
  Product product(given);
  Complaints complaints;
  Floats expected, plain;
  const streamo_matmul call = product.call(expected);
  if (!succeeded(streamo_matmul_reference(&product.source(), &call), "oracle", complaints)) return complaints;
  streamo_select_instruction_set("portable");
  if (!multiply(product, nullptr, "portable", plain, complaints)) return complaints;
  for (const std::string& set : bench.sets) {
    streamo_select_instruction_set(set.c_str());
    Floats found, shared;
    if (!multiply(product, nullptr, set, found, complaints)) continue;
    if (!multiply(product, bench.two_threads, set, shared, complaints)) continue;
    expect_near(product.error(found, expected), kInt8Nmse, set, complaints);
    expect_near(product.worst_row(found, plain), kRoundedNmse, set + " against portable", complaints);
    if (!same_bytes(found, shared)) complaints.push_back(set + ": two threads give other bits than one");
    if (!product.padding_untouched(found)) complaints.push_back(set + ": wrote between the output's rows");
  }
  return complaints;
}
