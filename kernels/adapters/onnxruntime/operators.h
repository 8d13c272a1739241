// The operators of domain `streamo` for ONNX Runtime; `edge/contract.py` says what each takes.
#pragma once

#include <cstddef>
#include <iterator>
#include <memory>

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
  int threads;  // how many a session runs with, a hint
};

struct Input {
  ElementType type;
  Characteristic characteristic = kRequired;
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

extern const Description kSpanAttention;
extern const Description kSpanAttentionInt8;
extern const Description kStreamMatMul;
extern const Description kWindowAttention;

}  // namespace streamo::ort
