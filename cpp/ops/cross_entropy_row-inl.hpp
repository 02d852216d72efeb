// The cross-entropy of one row for one target, piece by piece. A piece starts at a multiple of
// kChunk columns counted from column 0 and is contiguous; sums of chunks are merged in ascending
// order, so how a row is cut does not reach the bits. The formulas are those of
// docs/ops/cross_entropy.md: logits z, s = cap tanh(z / cap) or z, weights t of the targets.
#pragma once
#include "ops/softcap-inl.hpp"
#include "ops/softmax_row-inl.hpp"

#include "simd/begin.hpp"

// t_c = onehot [c = index] + w_c (spread + keep q_c). Columns are counted from those of the piece.
// An ignored row has no loss, whatever its logits are, but it has its lse.
template <class T>
struct TargetRow {
  bool ignored = false;  // then t is 0
  int64_t index = -1;    // outside of the piece: not here
  T onehot = 0, spread = 0, keep = 0;
  const T* weights = nullptr;        // w, or null for 1
  const T* probabilities = nullptr;  // q, or null for 0

  bool columns() const { return spread != 0 || probabilities; }
  bool holds_index(int n) const { return index >= 0 && index < n; }
  TargetRow from(int64_t column) const {
    TargetRow t = *this;
    t.index = index < 0 ? -1 : index - column;
    if (weights) t.weights += column;
    if (probabilities) t.probabilities += column;
    return t;
  }
  // of a register of columns, without the part of the index
  TW_MEMBER Vec<T> load_weights(int j, int left) const {
    Vec<T> t = set1(spread);
    if (probabilities) t = fma(load_some(probabilities + j, left, T{0}), set1(keep), t);
    return weights ? t * load_some(weights + j, left, T{0}) : t;
  }
  // what a change of q is multiplied by
  TW_MEMBER Vec<T> load_keep(int j, int left) const {
    return weights ? set1(keep) * load_some(weights + j, left, T{0}) : set1(keep);
  }
  T weight(int64_t j) const {
    T t = spread;
    if (probabilities) t = fma(set1(probabilities[j]), set1(keep), set1(t))[0];
    if (weights) t *= weights[j];
    return j == index ? t + onehot : t;
  }
};

// f(first column of a register, columns in it)
template <class T, class F>
TW_INLINE void each_column(int n, const F& f) {
  int j = 0;
  for (; j + kWidth<T> <= n; j += kWidth<T>) f(j, kWidth<T>);
  if (j < n) f(j, n - j);
}

// --- Forward -------

template <class T>
struct RowSums {
  T m = -std::numeric_limits<T>::infinity(), l = 0;  // maximum of s, sum of exp(s - m)
  T total = 0, gap = 0;  // sum of t and of t (m - s), both without the part of the index
  T picked = 0;          // s of the index
};

template <class T>
TW_INLINE T above_lowest(T m) {
  return std::numeric_limits<T>::lowest() > m ? std::numeric_limits<T>::lowest() : m;
}

// Sums of later columns are added to those of earlier ones.
template <class T>
inline void merge_sums(const RowSums<T>& later, RowSums<T>* sums) {
  const Exp<T> exp(1);
  const T top = later.m != later.m || later.m > sums->m ? later.m : sums->m,
          high = above_lowest(top);
  const T a = exp(above_lowest(sums->m) - high), b = exp(above_lowest(later.m) - high);
  auto gap = [&](const RowSums<T>& x) {
    return x.total == 0 || x.m == top ? x.gap : x.gap + x.total * (top - x.m);
  };
  const T moved = gap(*sums) + gap(later);
  sums->l = sums->l * a + later.l * b;
  sums->m = top;
  sums->total += later.total;
  sums->gap = moved;
  sums->picked += later.picked;
}

template <class T>
TW_INLINE T exponential_sum(const T* s, int n, Vec<T> high) {
  constexpr T kNone = -std::numeric_limits<T>::infinity();
  const Exp<T> exp(1);
  Lanes64<T> l;
  each_register<T>(n, [&](int j, int u, int left) __attribute__((always_inline)) {
    prefetch(s + j + kChunk);
    l.of[u] += exp(load_some(s + j, left, kNone) - high);
  });
  return l.total();
}

