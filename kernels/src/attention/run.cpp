// The public entry: validate, append, attend, merge.
#include <algorithm>
#include <new>

#include "attention/call.h"
#include "attention/carve.h"
#include "attention/few_rows.h"
#include "attention/validate.h"
#include "common/status.h"
#include "common/threads.h"

namespace streamo {
namespace {

constexpr int64_t kWorthSharing = 32768;  // elements; below, waking a thread costs more than it does
constexpr int32_t kTokensATask = 8;

// Memory of one call, in the calling thread's keeping.
AttentionCall prepare(const streamo_attention& a) {
  thread_local Scratch plan_memory, call_memory;
  AttentionCall call = {a, attention_kernels(), make_plan(a, plan_memory), nullptr, nullptr, {}};
  const size_t rows = static_cast<size_t>(a.kv_heads) * call.plan.rows, width = static_cast<size_t>(a.head_dim);
  if (call.plan.rows <= kMostFewRows) call.few_rows = call.kernels.few_rows;
  const size_t partial_rows = call.merged() ? rows * call.plan.chunks : 0;
  Carve memory(call_memory.reserve(Carve::bytes_of<float>(rows * width) +
                                   Carve::bytes_of<float>(partial_rows * width) +
                                   2 * Carve::bytes_of<float>(partial_rows)));
  call.queries = memory.take<float>(rows * width);
  call.partial.values = memory.take<float>(partial_rows * width);
  call.partial.maximum = memory.take<float>(partial_rows);
  call.partial.sum = memory.take<float>(partial_rows);
  return call;
}

void append(const AttentionCall& call, const streamo_threads* threads) {
  const streamo_attention& a = call.arguments;
  const int64_t elements = int64_t{a.new_tokens} * (a.query_heads + 2 * a.kv_heads) * a.head_dim;
  const size_t tasks = (static_cast<size_t>(a.new_tokens) + kTokensATask - 1) / kTokensATask;
  parallel_for(elements < kWorthSharing ? nullptr : threads, tasks, [&](size_t task) {
    const int32_t begin = static_cast<int32_t>(task) * kTokensATask;
    const int32_t end = std::min(begin + kTokensATask, a.new_tokens);
    for (int32_t token = begin; token < end; ++token) append_token(call, token);
  });
}

void merge(const AttentionCall& call, const streamo_threads* threads) {
  const Plan& plan = call.plan;
  const int64_t elements = int64_t{plan.chunks} * call.arguments.kv_heads * plan.rows * call.arguments.head_dim;
  const size_t tasks = static_cast<size_t>(call.arguments.kv_heads) * plan.blocks;
  parallel_for(elements < kWorthSharing ? nullptr : threads, tasks, [&](size_t task) {
    merge_chunks(call, static_cast<int32_t>(task) / plan.blocks, static_cast<int32_t>(task) % plan.blocks);
  });
}

streamo_status out_of_memory() { return refuse(STREAMO_OUT_OF_MEMORY, "attention found no memory for its scratch"); }

streamo_status run(const streamo_attention& arguments, const streamo_threads* threads) {
  const AttentionCall call = prepare(arguments);
  append(call, threads);
  const size_t tasks =
      static_cast<size_t>(arguments.kv_heads) * call.plan.blocks * static_cast<size_t>(call.plan.chunks);
  const auto attend_task = call.few_rows != nullptr ? attend_few_rows : attend;
  if (!try_parallel_for(threads, tasks, [&](size_t task) { attend_task(call, task); })) return out_of_memory();
  if (call.merged()) merge(call, threads);
  return STREAMO_OK;
}

}  // namespace
}  // namespace streamo

extern "C" streamo_status streamo_attention_run(const streamo_attention* arguments, const streamo_threads* threads) {
  using namespace streamo;
  clear_error();
  try {
    if (const streamo_status status = validate(arguments)) return status;
    if (const streamo_status status = validate(threads)) return status;
    return run(*arguments, threads);
  } catch (const std::bad_alloc&) {
    return out_of_memory();
  }
}
