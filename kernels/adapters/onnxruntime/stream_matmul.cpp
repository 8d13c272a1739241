// streamo::StreamMatMul: a product with quantised weights. For the CPU they are packed once, when the session is made; a
// GPU reads them as they are, from where ONNX Runtime has put them.
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
  explicit StreamMatMul(const Node& node) : gpu_(node.gpu) {
    source_.bits = to_int32("bits", attribute_int(node.api, node.info, "bits"));
    source_.block = to_int32("block_size", attribute_int(node.api, node.info, "block_size"));
    source_.gated = to_int32("gated", attribute_int(node.api, node.info, "gated"));
    if (gpu_ == nullptr) pack(node);
  }

  void run(Call& call) override {
    streamo_weights_source source = source_;
    if (gpu_ != nullptr) take_weights(source, call.input(kCodes), call.input(kScales));
    const std::int64_t outputs = source.outputs, width = source.gated != 0 ? outputs / 2 : outputs;
    const Tensor input = call.input(kInput, "input", {kAny, source.inputs});
    const std::int64_t rows = input.dims[0];
    const Tensor bias = call.optional(kBias, "bias", {outputs});
    const Tensor residual = call.optional(kResidual, "residual", {rows, width});
    streamo_matmul arguments{};
    arguments.rows = to_int32("rows", rows);
    arguments.input = input.as<const float>();
    arguments.bias = bias.as<const float>();
    arguments.residual = residual.as<const float>();
    arguments.output = static_cast<float*>(call.output(0, {rows, width}));
    arguments.input_stride = source.inputs;
    arguments.output_stride = width;
    if (gpu_ != nullptr) {
      gpu_->multiply(source, arguments, stream_of(*gpu_, call));
    } else {
      accept("the product", streamo_matmul_run(weights_.get(), &arguments, call.threads()));
    }
  }

 private:
  void pack(const Node& node) {
    const Tensor codes = constant(node, kCodes, "codes"), scales = constant(node, kScales, "scales");
    take_weights(source_, codes, scales);
    // No call is under way, so ONNX Runtime lends no threads yet.
    std::unique_ptr<streamo_threads, ThreadsDeleter> threads;
    if (node.threads > 1 && codes.count() >= kWorthThreads) threads.reset(streamo_threads_create(node.threads));
    streamo_weights* packed = nullptr;
    accept("packing weights", streamo_weights_pack(&source_, threads.get(), &packed));
    weights_.reset(packed);
    release_pages(codes.data, codes.count());
    release_pages(scales.data, scales.count() * std::int64_t{sizeof(float)});
  }

  static void take_weights(streamo_weights_source& source, const Tensor& codes, const Tensor& scales) {
    if (scales.rank != 2) {
      refuse(kInvalidArgument, "scales: expected 2 dimensions, found " + std::to_string(scales.rank));
    }
    const std::int64_t inputs = scales.dims[0] * source.block, outputs = scales.dims[1];
    if (codes.count() * 8 != inputs * outputs * source.bits) {
      refuse(kInvalidArgument, "codes: expected " + std::to_string(inputs * outputs * source.bits / 8) +
                                   " bytes, found " + std::to_string(codes.count()));
    }
    source.inputs = to_int32("inputs", inputs);
    source.outputs = to_int32("outputs", outputs);
    source.codes = codes.data;
    source.scales = scales.as<const float>();
  }

  GpuDevice* gpu_;
  streamo_weights_source source_{};
  std::unique_ptr<streamo_weights, WeightsDeleter> weights_;
};

}  // namespace

const Description kStreamMatMul = {
    "StreamMatMul", kInputs, std::size(kInputs), kOutputs, std::size(kOutputs),
    [](const Node& node) -> std::unique_ptr<Kernel> { return std::make_unique<StreamMatMul>(node); }};

}  // namespace streamo::ort
