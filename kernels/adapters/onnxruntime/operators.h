// The operators of domain `streamo` for ONNX Runtime; `edge/contract.py` says what each takes.
#pragma once

#include <cstddef>
#include <iterator>
#include <memory>

#include "gpu_device.h"
#include "ort_abi.h"
#include "tensors.h"

namespace streamo::ort {

// One node of a graph.
class Kernel {
 public:
  virtual ~Kernel() = default;
  virtual void run(Call& call) = 0;
};

struct Node {
  const Api* api;
  const KernelInfo* info;
  int threads;     // how many a session runs with, a hint
  GpuDevice* gpu;  // where the node runs, if it does on a GPU; null: on the CPU
};

struct Input {
  ElementType type;
  Characteristic characteristic = kRequired;
  bool on_host = false;  // also for a node on a GPU: it decides what is launched
};

// One kind of node: what ONNX Runtime asks about it, and how it is made.
struct Description {
  const char* name;
  const Input* inputs;
  std::size_t input_count;
  const ElementType* outputs;
  std::size_t output_count;
  std::unique_ptr<Kernel> (*make)(const Node& node);
};

// Where a node on `gpu` puts its work.
inline void* stream_of(const GpuDevice& gpu, const Call& call) { return gpu.on_host() ? nullptr : call.gpu_stream(); }

extern const Description kSpanAttention;
extern const Description kSpanAttentionInt8;
extern const Description kStreamMatMul;
extern const Description kWindowAttention;

}  // namespace streamo::ort
