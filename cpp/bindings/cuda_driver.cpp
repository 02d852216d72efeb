#include "cuda_driver.hpp"

#include <dlfcn.h>

#include <memory>
#include <mutex>

namespace tilewise::cuda {
namespace {

std::mutex opening;
// Never freed: threads of XLA may outlive what the interpreter ends.
const Driver* opened = nullptr;

template <typename F>
void find(void* library, const char* name, F& function) {
  function = reinterpret_cast<F>(dlsym(library, name));
  if (!function) throw Error(std::string("NVIDIA's driver has no function ") + name);
}

const Driver* load(const char* path) {
  void* library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
  if (!library) throw Error(std::string("NVIDIA's driver cannot be opened: ") + dlerror());
  auto made = std::make_unique<Driver>();
#define TILEWISE_FIND(name) find(library, #name, made->name)
  TILEWISE_FIND(cuGetErrorName);
  TILEWISE_FIND(cuGetErrorString);
  TILEWISE_FIND(cuStreamGetCtx);
  TILEWISE_FIND(cuCtxGetCurrent);
  TILEWISE_FIND(cuCtxPushCurrent_v2);
  TILEWISE_FIND(cuCtxPopCurrent_v2);
  TILEWISE_FIND(cuCtxGetDevice);
  TILEWISE_FIND(cuDeviceGetAttribute);
  TILEWISE_FIND(cuModuleLoadData);
  TILEWISE_FIND(cuModuleGetFunction);
  TILEWISE_FIND(cuFuncSetAttribute);
  TILEWISE_FIND(cuLaunchKernel);
  TILEWISE_FIND(cuMemcpyDtoHAsync_v2);
  TILEWISE_FIND(cuStreamSynchronize);
#undef TILEWISE_FIND
  return made.release();
}

}  // namespace

void Driver::check(Status status, const std::string& what) const {
  if (status == 0) return;
  const char *name = nullptr, *text = nullptr;
  cuGetErrorName(status, &name);
  cuGetErrorString(status, &text);
  throw Error(what + ": " + (name ? name : "error " + std::to_string(status)) +
              (text ? std::string(" (") + text + ")" : ""));
}

const Driver& driver() {
  const std::lock_guard<std::mutex> lock(opening);
  if (!opened) opened = load("libcuda.so.1");
  return *opened;
}

void open_driver(const std::string& path) {
  const std::lock_guard<std::mutex> lock(opening);
  opened = load(path.c_str());
}

}  // namespace tilewise::cuda
