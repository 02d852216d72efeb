#define TILEWISE_TARGET_AVX512
#include "ops/softmax-inl.hpp"

namespace tilewise {
const SoftmaxKernels* softmax_kernels_avx512() {
  return avx512::softmax_kernels();
}
}  // namespace tilewise
