// What the machine can do at most: arithmetic in registers, and reading memory. For benchmarks only.
#include "common/peaks.h"

#include <algorithm>
#include <atomic>
#include <cstring>

#include "common/instruction_set.h"
#include "common/status.h"
#include "common/threads.h"
#include "streamo_kernels.h"

namespace streamo {

thread_local volatile double peak_sink;

namespace {

constexpr std::size_t piece_bytes = std::size_t{4} << 20;

using Words = std::uint64_t __attribute__((vector_size(16)));

// Independent sums over whole lines, asked for ahead of time; what is left at the end is not read.
std::uint64_t sum_of(const unsigned char* memory, std::size_t bytes) {
  constexpr std::size_t ahead = 2048;
  Words sums[8] = {};
  for (std::size_t at = 0; at + sizeof sums <= bytes; at += sizeof sums) {
    if (at + ahead + sizeof sums <= bytes) {
      __builtin_prefetch(memory + at + ahead);
      __builtin_prefetch(memory + at + ahead + 64);
    }
    Words words[8];
    std::memcpy(words, memory + at, sizeof words);
    for (int i = 0; i < 8; ++i) sums[i] += words[i];
  }
  std::uint64_t sum = 0;
  for (const Words& part : sums) sum += part[0] + part[1];
  return sum;
}

PeakLoop loop_of(std::int32_t kind) {
  const bool integer = kind == STREAMO_PEAK_INT8;
  switch (instruction_set()) {
#if defined(__x86_64__)
    case InstructionSet::avx512vnni:
      return integer ? int8_peak_avx512vnni : float_peak_avx512vnni;
    case InstructionSet::avx2:
      return integer ? int8_peak_avx2 : float_peak_avx2;
#elif defined(__aarch64__)
    case InstructionSet::i8mm:
      return integer ? int8_peak_i8mm : float_peak_neon;
    case InstructionSet::dotprod:
      return integer ? int8_peak_dotprod : float_peak_neon;
#endif
    default:
      return integer ? int8_peak_portable : float_peak_portable;
  }
}

}  // namespace

double int8_peak_portable(std::int64_t rounds) {
  constexpr int chains = 16;
  std::int32_t sums[chains] = {};
  volatile std::int8_t factor = static_cast<std::int8_t>(rounds & 3);
  for (std::int64_t round = 0; round < rounds; ++round) {
    const std::int32_t value = factor;
    for (int c = 0; c < chains; ++c) sums[c] = (sums[c] + value * (value + c)) & 0xffff;
  }
  for (int c = 1; c < chains; ++c) sums[0] += sums[c];
  peak_sink = sums[0];
  return 2.0 * chains * static_cast<double>(rounds);
}

double float_peak_portable(std::int64_t rounds) {
  constexpr int chains = 32;
  float sums[chains] = {};
  const float factor = rounds & 1 ? 0.5F : 0.25F;
  for (std::int64_t round = 0; round < rounds; ++round) {
    for (float& sum : sums) sum = sum * factor + factor;
  }
  for (int c = 1; c < chains; ++c) sums[0] += sums[c];
  peak_sink = static_cast<double>(sums[0]);
  return 2.0 * chains * static_cast<double>(rounds);
}

}  // namespace streamo

using namespace streamo;

extern "C" double streamo_peak_arithmetic(int32_t kind, int64_t rounds, const streamo_threads* threads) {
  clear_error();
  if ((kind != STREAMO_PEAK_INT8 && kind != STREAMO_PEAK_F32) || rounds < 1) {
    refuse(STREAMO_BAD_ARGUMENT, "peak: expected kind 0 or 1 and at least 1 round, found kind %d and %lld rounds",
           kind, static_cast<long long>(rounds));
    return 0;
  }
  const PeakLoop loop = loop_of(kind);
  const int tasks = std::max(1, thread_count(threads));
  std::atomic<std::int64_t> operations{0};
  parallel_for(threads, static_cast<std::size_t>(tasks),
               [&](std::size_t) { operations += static_cast<std::int64_t>(loop(rounds)); });
  return static_cast<double>(operations.load());
}

extern "C" uint64_t streamo_peak_read(const void* memory, size_t bytes, const streamo_threads* threads) {
  clear_error();
  if (memory == nullptr) {
    refuse(STREAMO_BAD_ARGUMENT, "peak: expected memory to read, found NULL");
    return 0;
  }
  const auto* first = static_cast<const unsigned char*>(memory);
  std::atomic<std::uint64_t> sum{0};
  parallel_for(threads, (bytes + piece_bytes - 1) / piece_bytes, [&](std::size_t piece) {
    const std::size_t start = piece * piece_bytes;
    sum += sum_of(first + start, std::min(piece_bytes, bytes - start));
  });
  return sum.load();
}
