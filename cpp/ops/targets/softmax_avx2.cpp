#define TILEWISE_TARGET_AVX2
#include "ops/softmax-inl.hpp"

namespace tilewise {
const SoftmaxKernels* softmax_kernels_avx2() {
  return avx2::softmax_kernels();
}
}  // namespace tilewise
