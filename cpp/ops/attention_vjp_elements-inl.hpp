// What the VJP body makes of the raw products of a panel, element by element, and the gradient of
// the bias.
#pragma once
#include "ops/attention_vjp-inl.hpp"

#include "simd/begin.hpp"

template <class E>
__attribute__((noinline)) void VjpBody<E>::elements(QueryTile<E>& t, int p, int64_t k0,
                                                    const Segment& s, int n) {
  const Lane lane(*this, t, p, k0, n);
  const uint16_t* words = mask_.words(p);
  LackInPairs<E> errors(t, lane.at, logits_->softcap);
  for (int j = s.ja; j < s.jb; j++) {
    const int64_t at = int64_t{j} * kGradQueries + lane.at;
    const Vec<T> dp = load(ds_ + at);
    TanhAndSlope<T> cap{};
    Vec<T> factor = splat<T>(1);
    const Vec<T> w = weight(lane, j, n, load(p_ + at), &cap);
    if (dropout_->on) factor = load(factors_ + int64_t{j} * kPanel + n * kWidth<T>);
    Vec<T> kept = w * factor, d = (dp * factor - lane.delta) * w;
    const Lanes<T> in = s.edge ? edge_lanes<T>(words, j, n) : lanes<T>(0xffff);
    errors.add(in, kept, dropout_->on ? dp : dp - lane.delta, cap.slope);
    if (s.edge)
      for (Vec<T>* x : {&kept, &d, &cap.slope}) *x = select(in, *x, zero<T>());
    store(p_ + at, kept);
    store(ds_ + at, d);
    if (logits_->softcap) store(slope_ + at, cap.slope);
  }
  errors.store_to(&t, lane.at);
}

// In: raw products s, dp, their tangents in tds and tp. Out: p and tp with dropout, ds, tds.
template <class E>
__attribute__((noinline)) void VjpBody<E>::second_elements(QueryTile<E>& t, int p, int64_t k0,
                                                           const Segment& s, int n) {
  const Lane lane(*this, t, p, k0, n);
  const Vec<T> mu = load(t.mu + lane.at), tdelta = load(t.tdelta + lane.at);
  const uint16_t* words = mask_.words(p);
  const bool values_move = logits_wanted_ && (second_->tdo || t_.tv);
  for (int j = s.ja; j < s.jb; j++) {
    const int64_t at = int64_t{j} * kGradQueries + lane.at;
    const int64_t in_panel = int64_t{j} * kPanel + n * kWidth<T>;
    TanhAndSlope<T> cap{};
    Vec<T> tslope = zero<T>(), dp = load(ds_ + at), tdp = values_move ? load(tp_ + at) : zero<T>();
    const Vec<T> w = weight(lane, j, n, load(p_ + at), &cap);
    Vec<T> ts = products_move_ ? load(tds_ + at) : zero<T>();
    if (logits_->softcap) {
      const Vec<T> ttanh = ts * cap.slope;
      tslope = splat<T>(-2) * cap.value * ttanh;
      ts = ttanh * set1(logits_->natural_cap);
    } else {
      ts = ts * splat<T>(kLn2);
    }
    if (t_.tbias) ts += load(tbias_ + in_panel);
    Vec<T> tp = w * (ts - mu), kept = w, tkept = tp;
    if (dropout_->on) {
      const Vec<T> f = load(factors_ + in_panel);
      kept = w * f, tkept = tp * f, dp = dp * f, tdp = tdp * f;
    }
    const Vec<T> e = dp - lane.delta;
    Vec<T> d = e * w, td = fma(tp, e, w * (tdp - tdelta));
    if (s.edge) {
      const Lanes<T> in = edge_lanes<T>(words, j, n);
      for (Vec<T>* x : {&kept, &tkept, &d, &td, &cap.slope, &tslope})
        *x = select(in, *x, zero<T>());
    }
    store(p_ + at, kept);
    store(tp_ + at, tkept);
    store(ds_ + at, d);
    store(tds_ + at, td);
    if (logits_->softcap) {
      store(slope_ + at, cap.slope);
      store(tslope_ + at, tslope);
    }
  }
}

// ds is the gradient by the capped logit; by the product it is ds (1 - tanh^2)
template <class E>
inline void VjpBody<E>::through_softcap() {
  for (int j = 0; j < mask_.keys(); j++)
    for (int g = 0; g < mask_.groups(); g++) {
      if (mask_.none(j, g)) continue;
      for (int i = g * kGroup; i < (g + 1) * kGroup; i += kWidth<T>) {
        const int64_t at = j * kGradQueries + i;
        const Vec<T> d = load(ds_ + at), slope = load(slope_ + at);
        store(ds_ + at, d * slope);
        if (second_) store(tds_ + at, fma(load(tds_ + at), slope, load(tslope_ + at) * d));
      }
    }
}

template <class E>
inline void VjpBody<E>::add_bias(QueryTile<E>& t, int64_t k0, int keys, int64_t row) {
  const View4& to = grads_.dbias;
  const T* ds = second_ ? tds_ : ds_;
  if (schedule_.bias == BiasGradient::kFull) {
    for (int r = 0; r < t.rows; r++) {
      T* out = to.at_mut<T>(b_, h_, t.q0 + r) + k0 * to.column;
      for (int j = 0; j < keys; j++) out[j * to.column] += ds[j * kGradQueries + r];
    }
  } else if (schedule_.bias == BiasGradient::kOverKeys) {
    for (int r = 0; r < t.rows; r += kWidth<T>) {
      Vec<T> s = zero<T>();
      for (int j = 0; j < keys; j++) s += load(ds + j * kGradQueries + r);
      store(t.dbias + r, load(t.dbias + r) + s);
    }
  } else {
    for (int j = 0; j < keys; j++) {
      T s = 0;
      for (int r = 0; r < t.rows; r++) s += ds[j * kGradQueries + r];
      dbias_keys_[row + j] += s;
    }
  }
}

#include "simd/end.hpp"
