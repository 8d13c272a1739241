#include "gpu/attention_table.h"

#include <algorithm>
#include <cstring>
#include <new>
#include <vector>

#include "attention/validate.h"
#include "common/status.h"
#include "streamo_gpu.h"

namespace streamo::gpu {
namespace {

// The spans with rows, those of one run together, else in their order.
std::vector<streamo_span> by_run(const streamo_attention& a) {
  std::vector<streamo_span> spans;
  std::copy_if(a.spans, a.spans + a.span_count, std::back_inserter(spans),
               [](const streamo_span& span) { return span.length > 0; });
  std::stable_sort(spans.begin(), spans.end(),
                   [](const streamo_span& left, const streamo_span& right) { return left.run < right.run; });
  return spans;
}

streamo_status refuse_sizes(int32_t new_tokens, int32_t capacity, int32_t most_spans) {
  return refuse(STREAMO_BAD_ARGUMENT,
                "attention table: expected at least 1 new token, a row of the cache and 0 spans, found %d, %d and %d",
                new_tokens, capacity, most_spans);
}

}  // namespace

size_t write_table(const streamo_attention& arguments, const TableSize& size, int32_t* table) {
  int32_t* slots = table + kWordsATile;
  int32_t* tiles = slots + size.slots;
  std::memset(table, 0, kWordsATile * sizeof(int32_t));
  std::memset(slots, 0, size.slots * sizeof(int32_t));
  std::copy(arguments.new_slots, arguments.new_slots + arguments.new_tokens, slots);
  int32_t count = 0, first_of_run = 0, run = -1;
  const auto close_run = [&] {
    for (int32_t i = first_of_run; i < count; ++i) tiles[i * kWordsATile + 3] = count;
    first_of_run = count;
  };
  const std::vector<streamo_span> spans = by_run(arguments);
  for (const streamo_span& span : spans) {
    if (span.run != run) close_run();
    run = span.run;
    for (int32_t row = 0; row < span.length; row += kTileRows, ++count) {
      int32_t* tile = tiles + static_cast<size_t>(count) * kWordsATile;
      tile[0] = span.slot + row;
      tile[1] = std::min(kTileRows, span.length - row);
      tile[2] = run;
    }
  }
  close_run();
  table[0] = count;
  std::memset(tiles + static_cast<size_t>(count) * kWordsATile, 0, kWordsATile * sizeof(int32_t));
  return kWordsATile + size.slots + (static_cast<size_t>(count) + 1) * kWordsATile;
}

}  // namespace streamo::gpu

extern "C" streamo_status streamo_gpu_attention_table_bytes(int32_t new_tokens, int32_t capacity, int32_t most_spans,
                                                            size_t* bytes) {
  using namespace streamo;
  clear_error();
  if (bytes == nullptr) return refuse(STREAMO_BAD_ARGUMENT, "attention table: expected a place for its size");
  if (new_tokens < 1 || capacity < 1 || most_spans < 0) return gpu::refuse_sizes(new_tokens, capacity, most_spans);
  *bytes = gpu::TableSize(new_tokens, capacity, most_spans).words() * sizeof(int32_t);
  return STREAMO_OK;
}

extern "C" streamo_status streamo_gpu_attention_table(const streamo_attention* arguments, int32_t most_spans,
                                                      void* host_table, size_t bytes) {
  using namespace streamo;
  clear_error();
  try {
    if (arguments == nullptr || host_table == nullptr) {
      return refuse(STREAMO_BAD_ARGUMENT, "attention table: expected arguments and a table, found NULL");
    }
    const streamo_attention& a = *arguments;
    if (a.new_tokens < 1 || a.capacity < 1 || most_spans < 0) {
      return gpu::refuse_sizes(a.new_tokens, a.capacity, most_spans);
    }
    if (a.new_slots == nullptr || a.span_count < 0 || (a.span_count > 0 && a.spans == nullptr)) {
      return refuse(STREAMO_BAD_ARGUMENT, "attention table: expected new_slots and %d spans, found NULL", a.span_count);
    }
    if (const streamo_status status = validate_rows(a)) return status;
    const gpu::TableSize size(a.new_tokens, a.capacity, most_spans);
    if (a.span_count > most_spans) {
      return refuse(STREAMO_BAD_ARGUMENT, "attention table: expected at most %d spans, found %d", most_spans,
                    a.span_count);
    }
    if (bytes < size.words() * sizeof(int32_t)) {
      return refuse(STREAMO_BAD_ARGUMENT, "attention table: expected %zu bytes, found %zu",
                    size.words() * sizeof(int32_t), bytes);
    }
    gpu::write_table(a, size, static_cast<int32_t*>(host_table));
    return STREAMO_OK;
  } catch (const std::bad_alloc&) {
    return refuse(STREAMO_OUT_OF_MEMORY, "attention table: no memory to sort %d spans", arguments->span_count);
  }
}
