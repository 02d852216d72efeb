// exp2, log, tanh: one definition for every target, since libm picks a variant by CPU.
#pragma once
#include "simd/simd-inl.hpp"

#include "simd/begin.hpp"

constexpr double kLog2e = 1.4426950408889634074;
constexpr double kLn2 = 0.69314718055994530942;

// 2^f = 1 + f q(f) on [-1/2, 1/2]. Own minimax fits (Remez): kExp2 minimises the relative error of
// 2^f (float 9.2e-8, double 3.4e-18 before rounding), kExpm1 that of 2^f - 1 (float 2.4e-10,
// double 2.9e-21).
template <class T>
struct Polynomials;
template <>
struct Polynomials<float> {
  static constexpr float kExp2[] = {0x1.62e42ap-1f, 0x1.ebf9bcp-3f, 0x1.c6b752p-5f, 0x1.3cea88p-7f,
                                    0x1.5bba14p-10f};
  static constexpr float kExpm1[] = {0x1.62e430p-1f, 0x1.ebfbe0p-3f,  0x1.c6b08cp-5f,
                                     0x1.3b2a1cp-7f, 0x1.5d88bep-10f, 0x1.443f62p-13f,
                                     0x1.ffcbdep-17f};
  static constexpr float kRound =
      12582912.f;  // 1.5 * 2^23: adding it rounds to an integer kept in the low bits
  static constexpr float kCut = -125.f;
  static constexpr int kLogTerms = 4;
  static constexpr float kTanhMax = 44.f;  // there tanh' is twice the smallest normal number
};
template <>
struct Polynomials<double> {
  static constexpr double kExp2[] = {
      0x1.62e42fefa39efp-1,  0x1.ebfbdff82c5a4p-3,  0x1.c6b08d7049fe8p-5,  0x1.3b2ab6fba0119p-7,
      0x1.5d87fe78cd6cdp-10, 0x1.4309130ed8db1p-13, 0x1.ffcbfba981ad7p-17, 0x1.62bfc79d260f1p-20,
      0x1.b5267cddfc806p-24, 0x1.e61b4fdf1434cp-28, 0x1.e79bba57d3351p-32};
  static constexpr double kExpm1[] = {
      0x1.62e42fefa39efp-1,  0x1.ebfbdff82c58fp-3,  0x1.c6b08d704a0c0p-5,  0x1.3b2ab6fba4e7bp-7,
      0x1.5d87fe78a6720p-10, 0x1.430912f86ac88p-13, 0x1.ffcbfc5893cf7p-17, 0x1.62c02245f48e9p-20,
      0x1.b5253d1b4d9f8p-24, 0x1.e4cf03ee64fdep-28, 0x1.e8cb17703be4fp-32, 0x1.c4b5652a0bb29p-36,
      0x1.81618a7ce41d6p-40};
  static constexpr double kRound = 6755399441055744.;  // 1.5 * 2^52
  static constexpr double kCut = -1021.;
  static constexpr int kLogTerms = 10;
  static constexpr double kTanhMax = 354.5;
};

template <class T, int K>
TW_INLINE Vec<T> horner(const T (&c)[K], Vec<T> f) {
  Vec<T> p = set1(c[K - 1]);
  TW_UNROLL for (int k = K - 2; k >= 0; k--) p = fma(p, f, set1(c[k]));
  return p;
}

// 2^x for x <= 0, at most 2 ulp. x < kCut gives exactly +0, so no subnormal is ever made; exp2(0)
// is exactly 1; NaN stays.
template <class T>
TW_INLINE Vec<T> exp2(Vec<T> x) {
  using P = Polynomials<T>;
  Vec<T> t = x + set1(P::kRound), n = t - set1(P::kRound), f = x - n;
  return ldexp_cut(fma(horner<T>(P::kExp2, f), f, splat<T>(1)), n, t, x, P::kCut);
}

// The smallest whole number that is not below x.
template <class V>
TW_INLINE V whole_above(V x) {
#if defined(TILEWISE_TARGET_AVX512)
  if constexpr (std::is_same_v<V, VecF>) return (VecF)_mm512_roundscale_ps((__m512)x, 0x0a);
#endif
  for (unsigned i = 0; i < sizeof(V) / sizeof(x[0]); i++) x[i] = __builtin_ceil(x[i]);
  return x;
}

