#define TILEWISE_TARGET_PORTABLE
#include "ops/attention-inl.hpp"

namespace tilewise {
const AttentionKernels* attention_kernels_portable() {
  return portable::kernels();
}
}  // namespace tilewise
