// Numbers stored in 16 bits, and what they are in float: to nearest even, NaN stays NaN.
#pragma once
#include <bit>
#include <cstdint>

namespace tilewise {

struct Bf16 {
  uint16_t bits;
};
struct F16 {
  uint16_t bits;
};
// One element of a product with float sums.
struct Bf16x2 {
  Bf16 first, second;
};

inline float to_float(Bf16 x) {
  return std::bit_cast<float>(uint32_t{x.bits} << 16);
}

inline float to_float(F16 x) {
  const uint32_t sign = (x.bits & 0x8000u) << 16, size = x.bits & 0x7fffu;
  uint32_t out = (size << 13) + (112u << 23);
  if (size < 0x0400)
    out = std::bit_cast<uint32_t>(static_cast<float>(size) * 0x1p-24f);
  else if (size >= 0x7c00)
    out = 0x7f800000u | size << 13 | (size > 0x7c00 ? 0x400000u : 0u);
  return std::bit_cast<float>(sign | out);
}

inline void from_float(float x, Bf16* to) {
  const uint32_t u = std::bit_cast<uint32_t>(x);
  const bool nan = (u & 0x7fffffffu) > 0x7f800000u;
  const uint32_t out = nan ? u | 0x400000u : u + 0x7fffu + (u >> 16 & 1);
  to->bits = static_cast<uint16_t>(out >> 16);
}

inline void from_float(float x, F16* to) {
  const uint32_t u = std::bit_cast<uint32_t>(x), sign = u >> 16 & 0x8000u, size = u & 0x7fffffffu;
  uint32_t out = (size + 0xfffu + (size >> 13 & 1) - (112u << 23)) >> 13;
  if (size > 0x7f800000u)
    out = 0x7e00u | (size >> 13 & 0x3ffu);
  else if (size >= 0x477ff000u)  // half a unit above the largest
    out = 0x7c00u;
  else if (size < 0x38800000u)  // a unit of 0.5f is the smallest half: the sum rounds to it
    out = std::bit_cast<uint32_t>(std::bit_cast<float>(size) + 0.5f) - 0x3f000000u;
  to->bits = static_cast<uint16_t>(sign | out);
}

}  // namespace tilewise
