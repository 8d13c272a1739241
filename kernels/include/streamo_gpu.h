/* The C ABI of streamo-edge's GPU kernels: the operations of streamo_kernels.h with tensors on an NVIDIA GPU.
 *
 * Owns nothing but signatures. The kernels are machine code made ahead of time, one archive for each GPU generation; a
 * device needs its driver (libcuda.so.1, found at the first use) and nothing else: no compiler, no CUDA toolkit.
 *
 * Rules that hold for every function, besides those of streamo_kernels.h:
 *  - Pointers in the argument structs are device pointers in the GPU's own address space, unless said otherwise; each
 *    is a multiple of 16 bytes.
 *  - `stream` is a CUstream of the device's primary context (what CUDA's run-time library and every framework use);
 *    NULL is its default stream. Calls put work on the stream and return; nothing here waits, unless it says so.
 *  - `workspace` is device memory of at least what `..._workspace` says for the same arguments, in nobody else's use
 *    until the stream has passed the call. Calls after each other on one stream may share it.
 *  - What is computed does not depend on the grid or the timing: the same input gives the same bits on one device.
 *  - Calls from several threads are safe. Memory is never allocated by a call that computes; a kernel's machine code is
 *    loaded at its first use, or by `streamo_gpu_load`, which is due before a stream is captured into a graph.
 *  - STREAMO_DEVICE_LOST is for ever: each later call answers it at once, without touching the device. The process must
 *    be restarted.
 */
#ifndef STREAMO_GPU_H
#define STREAMO_GPU_H

#include "streamo_kernels.h"

