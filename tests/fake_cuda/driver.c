/* A CUDA driver without a GPU: exports what kernels/src/gpu/driver.h asks for, keeps "device" memory on the host, and
 * hands launches to a callback (tests/gpu_interpreter.py runs the kernel in Triton's interpreter).
 *
 * Strict where a real driver is: a context must be current, handles must be alive, copies must stay inside a block,
 * streams are recorded instead of run while they are captured, and after a sticky error nothing works any more.
 * Fresh memory is all ones (NaN in every float type), and what lies behind a block is checked when it is freed.
 *
 * Faults and figures: fake_cuda_set and fake_cuda_get, with the names in `settings`; at the start also from the
 * environment: FAKE_CUDA="sm=87,launch_fails_at=3". "_at" counts from now on: 1 is the next call. */
#define _GNU_SOURCE
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#define EXPORT __attribute__((visibility("default")))

enum {
  SUCCESS = 0, INVALID_VALUE = 1, OUT_OF_MEMORY = 2, NOT_INITIALIZED = 3, NO_DEVICE = 100, INVALID_DEVICE = 101,
  INVALID_IMAGE = 200, INVALID_CONTEXT = 201, INVALID_HANDLE = 400, NOT_FOUND = 500, ILLEGAL_ADDRESS = 700,
  LAUNCH_FAILED = 719, CAPTURE_INVALID = 901, CAPTURE_UNJOINED = 904
};
enum { GUARD_BYTES = 256, MOST_PARAMETERS = 66, SHARED_WITHOUT_ASKING = 48 << 10 };

typedef int (*launch_callback)(const char* kernel, const unsigned* grid, unsigned threads, unsigned shared,
                               void** parameters);

/* ------------------------------------------------------------------------------------------------------- settings */

static long long driver = 13000, devices = 1, sm = 87, multiprocessors = 16, integrated = 1, memory = 1LL << 40;
static long long most_shared = 163 << 10, init_error, load_error, alloc_fails_at, launch_fails_at;
static long long launch_error = ILLEGAL_ADDRESS, launch_is_late, host_page_tables, hidden;
static long long calls, waits, wishes, launches, blocks, block_bytes, modules, contexts, streams, events, graphs, faults;

static const struct { const char* name; long long* value; } settings[] = {
  {"driver", &driver},                     /* version, 1000 * major + 10 * minor */
  {"devices", &devices}, {"sm", &sm}, {"multiprocessors", &multiprocessors}, {"integrated", &integrated},
  {"memory", &memory},                     /* bytes of the device */
  {"host_page_tables", &host_page_tables}, /* 1: copies read the host's memory whenever they get to it */
  {"hidden", &hidden},                     /* 1: new memory can be touched by copies and kernels only */
  {"most_shared", &most_shared},           /* bytes of shared memory a block may ask for */
  {"init_error", &init_error},             /* what cuInit returns */
  {"load_error", &load_error},             /* what cuModuleLoadData returns */
  {"alloc_fails_at", &alloc_fails_at}, {"launch_fails_at", &launch_fails_at},
  {"launch_error", &launch_error},         /* and what that launch fails with */
  {"launch_is_late", &launch_is_late},     /* 1: that launch succeeds, and the next call fails */
  /* figures */
  {"calls", &calls},                       /* of functions that touch the device */
  {"waits", &waits},                       /* for a stream */
  {"wishes", &wishes},                     /* for shared memory in place of L1 */
  {"launches", &launches}, {"blocks", &blocks}, {"block_bytes", &block_bytes}, {"modules", &modules},
  {"contexts", &contexts}, {"streams", &streams}, {"events", &events}, {"graphs", &graphs},
  {"faults", &faults},                     /* what a real device would not forgive: writes behind a block */
};

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static launch_callback on_launch;
static int sticky, initialised;
static _Thread_local int depth; /* of this thread's stack of contexts */
static char the_context;

static long long* setting(const char* name, size_t length) {
  for (size_t i = 0; i < sizeof settings / sizeof *settings; ++i) {
    if (strlen(settings[i].name) == length && memcmp(settings[i].name, name, length) == 0) return settings[i].value;
  }
  fprintf(stderr, "fake CUDA: there is no setting `%.*s`\n", (int)length, name);
  abort();
}

