#define TILEWISE_TARGET_PORTABLE
#include "ops/softmax-inl.hpp"

namespace tilewise {
const SoftmaxKernels* softmax_kernels_portable() {
  return portable::softmax_kernels();
}
}  // namespace tilewise
