// Partial sums and maxima of one softmax row: 64 lanes over a chunk of columns, folded in a fixed
// tree, so that the width of a vector is invisible in every result.
#pragma once
#include <algorithm>

#include "math/softmax_state-inl.hpp"

#include "simd/begin.hpp"

constexpr int kChunk = 2048;
constexpr int kAhead = 2 * kChunk;  // from a column that is read to the one asked for
constexpr int kLanesWide = 64;      // partial sums of a chunk
constexpr int64_t kKept = 16384;    // rows up to this length keep their weights between passes

// The first n numbers at p, n <= kWidth, `fill` in the other lanes; 16 bits as float.
template <class X, class T = Wide<X>>
TW_INLINE Vec<T> load_some(const X* p, int n, T fill) {
  if (n == kWidth<T>) return load_wide(p);
#if defined(TILEWISE_TARGET_AVX512)
  const uint32_t bits = (1u << n) - 1;
  if constexpr (sizeof(X) == 2) {
    alignas(32) X x[kWidth<T>];
    _mm256_store_si256(reinterpret_cast<__m256i*>(x),
                       _mm256_maskz_loadu_epi16(static_cast<__mmask16>(bits), p));
    return select(lanes<T>(bits), widen(x), set1(fill));
  } else if constexpr (sizeof(X) == 4) {
    return (VecF)_mm512_mask_loadu_ps((__m512)set1(fill), lanes<T>(bits), p);
  } else {
    return (VecD)_mm512_mask_loadu_pd((__m512d)set1(fill), lanes<T>(bits), p);
  }
#else
  alignas(64) T x[kWidth<T>];
  for (int i = 0; i < kWidth<T>; i++) x[i] = i < n ? wide(p[i]) : fill;
  return load(x);
#endif
}
template <class X, class T = Wide<X>>
TW_INLINE void store_as(X* p, Vec<T> v) {
  if constexpr (sizeof(X) == 2)
    narrow(p, v);
  else
    store(p, v);
}
template <class X, class T = Wide<X>>
TW_INLINE void store_some(X* p, int n, Vec<T> v) {
  if (n == kWidth<T>) return store_as(p, v);
#if defined(TILEWISE_TARGET_AVX512)
  if constexpr (sizeof(X) == 4)
    return _mm512_mask_storeu_ps(p, lanes<T>((1u << n) - 1), (__m512)v);
  else if constexpr (sizeof(X) == 8)
    return _mm512_mask_storeu_pd(p, lanes<T>((1u << n) - 1), (__m512d)v);
#endif
  X x[kWidth<T>];
  store_as(x, v);
  std::memcpy(p, x, sizeof(X) * static_cast<size_t>(n));
}

// Register-wide stores, past the caches to addresses that are aligned.
#if defined(TILEWISE_TARGET_AVX512) || defined(TILEWISE_TARGET_AVX2)
constexpr bool kStreams = true;
#else
constexpr bool kStreams = false;
#endif
template <bool STREAM, class X, class T = Wide<X>>
TW_INLINE void put(X* to, Vec<T> v) {
#if defined(TILEWISE_TARGET_AVX512)
  if constexpr (STREAM && sizeof(X) != 2)
    return _mm512_stream_si512(reinterpret_cast<__m512i*>(to), (__m512i)v);
#elif defined(TILEWISE_TARGET_AVX2)
  if constexpr (STREAM && sizeof(X) != 2)
    return _mm256_stream_si256(reinterpret_cast<__m256i*>(to), (__m256i)v);
#endif
  store_as(to, v);
}

template <class X>
TW_INLINE int numbers_before_aligned(const X* to) {
  return static_cast<int>(-reinterpret_cast<uintptr_t>(to) % kVectorBytes / sizeof(X));
}

// f(index, register of the lanes, columns in it) for columns [from, n), `from` a multiple of 64.
template <class T, class F>
TW_INLINE void each_register(int from, int n, const F& f) {
  constexpr int kAll = kLanesWide / kWidth<T>;
  int j = from;
  for (; j + kLanesWide <= n; j += kLanesWide)
    TW_UNROLL_LANES for (int u = 0; u < kAll; u++) f(j + u * kWidth<T>, u, kWidth<T>);
  if (j >= n) return;
  TW_UNROLL_LANES for (int u = 0; u < kAll; u++) {
    const int at = j + u * kWidth<T>;
    if (at < n) f(at, u, std::min(n - at, kWidth<T>));
  }
}
template <class T, class F>
TW_INLINE void each_register(int n, const F& f) {
  each_register<T>(0, n, f);
}

// Into the second level: the first is too small for what is ahead.
TW_INLINE void prefetch_ahead(const void* p) {
  __builtin_prefetch(p, 0, 2);
}

// op over 16 lanes in a fixed tree: lanes 8 apart, then 4, 2, 1
template <class T, class Op>
TW_INLINE T tree(const Vec<T> (&x)[kRegs<T>], const Op& op) {
#if defined(TILEWISE_TARGET_AVX512)
  if constexpr (kRegs<T> == 1) {
    __m512 v = (__m512)x[0];
    auto fold = [&](__m512 y) __attribute__((always_inline)) { v = (__m512)op((VecF)v, (VecF)y); };
    fold(_mm512_shuffle_f32x4(v, v, _MM_SHUFFLE(1, 0, 3, 2)));
    fold(_mm512_shuffle_f32x4(v, v, _MM_SHUFFLE(2, 3, 0, 1)));
    fold(_mm512_permute_ps(v, _MM_SHUFFLE(1, 0, 3, 2)));
    fold(_mm512_permute_ps(v, _MM_SHUFFLE(2, 3, 0, 1)));
    return _mm512_cvtss_f32(v);
  }
#endif
  alignas(64) T lane[kGroup];
  for (int r = 0; r < kRegs<T>; r++) store(lane + r * kWidth<T>, x[r]);
  for (int half = kGroup / 2; half > 0; half /= 2)
    for (int i = 0; i < half; i++) lane[i] = op(lane[i], lane[i + half]);
  return lane[0];
}