__attribute__((constructor)) static void read_environment(void) {
  const char* at = getenv("FAKE_CUDA");
  while (at != NULL && *at != '\0') {
    const char* equals = strchr(at, '=');
    if (equals == NULL) abort();
    *setting(at, (size_t)(equals - at)) = strtoll(equals + 1, NULL, 0);
    at = strchr(equals, ',');
    if (at != NULL) ++at;
  }
}

EXPORT void fake_cuda_set(const char* name, long long value) { *setting(name, strlen(name)) = value; }
EXPORT long long fake_cuda_get(const char* name) { return *setting(name, strlen(name)); }
EXPORT void fake_cuda_on_launch(launch_callback callback) { on_launch = callback; }

/* --------------------------------------------------------------------------------------------------------- memory */

typedef struct block {
  struct block* next;
  unsigned char* data;
  size_t bytes, mapped; /* whole pages of its own, or 0 */
} block;
static block* all_blocks;

static void show_hidden(int access) {
  for (const block* b = all_blocks; b != NULL; b = b->next) {
    if (b->mapped) mprotect(b->data, b->mapped, access);
  }
}

/* Memory for a block, or NULL. */
static void* take(size_t bytes, size_t* mapped) {
  void* data = NULL;
  *mapped = 0;
  if (!hidden) return posix_memalign(&data, 256, bytes) == 0 ? data : NULL;
  *mapped = (bytes + 4095) / 4096 * 4096;
  data = mmap(NULL, *mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  return data == MAP_FAILED ? NULL : data;
}

static void give_back(void* data, size_t mapped) {
  if (mapped) munmap(data, mapped);
  else free(data);
}

static block* block_of(uint64_t address) {
  for (block* b = all_blocks; b != NULL; b = b->next) {
    if (address >= (uint64_t)b->data && address < (uint64_t)b->data + b->bytes) return b;
  }
  return NULL;
}

/* The block that an address lies in: 1, its start and its bytes; or 0. */
EXPORT int fake_cuda_block(uint64_t address, uint64_t* start, uint64_t* bytes) {
  pthread_mutex_lock(&lock);
  const block* b = block_of(address);
  if (b != NULL) *start = (uint64_t)b->data, *bytes = b->bytes;
  pthread_mutex_unlock(&lock);
  return b != NULL;
}

static int leaves_block(uint64_t address, size_t bytes) {
  const block* b = block_of(address);
  return b != NULL && address + bytes > (uint64_t)b->data + b->bytes;
}

/* Every function that touches the device starts with this. */
static int enter(void) {
  __atomic_add_fetch(&calls, 1, __ATOMIC_RELAXED);
  if (!initialised) return NOT_INITIALIZED;
  if (sticky) return sticky;
  return depth > 0 ? SUCCESS : INVALID_CONTEXT;
}

static int counts_down(long long* counter) { return *counter > 0 && --*counter == 0; }

EXPORT int cuMemAlloc_v2(uint64_t* pointer, size_t bytes) {
  int result = enter();
  if (result) return result;
  if (bytes == 0) return INVALID_VALUE;
  pthread_mutex_lock(&lock);
  size_t mapped = 0;
  void* data = NULL;
  block* b = NULL;
  if (counts_down(&alloc_fails_at) || block_bytes + (long long)bytes > memory ||
      (data = take(bytes + GUARD_BYTES, &mapped)) == NULL || (b = malloc(sizeof *b)) == NULL) {
    if (data != NULL) give_back(data, mapped);
    pthread_mutex_unlock(&lock);
    return OUT_OF_MEMORY;
  }
  memset(data, 0xff, bytes);
  memset((char*)data + bytes, 0xa5, GUARD_BYTES);
  *b = (block){all_blocks, data, bytes, mapped};
  if (mapped) mprotect(data, mapped, PROT_NONE);
  all_blocks = b;
  ++blocks, block_bytes += (long long)bytes;
  *pointer = (uint64_t)data;
  pthread_mutex_unlock(&lock);
  return SUCCESS;
}

EXPORT int cuMemFree_v2(uint64_t pointer) {
  int result = enter();
  if (result) return result;
  pthread_mutex_lock(&lock);
  block** at = &all_blocks;
  while (*at != NULL && (uint64_t)(*at)->data != pointer) at = &(*at)->next;
  block* found = *at;
  if (found != NULL) {
    *at = found->next;
    if (found->mapped) mprotect(found->data, found->mapped, PROT_READ);
    --blocks, block_bytes -= (long long)found->bytes;
    for (size_t i = 0; i < GUARD_BYTES; ++i) {
      if (found->data[found->bytes + i] != 0xa5) { ++faults; break; }
    }
    give_back(found->data, found->mapped);
    free(found);
  }
  pthread_mutex_unlock(&lock);
  return found != NULL ? SUCCESS : INVALID_VALUE;
}

EXPORT int cuMemGetInfo_v2(size_t* unused, size_t* total) {
  int result = enter();
  if (result) return result;
  *total = (size_t)memory, *unused = (size_t)(memory - block_bytes);
  return SUCCESS;
}

/* -------------------------------------------------------------------------------------------------------- modules */

typedef struct module {
  char kernel[128], letters[MOST_PARAMETERS], symbol[128];
  unsigned shared; /* dynamic shared memory that was asked for */
} module;

EXPORT int cuModuleLoadData(module** loaded, const void* image) {
  int result = enter();
  if (result) return result;
  if (load_error) return (int)load_error;
  module* m = calloc(1, sizeof *m);
  if (m == NULL) return OUT_OF_MEMORY;
  if (sscanf(image, "FAKECUBIN %127s %65s %127s", m->kernel, m->letters, m->symbol) != 3) {
    free(m);
    return INVALID_IMAGE;
  }
  if (m->letters[0] == '-') m->letters[0] = '\0'; /* no arguments */
  __atomic_add_fetch(&modules, 1, __ATOMIC_RELAXED);
  *loaded = m;
  return SUCCESS;
}

EXPORT int cuModuleUnload(module* m) {
  int result = enter();
  if (result) return result;
  free(m);
  __atomic_sub_fetch(&modules, 1, __ATOMIC_RELAXED);
  return SUCCESS;
}

EXPORT int cuModuleGetFunction(module** function, module* m, const char* symbol) {
  int result = enter();
  if (result) return result;
  if (strcmp(symbol, m->symbol) != 0) return NOT_FOUND;
  *function = m;
  return SUCCESS;
}

EXPORT int cuFuncSetAttribute(module* function, int attribute, int value) {
  int result = enter();
  if (result) return result;
  if (attribute == 9) { /* a wish: how much shared memory, beside the L1 */
    ++wishes;
    return value >= -1 && value <= 100 ? SUCCESS : INVALID_VALUE;
  }
  if (attribute != 8 || value < 0 || value > most_shared) return INVALID_VALUE;
  function->shared = (unsigned)value;
  return SUCCESS;
}

/* ----------------------------------------------------------------------------------------- streams and their work */

typedef struct work {
  struct work* next;
  enum { COPY, FILL, LAUNCH } kind;
  uint64_t target, source; /* copies and fills */
  size_t bytes;
  unsigned char value;
  module* function; /* launches */
  unsigned grid[3], threads, shared;
  uint64_t parameters[MOST_PARAMETERS];
} work;

/* A stream that waits for an event of a captured one is captured with it: its work goes to that `origin`'s list. */
typedef struct stream {
  int capturing; /* number of the capture that it began; 0: none */
  work *first, **last;
  struct stream* origin;
  int origins_capture, open; /* of the origin: branches that it has not waited for */
} stream;
typedef struct event {
  stream* origin; /* where it was recorded, if that was captured */
  int capture, of_branch;
} event;
static int captures;

static stream* captured_by(stream* s) {
  if (s == NULL) return NULL;
  if (s->capturing) return s;
  return s->origin != NULL && s->origin->capturing == s->origins_capture ? s->origin : NULL;
}

static int launch_now(const work* w) {
  void* pointers[MOST_PARAMETERS];
  for (int i = 0; i < MOST_PARAMETERS; ++i) pointers[i] = (void*)&w->parameters[i];
  pthread_mutex_lock(&lock);
  ++launches;
  int failed = counts_down(&launch_fails_at);
  pthread_mutex_unlock(&lock);
  if (!failed && on_launch != NULL && on_launch(w->function->kernel, w->grid, w->threads, w->shared, pointers) != 0) {
    sticky = LAUNCH_FAILED;
  }
  if (failed) {
    int lasting = launch_error >= 700 && launch_error < 800;
    if (lasting || launch_is_late) sticky = (int)launch_error;
    return launch_is_late ? SUCCESS : (int)launch_error;
  }
  return SUCCESS; /* what a kernel does wrong shows at the next call */
}

static int do_now(const work* w) {
  int result = SUCCESS;
  show_hidden(PROT_READ | PROT_WRITE);
  if (w->kind == LAUNCH) result = launch_now(w);
  if (w->kind == COPY) memmove((void*)w->target, (const void*)w->source, w->bytes);
  if (w->kind == FILL) memset((void*)w->target, w->value, w->bytes);
  show_hidden(PROT_NONE);
  return result;
}

static int do_or_record(stream* s, const work* w) {
  s = captured_by(s);
  if (s == NULL) return do_now(w);
  work* kept = malloc(sizeof *kept);
  if (kept == NULL) return OUT_OF_MEMORY;
  *kept = *w;
  kept->next = NULL;
  *s->last = kept;
  s->last = &kept->next;
  return SUCCESS;
}

EXPORT int cuMemcpyAsync(uint64_t target, uint64_t source, size_t bytes, stream* s) {
  int result = enter();
  if (result) return result;
  pthread_mutex_lock(&lock);
  int wrong = target == 0 || source == 0 || leaves_block(target, bytes) || leaves_block(source, bytes);
  pthread_mutex_unlock(&lock);
  if (wrong) return INVALID_VALUE;
  return do_or_record(s, &(work){.kind = COPY, .target = target, .source = source, .bytes = bytes});
}

EXPORT int cuPointerGetAttribute(unsigned* type, int attribute, uint64_t pointer) {
  int result = enter();
  if (result) return result;
  pthread_mutex_lock(&lock);
  int known = block_of(pointer) != NULL;
  pthread_mutex_unlock(&lock);
  if (attribute != 2 || !known) return INVALID_VALUE; /* the driver knows no other memory */
  *type = 2;
  return SUCCESS;
}

EXPORT int cuMemsetD8Async(uint64_t target, unsigned char value, size_t bytes, stream* s) {
  int result = enter();
  if (result) return result;
  pthread_mutex_lock(&lock);
  int wrong = target == 0 || leaves_block(target, bytes);
  pthread_mutex_unlock(&lock);
  if (wrong) return INVALID_VALUE;
  return do_or_record(s, &(work){.kind = FILL, .target = target, .bytes = bytes, .value = value});
}

EXPORT int cuLaunchKernel(module* function, unsigned x, unsigned y, unsigned z, unsigned threads, unsigned threads_y,
                          unsigned threads_z, unsigned shared, stream* s, void** parameters, void** extra) {
  int result = enter();
  if (result) return result;
  if (function == NULL) return INVALID_HANDLE;
  if (x == 0 || y == 0 || z == 0 || x > 0x7fffffffu || y > 65535 || z > 65535 || threads == 0 || threads > 1024 ||
      threads_y != 1 || threads_z != 1 || extra != NULL) {
    return INVALID_VALUE;
  }
  if (shared > SHARED_WITHOUT_ASKING && shared > function->shared) return INVALID_VALUE;
  work w = {.kind = LAUNCH, .function = function, .grid = {x, y, z}, .threads = threads, .shared = shared};
  size_t count = strlen(function->letters);
  for (size_t i = 0; i < count; ++i) {
    memcpy(&w.parameters[i], parameters[i], strchr("if", function->letters[i]) ? 4 : 8);
  }
  for (size_t i = count; i < count + 2; ++i) { /* Triton's scratch memory, which our kernels do not have */
    memcpy(&w.parameters[i], parameters[i], 8);
    if (w.parameters[i] != 0) return INVALID_VALUE;
  }
  return do_or_record(s, &w);
}

EXPORT int cuStreamCreate(stream** s, unsigned flags) {
  int result = enter();
  if (result) return result;
  if (flags > 1) return INVALID_VALUE;
  *s = calloc(1, sizeof **s);
  if (*s == NULL) return OUT_OF_MEMORY;
  __atomic_add_fetch(&streams, 1, __ATOMIC_RELAXED);
  return SUCCESS;
}

static void free_work(work* w) {
  while (w != NULL) {
    work* next = w->next;
    free(w);
    w = next;
  }
}

EXPORT int cuStreamDestroy_v2(stream* s) {
  int result = enter();
  if (result) return result;
  free_work(s->first);
  free(s);
  __atomic_sub_fetch(&streams, 1, __ATOMIC_RELAXED);
  return SUCCESS;
}

EXPORT int cuStreamSynchronize(stream* s) {
  int result = enter();
  if (result) return result;
  __atomic_add_fetch(&waits, 1, __ATOMIC_RELAXED);
  return captured_by(s) != NULL ? CAPTURE_INVALID : SUCCESS;
}

EXPORT int cuStreamIsCapturing(stream* s, int* capturing) {
  *capturing = captured_by(s) != NULL;
  return enter();
}

EXPORT int cuStreamWaitEvent(stream* s, event* e, unsigned flags) {
  int result = enter();
  if (result) return result;
  if (flags != 0 || e == NULL) return INVALID_VALUE;
  if (e->origin == NULL || e->origin->capturing != e->capture) return SUCCESS; /* what is done is done */
  if (s == e->origin) {
    if (e->of_branch) --s->open, e->of_branch = 0;
    return SUCCESS;
  }
  if (s == NULL || s->capturing) return CAPTURE_INVALID;
  if (captured_by(s) == NULL) *s = (stream){.origin = e->origin, .origins_capture = e->capture}, ++e->origin->open;
  return SUCCESS;
}

EXPORT int cuStreamBeginCapture_v2(stream* s, int mode) {
  int result = enter();
  if (result) return result;
  if (s == NULL || captured_by(s) != NULL || mode < 0 || mode > 2) return INVALID_VALUE;
  *s = (stream){.capturing = ++captures, .last = &s->first};
  return SUCCESS;
}

/* A graph is the list of its work; an executable graph is the same list. */
typedef struct graph {
  work* first;
} graph;

EXPORT int cuStreamEndCapture(stream* s, graph** g) {
  int result = enter();
  if (result) return result;
  if (s == NULL || !s->capturing) return CAPTURE_INVALID;
  *g = malloc(sizeof **g);
  if (*g == NULL) return OUT_OF_MEMORY;
  (*g)->first = s->first;
  const int open = s->open;
  *s = (stream){0};
  if (open != 0) return CAPTURE_UNJOINED;
  __atomic_add_fetch(&graphs, 1, __ATOMIC_RELAXED);
  return SUCCESS;
}

EXPORT int cuGraphInstantiateWithFlags(graph** executable, graph* g, unsigned long long flags) {
  int result = enter();
  if (result) return result;
  if (flags != 0) return INVALID_VALUE;
  graph* copy = malloc(sizeof *copy);
  if (copy == NULL) return OUT_OF_MEMORY;
  copy->first = g->first;
  g->first = NULL;
  __atomic_add_fetch(&graphs, 1, __ATOMIC_RELAXED);
  *executable = copy;
  return SUCCESS;
}

EXPORT int cuGraphDestroy(graph* g) {
  int result = enter();
  if (result) return result;
  free_work(g->first);
  free(g);
  __atomic_sub_fetch(&graphs, 1, __ATOMIC_RELAXED);
  return SUCCESS;
}

EXPORT int cuGraphExecDestroy(graph* g) { return cuGraphDestroy(g); }

EXPORT int cuGraphLaunch(graph* g, stream* s) {
  int result = enter();
  for (const work* w = g->first; result == SUCCESS && w != NULL; w = w->next) result = do_or_record(s, w);
  return result;
}

/* --------------------------------------------------------------------------------------------------------- events */

EXPORT int cuEventCreate(event** created, unsigned flags) {
  int result = enter();
  if (result) return result;
  (void)flags;
  *created = calloc(1, sizeof **created);
  if (*created == NULL) return OUT_OF_MEMORY;
  __atomic_add_fetch(&events, 1, __ATOMIC_RELAXED);
  return SUCCESS;
}

EXPORT int cuEventDestroy_v2(event* e) {
  int result = enter();
  if (result) return result;
  free(e);
  __atomic_sub_fetch(&events, 1, __ATOMIC_RELAXED);
  return SUCCESS;
}

EXPORT int cuEventRecord(event* e, stream* s) {
  stream* by = captured_by(s);
  *e = (event){by, by == NULL ? 0 : by->capturing, by != NULL && by != s};
  return enter();
}
EXPORT int cuEventSynchronize(void* event) { return (void)event, enter(); }
EXPORT int cuEventElapsedTime(float* milliseconds, void* from, void* to) {
  (void)from, (void)to;
  *milliseconds = 1.0f;
  return enter();
}

/* ------------------------------------------------------------------------------------------- device and its context */

EXPORT int cuInit(unsigned flags) {
  if (flags != 0) return INVALID_VALUE;
  if (init_error) return (int)init_error;
  if (devices == 0) return NO_DEVICE;
  initialised = 1;
  return SUCCESS;
}

EXPORT int cuDriverGetVersion(int* version) { return *version = (int)driver, SUCCESS; }
EXPORT int cuDeviceGetCount(int* count) { return *count = (int)devices, initialised ? SUCCESS : NOT_INITIALIZED; }

EXPORT int cuDeviceGet(int* device, int ordinal) {
  *device = ordinal;
  return ordinal >= 0 && ordinal < devices ? SUCCESS : INVALID_DEVICE;
}

EXPORT int cuDeviceGetName(char* name, int length, int device) {
  snprintf(name, (size_t)length, "Fake GPU %d", device);
  return SUCCESS;
}

EXPORT int cuDeviceGetAttribute(int* value, int attribute, int device) {
  (void)device;
  switch (attribute) {
    case 16: *value = (int)multiprocessors; return SUCCESS;
    case 18: *value = (int)integrated; return SUCCESS;
    case 75: *value = (int)sm / 10; return SUCCESS;
    case 76: *value = (int)sm % 10; return SUCCESS;
    case 100: *value = (int)host_page_tables; return SUCCESS;
    case 97: *value = (int)most_shared; return SUCCESS;
    default: return INVALID_VALUE;
  }
}

EXPORT int cuDeviceTotalMem_v2(size_t* bytes, int device) { return (void)device, *bytes = (size_t)memory, SUCCESS; }

EXPORT int cuDevicePrimaryCtxRetain(void** context, int device) {
  (void)device;
  if (sticky) return sticky;
  *context = &the_context;
  __atomic_add_fetch(&contexts, 1, __ATOMIC_RELAXED);
  return SUCCESS;
}

EXPORT int cuDevicePrimaryCtxRelease_v2(int device) {
  (void)device;
  return __atomic_sub_fetch(&contexts, 1, __ATOMIC_RELAXED) < 0 ? INVALID_CONTEXT : SUCCESS;
}

EXPORT int cuCtxPushCurrent_v2(void* context) {
  if (context != &the_context) return INVALID_CONTEXT;
  return ++depth, SUCCESS;
}

EXPORT int cuCtxPopCurrent_v2(void** context) {
  *context = &the_context;
  return depth > 0 ? (--depth, SUCCESS) : INVALID_CONTEXT;
}

EXPORT int cuGetErrorName(int error, const char** name) {
  switch (error) {
    case OUT_OF_MEMORY: *name = "CUDA_ERROR_OUT_OF_MEMORY"; return SUCCESS;
    case INVALID_VALUE: *name = "CUDA_ERROR_INVALID_VALUE"; return SUCCESS;
    case ILLEGAL_ADDRESS: *name = "CUDA_ERROR_ILLEGAL_ADDRESS"; return SUCCESS;
    case LAUNCH_FAILED: *name = "CUDA_ERROR_LAUNCH_FAILED"; return SUCCESS;
    default: *name = "CUDA_ERROR_OF_THE_FAKE"; return SUCCESS;
  }
}
