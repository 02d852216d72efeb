// Vectors of one target. A row of queries is laid out in groups of 16 logical lanes; a group is
// kRegs<T> registers wide. No operation here crosses lanes except the transposes, so the width is
// invisible in every result.
#pragma once
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#include "simd/float16.hpp"

#define TW_INLINE static inline __attribute__((always_inline))
#define TW_MEMBER inline __attribute__((always_inline))
#define TW_NOINLINE static __attribute__((noinline))
#define TW_UNROLL _Pragma("GCC unroll 32")
// Loops over 64 lanes, which without vector registers would only become long.
#if defined(TILEWISE_TARGET_PORTABLE)
#define TW_UNROLL_LANES _Pragma("GCC unroll 1")
#else
#define TW_UNROLL_LANES TW_UNROLL
#endif

#if defined(TILEWISE_TARGET_AMX) || defined(TILEWISE_TARGET_AMX_EMULATED)
#define TW_HAS_TILES
#include "simd/amx-inl.hpp"
#endif

#include "simd/begin.hpp"

#if defined(TILEWISE_TARGET_AVX512BF16)
#define TW_HAS_PAIRS
#endif

constexpr int kGroup = 16;

#if defined(TILEWISE_TARGET_AVX512)
constexpr int kVectorBytes = 64;
#elif defined(TILEWISE_TARGET_AVX2)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

typedef float VecF __attribute__((vector_size(kVectorBytes)));
typedef double VecD __attribute__((vector_size(kVectorBytes)));
typedef int32_t VecI __attribute__((vector_size(kVectorBytes)));
typedef int64_t VecL __attribute__((vector_size(kVectorBytes)));

template <class T>
struct Types;
template <>
struct Types<float> {
  using V = VecF;
  using I = VecI;
  using Int = int32_t;
  static constexpr int kMantissa = 23;
};
template <>
struct Types<double> {
  using V = VecD;
  using I = VecL;
  using Int = int64_t;
  static constexpr int kMantissa = 52;
};
#if defined(TW_HAS_PAIRS)
template <>
struct Types<Bf16x2> {
  using V = VecI;
};
#endif
template <class T>
using Vec = typename Types<T>::V;
template <class T>
using IVec = typename Types<T>::I;

template <class T>
constexpr int kWidth = kVectorBytes / static_cast<int>(sizeof(T));
template <class T>
constexpr int kRegs = kGroup / kWidth<T>;

// Elements E of products: what their sums are kept in, and how many terms of a sum one holds.
template <class E>
using Acc = std::conditional_t<std::is_same_v<E, Bf16x2>, float, E>;
template <class E>
constexpr int kFold = std::is_same_v<E, Bf16x2> ? 2 : 1;

// Whether the products of E are made by tile registers.
#if defined(TW_HAS_TILES)
template <class E>
constexpr bool kTiled = std::is_same_v<E, Bf16x2>;
#else
template <class E>
constexpr bool kTiled = false;
#endif

#if defined(TILEWISE_TARGET_AVX512)
template <class T>
using Lanes = std::conditional_t<sizeof(T) == 4, __mmask16, __mmask8>;

