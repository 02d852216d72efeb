// Transposes between rows in memory and lanes of registers.
#pragma once
#include "simd/simd-inl.hpp"

#include "simd/begin.hpp"

// Four columns of kWidth rows at once: out[e][lane r] = p[min(r, last) * ld + e], and the way back
// for rows 0..last.
#if defined(TILEWISE_TARGET_AVX512) || defined(TILEWISE_TARGET_AVX2)
TW_INLINE void transpose4(VecF* r) {
#if defined(TILEWISE_TARGET_AVX512)
  __m512d a = (__m512d)_mm512_unpacklo_ps((__m512)r[0], (__m512)r[1]);
  __m512d b = (__m512d)_mm512_unpackhi_ps((__m512)r[0], (__m512)r[1]);
  __m512d c = (__m512d)_mm512_unpacklo_ps((__m512)r[2], (__m512)r[3]);
  __m512d d = (__m512d)_mm512_unpackhi_ps((__m512)r[2], (__m512)r[3]);
  r[0] = (VecF)_mm512_unpacklo_pd(a, c);
  r[1] = (VecF)_mm512_unpackhi_pd(a, c);
  r[2] = (VecF)_mm512_unpacklo_pd(b, d);
  r[3] = (VecF)_mm512_unpackhi_pd(b, d);
#else
  __m256d a = (__m256d)_mm256_unpacklo_ps((__m256)r[0], (__m256)r[1]);
  __m256d b = (__m256d)_mm256_unpackhi_ps((__m256)r[0], (__m256)r[1]);
  __m256d c = (__m256d)_mm256_unpacklo_ps((__m256)r[2], (__m256)r[3]);
  __m256d d = (__m256d)_mm256_unpackhi_ps((__m256)r[2], (__m256)r[3]);
  r[0] = (VecF)_mm256_unpacklo_pd(a, c);
  r[1] = (VecF)_mm256_unpackhi_pd(a, c);
  r[2] = (VecF)_mm256_unpacklo_pd(b, d);
  r[3] = (VecF)_mm256_unpackhi_pd(b, d);
#endif
}
template <class X>
TW_INLINE VecF gather_rows4(const X* p, int64_t ld, int i, int last) {
  auto row = [&](int r) __attribute__((always_inline)) {
    return _mm_loadu_ps(reinterpret_cast<const float*>(p + (r < last ? r : last) * ld));
  };
#if defined(TILEWISE_TARGET_AVX512)
  __m512 x = _mm512_castps128_ps512(row(i));
  x = _mm512_insertf32x4(x, row(4 + i), 1);
  x = _mm512_insertf32x4(x, row(8 + i), 2);
  return (VecF)_mm512_insertf32x4(x, row(12 + i), 3);
#else
  return (VecF)_mm256_insertf128_ps(_mm256_castps128_ps256(row(i)), row(4 + i), 1);
#endif
}
TW_INLINE void scatter_rows4(float* p, int64_t ld, int i, int last, VecF x) {
#if defined(TILEWISE_TARGET_AVX512)
  if (i <= last) _mm_storeu_ps(p + i * ld, _mm512_castps512_ps128((__m512)x));
  if (4 + i <= last) _mm_storeu_ps(p + (4 + i) * ld, _mm512_extractf32x4_ps((__m512)x, 1));
  if (8 + i <= last) _mm_storeu_ps(p + (8 + i) * ld, _mm512_extractf32x4_ps((__m512)x, 2));
  if (12 + i <= last) _mm_storeu_ps(p + (12 + i) * ld, _mm512_extractf32x4_ps((__m512)x, 3));
#else
  if (i <= last) _mm_storeu_ps(p + i * ld, _mm256_castps256_ps128((__m256)x));
  if (4 + i <= last) _mm_storeu_ps(p + (4 + i) * ld, _mm256_extractf128_ps((__m256)x, 1));
#endif
}
TW_INLINE void load_columns4(const float* p, int64_t ld, int last, VecF* out) {
  TW_UNROLL for (int i = 0; i < 4; i++) out[i] = gather_rows4(p, ld, i, last);
  transpose4(out);
}
#if defined(TW_HAS_TILES)
// x[i] lane j and x[j] lane i change places. Moved and never computed with.
TW_INLINE void transpose16(VecI* x) {
  VecF t[kGroup];
  TW_UNROLL for (int i = 0; i < kGroup; i++) t[i] = (VecF)x[i];
  TW_UNROLL for (int i = 0; i < kGroup; i += 4) transpose4(t + i);
  // now t[4 i + e] holds rows [4 i, 4 i + 4) of columns e, e + 4, e + 8, e + 12
  auto even = [](VecF a, VecF b) __attribute__((always_inline)) {
    return (VecF)_mm512_shuffle_f32x4((__m512)a, (__m512)b, 0x88);
  };
  auto odd = [](VecF a, VecF b) __attribute__((always_inline)) {
    return (VecF)_mm512_shuffle_f32x4((__m512)a, (__m512)b, 0xdd);
  };
  TW_UNROLL for (int e = 0; e < 4; e++) {
    const VecF a = even(t[e], t[4 + e]), b = even(t[8 + e], t[12 + e]);
    const VecF c = odd(t[e], t[4 + e]), d = odd(t[8 + e], t[12 + e]);
    x[e] = (VecI)even(a, b);
    x[4 + e] = (VecI)even(c, d);
    x[8 + e] = (VecI)odd(a, b);
    x[12 + e] = (VecI)odd(c, d);
  }
}
#endif
#if defined(TW_HAS_PAIRS)
// Four pairs of columns, moved and never computed with.
TW_INLINE void load_columns4(const Bf16* p, int64_t ld, int last, VecI* out) {
  VecF t[4];
  TW_UNROLL for (int i = 0; i < 4; i++) t[i] = gather_rows4(p, ld, i, last);
  transpose4(t);
  TW_UNROLL for (int i = 0; i < 4; i++) out[i] = (VecI)t[i];
}
#endif
TW_INLINE void store_columns4(float* p, int64_t ld, int last, VecF* x) {
  transpose4(x);
  TW_UNROLL for (int i = 0; i < 4; i++) scatter_rows4(p, ld, i, last, x[i]);
}
#endif
#if defined(TILEWISE_TARGET_AVX512) || defined(TILEWISE_TARGET_AVX2)
#define TW_SCALAR_COLUMNS double
#else
#define TW_SCALAR_COLUMNS T
template <class T>
#endif
TW_INLINE void load_columns4(const TW_SCALAR_COLUMNS* p, int64_t ld, int last,
                             Vec<TW_SCALAR_COLUMNS>* out) {
  for (int r = 0; r < kWidth<TW_SCALAR_COLUMNS>; r++)
    for (int e = 0; e < 4; e++) out[e][r] = p[(r < last ? r : last) * ld + e];
}
#if defined(TILEWISE_TARGET_PORTABLE)
template <class T>
#endif
TW_INLINE void store_columns4(TW_SCALAR_COLUMNS* p, int64_t ld, int last,
                              Vec<TW_SCALAR_COLUMNS>* x) {
  for (int r = 0; r <= last && r < kWidth<TW_SCALAR_COLUMNS>; r++)
    for (int e = 0; e < 4; e++) p[r * ld + e] = x[e][r];
}
#undef TW_SCALAR_COLUMNS

#include "simd/end.hpp"