#ifdef __cplusplus
extern "C" {
#endif

/* ------------------------------------------------------------------------------------------------------ device */

/* One GPU, its primary context and the kernels for it. */
typedef struct streamo_gpu streamo_gpu;

typedef struct streamo_gpu_facts {
  char name[128];
  int32_t sm;              /* compute capability, 10 * major + minor: 87 is Orin, 90 is Hopper, 110 is Thor */
  int32_t kernel_sm;       /* of the kernels in use; the same major number, and not above `sm` */
  int32_t multiprocessors;
  int32_t driver_version;  /* CUDA version that the driver supports, 1000 * major + 10 * minor */
  int32_t integrated;      /* 1 where the GPU shares its memory with the CPU */
  int64_t memory_bytes;    /* all of the device's */
  int64_t free_bytes;      /* now */
} streamo_gpu_facts;

/* How many GPUs the driver shows. STREAMO_NO_DEVICE where there is no driver or none that works. */
STREAMO_API streamo_status streamo_gpu_count(int32_t* count);

/* Take device number `device` into use, with the kernels in `cubin_folder` (files sm_87.cubins and so on).
 * STREAMO_NO_DEVICE: no driver, too old a driver, no such device. STREAMO_NO_KERNEL: no archive for this GPU, or one
 * that is damaged. Nothing stays behind after a refusal. */
STREAMO_API streamo_status streamo_gpu_open(const char* cubin_folder, int32_t device, streamo_gpu** gpu);

/* Give back everything. Not while another call uses it; memory and streams are the caller's to free before. NULL is
 * allowed. */
STREAMO_API void streamo_gpu_close(streamo_gpu* gpu);

/* STREAMO_DEVICE_LOST once the device is lost; `facts` then says what was known at the opening. */
STREAMO_API streamo_status streamo_gpu_get_facts(streamo_gpu* gpu, streamo_gpu_facts* facts);

/* Load the machine code of every kernel whose name starts with `prefix`; NULL is all of them. */
STREAMO_API streamo_status streamo_gpu_load(streamo_gpu* gpu, const char* prefix);

/* Memory for callers without a framework. `bytes` 0 is refused. Freeing waits for the device; NULL is allowed. */
STREAMO_API streamo_status streamo_gpu_alloc(streamo_gpu* gpu, size_t bytes, void** pointer);
STREAMO_API streamo_status streamo_gpu_free(streamo_gpu* gpu, void* pointer);

/* Copy between any two places, host or device. Host memory that is not pinned may be reused when the call returns, if
 * it was the source; if it was the target, it is filled when the call returns. */
STREAMO_API streamo_status streamo_gpu_copy(streamo_gpu* gpu, void* target, const void* source, size_t bytes,
                                            void* stream);
STREAMO_API streamo_status streamo_gpu_fill(streamo_gpu* gpu, void* target, uint8_t value, size_t bytes, void* stream);

/* A stream that does not wait for the default stream. */
STREAMO_API streamo_status streamo_gpu_stream_create(streamo_gpu* gpu, void** stream);
STREAMO_API streamo_status streamo_gpu_stream_destroy(streamo_gpu* gpu, void* stream);

/* Wait until the stream's work is done. Errors of kernels show here at the latest. */
STREAMO_API streamo_status streamo_gpu_synchronize(streamo_gpu* gpu, void* stream);

/* Points in a stream's work, and the time between two of them. Reading the time waits for both. */
STREAMO_API streamo_status streamo_gpu_event_create(streamo_gpu* gpu, void** event);
STREAMO_API streamo_status streamo_gpu_event_destroy(streamo_gpu* gpu, void* event);
STREAMO_API streamo_status streamo_gpu_event_record(streamo_gpu* gpu, void* event, void* stream);
/* What the stream is given from now on waits for what had been recorded in the event. Between graph_begin and graph_end
 * this takes another stream along, whose work must be waited for in the same way before the end. */
STREAMO_API streamo_status streamo_gpu_stream_wait(streamo_gpu* gpu, void* stream, void* event);
STREAMO_API streamo_status streamo_gpu_event_elapsed(streamo_gpu* gpu, void* from, void* to, float* milliseconds);

/* Record what a stream is given between `begin` and `end`, without doing it; then do it as often as wanted. Calls that
 * send a table of their own from the host are refused meanwhile: attention without a `table`, window attention without
 * `device_starts`, and frames. */
STREAMO_API streamo_status streamo_gpu_graph_begin(streamo_gpu* gpu, void* stream);
STREAMO_API streamo_status streamo_gpu_graph_end(streamo_gpu* gpu, void* stream, void** graph);
STREAMO_API streamo_status streamo_gpu_graph_launch(streamo_gpu* gpu, void* graph, void* stream);
STREAMO_API streamo_status streamo_gpu_graph_destroy(streamo_gpu* gpu, void* graph);

/* Launch one kernel by its name, with grid[0] * grid[1] * grid[2] programs. `arguments` points to each argument's value;
 * `letters` has one letter for each: p pointer, i int32_t, l int64_t, f float, and must be what the kernel takes. For
 * benchmarks and tests; the operations below know their kernels. */
STREAMO_API streamo_status streamo_gpu_launch(streamo_gpu* gpu, const char* kernel, const uint32_t* grid,
                                              const char* letters, const void* const* arguments, void* stream);

/* --------------------------------------------------------------------------------------------------- attention */

/* Append T tokens to the cache and attend over it: `streamo_attention`, to the letter. In its struct `new_slots` and
 * `spans` are on the host; they say the sizes and, without a `table`, what to read. All other pointers are on the
 * device, the caches with their scales, angles, runs and output included. head_dim is 64 or 128.
 *
 * The table is `new_slots` and `spans` in the form the kernels read, on the device. Made once, it serves the layers of
 * a step; with one that the caller rewrites in place, a step captured in a graph can be repeated: grids depend on T, on
 * the sizes and on `most_spans`, not on how many rows are cached. */
STREAMO_API streamo_status streamo_gpu_attention_table_bytes(int32_t new_tokens, int32_t capacity, int32_t most_spans,
                                                             size_t* bytes);

/* Write the table of `new_slots` and `spans` to `host_table`, of `bytes` as above, to be copied to the device.
 * Reads new_tokens, capacity, run_count, new_slots, spans and span_count, and checks them. */
STREAMO_API streamo_status streamo_gpu_attention_table(const streamo_attention* arguments, int32_t most_spans,
                                                       void* host_table, size_t bytes);

STREAMO_API streamo_status streamo_gpu_attention_workspace(streamo_gpu* gpu, const streamo_attention* arguments,
                                                           size_t* bytes);

/* The same for whoever reserves memory before the sizes are known: enough for every call with at most these
 * new_tokens, capacity, run_count and span_count. Fewer tokens can need more than more do: they leave more to split. */
STREAMO_API streamo_status streamo_gpu_attention_most_workspace(streamo_gpu* gpu, const streamo_attention* arguments,
                                                                size_t* bytes);

/* `table` NULL: made from the arguments and sent to the workspace by this call. Cost as streamo_attention_run: each
 * named row is read once per KV head and block of query rows; never is the cache converted or copied. */
STREAMO_API streamo_status streamo_gpu_attention_run(streamo_gpu* gpu, const streamo_attention* arguments,
                                                     const void* table, int32_t most_spans, void* workspace,
                                                     size_t workspace_bytes, void* stream);

/* Attention inside windows: `streamo_window_attention`, with a head_dim of 32, 64, 80 or 128. `window_starts` is on the
 * host; `device_starts` is the same on the device, or NULL: then this call sends it to the workspace. */
STREAMO_API streamo_status streamo_gpu_window_attention_workspace(streamo_gpu* gpu,
                                                                  const streamo_window_attention* arguments,
                                                                  size_t* bytes);
STREAMO_API streamo_status streamo_gpu_window_attention_run(streamo_gpu* gpu,
                                                            const streamo_window_attention* arguments,
                                                            const int32_t* device_starts, void* workspace,
                                                            size_t workspace_bytes, void* stream);

/* ---------------------------------------------------------------------------------------------- matrix product */

/* How a product takes its input. */
typedef enum streamo_gpu_activations {
  STREAMO_GPU_ACTIVATIONS_AUTO = 0, /* what is faster for these sizes and bits */
  STREAMO_GPU_ACTIVATIONS_FP16 = 1, /* float16, scaled by row so that nothing overflows; sums in float32 */
  STREAMO_GPU_ACTIVATIONS_INT8 = 2  /* 8 bits with one scale for each row and block, as streamo_matmul_run */
} streamo_gpu_activations;

/* output = activation(input . weights + bias) + residual: `streamo_matmul` with weights as the bundle stores them; their
 * codes and scales are on the device, not repacked. `activations` is a streamo_gpu_activations. */
STREAMO_API streamo_status streamo_gpu_matmul_workspace(streamo_gpu* gpu, const streamo_weights_source* weights,
                                                        const streamo_matmul* arguments, int32_t activations,
                                                        size_t* bytes);

/* The same for whoever reserves memory before the sizes are known: enough for every call with at most these rows. Reads
 * no pointer; of `bias` and `residual` only whether they are NULL. */
STREAMO_API streamo_status streamo_gpu_matmul_most_workspace(streamo_gpu* gpu, const streamo_weights_source* weights,
                                                             const streamo_matmul* arguments, int32_t activations,
                                                             size_t* bytes);
STREAMO_API streamo_status streamo_gpu_matmul_run(streamo_gpu* gpu, const streamo_weights_source* weights,
                                                  const streamo_matmul* arguments, int32_t activations,
                                                  void* workspace, size_t workspace_bytes, void* stream);

/* -------------------------------------------------------------------------------------------------------- norm */

/* RMSNorm: output = x / sqrt(mean(x^2) + epsilon) * weight, with x = input + residual. */
typedef struct streamo_gpu_norm {
  int32_t rows, width;
  float epsilon;
  const float* input;    /* (rows, width) */
  const float* residual; /* (rows, width), or NULL */
  const float* weight;   /* (width) */
  float* sum;            /* (rows, width): x, may be input or residual; or NULL */
  float* output;         /* (rows, width) */
} streamo_gpu_norm;

STREAMO_API streamo_status streamo_gpu_norm_run(streamo_gpu* gpu, const streamo_gpu_norm* arguments, void* stream);

/* ---------------------------------------------------------------------------------------------------- sampling */

/* The choice of the next token from the logits of one row, on the device. temperature 0 is the largest logit, the
 * first of equal ones. Otherwise: the top_k largest (0: all), of these the smallest set whose probabilities reach
 * top_p, and one of them by `random`, which is the caller's so that host and device choose alike: the token is that of
 * edge/sampling.py unless `random` or top_p lies within 1e-5 of the border between two tokens. */
typedef struct streamo_gpu_sample {
  int32_t vocabulary;
  float temperature;     /* 0 to 10 */
  int32_t top_k;         /* 0, or 1 and more */
  float top_p;           /* above 0, at most 1 */
  double random;         /* from 0 to below 1, another one for each token */
  const float* logits;   /* (vocabulary) */
  int32_t* token;        /* (1) */
} streamo_gpu_sample;

STREAMO_API streamo_status streamo_gpu_sample_workspace(streamo_gpu* gpu, const streamo_gpu_sample* arguments,
                                                        size_t* bytes);
STREAMO_API streamo_status streamo_gpu_sample_run(streamo_gpu* gpu, const streamo_gpu_sample* arguments,
                                                  void* workspace, size_t workspace_bytes, void* stream);

/* ------------------------------------------------------------------------------------------------------- frame */

typedef enum streamo_gpu_pixels {
  STREAMO_GPU_PIXELS_RGB = 0,  /* plane: (height, width, 3) uint8 */
  STREAMO_GPU_PIXELS_NV12 = 1  /* plane: luma (height, width) uint8; chroma: (height / 2, width / 2, 2) uint8 */
} streamo_gpu_pixels;

/* A frame to the vision tower's input: antialiased bicubic resize, normalisation, patches; `edge/preprocess.py` on the
 * device, equal within one grey level. */
typedef struct streamo_gpu_frame {
  int32_t pixels;        /* a streamo_gpu_pixels */
  int32_t full_range;    /* NV12: 0 video range (16..235), 1 full range (0..255) */
  int32_t bt709;         /* NV12: 0 BT.601, 1 BT.709 */
  int32_t width, height; /* of the frame; even for NV12 */
  int64_t plane_stride;  /* bytes from one row to the next */
  int64_t chroma_stride;
  const uint8_t* plane;
  const uint8_t* chroma;   /* NV12 only */
  int32_t new_width, new_height; /* multiples of patch * merge */
  int32_t patch, merge;
  float mean[3], deviation[3];   /* of pixels from 0 to 1 */
  float* output;           /* (new_height / patch * new_width / patch, 3 * patch^2) */
} streamo_gpu_frame;

STREAMO_API streamo_status streamo_gpu_frame_workspace(streamo_gpu* gpu, const streamo_gpu_frame* arguments,
                                                       size_t* bytes);
STREAMO_API streamo_status streamo_gpu_frame_run(streamo_gpu* gpu, const streamo_gpu_frame* arguments, void* workspace,
                                                 size_t workspace_bytes, void* stream);

#ifdef __cplusplus
}
#endif
#endif
