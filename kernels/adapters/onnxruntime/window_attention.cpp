// streamo::WindowAttention: the vision tower's attention inside windows of patches.
#include <string>

#include "operators.h"

namespace streamo::ort {
namespace {

enum : std::size_t { kQkv, kRopeCos, kRopeSin, kWindowStarts };

constexpr Input kInputs[] = {{kFloat}, {kFloat}, {kFloat}, {kInt32, kRequired, true}};
constexpr ElementType kOutputs[] = {kFloat};

class WindowAttention : public Kernel {
 public:
  explicit WindowAttention(const Node& node)
      : gpu_(node.gpu),
        heads_(to_int32("num_heads", attribute_int(node.api, node.info, "num_heads"))),
        scale_(attribute_float(node.api, node.info, "scale")) {}

  void run(Call& call) override {
    const Tensor qkv = call.input(kQkv, "qkv", {kAny, kAny});
    const std::int64_t rows = qkv.dims[0], width = qkv.dims[1];
    if (heads_ < 1 || width % (3 * std::int64_t{heads_}) != 0) {
      refuse(kInvalidArgument, "qkv: expected a width of 3 heads D with " + std::to_string(heads_) +
                                   " heads, found " + std::to_string(width));
    }
    const std::int64_t head_dim = width / (3 * std::int64_t{heads_});
    const Tensor starts = call.input(kWindowStarts, "window_starts", {kAny});
    if (starts.dims[0] < 1) refuse(kInvalidArgument, "window_starts: expected at least 1 number, found none");
    streamo_window_attention arguments{};
    arguments.heads = heads_;
    arguments.head_dim = to_int32("head width", head_dim);
    arguments.rows = to_int32("rows", rows);
    arguments.window_count = to_int32("windows", starts.dims[0] - 1);
    arguments.scale = scale_;
    arguments.qkv = qkv.as<const float>();
    arguments.rope_cos = call.input(kRopeCos, "rope_cos", {rows, head_dim / 2}).as<const float>();
    arguments.rope_sin = call.input(kRopeSin, "rope_sin", {rows, head_dim / 2}).as<const float>();
    arguments.window_starts = starts.as<const std::int32_t>();
    arguments.output = static_cast<float*>(call.output(0, {rows, heads_ * head_dim}));
    if (gpu_ != nullptr) {
      gpu_->attend_in_windows(arguments, stream_of(*gpu_, call));
    } else {
      accept("window attention", streamo_window_attention_run(&arguments, call.threads()));
    }
  }

 private:
  GpuDevice* gpu_;
  std::int32_t heads_;
  float scale_;
};

}  // namespace

const Description kWindowAttention = {
    "WindowAttention", kInputs, std::size(kInputs), kOutputs, std::size(kOutputs),
    [](const Node& node) -> std::unique_ptr<Kernel> { return std::make_unique<WindowAttention>(node); }};

}  // namespace streamo::ort
