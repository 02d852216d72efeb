#define TILEWISE_TARGET_AMX
#include "ops/attention-inl.hpp"

#include "simd/begin.hpp"

// Whether the instructions do what they should: products of small whole numbers.
TW_NOINLINE bool tiles_work() {
  TileImage a, b, c, wanted{};
  auto pair = [](int x, int y) {
    Bf16x2 two;
    from_float(static_cast<float>(x), &two.first);
    from_float(static_cast<float>(y), &two.second);
    return std::bit_cast<uint32_t>(two);
  };
  for (int i = 0; i < kSide; i++)
    for (int k = 0; k < kSide; k++) {
      a.rows[i][k] = pair(i - 2 * k, 5 + (i ^ k));
      b.rows[i][k] = pair(3 * i - k, k - 7);
      c.rows[i][k] = 0;
    }
  const TileMode mode;
  tile_zero<0>();
  tile_load<6>(&a, 4 * kSide);
  tile_load<7>(&b, 4 * kSide);
  for (int i = 0; i < 2; i++) {
    tile_multiply<0, 6, 7>();
    multiply_images(&wanted, a, b);
  }
  tile_store<0>(&c, 4 * kSide);
  return std::memcmp(&c, &wanted, sizeof c) == 0;
}

#include "simd/end.hpp"

namespace tilewise {
const AttentionFunctions* attention_tiles_amx() {
  return amx::pair_functions<Bf16x2>();
}
bool amx_tiles_work() {
  return amx::tiles_work();
}
}  // namespace tilewise