// tree() of 16 rows of 16 lanes each, `to[i]` of row i.
template <class T, class Op>
TW_INLINE void trees(const T* lanes16, const Op& op, T* to) {
#if defined(TILEWISE_TARGET_AVX512)
  if constexpr (kRegs<T> == 1) {
    VecF x[kGroup];
    TW_UNROLL_LANES for (int i = 0; i < kGroup; i++) x[i] = load(lanes16 + i * kGroup);
    auto quarters = [&](VecF a, VecF b, auto low, auto high) __attribute__((always_inline)) {
      return op((VecF)_mm512_shuffle_f32x4((__m512)a, (__m512)b, decltype(low)::value),
                (VecF)_mm512_shuffle_f32x4((__m512)a, (__m512)b, decltype(high)::value));
    };
    auto pairs = [&](VecF a, VecF b, auto low, auto high) __attribute__((always_inline)) {
      return op((VecF)_mm512_shuffle_ps((__m512)a, (__m512)b, decltype(low)::value),
                (VecF)_mm512_shuffle_ps((__m512)a, (__m512)b, decltype(high)::value));
    };
    using Even = std::integral_constant<int, 0x88>;
    using Odd = std::integral_constant<int, 0xdd>;
    using Low = std::integral_constant<int, 0x44>;
    using High = std::integral_constant<int, 0xee>;
    // rows i and i + 8 side by side, then four of them, then all in the order of `rows`
    TW_UNROLL_LANES for (int i = 0; i < 8; i++) x[i] = quarters(x[i], x[i + 8], Low{}, High{});
    TW_UNROLL_LANES for (int i = 0; i < 4; i++) x[i] = quarters(x[i], x[i + 4], Even{}, Odd{});
    TW_UNROLL_LANES for (int i = 0; i < 2; i++) x[i] = pairs(x[i], x[i + 2], Low{}, High{});
    const VecF all = pairs(x[0], x[1], Even{}, Odd{});
    const __m512i rows = _mm512_setr_epi32(0, 2, 1, 3, 8, 10, 9, 11, 4, 6, 5, 7, 12, 14, 13, 15);
    return store(to, (VecF)_mm512_permutexvar_ps(rows, (__m512)all));
  }
#endif
  for (int i = 0; i < kGroup; i++) {
    Vec<T> x[kRegs<T>];
    for (int r = 0; r < kRegs<T>; r++) x[r] = load(lanes16 + i * kGroup + r * kWidth<T>);
    to[i] = tree<T>(x, op);
  }
}

struct Sum {
  template <class V>
  TW_MEMBER V operator()(V a, V b) const {
    return a + b;
  }
};
struct Top {  // b where one is NaN
  template <class V>
  TW_MEMBER V operator()(V a, V b) const {
    if constexpr (std::is_arithmetic_v<V>)
      return a > b ? a : b;
    else
      return max(a, b);
  }
};

// One register for each kWidth of 64 lanes, folded to one number in a fixed order.
template <class T>
struct Lanes64 {
  Vec<T> of[kLanesWide / kWidth<T>];
  TW_MEMBER explicit Lanes64(T x = 0) {
    for (Vec<T>& v : of) v = set1(x);
  }
  // to 16
  template <class Op>
  TW_MEMBER void fold(const Op& op, Vec<T> (&x)[kRegs<T>]) const {
    TW_UNROLL_LANES for (int r = 0; r < kRegs<T>; r++) {
      auto group = [&](int g) __attribute__((always_inline)) { return of[g * kRegs<T> + r]; };
      x[r] = op(op(group(0), group(2)), op(group(1), group(3)));
    }
  }
  template <class Op>
  TW_MEMBER T fold(const Op& op) const {
    Vec<T> x[kRegs<T>];
    fold(op, x);
    return tree<T>(x, op);
  }
  TW_MEMBER T total() const { return fold(Sum{}); }
  TW_MEMBER T top() const { return fold(Top{}); }
};

// The maximum of entries whose sum of exponentials is NaN, of which one of +inf may be the reason.
template <class T, class X>
TW_NOINLINE T top_with_nan(T m, const X* x, int n) {
  for (int i = 0; i < n; i++)
    if (const T entry = wide(x[i]); entry != entry) return entry;
  return m;
}

// exp(k d) for d <= 0, with k log2(e) in two parts: within 2 ulp of exp of the rounded d k. Exactly
// 1 at 0, and +0 below 2^(kCut - 1/2).
template <class T>
struct Exp {
  Vec<T> high, low;
  TW_MEMBER explicit Exp(double k) {
    const double base2 = k * kLog2e;
    high = splat<T>(base2);
    low = splat<T>(base2 - static_cast<double>(static_cast<T>(base2)));
  }
  TW_MEMBER Vec<T> operator()(Vec<T> d) const {
    using P = Polynomials<T>;
    const Vec<T> t = fma(d, high, set1(P::kRound)), n = t - set1(P::kRound),
                 f = fma(d, low, fma(d, high, -n));
    return ldexp_cut(fma(horner<T>(P::kExp2, f), f, splat<T>(1)), n, t, n, P::kCut);
  }
  T operator()(T d) const { return (*this)(set1(d))[0]; }
};

template <class T>
struct ChunkState {
  T m, l;
};

#include "simd/end.hpp"