// Sums of the weights of one chunk's targets.
template <class T>
TW_INLINE void target_sums(const T* s, int n, Vec<T> high, const TargetRow<T>& target,
                           RowSums<T>* sums) {
  Lanes64<T> total, gap;
  each_register<T>(n, [&](int j, int u, int left) __attribute__((always_inline)) {
    Vec<T> t = target.load_weights(j, left);
    if (left < kWidth<T>) {
      alignas(64) T x[kWidth<T>];
      store(x, t);
      t = load_some(x, left, T{0});
    }
    total.of[u] += t;
    // what has no weight may be -inf
    gap.of[u] += select(equal(t, zero<T>()), zero<T>(), t * (high - load_some(s + j, left, T{0})));
  });
  sums->total = total.total();
  sums->gap = gap.total();
}

// One chunk.
template <class T>
TW_INLINE RowSums<T> sums_of_chunk(const T* s, int n, const TargetRow<T>& target) {
  constexpr T kNone = -std::numeric_limits<T>::infinity();
  RowSums<T> sums;
  // max(a, b) is b where either is NaN: one may be lost here, but not in the sum below
  Lanes64<T> top(kNone);
  each_register<T>(n, [&](int j, int u, int left) __attribute__((always_inline)) {
    top.of[u] = max(load_some(s + j, left, kNone), top.of[u]);
  });
  sums.m = top.top();
  const Vec<T> high = finite_max<T>(set1(sums.m));
  sums.l = exponential_sum<T>(s, n, high);
  if (target.columns()) target_sums(s, n, high, target, &sums);
  if (target.holds_index(n)) sums.picked = s[target.index];
  if (sums.l != sums.l) sums.m = top_with_nan(sums.m, s, n);
  return sums;
}

// Adds a piece of n columns. `scratch` has kChunk entries where cap is not 0.
template <class T>
TW_NOINLINE void add_row_sums(const T* z, int n, const TargetRow<T>& target, T cap, T* scratch,
                              RowSums<T>* sums) {
  for (int at = 0; at < n; at += kChunk) {
    const int columns = std::min(kChunk, n - at);
    const T* s = z + at;
    if (cap != 0) {
      const Softcap<T, true> f(cap);
      each_column<T>(columns, [&](int j, int left) __attribute__((always_inline)) {
        store_some(scratch + j, left, f(load_some(z + at + j, left, T{0})));
      });
      s = scratch;
    }
    merge_sums(sums_of_chunk(s, columns, target.from(at)), sums);
  }
}

// What a whole row's sums give. A row without a logit above -inf is empty: its loss is 0.
template <class T>
struct FinishedRow {
  T m, log_l, lse, total;  // total is the sum of t
  T loss = 0, z_loss = 0;

  FinishedRow(const RowSums<T>& sums, const TargetRow<T>& target, T zeta) {
    const T l = sums.l, kInfinity = std::numeric_limits<T>::infinity();
    const bool nan = l != l;
    log_l = l == 0 ? T{0} : nan ? l : log<T>(set1(l))[0];
    m = nan ? l : sums.m + T{0};
    lse = sums.m == kInfinity ? sums.m : m + log_l;
    total = sums.total + target.onehot;
    if (l == 0) return;
    // in float64: what is added has the errors of its terms alone
    const double high = m, small = log_l, whole = high + small;
    if (target.ignored) return;
    if (zeta != 0) z_loss = static_cast<T>(static_cast<double>(zeta) * whole * whole);
    double sum = static_cast<double>(total) * small + static_cast<double>(sums.gap);
    if (target.onehot != 0)
      sum += static_cast<double>(target.onehot) * (high - static_cast<double>(sums.picked));
    loss = static_cast<T>(zeta == 0 ? sum : sum + static_cast<double>(zeta) * whole * whole);
  }
};

// --- Derivatives: they start from the pair (m, log_l) of the row -------

template <class T>
struct RowState {
  T m, log_l, inverse;  // inverse is exp(-log_l)
  bool empty;
  RowState(T m_in, T log_l_in) : m(m_in), log_l(log_l_in) {
    empty = m == -std::numeric_limits<T>::infinity();
    inverse = empty ? T{0} : Exp<T>(1)(-log_l);
  }
};

// Cotangents of what a row gives.
template <class T>
struct OutputCotangents {
  T loss = 0, lse = 0, z_loss = 0;
};
// What they are for the logits: ds = alpha p - g t.
template <class T>
struct RowCotangents {
  T alpha = 0, g = 0;
  bool none() const { return alpha == 0 && g == 0; }
};