TW_INLINE VecF set1(float x) {
  return (VecF)_mm512_set1_ps(x);
}
TW_INLINE VecD set1(double x) {
  return (VecD)_mm512_set1_pd(x);
}
TW_INLINE VecF load(const float* p) {
  return (VecF)_mm512_loadu_ps(p);
}
TW_INLINE VecD load(const double* p) {
  return (VecD)_mm512_loadu_pd(p);
}
TW_INLINE void store(float* p, VecF x) {
  _mm512_storeu_ps(p, (__m512)x);
}
TW_INLINE void store(double* p, VecD x) {
  _mm512_storeu_pd(p, (__m512d)x);
}
TW_INLINE VecF fma(VecF a, VecF b, VecF c) {
  return (VecF)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
}
TW_INLINE VecD fma(VecD a, VecD b, VecD c) {
  return (VecD)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
}
// a > b ? a : b, so b where either is NaN
TW_INLINE VecF max(VecF a, VecF b) {
  return (VecF)_mm512_max_ps((__m512)a, (__m512)b);
}
TW_INLINE VecD max(VecD a, VecD b) {
  return (VecD)_mm512_max_pd((__m512d)a, (__m512d)b);
}
template <class T>
TW_INLINE Lanes<T> lanes(uint32_t bits) {
  return static_cast<Lanes<T>>(bits);
}
TW_INLINE VecF select(__mmask16 m, VecF a, VecF b) {
  return (VecF)_mm512_mask_blend_ps(m, (__m512)b, (__m512)a);
}
TW_INLINE VecD select(__mmask8 m, VecD a, VecD b) {
  return (VecD)_mm512_mask_blend_pd(m, (__m512d)b, (__m512d)a);
}
TW_INLINE VecF fma_where(__mmask16 m, VecF a, VecF b, VecF c) {
  return (VecF)_mm512_mask3_fmadd_ps((__m512)a, (__m512)b, (__m512)c, m);
}
TW_INLINE VecD fma_where(__mmask8 m, VecD a, VecD b, VecD c) {
  return (VecD)_mm512_mask3_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c, m);
}
TW_INLINE __mmask16 equal(VecF a, VecF b) {
  return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_EQ_OQ);
}
TW_INLINE __mmask8 equal(VecD a, VecD b) {
  return _mm512_cmp_pd_mask((__m512d)a, (__m512d)b, _CMP_EQ_OQ);
}
TW_INLINE __mmask16 unordered(VecF a) {
  return _mm512_cmp_ps_mask((__m512)a, (__m512)a, _CMP_UNORD_Q);
}
TW_INLINE __mmask8 unordered(VecD a) {
  return _mm512_cmp_pd_mask((__m512d)a, (__m512d)a, _CMP_UNORD_Q);
}
TW_INLINE bool any(__mmask16 m) {
  return m != 0;
}
TW_INLINE VecF abs(VecF a) {
  return (VecF)_mm512_abs_ps((__m512)a);
}
TW_INLINE VecD abs(VecD a) {
  return (VecD)_mm512_abs_pd((__m512d)a);
}
// p * 2^n where x >= cut or x is NaN, else +0. `bits` holds n in its low mantissa bits.
TW_INLINE VecF ldexp_cut(VecF p, VecF n, VecF, VecF x, float cut) {
  return (VecF)_mm512_maskz_scalef_ps(_mm512_cmp_ps_mask((__m512)x, (__m512)set1(cut), _CMP_NLT_UQ),
                                      (__m512)p, (__m512)n);
}
TW_INLINE VecD ldexp_cut(VecD p, VecD n, VecD, VecD x, double cut) {
  return (VecD)_mm512_maskz_scalef_pd(
      _mm512_cmp_pd_mask((__m512d)x, (__m512d)set1(cut), _CMP_NLT_UQ), (__m512d)p, (__m512d)n);
}
#else
template <class T>
using Lanes = IVec<T>;