// Natural logarithm of a positive normal: log(1 + f) = f - (f^2/2 - s (f^2/2 + R)), s = f/(2 + f),
// R = sum 2 s^2k/(2k+1), with 1 + f in [sqrt(1/2), sqrt(2)). At most 1 ulp.
template <class T>
TW_INLINE Vec<T> log(Vec<T> x) {
  using I = IVec<T>;
  using Int = typename Types<T>::Int;
  constexpr int kM = Types<T>::kMantissa;
  constexpr Int kHalfRoot =
      sizeof(T) == 4 ? Int{0x3f3504f3} : static_cast<Int>(0x3fe6a09e667f3bcdLL);
  I u = (I)x, e = (u - kHalfRoot) >> kM;
  Vec<T> f = (Vec<T>)(u - (e << kM)) - splat<T>(1);
  Vec<T> n = __builtin_convertvector(e, Vec<T>);
  Vec<T> s = f / (splat<T>(2) + f), z = s * s;
  Vec<T> r = splat<T>(2.0 / (2 * Polynomials<T>::kLogTerms + 1));
  TW_UNROLL for (int k = Polynomials<T>::kLogTerms - 1; k >= 1; k--) r =
      fma(r, z, splat<T>(2.0 / (2 * k + 1)));
  r = r * z;
  Vec<T> h = splat<T>(0.5) * f * f;
  // ln 2 in two parts, the first with trailing zeros so that n * hi is exact
  constexpr double kHi = sizeof(T) == 4 ? 0.693359375 : 0x1.62e42fee00000p-1;
  Vec<T> lo = fma(n, splat<T>(kLn2 - kHi), s * (h + r));
  return fma(n, splat<T>(kHi), f - (h - lo));
}

// E = 2^n f q(f) + (2^n - 1) = expm1(2 |x|), of |x| up to kTanhMax.
template <class T>
TW_INLINE Vec<T> expm1_of_twice(Vec<T> x) {
  using P = Polynomials<T>;
  using I = IVec<T>;
  Vec<T> y = -max(set1(-P::kTanhMax), -abs(x)) * splat<T>(2 * kLog2e);
  Vec<T> t = y + set1(P::kRound), n = t - set1(P::kRound), f = y - n;
  Vec<T> scale = (Vec<T>)((I)splat<T>(1) + ((I)t << Types<T>::kMantissa));
  return fma(scale, horner<T>(P::kExpm1, f) * f, scale - splat<T>(1));
}

template <class T>
TW_INLINE Vec<T> with_sign_of(Vec<T> magnitude, Vec<T> x) {
  using I = IVec<T>;
  const I sign = (I)splat<T>(-0.0);
  return (Vec<T>)(((I)magnitude & ~sign) | ((I)x & sign));
}

// tanh(x) = E / (E + 2): relative accuracy at 0 without a branch. At most 4 ulp.
template <class T>
TW_INLINE Vec<T> tanh(Vec<T> x) {
  const Vec<T> e = expm1_of_twice<T>(x);
  return with_sign_of<T>(e / (e + splat<T>(2)), x);
}

// tanh and its derivative 1 - tanh^2 = 4 (E + 1) / (E + 2)^2, which keeps its digits where tanh is
// all but 1, and is 0 where it would not be a normal number.
template <class T>
struct TanhAndSlope {
  Vec<T> value, slope;
};
template <class T>
TW_INLINE TanhAndSlope<T> tanh_and_slope(Vec<T> x) {
  const Vec<T> most = set1(Polynomials<T>::kTanhMax), half = splat<T>(0.5);
  const Vec<T> e = expm1_of_twice<T>(x), below = e + splat<T>(2), t = e / below;
  const Vec<T> slope = splat<T>(4) / below * fma(half, t, half);
  return {with_sign_of<T>(t, x), select(equal(max(abs(x), most), most), slope, splat<T>(0))};
}

#include "simd/end.hpp"
