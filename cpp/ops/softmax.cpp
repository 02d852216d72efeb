#include "ops/softmax.hpp"

#include "simd/targets.hpp"

namespace tilewise {

const SoftmaxKernels* softmax_kernels_avx512();
const SoftmaxKernels* softmax_kernels_avx2();
const SoftmaxKernels* softmax_kernels_portable();

namespace {

const SoftmaxKernels* kernels() {
#if defined(TILEWISE_X86)
  const Target target = active_target();
  if (target == Target::kAvx2) return softmax_kernels_avx2();
  if (target != Target::kPortable) return softmax_kernels_avx512();
#endif
  return softmax_kernels_portable();
}

}  // namespace

const SoftmaxFunctions& softmax_functions(Storage storage) {
  return storage == Storage::kFloat64 ? kernels()->f64 : kernels()->f32;
}

}  // namespace tilewise
