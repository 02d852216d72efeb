// The soft cap of logits, s = cap tanh(z / cap), with its derivatives. They are made from z: of a
// logit far above the cap, s has no digits left that tell how far.
#pragma once
#include "math/math-inl.hpp"

#include "simd/begin.hpp"

// s with its first and second derivative; cap is not read where CAPPED is false.
template <class T>
struct Capped {
  Vec<T> s, slope, bend;
};
template <class T, bool CAPPED>
struct Softcap {
  Vec<T> cap, inverse;
  explicit Softcap(T c) : cap(set1(c)), inverse(set1(CAPPED ? T{1} / c : T{0})) {}
  TW_MEMBER Vec<T> operator()(Vec<T> z) const {
    if constexpr (CAPPED) return cap * tanh<T>(z * inverse);
    return z;
  }
  TW_MEMBER Capped<T> with_slope(Vec<T> z) const {
    if constexpr (CAPPED) {
      const TanhAndSlope<T> u = tanh_and_slope<T>(z * inverse);
      return {cap * u.value, u.slope, splat<T>(-2) * u.value * inverse * u.slope};
    }
    return {z, splat<T>(1), zero<T>()};
  }
};

#include "simd/end.hpp"
