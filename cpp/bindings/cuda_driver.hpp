// What is used of NVIDIA's driver, declared here and found when it is first needed: neither its
// headers nor its library have to be there when this is built, or where there is no GPU.
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

namespace tilewise::cuda {

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

using Status = int;  // CUresult; 0 is success
using Context = struct ContextTag*;
using Stream = struct StreamTag*;
using Module = struct ModuleTag*;
using Function = struct FunctionTag*;
using Address = std::uint64_t;  // CUdeviceptr
using Device = int;

// Source: cuda.h of CUDA 12 and 13, CUdevice_attribute and CUfunction_attribute.
inline constexpr int kCapabilityMajor = 75, kCapabilityMinor = 76, kMostDynamicShared = 8;

// The functions, by the names under which the driver exports them.
struct Driver {
  Status (*cuGetErrorName)(Status, const char**);
  Status (*cuGetErrorString)(Status, const char**);
  Status (*cuStreamGetCtx)(Stream, Context*);
  Status (*cuCtxGetCurrent)(Context*);
  Status (*cuCtxPushCurrent_v2)(Context);
  Status (*cuCtxPopCurrent_v2)(Context*);
  Status (*cuCtxGetDevice)(Device*);
  Status (*cuDeviceGetAttribute)(int*, int, Device);
  Status (*cuModuleLoadData)(Module*, const void*);
  Status (*cuModuleGetFunction)(Function*, Module, const char*);
  Status (*cuFuncSetAttribute)(Function, int, int);
  Status (*cuLaunchKernel)(Function, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned,
                           unsigned, Stream, void**, void**);
  Status (*cuMemcpyDtoHAsync_v2)(void*, Address, std::size_t, Stream);
  Status (*cuStreamSynchronize)(Stream);

  // Throws an Error where a call of the driver failed.
  void check(Status status, const std::string& what) const;
};

// Returns the driver, opened on the first call; throws an Error where there is none.
const Driver& driver();

// Lets the next calls of `driver` use a library at a path.
void open_driver(const std::string& path);

}  // namespace tilewise::cuda
