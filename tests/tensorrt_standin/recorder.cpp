// The part of streamo_gpu.h that the plugin calls, taking note of its arguments instead of computing.
#include "streamo_gpu.h"

#include <string>

extern "C" {
streamo_attention recorded_attention{};
streamo_matmul recorded_matmul{};
streamo_weights_source recorded_weights{};
void const* recorded_table = nullptr;
int32_t recorded_most_spans = 0;
size_t recorded_workspace = 0;
int32_t recorded_opens = 0;
int32_t recorder_refuses = 0;
int32_t recorder_has_no_gpu = 0;
}
static std::string folder;
static char const* sentence = "";

static streamo_status answer(char const* refusal) {
  sentence = recorder_refuses ? refusal : "";
  return recorder_refuses ? STREAMO_UNSUPPORTED : STREAMO_OK;
}

extern "C" char const* recorded_folder() { return folder.c_str(); }

extern "C" {
const char* streamo_last_error(void) { return sentence; }
streamo_status streamo_gpu_open(const char* cubins, int32_t, streamo_gpu** gpu) {
  folder = cubins;
  ++recorded_opens;
  if (recorder_has_no_gpu) sentence = "no kernels for compute capability 7.2";
  if (recorder_has_no_gpu) return STREAMO_NO_KERNEL;
  static int place;
  *gpu = reinterpret_cast<streamo_gpu*>(&place);
  return STREAMO_OK;
}
streamo_status streamo_gpu_attention_workspace(streamo_gpu*, const streamo_attention* a, size_t* bytes) {
  *bytes = static_cast<size_t>(a->new_tokens) * 1000 + a->capacity;
  return STREAMO_OK;
}
streamo_status streamo_gpu_attention_most_workspace(streamo_gpu*, const streamo_attention* a, size_t* bytes) {
  *bytes = static_cast<size_t>(a->new_tokens) * 2000 + a->capacity;
  return answer("the head is too wide");
}
streamo_status streamo_gpu_attention_run(streamo_gpu*, const streamo_attention* a, const void* table, int32_t most_spans,
                                         void*, size_t workspace_bytes, void*) {
  recorded_attention = *a;
  recorded_table = table;
  recorded_most_spans = most_spans;
  recorded_workspace = workspace_bytes;
  return answer("the head is too wide");
}
streamo_status streamo_gpu_matmul_workspace(streamo_gpu*, const streamo_weights_source*, const streamo_matmul* m,
                                            int32_t, size_t* bytes) {
  *bytes = static_cast<size_t>(m->rows) * 100;
  return STREAMO_OK;
}
streamo_status streamo_gpu_matmul_most_workspace(streamo_gpu*, const streamo_weights_source*, const streamo_matmul* m,
                                                 int32_t, size_t* bytes) {
  *bytes = static_cast<size_t>(m->rows) * 200 + (m->bias != nullptr) + 2 * (m->residual != nullptr);
  return answer("the block is too long");
}
streamo_status streamo_gpu_matmul_run(streamo_gpu*, const streamo_weights_source* w, const streamo_matmul* m, int32_t,
                                      void*, size_t workspace_bytes, void*) {
  recorded_weights = *w;
  recorded_matmul = *m;
  recorded_workspace = workspace_bytes;
  return STREAMO_OK;
}
}
