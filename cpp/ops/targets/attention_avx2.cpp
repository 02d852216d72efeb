#define TILEWISE_TARGET_AVX2
#include "ops/attention-inl.hpp"

namespace tilewise {
const AttentionKernels* attention_kernels_avx2() {
  return avx2::kernels();
}
}  // namespace tilewise
