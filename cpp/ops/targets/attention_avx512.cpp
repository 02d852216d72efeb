#define TILEWISE_TARGET_AVX512
#include "ops/attention-inl.hpp"

namespace tilewise {
const AttentionKernels* attention_kernels_avx512() {
  return avx512::kernels();
}
}  // namespace tilewise
