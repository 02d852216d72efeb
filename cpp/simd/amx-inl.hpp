// Tile registers for products of bf16 pairs: eight of them, 16 rows of 16 pairs or sums, always
// whole. Emulated, they are memory, and a product is AVX-512 code with the instruction's
// arithmetic.
#pragma once
#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "simd/float16.hpp"

#include "simd/begin.hpp"

constexpr int kSide = 16;  // rows of a tile register, and pairs or sums in a row

struct alignas(64) TileImage {
  uint32_t rows[kSide][kSide];
};

// The terms of even and of odd place are two chains from zero, and the sum of both is added.
static __attribute__((noinline, unused)) void multiply_rows(TileImage* c, const TileImage& a,
                                                            const TileImage& b) {
  const __m512i high = _mm512_set1_epi32(static_cast<int32_t>(0xffff0000));
  for (int m = 0; m < kSide; m++) {
    __m512 even = _mm512_setzero_ps(), odd = even;
    for (int k = 0; k < kSide; k++) {
      const __m512i x = _mm512_set1_epi32(static_cast<int32_t>(a.rows[m][k])),
                    y = _mm512_load_si512(b.rows[k]);
      even = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_slli_epi32(x, 16)),
                             _mm512_castsi512_ps(_mm512_slli_epi32(y, 16)), even);
      odd = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_and_si512(x, high)),
                            _mm512_castsi512_ps(_mm512_and_si512(y, high)), odd);
    }
    _mm512_store_ps(c->rows[m],
                    _mm512_add_ps(_mm512_load_ps(c->rows[m]), _mm512_add_ps(even, odd)));
  }
}

// TDPBF16PS: to nearest even, subnormals are zero on the way in and out, whatever MXCSR says.
static __attribute__((unused)) void multiply_images(TileImage* c, const TileImage& a,
                                                    const TileImage& b) {
  const unsigned mode = _mm_getcsr();
  _mm_setcsr(0x9fc0);
  asm volatile("" ::: "memory");
  multiply_rows(c, a, b);
  asm volatile("" ::: "memory");
  _mm_setcsr(mode);
}

#if defined(TILEWISE_TARGET_AMX)
// Assembler, since the compilers' intrinsics do not say that a load reads memory.
template <int T>
TW_INLINE void tile_zero() {
  asm volatile("tilezero %%tmm%c0" ::"i"(T));
}
template <int T>
TW_INLINE void tile_load(const void* from, int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(T) : "memory");
}
template <int T>
TW_INLINE void tile_store(void* to, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "i"(T) : "memory");
}
// C += A B
template <int C, int A, int B>
TW_INLINE void tile_multiply() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}

// Whole tiles while it lives, then what the caller had set up.
class TileMode {
  struct alignas(64) Config {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
  };
  static_assert(sizeof(Config) == 64);
  Config before_;

 public:
  TileMode() {
    asm volatile("sttilecfg %0" : "=m"(before_));
    Config whole{};
    whole.palette = 1;
    for (int i = 0; i < 8; i++) whole.row_bytes[i] = 4 * kSide, whole.rows[i] = kSide;
    asm volatile("ldtilecfg %0" ::"m"(whole));
  }
  TileMode(const TileMode&) = delete;
  ~TileMode() {
    if (before_.palette)
      asm volatile("ldtilecfg %0" ::"m"(before_));
    else
      asm volatile("tilerelease");
  }
};
#else
struct TileRegisters {
  TileImage of[8];
  int users = 0;
};
static thread_local TileRegisters tile_registers;

template <int T>
TW_INLINE void tile_zero() {
  std::memset(&tile_registers.of[T], 0, sizeof(TileImage));
}
template <int T>
TW_INLINE void tile_load(const void* from, int64_t stride) {
  for (int r = 0; r < kSide; r++)
    std::memcpy(tile_registers.of[T].rows[r], static_cast<const char*>(from) + r * stride,
                4 * kSide);
}
template <int T>
TW_INLINE void tile_store(void* to, int64_t stride) {
  for (int r = 0; r < kSide; r++)
    std::memcpy(static_cast<char*>(to) + r * stride, tile_registers.of[T].rows[r], 4 * kSide);
}
template <int C, int A, int B>
TW_INLINE void tile_multiply() {
  TileRegisters& tiles = tile_registers;
  if (!tiles.users) __builtin_trap();  // the instruction would be illegal
  multiply_images(&tiles.of[C], tiles.of[A], tiles.of[B]);
}

class TileMode {
 public:
  TileMode() { tile_registers.users++; }
  TileMode(const TileMode&) = delete;
  ~TileMode() { tile_registers.users--; }
};
#endif

#include "simd/end.hpp"
