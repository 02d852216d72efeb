#define TILEWISE_TARGET_AVX2
#include "ops/cross_entropy-inl.hpp"

namespace tilewise {
const CrossEntropyKernels* cross_entropy_kernels_avx2() {
  return avx2::cross_entropy_kernels();
}
}  // namespace tilewise
