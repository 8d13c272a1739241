// RMSNorm on the GPU: the call of kernels/gpu/norm.py.
#include <initializer_list>

#include "gpu/launch.h"

extern "C" streamo_status streamo_gpu_norm_run(streamo_gpu* gpu, const streamo_gpu_norm* arguments, void* stream) {
  using namespace streamo;
  return gpu::on_device(gpu, [&]() -> streamo_status {
    const streamo_gpu_norm* a = arguments;
    if (a == nullptr) return refuse(STREAMO_BAD_ARGUMENT, "norm: expected arguments, found NULL");
    if (a->rows < 1 || a->width < 1) {
      return refuse(STREAMO_BAD_ARGUMENT, "norm: expected at least 1 row of at least 1 number, found %d of %d", a->rows,
                    a->width);
    }
    if (a->input == nullptr || a->weight == nullptr || a->output == nullptr) {
      return refuse(STREAMO_BAD_ARGUMENT, "norm: expected an input, a weight and an output, found NULL");
    }
    for (const void* pointer : {static_cast<const void*>(a->input), static_cast<const void*>(a->residual),
                                static_cast<const void*>(a->weight), static_cast<const void*>(a->sum),
                                static_cast<const void*>(a->output)}) {
      if (const streamo_status status = gpu::check_aligned("norm", pointer)) return status;
    }
    if (!(a->epsilon >= 0)) {
      return refuse(STREAMO_BAD_ARGUMENT, "norm: expected an epsilon of at least 0, found %g",
                    static_cast<double>(a->epsilon));
    }
    return gpu::launch(gpu, "norm", {static_cast<uint32_t>(a->rows)}, stream, a->input, a->residual, a->weight, a->sum,
                       a->output, a->width, a->epsilon, a->residual == nullptr ? 0 : a->width,
                       a->sum == nullptr ? 0 : a->width);
  });
}