// `total` is that of FinishedRow. Zeros stay zeros, also in a row that has NaN.
template <class T>
TW_INLINE RowCotangents<T> row_cotangents(const RowState<T>& row, const OutputCotangents<T>& of,
                                          const TargetRow<T>& target, T total, T zeta) {
  RowCotangents<T> c;
  if (row.empty) return c;
  c.alpha = of.lse;
  if (target.ignored) return c;
  c.g = of.loss;
  const T both = of.loss + of.z_loss;
  if (of.loss != 0) c.alpha += of.loss * total;
  if (both != 0 && zeta != 0) c.alpha += both * (T{2} * zeta * (row.m + row.log_l));
  return c;
}

template <class T, bool CAPPED, bool COLUMNS>
TW_NOINLINE void write_row_gradient(const T* z, int n, const RowState<T>& row,
                                    const RowCotangents<T>& c, const TargetRow<T>& target, T cap,
                                    T* dz) {
  const Exp<T> exp(1);
  const Softcap<T, CAPPED> f(cap);
  const Vec<T> m = set1(row.m), factor = set1(c.alpha * row.inverse), g = set1(-c.g);
  auto gradient = [&](Vec<T> logit, Vec<T> t) __attribute__((always_inline)) {
    const Capped<T> x = f.with_slope(logit);
    const Vec<T> ds = fma(g, t, exp(x.s - m) * factor);
    if constexpr (CAPPED) return ds * x.slope;
    return ds;
  };
  const bool here = target.holds_index(n);
  const T at_index = here ? z[target.index] : T{0};
  each_column<T>(n, [&](int j, int left) __attribute__((always_inline)) {
    const Vec<T> t = COLUMNS ? target.load_weights(j, left) : zero<T>();
    store_some(dz + j, left, gradient(load_some(z + j, left, T{0}), t));
  });
  if (here) dz[target.index] = gradient(set1(at_index), set1(target.weight(target.index)))[0];
}

// dz = f' (alpha p - g t); dz may be z.
template <class T>
TW_INLINE void row_gradient(const T* z, int n, const RowState<T>& row, const RowCotangents<T>& c,
                            const TargetRow<T>& target, T cap, T* dz) {
  if (row.empty || c.none()) return void(std::memset(dz, 0, sizeof(T) * static_cast<size_t>(n)));
  if (cap != 0)
    target.columns() ? write_row_gradient<T, true, true>(z, n, row, c, target, cap, dz)
                     : write_row_gradient<T, true, false>(z, n, row, c, target, cap, dz);
  else
    target.columns() ? write_row_gradient<T, false, true>(z, n, row, c, target, cap, dz)
                     : write_row_gradient<T, false, false>(z, n, row, c, target, cap, dz);
}

// lse - s, and 0 where s is -inf: such a class is absent.
template <class T>
TW_INLINE Vec<T> gap_to_lse(const RowState<T>& row, Vec<T> s) {
  const Vec<T> absent = set1(-std::numeric_limits<T>::infinity());
  return select(equal(s, absent), zero<T>(), set1(row.log_l) + (set1(row.m) - s));
}

// dq = g keep w (lse - s)
template <class T, bool CAPPED>
TW_NOINLINE void write_probability_gradient(const T* z, int n, const RowState<T>& row, T g,
                                            const TargetRow<T>& target, T cap, T* dq) {
  const Softcap<T, CAPPED> f(cap);
  each_column<T>(n, [&](int j, int left) __attribute__((always_inline)) {
    const Vec<T> gap = gap_to_lse(row, f(load_some(z + j, left, T{0})));
    store_some(dq + j, left, set1(g) * target.load_keep(j, left) * gap);
  });
}

template <class T>
TW_INLINE void probability_gradient(const T* z, int n, const RowState<T>& row, T g,
                                    const TargetRow<T>& target, T cap, T* dq) {
  if (row.empty || g == 0) return void(std::memset(dq, 0, sizeof(T) * static_cast<size_t>(n)));
  cap != 0 ? write_probability_gradient<T, true>(z, n, row, g, target, cap, dq)
           : write_probability_gradient<T, false>(z, n, row, g, target, cap, dq);
}

// --- Tangents: ts = f' tz, tt = keep w tq; tz and tq may be null for 0 -------

template <class T>
struct TangentSums {
  T mu = 0;              // sum of p ts
  T picked = 0;          // sum of t ts
  T total = 0, gap = 0;  // sums of tt and of tt (lse - s)
  void add(const TangentSums& x) { mu += x.mu, picked += x.picked, total += x.total, gap += x.gap; }
};

template <class T>
TW_INLINE Vec<T> load_maybe(const T* p, int j, int left) {
  return p ? load_some(p + j, left, T{0}) : zero<T>();
}

