/* Stands in for NVIDIA's driver on the host: what would run on a GPU is handed to the test. */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef int (*Launched)(const char* image, const char* name, const unsigned* sizes, void** values);
struct Function {
  char *image, *name;
  int shared;
};

static Launched launched;
static char failing[64];
static int capability = 90, loads, waits, pushed, contexts[4], current;

void stand_in_launched(Launched function) {
  launched = function;
}
void stand_in_failing(const char* name) {
  snprintf(failing, sizeof failing, "%s", name);
}
void stand_in_board(int context, int number) {
  current = context, capability = number;
}
int stand_in_loads(void) {
  return loads;
}
int stand_in_waits(void) {
  return waits;
}
int stand_in_pushed(void) {
  return pushed;
}

static int status(const char* name) {
  return strcmp(name, failing) == 0 ? 700 : 0;
}

int cuGetErrorName(int error, const char** text) {
  *text = error == 700 ? "CUDA_ERROR_ILLEGAL_ADDRESS" : NULL;
  return 0;
}
int cuGetErrorString(int error, const char** text) {
  *text = error == 700 ? "an illegal memory access was encountered" : NULL;
  return 0;
}
int cuStreamGetCtx(void* stream, void** context) {
  (void)stream;
  *context = &contexts[current];
  return status("cuStreamGetCtx");
}
int cuCtxGetCurrent(void** context) {
  *context = strcmp(failing, "no context") == 0 ? NULL : &contexts[current];
  return status("cuCtxGetCurrent");
}
int cuCtxPushCurrent_v2(void* context) {
  (void)context;
  if (status("cuCtxPushCurrent")) return 700;
  pushed++;
  return 0;
}
int cuCtxPopCurrent_v2(void** context) {
  *context = &contexts[current];
  pushed--;
  return 0;
}
int cuCtxGetDevice(int* device) {
  *device = 0;
  return status("cuCtxGetDevice");
}
int cuDeviceGetAttribute(int* value, int attribute, int device) {
  (void)device;
  *value = attribute == 75 ? capability / 10 : attribute == 76 ? capability % 10 : -1;
  return status("cuDeviceGetAttribute");
}
int cuModuleLoadData(void** module, const void* image) {
  *module = strdup(image);
  loads++;
  return status("cuModuleLoadData");
}
int cuModuleGetFunction(void** function, void* module, const char* name) {
  struct Function* made = malloc(sizeof *made);
  made->image = module;
  made->name = strdup(name);
  made->shared = 48 << 10;
  *function = made;
  return status("cuModuleGetFunction");
}
int cuFuncSetAttribute(struct Function* function, int attribute, int value) {
  if (attribute != 8) return 1;
  function->shared = value;
  return status("cuFuncSetAttribute");
}
int cuLaunchKernel(struct Function* function, unsigned gx, unsigned gy, unsigned gz, unsigned bx,
                   unsigned by, unsigned bz, unsigned shared, void* stream, void** values,
                   void** extra) {
  if (status("cuLaunchKernel")) return 700;
  if (stream || extra || by != 1 || bz != 1 || (int)shared > function->shared) return 1;
  unsigned sizes[] = {gx, gy, gz, bx, shared};
  return launched(function->image, function->name, sizes, values);
}
int cuMemcpyDtoHAsync_v2(void* target, uint64_t source, size_t bytes, void* stream) {
  (void)stream;
  memcpy(target, (void*)(uintptr_t)source, bytes);
  return status("cuMemcpyDtoHAsync");
}
int cuStreamSynchronize(void* stream) {
  (void)stream;
  waits++;
  return status("cuStreamSynchronize");
}
