#include "ops/cross_entropy.hpp"

#include "simd/targets.hpp"

namespace tilewise {

const CrossEntropyKernels* cross_entropy_kernels_avx512();
const CrossEntropyKernels* cross_entropy_kernels_avx2();
const CrossEntropyKernels* cross_entropy_kernels_portable();

namespace {

const CrossEntropyKernels* kernels() {
#if defined(TILEWISE_X86)
  const Target target = active_target();
  if (target == Target::kAvx2) return cross_entropy_kernels_avx2();
  if (target != Target::kPortable) return cross_entropy_kernels_avx512();
#endif
  return cross_entropy_kernels_portable();
}

}  // namespace

const CrossEntropyFunctions& cross_entropy_functions(Storage storage) {
  return storage == Storage::kFloat64 ? kernels()->f64 : kernels()->f32;
}

}  // namespace tilewise
