// The choice of the next token on the GPU: the calls of kernels/gpu/sample.py.
#include "gpu/launch.h"

namespace streamo::gpu {
namespace {

constexpr int32_t kChunk = 2048;            // of sample.py
constexpr int32_t kMostTokens = 1 << 24;    // tokens are counted in float32

struct Pieces {
  int32_t* best_keys;
  int32_t* best_tokens;
};

int32_t chunks_of(const streamo_gpu_sample& a) { return (a.vocabulary + kChunk - 1) / kChunk; }

Pieces cut(Workspace& workspace, const streamo_gpu_sample& a) {
  const size_t chunks = static_cast<size_t>(chunks_of(a));
  int32_t* keys = workspace.take<int32_t>(chunks);
  return {keys, workspace.take<int32_t>(chunks)};
}

streamo_status check(const streamo_gpu_sample* a) {
  const auto bad = STREAMO_BAD_ARGUMENT;
  if (a == nullptr) return refuse(bad, "sample: expected arguments, found NULL");
  if (a->vocabulary < 1) return refuse(bad, "sample: expected at least 1 token, found %d", a->vocabulary);
  if (a->vocabulary > kMostTokens) {
    return refuse(STREAMO_UNSUPPORTED, "sample: expected at most %d tokens, found %d", kMostTokens, a->vocabulary);
  }
  if (!(a->temperature >= 0 && a->temperature <= 10)) {
    return refuse(bad, "sample: expected a temperature from 0 to 10, found %g", static_cast<double>(a->temperature));
  }
  if (a->top_k < 0) return refuse(bad, "sample: expected top_k 0 or more, found %d", a->top_k);
  if (!(a->top_p > 0 && a->top_p <= 1)) {
    return refuse(bad, "sample: expected top_p above 0 and at most 1, found %g", static_cast<double>(a->top_p));
  }
  if (!(a->random >= 0 && a->random < 1)) {
    return refuse(bad, "sample: expected a random number from 0 to below 1, found %g", a->random);
  }
  if (a->logits == nullptr || a->token == nullptr) {
    return refuse(bad, "sample: expected logits and a place for the token, found NULL");
  }
  if (const streamo_status status = check_aligned("sample", a->logits)) return status;
  return check_aligned("sample", a->token);
}

streamo_status run(streamo_gpu* gpu, const streamo_gpu_sample& a, void* memory, size_t bytes, void* stream) {
  Workspace workspace(memory, bytes);
  const Pieces pieces = cut(workspace, a);
  if (const streamo_status status = workspace.check("sample")) return status;
  const int32_t chunks = chunks_of(a);
  const streamo_status status = launch(gpu, "sample_chunks", {static_cast<uint32_t>(chunks)}, stream, a.logits,
                                       pieces.best_keys, pieces.best_tokens, a.vocabulary);
  if (status != STREAMO_OK) return status;
  if (a.temperature == 0) {
    return launch(gpu, "sample_largest", {}, stream, pieces.best_keys, pieces.best_tokens, a.token, chunks,
                  a.vocabulary);
  }
  return launch(gpu, "sample_likely", {}, stream, a.logits, pieces.best_keys, a.token, a.vocabulary, chunks,
                1.0f / a.temperature, a.top_k, a.top_p, static_cast<float>(a.random));
}

}  // namespace
}  // namespace streamo::gpu

extern "C" streamo_status streamo_gpu_sample_workspace(streamo_gpu* gpu, const streamo_gpu_sample* arguments,
                                                       size_t* bytes) {
  using namespace streamo;
  return gpu::on_device(gpu, [&]() -> streamo_status {
    if (const streamo_status status = gpu::check(arguments)) return status;
    if (bytes == nullptr) return refuse(STREAMO_BAD_ARGUMENT, "sample: expected a place for the size, found NULL");
    gpu::Workspace counted;
    gpu::cut(counted, *arguments);
    *bytes = counted.used();
    return STREAMO_OK;
  });
}

extern "C" streamo_status streamo_gpu_sample_run(streamo_gpu* gpu, const streamo_gpu_sample* arguments, void* workspace,
                                                 size_t workspace_bytes, void* stream) {
  using namespace streamo;
  return gpu::on_device(gpu, [&]() -> streamo_status {
    if (const streamo_status status = gpu::check(arguments)) return status;
    return gpu::run(gpu, *arguments, workspace, workspace_bytes, stream);
  });
}
