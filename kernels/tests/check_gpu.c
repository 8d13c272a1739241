/* Opens, refuses, uses and closes GPUs again and again: for the leak checker.
 *   check_gpu FOLDER DAMAGED      folders of archives, with the driver that STREAMO_CUDA_DRIVER names */
#include <stdio.h>
#include <stdlib.h>

#include "streamo_gpu.h"

static void expect(int holds, const char* what) {
  if (holds) return;
  fprintf(stderr, "failed: %s: %s\n", what, streamo_last_error());
  exit(1);
}

static void use(streamo_gpu* gpu) {
  const uint32_t grid[3] = {1, 1, 1};
  void *x = NULL, *y = NULL, *stream = NULL, *graph = NULL;
  streamo_gpu_facts facts;
  expect(streamo_gpu_get_facts(gpu, &facts) == STREAMO_OK && facts.sm == 87, "facts");
  expect(streamo_gpu_alloc(gpu, 256, &x) == STREAMO_OK && streamo_gpu_alloc(gpu, 256, &y) == STREAMO_OK, "memory");
  expect(streamo_gpu_alloc(gpu, (size_t)1 << 62, &graph) == STREAMO_OUT_OF_MEMORY && graph == NULL, "too much memory");
  expect(streamo_gpu_stream_create(gpu, &stream) == STREAMO_OK, "stream");
  const void* arguments[] = {&x, &y};
  expect(streamo_gpu_launch(gpu, "without_mask_64", grid, "pp", arguments, NULL) == STREAMO_OK, "launch");
  expect(streamo_gpu_launch(gpu, "without_mask_64", grid, "pi", arguments, NULL) == STREAMO_BAD_ARGUMENT, "types");
  expect(streamo_gpu_launch(gpu, "nothing", grid, "pp", arguments, NULL) == STREAMO_NO_KERNEL, "no kernel");
  expect(streamo_gpu_graph_begin(gpu, stream) == STREAMO_OK, "begin");
  expect(streamo_gpu_fill(gpu, x, 1, 256, stream) == STREAMO_OK, "fill");
  expect(streamo_gpu_graph_end(gpu, stream, &graph) == STREAMO_OK, "end");
  expect(streamo_gpu_graph_launch(gpu, graph, stream) == STREAMO_OK, "graph");
  expect(streamo_gpu_synchronize(gpu, stream) == STREAMO_OK, "wait");
  expect(streamo_gpu_graph_destroy(gpu, graph) == STREAMO_OK, "end of the graph");
  expect(streamo_gpu_stream_destroy(gpu, stream) == STREAMO_OK, "end of the stream");
  expect(streamo_gpu_free(gpu, x) == STREAMO_OK && streamo_gpu_free(gpu, y) == STREAMO_OK, "end of the memory");
}

int main(int count, char** arguments) {
  if (count != 3) return 2;
  for (int i = 0; i < 50; ++i) {
    streamo_gpu* gpu = NULL;
    expect(streamo_gpu_open(arguments[2], 0, &gpu) == STREAMO_NO_KERNEL && gpu == NULL, "a damaged archive");
    expect(streamo_gpu_open(arguments[1], 7, &gpu) == STREAMO_NO_DEVICE && gpu == NULL, "a device that is not there");
    expect(streamo_gpu_open(arguments[1], 0, &gpu) == STREAMO_OK, "opening");
    use(gpu);
    streamo_gpu_close(gpu);
  }
  streamo_gpu_close(NULL);
  puts("opened 50 times");
  return 0;
}
