/* A driver for tests: one GPU whose memory is the host's and whose streams do their work at once. */
#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

static double now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec * 1e3 + t.tv_nsec / 1e6;
}

int cuInit(unsigned flags) { return (int)flags; }
int cuDeviceGet(int *device, int i) { return *device = i; }
int cuDeviceGetAttribute(int *value, int attribute, int device) {
  *value = attribute == 75 ? 8 : attribute == 76 ? 6 : 2;
  return device;
}
int cuDeviceGetName(char *name, int size, int device) { return strncpy(name, "emulated", size) ? device : 1; }
int cuDevicePrimaryCtxRetain(void **context, int device) { return *context = 0, device; }
int cuCtxSetCurrent(void *context) { return context != 0; }
int cuCtxSynchronize(void) { return 0; }
int cuStreamCreate(void **stream, unsigned flags) { return *stream = 0, flags != 1; }
int cuMemAlloc_v2(uint64_t *memory, size_t bytes) {
  *memory = (uint64_t)aligned_alloc(256, (bytes + 255) / 256 * 256);
  return !*memory;
}
int cuMemFree_v2(uint64_t memory) { return free((void *)memory), 0; }
int cuMemcpyHtoD_v2(uint64_t to, const void *from, size_t bytes) { return !memcpy((void *)to, from, bytes); }
int cuMemcpyDtoH_v2(void *to, uint64_t from, size_t bytes) { return !memcpy(to, (void *)from, bytes); }
int cuEventCreate(double **event, unsigned flags) { return !(*event = malloc(sizeof **event)) || flags; }
int cuEventRecord(double *event, void *stream) { return *event = now(), stream != 0; }
int cuEventQuery(double *event) { return !event; }
int cuEventElapsedTime(float *milliseconds, double *start, double *stop) { return *milliseconds = *stop - *start, 0; }

/* A module is a library of `cuda_machine.EmulatedNvcc.compile_kernels`. */
typedef int Function(const unsigned *sizes, void **parameters);
int cuModuleLoad(void **module, const char *path) { return !(*module = dlopen(path, RTLD_NOW)); }
int cuModuleGetFunction(void **function, void *module, const char *name) {
  char symbol[200];
  snprintf(symbol, sizeof symbol, "emulated_%s", name);
  return !(*function = dlsym(module, symbol));
}
int cuFuncSetAttribute(void *function, int attribute, int value) { return !function || attribute != 8 || value < 0; }

/* A graph is the launches of the last capture; libraries launch by themselves, and at once. */
static struct {
  Function *function;
  unsigned sizes[7];
  void **parameters;
} graph[100];
static int capturing, launches;
int cuLaunchKernel(Function *function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                   unsigned shared, void *stream, void **parameters, void **extra) {
  unsigned sizes[] = {gx, gy, gz, bx, by, bz, shared};
  if (stream || extra) return 1;
  if (!capturing) return function(sizes, parameters);
  graph[launches].function = function;
  graph[launches].parameters = parameters;
  return !memcpy(graph[launches++].sizes, sizes, sizeof sizes);
}
int cuStreamBeginCapture_v2(void *stream, int mode) { return launches = 0, capturing = 1, stream != 0 || mode != 0; }
int cuStreamEndCapture(void *stream, void **graph) { return capturing = 0, *graph = 0, stream != 0; }
int cuGraphInstantiateWithFlags(void **ready, void *graph, uint64_t flags) { return *ready = graph, flags != 0; }
int cuGraphLaunch(void *ready, void *stream) {
  int status = ready || stream;
  for (int i = 0; i < launches && !status; i++) status = graph[i].function(graph[i].sizes, graph[i].parameters);
  return status;
}
