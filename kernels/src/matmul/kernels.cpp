// Which matrix kernels an instruction set gets. The only place that knows them all.
#include "matmul/kernels.h"

namespace streamo {

const MatmulKernels& matmul_kernels(InstructionSet set) {
  switch (set) {
#if defined(__x86_64__)
    case InstructionSet::avx512vnni:
      return matmul_avx512;
    case InstructionSet::avx2:
      return matmul_avx2;
#elif defined(__aarch64__)
    case InstructionSet::i8mm:
      return matmul_i8mm;
    case InstructionSet::dotprod:
      return matmul_dotprod;
#endif
    default:
      return matmul_portable;
  }
}

}  // namespace streamo
