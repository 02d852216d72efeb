// The state (m, l, acc) of a softmax row: running maximum, sum of exp2(s - m), weighted sum. Empty
// is (-inf, 0, 0). `entropy` beside it is the sum of w (s - m). All in base 2. See
// docs/ops/attention.md.
#pragma once
#include "math/math-inl.hpp"

#include "simd/begin.hpp"

template <class T>
TW_INLINE Vec<T> minus_infinity() {
  return set1(-std::numeric_limits<T>::infinity());
}
// The maximum as it is subtracted: an empty state needs no branch, its rescaling is exactly 1 and
// its weights 0.
template <class T>
TW_INLINE Vec<T> finite_max(Vec<T> m) {
  return max(set1(std::numeric_limits<T>::lowest()), m);
}
// What is left of e = sum w (s - m) after the maximum moved from m_old to m_new and the weights
// were multiplied by a.
template <class T>
TW_INLINE Vec<T> moved_entropy(Vec<T> e, Vec<T> l, Vec<T> m_old, Vec<T> m_new, Vec<T> a) {
  const Vec<T> moved = fma(l, finite_max<T>(m_old) - finite_max<T>(m_new), e) * a;
  return select(equal(l * a, zero<T>()), zero<T>(), moved);
}

// Factors by which two states are rescaled to their common maximum.
template <class T>
struct Merge {
  Vec<T> m, a, b;
  TW_MEMBER Merge(Vec<T> ma, Vec<T> mb) {
    m = max(ma, mb);
    Vec<T> top = finite_max<T>(m);
    a = exp2<T>(finite_max<T>(ma) - top);
    b = exp2<T>(finite_max<T>(mb) - top);
  }
  TW_MEMBER Vec<T> operator()(Vec<T> x, Vec<T> y) const { return fma(x, a, y * b); }
  TW_MEMBER Vec<T> entropy(Vec<T> ea, Vec<T> la, Vec<T> ma, Vec<T> eb, Vec<T> lb, Vec<T> mb) const {
    return moved_entropy<T>(ea, la, ma, m, a) + moved_entropy<T>(eb, lb, mb, m, b);
  }
};

// A maximum in natural units. lowest() stands for itself: a logit of lowest() saturated when it was
// brought to base 2.
template <class T>
TW_INLINE Vec<T> natural(Vec<T> m) {
  const Vec<T> lowest = set1(std::numeric_limits<T>::lowest());
  return select(equal(m, lowest), lowest, m * splat<T>(kLn2));
}

// What a row's final state gives.
template <class T>
struct Finished {
  Vec<T> m, log_l, lse, inverse, entropy;
  TW_MEMBER Finished(Vec<T> m_in, Vec<T> l, Vec<T> e) {
    auto empty = equal(l, zero<T>());
    auto nan = unordered(l);
    inverse = select(empty, zero<T>(), splat<T>(1) / l);
    log_l = select(nan, l, select(empty, zero<T>(), log<T>(l)));
    m = select(nan, l, m_in + zero<T>());
    lse =
        select(equal(m, set1(std::numeric_limits<T>::lowest())), m, fma(m, splat<T>(kLn2), log_l));
    entropy = fma(-e * inverse, splat<T>(kLn2), log_l);
  }
};

#include "simd/end.hpp"
