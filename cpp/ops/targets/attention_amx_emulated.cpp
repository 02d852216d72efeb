#define TILEWISE_TARGET_AMX_EMULATED
#include "ops/attention-inl.hpp"

namespace tilewise {
const AttentionFunctions* attention_tiles_emulated() {
  return amx_emulated::pair_functions<Bf16x2>();
}
}  // namespace tilewise