// One chunk.
template <class T, bool CAPPED>
TW_NOINLINE TangentSums<T> tangent_sums_of_chunk(const T* z, const T* tz, const T* tq, int n,
                                                 const RowState<T>& row, const TargetRow<T>& target,
                                                 T cap) {
  constexpr T kNone = -std::numeric_limits<T>::infinity();
  const Exp<T> exp(1);
  const Softcap<T, CAPPED> f(cap);
  const Vec<T> m = set1(row.m), inverse = set1(row.inverse);
  const bool columns = target.columns();
  Lanes64<T> mu, picked, total, gap;
  each_register<T>(n, [&](int j, int u, int left) __attribute__((always_inline)) {
    const Capped<T> x = f.with_slope(load_some(z + j, left, kNone));
    const Vec<T> ts = x.slope * load_maybe(tz, j, left);
    mu.of[u] += exp(x.s - m) * inverse * ts;
    if (columns) picked.of[u] += target.load_weights(j, left) * ts;
    if (tq) {
      const Vec<T> tt = target.load_keep(j, left) * load_some(tq + j, left, T{0});
      total.of[u] += tt;
      gap.of[u] += tt * gap_to_lse(row, x.s);
    }
  });
  TangentSums<T> sums{mu.total(), picked.total(), total.total(), gap.total()};
  if (tz && target.holds_index(n)) {
    const Vec<T> slope = f.with_slope(set1(z[target.index])).slope;
    sums.picked += target.onehot * (slope * set1(tz[target.index]))[0];
  }
  return sums;
}

// Adds a piece of n columns.
template <class T>
TW_INLINE void add_tangent_sums(const T* z, const T* tz, const T* tq, int n, const RowState<T>& row,
                                const TargetRow<T>& target, T cap, TangentSums<T>* sums) {
  if (row.empty) return;
  for (int at = 0; at < n; at += kChunk) {
    const int columns = std::min(kChunk, n - at);
    const T *t = tz ? tz + at : nullptr, *q = tq ? tq + at : nullptr;
    const TargetRow<T> part = target.from(at);
    sums->add(cap != 0 ? tangent_sums_of_chunk<T, true>(z + at, t, q, columns, row, part, cap)
                       : tangent_sums_of_chunk<T, false>(z + at, t, q, columns, row, part, cap));
  }
}

// Tangents of what a row gives.
template <class T>
struct OutputTangents {
  T loss = 0, lse = 0, z_loss = 0;

  OutputTangents(const RowState<T>& row, const TangentSums<T>& sums, const TargetRow<T>& target,
                 T total, T zeta) {
    if (row.empty) return;
    lse = sums.mu;
    if (target.ignored) return;
    if (zeta != 0) z_loss = T{2} * zeta * (row.m + row.log_l) * sums.mu;
    loss = (total * sums.mu - sums.picked) + sums.gap + z_loss;
  }
};

// Cotangents with their tangents, and mu.
template <class T>
struct MovedCotangents {
  RowCotangents<T> of, moved;
  T mu = 0;
  bool none() const { return of.none() && moved.none(); }
};

template <class T>
TW_INLINE MovedCotangents<T> moved_cotangents(const RowState<T>& row, const TangentSums<T>& sums,
                                              const OutputCotangents<T>& of,
                                              const OutputCotangents<T>& moved,
                                              const TargetRow<T>& target, T total, T zeta) {
  MovedCotangents<T> c{row_cotangents(row, of, target, total, zeta),
                       row_cotangents(row, moved, target, total, zeta), sums.mu};
  if (row.empty || target.ignored) return c;
  const T both = of.loss + of.z_loss;
  if (of.loss != 0) c.moved.alpha += of.loss * sums.total;
  if (both != 0 && zeta != 0) c.moved.alpha += both * (T{2} * zeta * sums.mu);
  return c;
}