#if defined(TILEWISE_TARGET_AVX2)
TW_INLINE VecF set1(float x) {
  return (VecF)_mm256_set1_ps(x);
}
TW_INLINE VecD set1(double x) {
  return (VecD)_mm256_set1_pd(x);
}
TW_INLINE VecF load(const float* p) {
  return (VecF)_mm256_loadu_ps(p);
}
TW_INLINE VecD load(const double* p) {
  return (VecD)_mm256_loadu_pd(p);
}
TW_INLINE void store(float* p, VecF x) {
  _mm256_storeu_ps(p, (__m256)x);
}
TW_INLINE void store(double* p, VecD x) {
  _mm256_storeu_pd(p, (__m256d)x);
}
TW_INLINE VecF fma(VecF a, VecF b, VecF c) {
  return (VecF)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
}
TW_INLINE VecD fma(VecD a, VecD b, VecD c) {
  return (VecD)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
}
TW_INLINE VecF max(VecF a, VecF b) {
  return (VecF)_mm256_max_ps((__m256)a, (__m256)b);
}
TW_INLINE VecD max(VecD a, VecD b) {
  return (VecD)_mm256_max_pd((__m256d)a, (__m256d)b);
}
TW_INLINE VecF select(VecI m, VecF a, VecF b) {
  return (VecF)_mm256_blendv_ps((__m256)b, (__m256)a, (__m256)m);
}
TW_INLINE VecD select(VecL m, VecD a, VecD b) {
  return (VecD)_mm256_blendv_pd((__m256d)b, (__m256d)a, (__m256d)m);
}
TW_INLINE VecI set1(int32_t x) {
  return (VecI)_mm256_set1_epi32(x);
}
TW_INLINE VecL set1(int64_t x) {
  return (VecL)_mm256_set1_epi64x(x);
}
TW_INLINE bool any(VecI m) {
  return _mm256_movemask_ps((__m256)m) != 0;
}
TW_INLINE bool any(VecL m) {
  return _mm256_movemask_pd((__m256d)m) != 0;
}
#else
TW_INLINE VecF set1(float x) {
  return x - (VecF){};
}
TW_INLINE VecD set1(double x) {
  return x - (VecD){};
}
TW_INLINE VecI set1(int32_t x) {
  return x - (VecI){};
}
TW_INLINE VecL set1(int64_t x) {
  return x - (VecL){};
}
template <class T>
TW_INLINE Vec<T> load(const T* p) {
  Vec<T> r;
  std::memcpy(&r, p, sizeof r);
  return r;
}
TW_INLINE void store(float* p, VecF x) {
  std::memcpy(p, &x, sizeof x);
}
TW_INLINE void store(double* p, VecD x) {
  std::memcpy(p, &x, sizeof x);
}
TW_INLINE VecF fma(VecF a, VecF b, VecF c) {
  for (int i = 0; i < kWidth<float>; i++) c[i] = __builtin_fmaf(a[i], b[i], c[i]);
  return c;
}
TW_INLINE VecD fma(VecD a, VecD b, VecD c) {
  for (int i = 0; i < kWidth<double>; i++) c[i] = __builtin_fma(a[i], b[i], c[i]);
  return c;
}
TW_INLINE VecF select(VecI m, VecF a, VecF b) {
  return (VecF)((m & (VecI)a) | (~m & (VecI)b));
}
TW_INLINE VecD select(VecL m, VecD a, VecD b) {
  return (VecD)((m & (VecL)a) | (~m & (VecL)b));
}
TW_INLINE VecF max(VecF a, VecF b) {
  return select((VecI)(a > b), a, b);
}
TW_INLINE VecD max(VecD a, VecD b) {
  return select((VecL)(a > b), a, b);
}
template <class M>
TW_INLINE bool any(M m) {
  for (unsigned i = 0; i < sizeof(M) / sizeof(m[0]); i++)
    if (m[i]) return true;
  return false;
}
#endif
template <class T>
TW_INLINE Lanes<T> lanes(uint32_t bits) {
  using Int = typename Types<T>::Int;
  IVec<T> select_bit;
  for (int i = 0; i < kWidth<T>; i++) select_bit[i] = Int{1} << i;
  return (IVec<T>)((set1(static_cast<Int>(bits)) & select_bit) != 0);
}
template <class V, class M>
TW_INLINE V fma_where(M m, V a, V b, V c) {
  return select(m, fma(a, b, c), c);
}
TW_INLINE VecI equal(VecF a, VecF b) {
  return (VecI)(a == b);
}
TW_INLINE VecL equal(VecD a, VecD b) {
  return (VecL)(a == b);
}
TW_INLINE VecI unordered(VecF a) {
  return (VecI)(a != a);
}
TW_INLINE VecL unordered(VecD a) {
  return (VecL)(a != a);
}
TW_INLINE VecF abs(VecF a) {
  return (VecF)((VecI)a & 0x7fffffff);
}
TW_INLINE VecD abs(VecD a) {
  return (VecD)((VecL)a & 0x7fffffffffffffffLL);
}
TW_INLINE VecF ldexp_cut(VecF p, VecF, VecF bits, VecF x, float cut) {
  return (VecF)(((VecI)p + ((VecI)bits << 23)) & ~(VecI)(x < set1(cut)));
}
TW_INLINE VecD ldexp_cut(VecD p, VecD, VecD bits, VecD x, double cut) {
  return (VecD)(((VecL)p + ((VecL)bits << 52)) & ~(VecL)(x < set1(cut)));
}
#endif

// --- Multiply-adds of product elements: c + a b -------

template <class V>
TW_INLINE V multiply_add(V a, V b, V c) {
  return fma(a, b, c);
}
template <class M, class V>
TW_INLINE V multiply_add_where(M m, V a, V b, V c) {
  return fma_where(m, a, b, c);
}
template <class E>
TW_INLINE Vec<E> broadcast(const E* p) {
  return set1(*p);
}

