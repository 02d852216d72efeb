#define TILEWISE_TARGET_AVX512BF16
#include "ops/attention-inl.hpp"

namespace tilewise {
const AttentionFunctions* attention_pairs_avx512bf16() {
  return avx512bf16::pair_functions<Bf16x2>();
}
}  // namespace tilewise
