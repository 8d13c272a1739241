// Which instruction set the kernels use. Asked of the CPU once; a test may choose a lesser one.
#pragma once

namespace streamo {

enum class InstructionSet { portable, avx2, avx512vnni, dotprod, i8mm };

// The one in use.
InstructionSet instruction_set();

}  // namespace streamo
