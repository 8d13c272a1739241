// Which table of inner kernels belongs to the instruction set in use.
#include "attention/kernels.h"

#include "common/instruction_set.h"

namespace streamo {

const AttentionKernels& attention_kernels() {
  switch (instruction_set()) {
#if defined(__x86_64__)
    case InstructionSet::avx512vnni:
      return attention_kernels_avx512;
    case InstructionSet::avx2:
      return attention_kernels_avx2;
#elif defined(__aarch64__)
    case InstructionSet::i8mm:
      return attention_kernels_i8mm;
    case InstructionSet::dotprod:
      return attention_kernels_dotprod;
#endif
    default:
      return attention_kernels_portable;
  }
}

}  // namespace streamo
