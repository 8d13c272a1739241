// What is known of the step that a stream runs, from outside the graph; see kernels/include/streamo_onnxruntime.h.
//
// Streams are the process's own numbers, and so is what is kept of them here: sessions and operators come and go.
#pragma once

#include <cstdint>

namespace streamo::ort {

struct GpuStep {
  const void* table = nullptr;  // on the device
  std::int32_t most_spans = 0;
  std::int64_t moves = 0;
};

GpuStep step_on(void* stream);

// Memory that work on the stream uses is another from now on.
void count_move(void* stream);

}  // namespace streamo::ort
