/* What a program that runs ONNX Runtime sessions tells the operators on a GPU besides a graph's inputs.
 *
 * Owns nothing but a signature. The operators themselves are found by ONNX Runtime through RegisterCustomOps.
 */
#ifndef STREAMO_ONNXRUNTIME_H
#define STREAMO_ONNXRUNTIME_H

#include "streamo_kernels.h"

#ifdef __cplusplus
extern "C" {
#endif

/* From now on, attention that runs on `stream` reads its rows from `table`, what streamo_gpu_attention_table wrote for
 * `most_spans`, in device memory; of its inputs `new_slots` and `spans` only the sizes count then. With NULL, each call
 * sends a table of its own. A run that a stream was captured into reads the memory that was named when it was captured,
 * so a program rewrites one table in place before it repeats the run.
 *
 * `moves` receives how often the operators have replaced device memory of their own on this stream. What was captured
 * before the number changed must not be run again. */
STREAMO_API streamo_status streamo_onnxruntime_use_table(void* stream, const void* table, int32_t most_spans,
                                                         int64_t* moves);

#ifdef __cplusplus
}
#endif
#endif
