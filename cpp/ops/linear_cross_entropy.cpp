#include "ops/linear_cross_entropy.hpp"

#include "simd/targets.hpp"

namespace tilewise {

const LinearCrossEntropyKernels* linear_cross_entropy_kernels_avx512();
const LinearCrossEntropyKernels* linear_cross_entropy_kernels_avx2();
const LinearCrossEntropyKernels* linear_cross_entropy_kernels_portable();
const LinearCrossEntropyFunctions* linear_cross_entropy_pairs_avx512bf16();

namespace {

const LinearCrossEntropyKernels* kernels() {
#if defined(TILEWISE_X86)
  const Target target = active_target();
  if (target == Target::kAvx2) return linear_cross_entropy_kernels_avx2();
  if (target != Target::kPortable) return linear_cross_entropy_kernels_avx512();
#endif
  return linear_cross_entropy_kernels_portable();
}

}  // namespace

LinearCrossEntropyFunctions linear_cross_entropy_functions(
    const LinearCrossEntropyProblem& problem) {
  const Storage storage = problem.hidden.storage;
  LinearCrossEntropyFunctions functions =
      storage == Storage::kFloat64 ? kernels()->f64 : kernels()->f32;
#if defined(TILEWISE_X86)
  if (active_target() == Target::kAvx512Bf16 && storage == Storage::kBfloat16) {
    const LinearCrossEntropyFunctions* pairs = linear_cross_entropy_pairs_avx512bf16();
    functions.forward = pairs->forward;
    functions.vjp = pairs->vjp;
  }
#endif
  return functions;
}

}  // namespace tilewise