#if defined(TW_HAS_PAIRS)
TW_INLINE VecI load(const Bf16x2* p) {
  return (VecI)_mm512_loadu_si512(p);
}
TW_INLINE void store(Bf16x2* p, VecI x) {
  _mm512_storeu_si512(p, (__m512i)x);
}
TW_INLINE VecI set1(Bf16x2 x) {
  return (VecI)_mm512_set1_epi32(std::bit_cast<int32_t>(x));
}
template <>
TW_MEMBER VecI broadcast(const Bf16x2* p) {
  int32_t bits;
  std::memcpy(&bits, p, sizeof bits);
  return (VecI)_mm512_set1_epi32(bits);
}
// Subnormals, of a, b and the sum, count as zero.
TW_INLINE VecF multiply_add(VecI a, VecI b, VecF c) {
  return (VecF)_mm512_dpbf16_ps((__m512)c, (__m512bh)a, (__m512bh)b);
}
// GCC's masked intrinsic keeps eight of the sixteen mask bits.
TW_INLINE VecF multiply_add_where(__mmask16 m, VecI a, VecI b, VecF c) {
  asm("vdpbf16ps %2, %1, %0%{%3%}" : "+v"(c) : "v"(a), "v"(b), "Yk"(m));
  return c;
}
// lo and hi side by side; subnormals become zero, as the products would take them.
TW_INLINE __m512i round_pair(VecF lo, VecF hi) {
  return (__m512i)_mm512_cvtne2ps_pbh((__m512)hi, (__m512)lo);
}
TW_INLINE VecF rounded_to_bf16(VecF x) {
  const __m256i half = (__m256i)_mm512_cvtneps_pbh((__m512)x);
  return (VecF)_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16);
}
// Lane i holds first[i] and second[i].
TW_INLINE VecI lane_pairs(VecF first, VecF second) {
  const __m512i order = _mm512_add_epi32(
      _mm512_set1_epi32(0x00100000),
      _mm512_mullo_epi32(_mm512_set1_epi32(0x00010001),
                         _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15)));
  return (VecI)_mm512_permutexvar_epi16(order, round_pair(first, second));
}
TW_INLINE void store_pairs(Bf16x2* to, VecF first, VecF second) {
  store(to, lane_pairs(first, second));
}
// 32 numbers of a row, in their order.
TW_INLINE void store_row_pairs(Bf16x2* to, VecF lo, VecF hi) {
  store(to, (VecI)round_pair(lo, hi));
}
TW_INLINE void store_row_pairs(Bf16* to, VecF lo, VecF hi) {
  _mm512_storeu_si512(to, round_pair(lo, hi));
}
// Which bits of the pairs stay: of a half that is not seen only the sign, so that its products with
// +0 are the zeros they would be for a finite number.
TW_INLINE VecI seen_halves(__mmask16 first, __mmask16 second) {
  const __m512i sign = _mm512_set1_epi32(static_cast<int32_t>(0x80008000)),
                both = _mm512_mask_or_epi32(sign, first, sign, _mm512_set1_epi32(0x7fff));
  return (VecI)_mm512_mask_or_epi32(both, second, both, _mm512_set1_epi32(0x7fff0000));
}
#endif

// A load that stays in a register: folded into each multiply-add that uses it, it would be done
// again and again.
template <class T>
TW_INLINE Vec<T> load_once(const T* p) {
  Vec<T> x = load(p);
#if !defined(TILEWISE_TARGET_PORTABLE)
  asm("" : "+v"(x));
#endif
  return x;
}

// --- 16-bit storage: kWidth<float> numbers at once, or a row -------

TW_INLINE VecF widen(const Bf16* p) {
#if defined(TILEWISE_TARGET_AVX512)
  const __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return (VecF)_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16);
#elif defined(TILEWISE_TARGET_AVX2)
  const __m128i x = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return (VecF)_mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16);
#else
  VecI x;
  for (int i = 0; i < kWidth<float>; i++) x[i] = std::bit_cast<int32_t>(to_float(p[i]));
  return (VecF)x;
