#define TILEWISE_TARGET_AVX512BF16
#include "ops/linear_cross_entropy-inl.hpp"

namespace tilewise {
const LinearCrossEntropyFunctions* linear_cross_entropy_pairs_avx512bf16() {
  return avx512bf16::linear_cross_entropy_pairs();
}
}  // namespace tilewise
