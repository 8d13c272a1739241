// The fastest arithmetic that each instruction set can do, for benchmarks to measure a kernel against.
#pragma once

#include <cstdint>

namespace streamo {

// Runs `rounds` rounds of independent multiply-adds on values in registers; returns the operations that were done, a
// multiply and an add counting as two.
using PeakLoop = double (*)(std::int64_t rounds);

double int8_peak_portable(std::int64_t rounds);
double float_peak_portable(std::int64_t rounds);
double int8_peak_avx2(std::int64_t rounds);
double float_peak_avx2(std::int64_t rounds);
double int8_peak_avx512vnni(std::int64_t rounds);
double float_peak_avx512vnni(std::int64_t rounds);
double float_peak_neon(std::int64_t rounds);
double int8_peak_dotprod(std::int64_t rounds);
double int8_peak_i8mm(std::int64_t rounds);

// Where the sums end up, so that no compiler leaves them out.
extern thread_local volatile double peak_sink;

}  // namespace streamo