#endif
}
TW_INLINE VecF widen(const F16* p) {
#if defined(TILEWISE_TARGET_AVX512)
  return (VecF)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(TILEWISE_TARGET_AVX2)
  return (VecF)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  VecI x;
  for (int i = 0; i < kWidth<float>; i++) x[i] = std::bit_cast<int32_t>(to_float(p[i]));
  return (VecF)x;
#endif
}
// The instruction for this takes subnormals as zero.
TW_INLINE void narrow(Bf16* p, VecF x) {
#if defined(TILEWISE_TARGET_AVX512) || defined(TILEWISE_TARGET_AVX2)
  typedef uint32_t VecU __attribute__((vector_size(kVectorBytes)));
  const VecU u = (VecU)x;
  const VecU y =
      (VecU)select(unordered(x), (VecF)(u | 0x400000), (VecF)(u + 0x7fff + (u >> 16 & 1))) >> 16;
#if defined(TILEWISE_TARGET_AVX512)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16((__m512i)y));
#else
  const __m256i z = _mm256_packus_epi32((__m256i)y, (__m256i)y);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                   _mm256_castsi256_si128(_mm256_permute4x64_epi64(z, 8)));
#endif
#else
  for (int i = 0; i < kWidth<float>; i++) from_float(x[i], p + i);
#endif
}
TW_INLINE void narrow(F16* p, VecF x) {
#if defined(TILEWISE_TARGET_AVX512)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT));
#elif defined(TILEWISE_TARGET_AVX2)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                   _mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT));
#else
  for (int i = 0; i < kWidth<float>; i++) from_float(x[i], p + i);
#endif
}

// The last register of a row overlaps the one before it.
template <class X>
TW_INLINE void widen_row(const X* from, int n, float* to) {
  constexpr int kW = kWidth<float>;
  for (int i = 0; i < n && n < kW; i++) to[i] = to_float(from[i]);
  for (int i = 0; i < n && n >= kW; i += kW) {
    const int at = std::min(i, n - kW);
    store(to + at, widen(from + at));
  }
}
template <class X>
TW_INLINE void narrow_row(const float* from, int n, X* to) {
  constexpr int kW = kWidth<float>;
  for (int i = 0; i < n && n < kW; i++) from_float(from[i], to + i);
  for (int i = 0; i < n && n >= kW; i += kW) {
    const int at = std::min(i, n - kW);
    narrow(to + at, load(from + at));
  }
}

// Numbers of any storage as they are computed with.
template <class X>
using Wide = std::conditional_t<sizeof(X) == 2, float, X>;
template <class X>
TW_INLINE Vec<Wide<X>> load_wide(const X* p) {
  if constexpr (sizeof(X) == 2)
    return widen(p);
  else
    return load(p);
}
template <class X>
TW_INLINE Wide<X> wide(X x) {
  if constexpr (sizeof(X) == 2)
    return to_float(x);
  else
    return x;
}

template <class T>
TW_INLINE Vec<T> zero() {
  return Vec<T>{};
}
template <class T>
TW_INLINE Vec<T> splat(double x) {
  return set1(static_cast<T>(x));
}

// Bit i: lo[i] <= j < hi[i], for 16 lanes.
TW_INLINE uint32_t inside(const int32_t* lo, const int32_t* hi, int32_t j) {
#if defined(TILEWISE_TARGET_AVX512)
  const __m512i x = _mm512_set1_epi32(j);
  return _mm512_mask_cmpgt_epi32_mask(_mm512_cmple_epi32_mask(_mm512_loadu_si512(lo), x),
                                      _mm512_loadu_si512(hi), x);
#elif defined(TILEWISE_TARGET_AVX2)
  const __m256i x = _mm256_set1_epi32(j);
  uint32_t bits = 0;
  for (int i = 0; i < 16; i += 8) {
    const __m256i l = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(lo + i));
    const __m256i h = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(hi + i));
    const __m256i in = _mm256_andnot_si256(_mm256_cmpgt_epi32(l, x), _mm256_cmpgt_epi32(h, x));
    bits |= static_cast<uint32_t>(_mm256_movemask_ps(_mm256_castsi256_ps(in))) << i;
  }
  return bits;
#else
  uint32_t bits = 0;
  for (int i = 0; i < 16; i++) bits |= static_cast<uint32_t>(lo[i] <= j && j < hi[i]) << i;
  return bits;
#endif
}

TW_INLINE void prefetch(const void* p) {
  __builtin_prefetch(p);
}

// A caller's flush-to-zero or rounding mode must not change bits. Tile registers work while it
// lives.
struct FloatingPointMode {
#if defined(TW_HAS_TILES)
  TileMode tiles;
#endif
#if defined(__x86_64__)
  unsigned saved = _mm_getcsr();
  FloatingPointMode() { _mm_setcsr(0x1f80); }
  ~FloatingPointMode() { _mm_setcsr(saved); }
#endif
};

#include "simd/end.hpp"
