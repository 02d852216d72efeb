#define TILEWISE_TARGET_AVX2
#include "ops/linear_cross_entropy-inl.hpp"

namespace tilewise {
const LinearCrossEntropyKernels* linear_cross_entropy_kernels_avx2() {
  return avx2::linear_cross_entropy_kernels();
}
}  // namespace tilewise
