#define TILEWISE_TARGET_AVX512
#include "ops/linear_cross_entropy-inl.hpp"

namespace tilewise {
const LinearCrossEntropyKernels* linear_cross_entropy_kernels_avx512() {
  return avx512::linear_cross_entropy_kernels();
}
}  // namespace tilewise
