#include "ops/attention.hpp"

#include "simd/targets.hpp"

namespace tilewise {

const AttentionKernels* attention_kernels_avx512();
const AttentionKernels* attention_kernels_avx2();
const AttentionKernels* attention_kernels_portable();

const AttentionKernels& attention_kernels() {
  switch (active_target()) {
#if defined(__x86_64__)
    case Target::kAvx512:
      return *attention_kernels_avx512();
    case Target::kAvx2:
      return *attention_kernels_avx2();
#endif
    default:
      return *attention_kernels_portable();
  }
}

}  // namespace tilewise
