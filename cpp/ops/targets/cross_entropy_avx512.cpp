#define TILEWISE_TARGET_AVX512
#include "ops/cross_entropy-inl.hpp"

namespace tilewise {
const CrossEntropyKernels* cross_entropy_kernels_avx512() {
  return avx512::cross_entropy_kernels();
}
}  // namespace tilewise
