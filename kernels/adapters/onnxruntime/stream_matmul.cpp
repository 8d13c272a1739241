// streamo::StreamMatMul: a product with quantised weights, which are packed once, when the session is made.
#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <string>

#include "operators.h"

namespace streamo::ort {
namespace {

enum : std::size_t { kInput, kCodes, kScales, kBias, kResidual };

constexpr Input kInputs[] = {{kFloat}, {kUint8}, {kFloat}, {kFloat, kOptional}, {kFloat, kOptional}};
constexpr ElementType kOutputs[] = {kFloat};
constexpr std::int64_t kWorthThreads = 1 << 20;  // bytes of codes

struct ThreadsDeleter {
  void operator()(streamo_threads* threads) const { streamo_threads_destroy(threads); }
};
struct WeightsDeleter {
  void operator()(streamo_weights* weights) const { streamo_weights_destroy(weights); }
};

Tensor constant(const Node& node, std::size_t index, const char* name) {
  int is_constant = 0;
  const Value* value = nullptr;
  Status* status = GetConstantInput::of(node.api)(node.info, index, &is_constant, &value);
  if (status != nullptr) ReleaseStatus::of(node.api)(status);
  if (status != nullptr || is_constant == 0 || value == nullptr) {
    refuse(kInvalidArgument, std::string(name) + ": expected an initializer of the graph, found a computed tensor");
  }
  return describe(node.api, value);
}

// ONNX Runtime maps the file of weights, and nothing reads them there once they are packed: let the system have their
// pages, which would count as this process's memory for good. Advice only: what is read after all comes from the file.
void release_pages(const void* data, std::int64_t bytes) {
#ifdef MADV_PAGEOUT
  const auto page = static_cast<std::uintptr_t>(sysconf(_SC_PAGESIZE));
  const auto address = reinterpret_cast<std::uintptr_t>(data);
  const std::uintptr_t first = (address + page - 1) / page * page;
  const std::uintptr_t last = (address + static_cast<std::uintptr_t>(bytes)) / page * page;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_PAGEOUT);
#else
  static_cast<void>(data), static_cast<void>(bytes);
#endif
}

class StreamMatMul : public Kernel {
 public:
  explicit StreamMatMul(const Node& node) {
    streamo_weights_source source{};
    source.bits = to_int32("bits", attribute_int(node.api, node.info, "bits"));
    source.block = to_int32("block_size", attribute_int(node.api, node.info, "block_size"));
    source.gated = to_int32("gated", attribute_int(node.api, node.info, "gated"));
    const Tensor codes = constant(node, kCodes, "codes"), scales = constant(node, kScales, "scales");
    if (scales.rank != 2) {
      refuse(kInvalidArgument, "scales: expected 2 dimensions, found " + std::to_string(scales.rank));
    }
    inputs_ = scales.dims[0] * source.block;
    outputs_ = scales.dims[1];
    gated_ = source.gated != 0;
    if (codes.count() * 8 != inputs_ * outputs_ * source.bits) {
      refuse(kInvalidArgument, "codes: expected " + std::to_string(inputs_ * outputs_ * source.bits / 8) +
                                   " bytes, found " + std::to_string(codes.count()));
    }
    source.inputs = to_int32("inputs", inputs_);
    source.outputs = to_int32("outputs", outputs_);
    source.codes = codes.data;
    source.scales = scales.as<const float>();
    // No call is under way, so ONNX Runtime lends no threads yet.
    std::unique_ptr<streamo_threads, ThreadsDeleter> threads;
    if (node.threads > 1 && codes.count() >= kWorthThreads) threads.reset(streamo_threads_create(node.threads));
    streamo_weights* packed = nullptr;
    accept("packing weights", streamo_weights_pack(&source, threads.get(), &packed));
    weights_.reset(packed);
    release_pages(codes.data, codes.count());
    release_pages(scales.data, scales.count() * std::int64_t{sizeof(float)});
  }

  void run(Call& call) override {
    const std::int64_t width = gated_ ? outputs_ / 2 : outputs_;
    const Tensor input = call.input(kInput, "input", {kAny, inputs_});
    const std::int64_t rows = input.dims[0];
    const Tensor bias = call.optional(kBias, "bias", {outputs_});
    const Tensor residual = call.optional(kResidual, "residual", {rows, width});
    streamo_matmul arguments{};
    arguments.rows = to_int32("rows", rows);
    arguments.input = input.as<const float>();
    arguments.bias = bias.as<const float>();
    arguments.residual = residual.as<const float>();
    arguments.output = static_cast<float*>(call.output(0, {rows, width}));
    arguments.input_stride = inputs_;
    arguments.output_stride = width;
    accept("the product", streamo_matmul_run(weights_.get(), &arguments, call.threads()));
  }

 private:
  std::int64_t inputs_ = 0, outputs_ = 0;
  bool gated_ = false;
  std::unique_ptr<streamo_weights, WeightsDeleter> weights_;
};

}  // namespace

const Description kStreamMatMul = {
    "StreamMatMul", kInputs, std::size(kInputs), kOutputs, std::size(kOutputs),
    [](const Node& node) -> std::unique_ptr<Kernel> { return std::make_unique<StreamMatMul>(node); }};

}  // namespace streamo::ort
