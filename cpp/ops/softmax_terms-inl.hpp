// What the softmax family computes of the entries and numbers of rows, one lane at a time: of one
// row all lanes of its numbers are equal, of rows side by side each is another row's.
#pragma once
#include "ops/softmax_lanes-inl.hpp"

#include "simd/begin.hpp"

// The state (m, l) takes another in, which comes behind it.
template <class T>
TW_INLINE void add_state(const Exp<T>& exp, Vec<T> other_m, Vec<T> other_l, Vec<T>* m, Vec<T>* l) {
  // max(a, b) is b where either is NaN
  const Vec<T> top = select(unordered(other_m), other_m, max(other_m, *m)),
               high = finite_max<T>(top);
  *l = *l * exp(finite_max<T>(*m) - high) + other_l * exp(finite_max<T>(other_m) - high);
  *m = top;
}

// By what weights are multiplied that are relative to the maximum of their chunk.
template <class T>
TW_INLINE Vec<T> factor_of_chunk(const Exp<T>& exp, Vec<T> chunk_m, Vec<T> m, Vec<T> inverse) {
  const Vec<T> moved = exp(finite_max<T>(chunk_m) - finite_max<T>(m)) * inverse;
  return select(equal(chunk_m, m), inverse, moved);
}

// What the final state of a row gives; logarithms only where they are wanted.
template <class T>
struct RowResults {
  Vec<T> inverse, log_l, m, lse;
  TW_MEMBER RowResults(Vec<T> top, Vec<T> l, Vec<T> scale, bool logs) {
    const Vec<T> infinity = splat<T>(std::numeric_limits<double>::infinity());
    const auto empty = equal(l, zero<T>()), nan = unordered(l);
    inverse = select(empty, zero<T>(), splat<T>(1) / l);
    log_l = logs ? select(nan, l, select(empty, zero<T>(), log<T>(l))) : zero<T>();
    const Vec<T> highest = select(nan, l, top);
    m = highest + zero<T>();
    lse = select(equal(top, infinity), infinity, highest * scale + log_l);
  }
};

// Derivatives by the formulas of docs/ops/softmax.md; p is a probability. Of rows without an entry
// they are not to be used.
template <class T>
struct SoftmaxTerms {
  Vec<T> scale, c, mu, tc;

  TW_MEMBER Vec<T> dx(Vec<T> p, Vec<T> gy, Vec<T> gz) const {
    return (p * (gy - c) + gz) * scale + zero<T>();
  }
  TW_MEMBER Vec<T> ty(Vec<T> p, Vec<T> tx) const { return p * moved(tx) + zero<T>(); }
  TW_MEMBER Vec<T> tz(Vec<T> tx) const { return moved(tx) + zero<T>(); }
  // A term of tc.
  TW_MEMBER Vec<T> tc_of(Vec<T> p, Vec<T> tx, Vec<T> gy, Vec<T> tgy, Vec<T> tgz) const {
    return p * (moved(tx) * gy + tgy) + tgz;
  }
  TW_MEMBER Vec<T> tdx(Vec<T> p, Vec<T> tx, Vec<T> gy, Vec<T> tgy, Vec<T> tgz) const {
    return (p * (moved(tx) * (gy - c) + (tgy - tc)) + tgz) * scale + zero<T>();
  }
  TW_MEMBER Vec<T> dsink(Vec<T> share) const { return -share * c + zero<T>(); }
  TW_MEMBER Vec<T> tdsink(Vec<T> share, Vec<T> tsink) const {
    return -share * ((tsink - mu) * c + tc) + zero<T>();
  }

 private:
  TW_MEMBER Vec<T> moved(Vec<T> tx) const { return tx * scale - mu; }
};

// The sink as a column of its own, whose logit is z.
struct SinkScale {
  double scale;  // logits are scale x
  template <class T>
  T x(T z) const {
    return static_cast<T>(static_cast<double>(z) / scale);
  }
  // z - m scale, which is not above 0
  template <class T>
  T below(T z, T m) const {
    const T d = static_cast<T>(static_cast<double>(z) - static_cast<double>(m) * scale);
    return d < T{0} ? d : T{0};
  }
};

#include "simd/end.hpp"
