#include "gpu_step.h"

#include <exception>
#include <map>
#include <mutex>

#include "common/status.h"
#include "streamo_onnxruntime.h"

namespace streamo::ort {
namespace {

std::mutex looking;

std::map<void*, GpuStep>& steps() {
  static auto& all = *new std::map<void*, GpuStep>;  // never destroyed: a session may outlast static objects
  return all;
}

}  // namespace

GpuStep step_on(void* stream) {
  const std::lock_guard<std::mutex> lock(looking);
  return steps()[stream];
}

void count_move(void* stream) {
  const std::lock_guard<std::mutex> lock(looking);
  ++steps()[stream].moves;
}

}  // namespace streamo::ort

extern "C" streamo_status streamo_onnxruntime_use_table(void* stream, const void* table, int32_t most_spans,
                                                        int64_t* moves) {
  using namespace streamo;
  clear_error();
  if (moves == nullptr) return refuse(STREAMO_BAD_ARGUMENT, "a step's table: expected a place for the moves, found NULL");
  if (most_spans < 0) {
    return refuse(STREAMO_BAD_ARGUMENT, "a step's table: expected 0 spans or more, found %d", most_spans);
  }
  try {
    const std::lock_guard<std::mutex> lock(ort::looking);
    ort::GpuStep& step = ort::steps()[stream];
    step.table = table;
    step.most_spans = most_spans;
    *moves = step.moves;
    return STREAMO_OK;
  } catch (const std::exception& error) {
    return refuse(STREAMO_OUT_OF_MEMORY, "a step's table: no host memory: %s", error.what());
  }
}
