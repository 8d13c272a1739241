// What one instruction set brings to the quantised matrix product: the layout it wants and its inner loops.
//
// Lanes are outputs. Outputs are packed in panels; a panel holds, for each block along K, the codes
// [groups][panel][group] and then `panel` float scales. A group is `group` consecutive values along K of one output,
// the bytes one integer dot product eats. Codes are stored with a zero point added (4 bits: 8; 8 bits: `zero8`), which
// costs nothing: the integer sums start at minus the zero point times the sum of the input's codes (`starts`).
//
// Knows nothing of threads, of whole matrices or of the C ABI. Files named for an instruction set include only headers
// whose functions have internal linkage, so that none of their code runs on a lesser CPU.
#pragma once

#include <cstddef>
#include <cstdint>

#include "common/instruction_set.h"

namespace streamo {

// One tile of at most `tile_rows` rows of the input, to be quantised.
struct QuantiseArguments {
  const float* input;  // (rows, inputs), rows `stride` elements apart
  std::int64_t stride;
  std::int32_t rows;
  std::int32_t inputs;  // K
  std::int32_t block;
  std::int32_t zero;     // zero point of the weights' codes
  std::int8_t* codes;    // out: [groups of all blocks][tile_rows][group]; absent rows and the end of K are zero
  float* scales;         // out: [blocks][tile_rows]; NaN for a block that holds an infinity or a NaN
  std::int32_t* starts;  // out: [blocks][tile_rows]: -zero * sum of the block's codes
};

// One tile of rows against one panel, over consecutive blocks of equal length.
struct TileArguments {
  const std::uint8_t* codes;  // of the first block: [groups][panel][group] bytes, or the same as nibbles
  std::size_t codes_stride;   // bytes from a block's codes to the next block's
  const std::uint8_t* scales;  // floats of the first block: [panel], aligned as floats
  std::size_t scales_stride;   // bytes
  const std::int8_t* input;    // quantised, from the first of these blocks on
  const float* input_scales;
  const std::int32_t* starts;
  std::int32_t blocks;
  std::int32_t groups;  // of each of these blocks
  std::int32_t rows;    // 1 .. tile_rows
  float* sums;          // [tile_rows][panel], aligned to 64: sums += integer sum * (weight scale * input scale)
};

// Sums of one panel to the output: activation(sums + bias) + residual.
struct FinishArguments {
  const float* sums;  // [rows][panel]
  std::int32_t rows;
  std::int32_t width;     // outputs to write, at most panel, or panel / 2 with `gated`
  std::int32_t gated;     // first half of the panel is the gate, second half is up
  const float* bias;      // of the first output written, or NULL
  const float* bias_up;   // of its up column; with `gated` and `bias`
  const float* residual;  // as output, or NULL; may be output
  float* output;
  std::int64_t output_stride;
};

struct MatmulKernels {
  std::int32_t panel;        // outputs packed together; even
  std::int32_t group;        // 4 or 8
  std::int32_t nibble_span;  // 4 bits: of each 2 * nibble_span codes, byte i holds code i low, i + nibble_span high;
                             // divides panel * group / 2
  std::int32_t zero8;        // added to 8-bit codes: 128 where the dot product wants them unsigned, else 0
  std::int32_t tile_rows;    // rows of the input a tile interleaves
  std::int32_t few_rows;     // up to so many rows nibbles are used straight from memory, above they are unpacked once

  void (*quantise)(const QuantiseArguments&);
  void (*unpack)(const std::uint8_t* nibbles, std::uint8_t* codes, std::size_t groups);  // [groups][panel][group]
  void (*from_bytes)(const TileArguments&, std::int32_t bits);  // bits: whether codes are 0 .. 15 or 8 bits wide
  void (*from_nibbles)(const TileArguments&);
  void (*finish)(const FinishArguments&);
};

// Those of an instruction set; the portable ones where this build has none for it.
const MatmulKernels& matmul_kernels(InstructionSet set);

extern const MatmulKernels matmul_portable;
#if defined(__x86_64__)
extern const MatmulKernels matmul_avx2;
extern const MatmulKernels matmul_avx512;
#elif defined(__aarch64__)
extern const MatmulKernels matmul_dotprod;
extern const MatmulKernels matmul_i8mm;
#endif

}  // namespace streamo
