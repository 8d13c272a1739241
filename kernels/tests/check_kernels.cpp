// Reads cases, one a line, and checks each with every instruction set of this CPU, or with those named as arguments.
//
// Each must agree with the double-precision oracle, write the same cache as every other, and give the same bits with
// one thread and with two. Prints a line for each failure. Exit code 0: all agree; 1: some do not; 2: bad arguments or
// cases.
#include <cstdio>
#include <exception>
#include <iostream>

#include "check.h"

namespace {

Bench make_bench(int count, char** names) {
  Bench bench;
  for (int i = 0; i < count; ++i) {
    if (streamo_instruction_set_available(names[i]) == 0) {
      throw std::runtime_error(std::string("expected a CPU with ") + names[i] + ", found one with at best " +
                               streamo_instruction_set());
    }
    bench.sets.emplace_back(names[i]);
  }
  for (const char* name : {"avx512vnni", "avx2", "i8mm", "dotprod", "portable"}) {
    if (count == 0 && streamo_instruction_set_available(name) != 0) bench.sets.emplace_back(name);
  }
  bench.two_threads = streamo_threads_create(2);
  if (bench.two_threads == nullptr) throw std::runtime_error(streamo_last_error());
  return bench;
}

Complaints check(const Case& given, const Bench& bench) {
  if (given.kind() == "attention") return check_attention(given, bench);
  if (given.kind() == "matmul") return check_matmul(given, bench);
  if (given.kind() == "window") return check_window_attention(given, bench);
  throw std::runtime_error("expected attention, matmul or window, found '" + given.kind() + "'");
}

int run(int count, char** names) {
  const Bench bench = make_bench(count, names);
  int cases = 0, failed = 0;
  for (std::string line; std::getline(std::cin, line);) {
    if (line.empty()) continue;
    const Case given(line);
    const Complaints complaints = check(given, bench);
    ++cases;
    failed += complaints.empty() ? 0 : 1;
    for (const std::string& sentence : complaints) std::printf("%s: %s\n", given.name().c_str(), sentence.c_str());
  }
  streamo_threads_destroy(bench.two_threads);
  if (cases == 0) throw std::runtime_error("expected cases on standard input, found none");
  std::printf("%d cases, %d failed, with", cases, failed);
  for (const std::string& set : bench.sets) std::printf(" %s", set.c_str());
  std::printf("\n");
  return failed == 0 ? 0 : 1;
}

}  // namespace

int main(int count, char** arguments) {
  try {
    return run(count - 1, arguments + 1);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "check_kernels: %s\n", error.what());
    return 2;
  }
}