template <class T, bool CAPPED, bool COLUMNS>
TW_NOINLINE void write_moved_gradient(const T* z, const T* tz, const T* tq, int n,
                                      const RowState<T>& row, const MovedCotangents<T>& c,
                                      const TargetRow<T>& target, T cap, T* dz, T* tdz) {
  const Exp<T> exp(1);
  const Softcap<T, CAPPED> f(cap);
  const Vec<T> m = set1(row.m), inverse = set1(row.inverse), mu = set1(c.mu);
  const Vec<T> alpha = set1(c.of.alpha), talpha = set1(c.moved.alpha);
  const Vec<T> g = set1(-c.of.g), tg = set1(-c.moved.g);
  struct Both {
    Vec<T> d, td;
  };
  auto both = [&](Vec<T> logit, Vec<T> move, Vec<T> t, Vec<T> tt) __attribute__((always_inline)) {
    const Capped<T> x = f.with_slope(logit);
    const Vec<T> p = exp(x.s - m) * inverse, ds = fma(g, t, alpha * p);
    const Vec<T> all = fma(alpha, x.slope * move - mu, talpha);
    const Vec<T> tds = fma(g, tt, fma(tg, t, p * all));
    if constexpr (CAPPED) return Both{ds * x.slope, fma(tds, x.slope, ds * (x.bend * move))};
    return Both{ds, tds};
  };
  auto tangent_of_weights = [&](int j, int left) __attribute__((always_inline)) {
    return tq ? target.load_keep(j, left) * load_some(tq + j, left, T{0}) : zero<T>();
  };
  const bool here = target.holds_index(n);
  const int64_t i = here ? target.index : 0;
  const Both at_index =
      both(set1(z[i]), set1(tz ? tz[i] : T{0}), set1(target.weight(i)), zero<T>());
  each_column<T>(n, [&](int j, int left) __attribute__((always_inline)) {
    const Vec<T> t = COLUMNS ? target.load_weights(j, left) : zero<T>();
    const Vec<T> tt = COLUMNS ? tangent_of_weights(j, left) : zero<T>();
    const Both x = both(load_some(z + j, left, T{0}), load_maybe(tz, j, left), t, tt);
    if (dz) store_some(dz + j, left, x.d);
    store_some(tdz + j, left, x.td);
  });
  if (!here) return;
  if (dz) dz[i] = at_index.d[0];
  tdz[i] = at_index.td[0];
}

// tdz, the tangent of dz, and dz too where that is not null.
template <class T>
TW_INLINE void row_gradient_tangent(const T* z, const T* tz, const T* tq, int n,
                                    const RowState<T>& row, const MovedCotangents<T>& c,
                                    const TargetRow<T>& target, T cap, T* dz, T* tdz) {
  if (n == 0) return;
  if (row.empty || c.none()) {
    if (dz) std::memset(dz, 0, sizeof(T) * static_cast<size_t>(n));
    return void(std::memset(tdz, 0, sizeof(T) * static_cast<size_t>(n)));
  }
  if (cap != 0)
    target.columns()
        ? write_moved_gradient<T, true, true>(z, tz, tq, n, row, c, target, cap, dz, tdz)
        : write_moved_gradient<T, true, false>(z, tz, tq, n, row, c, target, cap, dz, tdz);
  else
    target.columns()
        ? write_moved_gradient<T, false, true>(z, tz, tq, n, row, c, target, cap, dz, tdz)
        : write_moved_gradient<T, false, false>(z, tz, tq, n, row, c, target, cap, dz, tdz);
}

// tdq = keep w (tg (lse - s) + g (mu - ts))
template <class T, bool CAPPED>
TW_NOINLINE void write_moved_probability_gradient(const T* z, const T* tz, int n,
                                                  const RowState<T>& row,
                                                  const MovedCotangents<T>& c,
                                                  const TargetRow<T>& target, T cap, T* tdq) {
  const Softcap<T, CAPPED> f(cap);
  const Vec<T> absent = set1(-std::numeric_limits<T>::infinity());
  each_column<T>(n, [&](int j, int left) __attribute__((always_inline)) {
    const Capped<T> x = f.with_slope(load_some(z + j, left, T{0}));
    const Vec<T> gap = gap_to_lse(row, x.s), ts = x.slope * load_maybe(tz, j, left);
    const Vec<T> moved = fma(set1(c.moved.g), gap, set1(c.of.g) * (set1(c.mu) - ts));
    const Vec<T> seen = select(equal(x.s, absent), zero<T>(), moved);
    store_some(tdq + j, left, target.load_keep(j, left) * seen);
  });
}

template <class T>
TW_INLINE void probability_gradient_tangent(const T* z, const T* tz, int n, const RowState<T>& row,
                                            const MovedCotangents<T>& c, const TargetRow<T>& target,
                                            T cap, T* tdq) {
  if (row.empty || (c.of.g == 0 && c.moved.g == 0))
    return void(std::memset(tdq, 0, sizeof(T) * static_cast<size_t>(n)));
  cap != 0 ? write_moved_probability_gradient<T, true>(z, tz, n, row, c, target, cap, tdq)
           : write_moved_probability_gradient<T, false>(z, tz, n, row, c, target, cap, tdq);
}

#include "simd/end.hpp"
