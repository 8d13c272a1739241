/* The C ABI of streamo-edge's native kernels.
 *
 * Owns nothing but signatures: attention over a KV cache that is appended in place, products with 4-bit and 8-bit
 * weights, and attention inside the windows of the vision tower. No type of another library appears here.
 *
 * Rules that hold for every function:
 *  - Tensors are float32, row-major and contiguous unless a stride is given; sizes count elements, not bytes.
 *  - Nothing is allocated per call once the largest call has been made; scratch memory belongs to the threads.
 *  - Arguments that do not fit are refused with a status before anything is written; `streamo_last_error` then says, in
 *    one sentence, what was expected and what was found. Nothing throws, nothing prints.
 *  - The same input gives the same bits, whatever the number of threads.
 *
 * Letters: T new tokens, C rows of the cache (slots), Hq query heads, Hkv key/value heads, D head width, R runs.
 */
#ifndef STREAMO_KERNELS_H
#define STREAMO_KERNELS_H

#include <stddef.h>
#include <stdint.h>

#if defined(__GNUC__)
#define STREAMO_API __attribute__((visibility("default")))
#else
#define STREAMO_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

#define STREAMO_KERNELS_ABI 1

typedef enum streamo_status {
  STREAMO_OK = 0,
  STREAMO_BAD_ARGUMENT = 1,  /* a shape, pointer, stride, slot or span does not fit */
  STREAMO_UNSUPPORTED = 2,   /* sizes that no kernel here covers, or an unknown instruction set */
  STREAMO_OUT_OF_MEMORY = 3,
  /* Only from the functions of streamo_gpu.h: */
  STREAMO_NO_DEVICE = 4,     /* no driver, one that is too old, or no such GPU */
  STREAMO_NO_KERNEL = 5,     /* no machine code for this GPU, or its archive is damaged */
  STREAMO_DEVICE_LOST = 6,   /* the GPU is unusable for the rest of this process */
  STREAMO_DEVICE_ERROR = 7   /* the driver refused a call; the GPU is still usable */
} streamo_status;

/* Version of this interface: STREAMO_KERNELS_ABI of the library that was built. */
STREAMO_API int32_t streamo_abi_version(void);

/* Why the last call of this thread was refused; "" if it was not. Valid until the thread's next call. */
STREAMO_API const char* streamo_last_error(void);

/* ------------------------------------------------------------------------------------------ instruction sets */

/* The one in use: "avx512vnni", "avx2", "i8mm", "dotprod" or "portable". Chosen at the first call. */
STREAMO_API const char* streamo_instruction_set(void);

/* Whether this build and this CPU can use `name`. */
STREAMO_API int32_t streamo_instruction_set_available(const char* name);

/* Use another one from now on; for tests and benchmarks. NULL returns to the best. Not while another call runs. */
STREAMO_API streamo_status streamo_select_instruction_set(const char* name);

/* ---------------------------------------------------------------------------------------------------- threads */

typedef void (*streamo_task)(void* context, size_t index);

/* Somebody's threads. `run` calls task(context, i) for every i below `tasks`, and returns when all are done.
 * NULL in place of this struct: the calling thread does everything. */
typedef struct streamo_threads {
  void* pool;
  int32_t count; /* how many may work at once, at least 1; a hint for splitting */
  void (*run)(void* pool, size_t tasks, streamo_task task, void* context);
} streamo_threads;

/* Threads of our own, for callers that have none. `count` at least 1, the calling thread included. NULL: no memory. */
STREAMO_API streamo_threads* streamo_threads_create(int32_t count);
STREAMO_API void streamo_threads_destroy(streamo_threads* threads);

/* -------------------------------------------------------------------------------------------------- attention */

typedef enum streamo_kv_type { STREAMO_KV_F32 = 0, STREAMO_KV_INT8 = 1 } streamo_kv_type;

/* Cached rows slot .. slot + length - 1, all of one run. */
typedef struct streamo_span {
  int32_t slot, length, run;
} streamo_span;

/* Append T tokens to the cache and attend over it.
 *
 * 1. bias: qkv + qkv_bias. 2. RoPE: element i of a head pairs with element i + D/2; the new tokens' queries and keys
 * are turned by rope_cos/sin. 3. Row new_slots[t] of the caches receives token t's key and value. 4. The new tokens
 * attend to every cached row that a span names, and causally among themselves: token t to new tokens 0 .. t.
 *
 * Runs. Cached keys keep the rotation with which they were written. Rows whose place in the conversation has moved
 * by the same number of positions form a run; for those rows the query is turned further, by run_cos/sin[run]. New
 * tokens attend to each other with the query as it is. A span's `length` may be 0; spans never name a slot twice.
 *
 * int8 cache. Codes are q = clamp(round_half_even(x / s), -127, 127) with one scale s = max|x| / 127 for each row and
 * head, kept in key_scales and value_scales (s = 0 for a row of zeros). What is quantised is
 *   keys:   RoPE(k + bias_k - key_offset)    the score adds  query . RoPE(key_offset)  exactly, with the row's angles
 *           from slot_cos/sin; Qwen2.5's keys need this, their common part would drown the rest in rounding;
 *   values: v without its bias, which is added to the output (the weights of a softmax sum to 1).
 * A float cache holds RoPE(k + bias_k) and v + bias_v, and takes no offset.
 */
typedef struct streamo_attention {
  int32_t query_heads, kv_heads, head_dim; /* Hq a multiple of Hkv; D a multiple of 16, at most 256 */
  int32_t capacity;                        /* C */
  int32_t new_tokens;                      /* T, at least 1 */
  int32_t kv_type; /* a streamo_kv_type; any number may come in, and is refused */
  float scale; /* of the scores, usually D^-1/2 */

  const float* qkv;      /* (T, (Hq + 2 Hkv) D): queries, keys, values */
  const float* qkv_bias; /* ((Hq + 2 Hkv) D), or NULL */
  const float* rope_cos; /* (T, D/2) */
  const float* rope_sin; /* (T, D/2) */

  void* key_cache;          /* (Hkv, C, D) float or int8_t */
  void* value_cache;        /* (Hkv, C, D) */
  float* key_scales;        /* (Hkv, C); int8 only */
  float* value_scales;      /* (Hkv, C); int8 only */
  const float* key_offset;  /* (Hkv, D), before RoPE; int8 only, may be NULL */
  const float* slot_cos;    /* (C, D/2) the angles each row was written with, new rows included; with key_offset */
  const float* slot_sin;    /* (C, D/2) */

  const int32_t* new_slots;  /* (T), all different, none of them in a span */
  const streamo_span* spans; /* (span_count) */
  int32_t span_count;
  const float* run_cos; /* (R, D/2) */
  const float* run_sin; /* (R, D/2) */
  int32_t run_count;    /* R */

  float* output; /* (T, Hq D) */
} streamo_attention;

/* With the instruction set in use. Cost: reads each named row once per KV head and call, whatever T and Hq. */
STREAMO_API streamo_status streamo_attention_run(const streamo_attention* arguments, const streamo_threads* threads);

/* The same in plain loops and double precision, over the same cache contents: the oracle. */
STREAMO_API streamo_status streamo_attention_reference(const streamo_attention* arguments);

/* Bidirectional attention of a vision tower, inside consecutive windows of rows.
 * Rows window_starts[w] .. window_starts[w + 1] - 1 see each other; one window is full attention. */
typedef struct streamo_window_attention {
  int32_t heads, head_dim; /* D a multiple of 16, at most 256 */
  int32_t rows;            /* P */
  int32_t window_count;
  float scale;
  const float* qkv;             /* (P, 3 heads D), bias already added */
  const float* rope_cos;        /* (P, D/2) */
  const float* rope_sin;        /* (P, D/2) */
  const int32_t* window_starts; /* (window_count + 1), rising from 0 to P */
  float* output;                /* (P, heads D) */
} streamo_window_attention;

STREAMO_API streamo_status streamo_window_attention_run(const streamo_window_attention* arguments,
                                                        const streamo_threads* threads);
STREAMO_API streamo_status streamo_window_attention_reference(const streamo_window_attention* arguments);

/* --------------------------------------------------------------------------------------------- matrix product */

/* Quantised weights as the bundle stores them: symmetric codes, one scale for each block along K. */
typedef struct streamo_weights_source {
  int32_t inputs;      /* K, any number of at least 1; the last block may be short */
  int32_t outputs;     /* N; even for 4 bits. With `gated`, N counts gate and up together */
  int32_t bits;        /* 8: int8_t codes -127..127. 4: codes -8..7, two a byte, the first in the low half */
  int32_t block;       /* 16, 32, 64 or 128 (any multiple of 16 up to 256 is accepted) */
  int32_t gated;       /* 0, or 1: columns 0..N/2-1 are the gate, the rest is up; the product is silu(gate) * up */
  const void* codes;   /* (K, N) */
  const float* scales; /* (ceil(K / block), N) */
} streamo_weights_source;

/* Weights in the layout of the instruction set in use. */
typedef struct streamo_weights streamo_weights;

/* Pack once, at load. The source may be freed afterwards. */
STREAMO_API streamo_status streamo_weights_pack(const streamo_weights_source* source, const streamo_threads* threads,
                                                streamo_weights** packed);
STREAMO_API void streamo_weights_destroy(streamo_weights* packed);
STREAMO_API size_t streamo_weights_bytes(const streamo_weights* packed);

/* output = activation(input . weights + bias) + residual.
 * The input is quantised to 8 bits, one scale for each row and block (max|x| / 127, round half to even). */
typedef struct streamo_matmul {
  int32_t rows;             /* T, at least 1 */
  const float* input;       /* (T, K) */
  const float* bias;        /* (N), or NULL; of gate and up with gated weights */
  const float* residual;    /* as output, or NULL; may be the output itself */
  float* output;            /* (T, N), or (T, N/2) with gated weights */
  int64_t input_stride;     /* elements from one row to the next, at least K */
  int64_t output_stride;    /* of output and residual, at least their width */
} streamo_matmul;

STREAMO_API streamo_status streamo_matmul_run(const streamo_weights* weights, const streamo_matmul* arguments,
                                              const streamo_threads* threads);

/* The same in double precision from the unpacked codes, without quantising the input: the oracle. */
STREAMO_API streamo_status streamo_matmul_reference(const streamo_weights_source* source,
                                                    const streamo_matmul* arguments);

/* ------------------------------------------------------------------------------------------- benchmark peaks */

typedef enum streamo_peak { STREAMO_PEAK_INT8 = 0, STREAMO_PEAK_F32 = 1 } streamo_peak;

/* The fastest arithmetic of the instruction set in use: `rounds` rounds of independent multiply-adds in registers, on
 * every thread. Returns the operations done (a multiply and an add are two) for the caller to divide by the time it
 * took; 0 if refused. */
STREAMO_API double streamo_peak_arithmetic(int32_t kind, int64_t rounds, const streamo_threads* threads);

/* Reads `bytes` of memory once, shared among the threads, and returns the sum of its words. */
STREAMO_API uint64_t streamo_peak_read(const void* memory, size_t bytes, const streamo_threads* threads);

#ifdef __cplusplus
}
#endif
#endif
