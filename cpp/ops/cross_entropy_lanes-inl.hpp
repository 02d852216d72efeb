// Cross-entropy of tokens in lanes: what a tile of logits s[class][kPanel] adds to the statistics
// of its tokens, and what it becomes: gradients, or their tangents. A lane never meets another, so
// a token's bits depend on its own logits alone.
#pragma once
#include "ops/linear_cross_entropy.hpp"
#include "ops/softmax_row-inl.hpp"
#include "tile/pack-inl.hpp"

#include "simd/begin.hpp"

constexpr int kFoldClasses = 64;  // classes with a maximum of their own, counted from the first

// Numbers of tokens, one array each.
template <class T>
struct TokenLanes {
  // the token's class within this call, or -1; `kept` is 0 where the token is ignored
  int64_t* target;
  T *kept, *onehot, *spread, *mass;
  // statistics: those of the softmax, sum of e^(s - m) (s - m), sum of w (s - m), s of the target
  T *m, *l, *entropy, *spread_sum, *picked;
  int64_t* argmax;
  // derivatives: ds = e^(s - m) (alpha - ge (s - m + h)) - go [target] - gs w, 0 where not `live`
  T *live, *alpha, *ge, *h, *go, *gs;
  T *least, *large;  // entries below one are left out, above the other never rounded
  // tangents: sums of p ts, t ts, p log p ts; and what ds has, of its tangent
  T *inverse, *mu, *tau, *nu, *talpha, *tge, *moved_h, *tgo, *tgs;

  void place(Arena& arena, int64_t n) {
    target = arena.take<int64_t>(n);
    argmax = arena.take<int64_t>(n);
    for (T** x : {&kept, &onehot, &spread, &mass,   &m,   &l,       &entropy, &spread_sum, &picked,
                  &live, &alpha,  &ge,     &h,      &go,  &gs,      &least,   &large,      &inverse,
                  &mu,   &tau,    &nu,     &talpha, &tge, &moved_h, &tgo,     &tgs})
      *x = arena.take<T>(n);
  }
};

// A tile: classes [first, first + classes) of a panel whose first token is `token`. `weights` are
// those of the tile's classes, or null.
template <class T>
struct LogitTile {
  T* s;
  int classes;
  int64_t first, token;
  const T* weights;
};

// Which class of the tile is each lane's target, -1 for none.
template <class T>
TW_INLINE void targets_of(const LogitTile<T>& tile, const int64_t* target, T* out) {
  for (int i = 0; i < kPanel; i++) {
    const int64_t y = target[tile.token + i] - tile.first;
    out[i] = y >= 0 && y < tile.classes ? static_cast<T>(y) : T{-1};
  }
}

// s = z + bias, or cap tanh of it, in place.
template <class T>
TW_NOINLINE void finish_logits(T* z, int classes, const T* bias, T cap) {
  const Vec<T> c = set1(cap), inverse = set1(cap != 0 ? T{1} / cap : T{0});
  for (int j = 0; j < classes; j++, z += kPanel) {
    const Vec<T> b = set1(bias ? bias[j] : T{0});
    TW_UNROLL_LANES for (int n = 0; n < kPanelVecs<T>; n++) {
      T* to = z + n * kWidth<T>;
      const Vec<T> x = load(to) + b;
      store(to, cap != 0 ? c * tanh<T>(x * inverse) : x);
    }
  }
}

// The derivative of the softcap, from its result.
template <class T>
TW_INLINE Vec<T> slope(Vec<T> s, Vec<T> inverse_cap) {
  const Vec<T> x = s * inverse_cap;
  return fma(-x, x, splat<T>(1));
}

// ts from tz, in place.
template <class T>
TW_NOINLINE void finish_tangents(T* tz, const T* s, int classes, const T* tbias, T cap) {
  const Vec<T> inverse = set1(cap != 0 ? T{1} / cap : T{0});
  for (int j = 0; j < classes; j++, tz += kPanel, s += kPanel) {
    const Vec<T> b = set1(tbias ? tbias[j] : T{0});
    TW_UNROLL_LANES for (int n = 0; n < kPanelVecs<T>; n++) {
      T* to = tz + n * kWidth<T>;
      const Vec<T> x = load(to) + b;
      store(to, cap != 0 ? x * slope<T>(load(s + n * kWidth<T>), inverse) : x);
    }
  }
}

// What is left of a sum of w (s - m) when the maximum moved and the weights, which sum to `total`,
// did not change.
template <class T>
TW_INLINE Vec<T> moved_sum(Vec<T> sum, T total, Vec<T> m_old, Vec<T> m_new) {
  return total == 0 ? sum : fma(set1(total), m_old - m_new, sum);
}

// Adds kFoldClasses classes, or fewer, to the statistics of one register of lanes. `before` is the
// sum of class weights of the classes before. EXTRA: entropy, spread and argmax too.
template <class T, bool EXTRA>
TW_INLINE void add_fold(const LogitTile<T>& tile, const T* targets, T before, int n,
                        const TokenLanes<T>& of) {
  const int64_t at = tile.token + n * kWidth<T>;
  const T* s = tile.s + n * kWidth<T>;
  const Vec<T> y = load(targets + n * kWidth<T>);
  Vec<T> top = minus_infinity<T>();
  for (int j = 0; j < tile.classes; j++) top = max(load(s + int64_t{j} * kPanel), top);
  const Vec<T> m_old = load(of.m + at), m = max(top, m_old), high = finite_max<T>(m);
  const Exp<T> exp(1);
  const Vec<T> a = exp(finite_max<T>(m_old) - high);
  Vec<T> sum = zero<T>(), e = zero<T>(), u = zero<T>(), picked = load(of.picked + at);
  Vec<T> best = splat<T>(-1);
  for (int j = 0; j < tile.classes; j++) {
    const Vec<T> x = load(s + int64_t{j} * kPanel), d = x - high, w = exp(d);
    sum += w;
    picked = select(equal(y, splat<T>(j)), x, picked);
    if constexpr (EXTRA) {
      e += select(equal(w, zero<T>()), zero<T>(), w * d);
      u = fma(set1(tile.weights ? tile.weights[j] : T{1}), d, u);
      const int back = tile.classes - 1 - j;
      best = select(equal(load(s + int64_t{back} * kPanel), m), splat<T>(back), best);
    }
  }
  const Vec<T> l = load(of.l + at);
  if constexpr (EXTRA) {
    store(of.entropy + at, moved_entropy<T>(load(of.entropy + at), l, m_old, m, a) + e);
    store(of.spread_sum + at,
          moved_sum<T>(load(of.spread_sum + at), before, finite_max<T>(m_old), high) + u);
    const auto risen = equal(m, m_old);
    const Vec<T> found = select(risen, splat<T>(-1), best);
    for (int i = 0; i < kWidth<T>; i++)
      if (found[i] >= 0) of.argmax[at + i] = tile.first + static_cast<int64_t>(found[i]);
  }
  store(of.picked + at, picked);
  store(of.l + at, fma(l, a, sum));
  store(of.m + at, m);
}

template <class T>
TW_NOINLINE void add_statistics(const LogitTile<T>& tile, T before, bool extra,
                                const TokenLanes<T>& of) {
  alignas(64) T targets[kPanel];
  targets_of(tile, of.target, targets);
  for (int n = 0; n < kPanelVecs<T>; n++) {
    if (extra)
      add_fold<T, true>(tile, targets, before, n, of);
    else
      add_fold<T, false>(tile, targets, before, n, of);
  }
}

// Options of the elements of a gradient.
template <class T>
struct GradientForm {
  bool entropy;  // some cotangent of the entropy
  bool filter;
  T cap;
};

// s becomes dz.
template <class T, bool PLAIN>
TW_INLINE void put_gradient(const LogitTile<T>& tile, const T* targets, const GradientForm<T>& form,
                            int n, const TokenLanes<T>& of) {
  const int64_t at = tile.token + n * kWidth<T>;
  T* s = tile.s + n * kWidth<T>;
  auto lane = [&](const T* x) __attribute__((always_inline)) { return load(x + at); };
  const Vec<T> y = load(targets + n * kWidth<T>), m = finite_max<T>(lane(of.m)),
               alpha = lane(of.alpha), ge = lane(of.ge), h = lane(of.h), go = lane(of.go),
               gs = lane(of.gs), least = lane(of.least);
  const auto dead = equal(lane(of.live), zero<T>());
  const Vec<T> inverse_cap = set1(form.cap != 0 ? T{1} / form.cap : T{0});
  const Exp<T> exp(1);
  for (int j = 0; j < tile.classes; j++, s += kPanel) {
    const Vec<T> x = load(s), d = x - m, w = exp(d);
    const auto here = equal(y, splat<T>(j));
    Vec<T> c = alpha, out;
    if constexpr (PLAIN) {
      out = fma(w, c, -select(here, go, zero<T>()));
    } else {
      if (form.entropy) c = alpha - ge * select(equal(w, zero<T>()), zero<T>(), d + h);
      out = fma(w, c, -(gs * set1(tile.weights ? tile.weights[j] : T{1})));
      out -= select(here, go, zero<T>());
      if (form.cap != 0) out *= slope<T>(x, inverse_cap);
      if (form.filter) {
        const Vec<T> left = select(equal(max(abs(out), least), least), zero<T>(), out);
        out = select(here, out, left);
      }
    }
    store(s, select(dead, zero<T>(), out));
  }
}

template <class T>
TW_NOINLINE void put_gradients(const LogitTile<T>& tile, const GradientForm<T>& form, bool plain,
                               const TokenLanes<T>& of) {
  alignas(64) T targets[kPanel];
  targets_of(tile, of.target, targets);
  for (int n = 0; n < kPanelVecs<T>; n++) {
    if (plain)
      put_gradient<T, true>(tile, targets, form, n, of);
    else
      put_gradient<T, false>(tile, targets, form, n, of);
  }
}

// Which classes of a tile have an entry other than zero: a bit for each `step` of them.
template <class T>
TW_NOINLINE uint32_t filled_classes(const T* dz, int classes, int step) {
  uint32_t filled = 0;
  for (int first = 0, bit = 0; first < classes; first += step, bit++) {
    const T* end = dz + int64_t{std::min(first + step, classes)} * kPanel;
    Vec<T> top = zero<T>();
    bool nan = false;
    for (const T* at = dz + int64_t{first} * kPanel; at < end; at += kWidth<T>) {
      top = max(top, abs(load(at)));
      nan |= any(unordered(load(at)));
    }
    for (int i = 0; i < kWidth<T>; i++) nan |= top[i] > 0;
    if (nan) filled |= 1u << bit;
  }
  return filled;
}

// Adds to mu, tau and nu.
template <class T>
TW_NOINLINE void add_tangent_sums(const LogitTile<T>& tile, const T* ts, const TokenLanes<T>& of) {
  alignas(64) T targets[kPanel];
  targets_of(tile, of.target, targets);
  const Exp<T> exp(1);
  for (int n = 0; n < kPanelVecs<T>; n++) {
    const int64_t at = tile.token + n * kWidth<T>;
    const Vec<T> y = load(targets + n * kWidth<T>), m = finite_max<T>(load(of.m + at)),
                 inverse = load(of.inverse + at), onehot = load(of.onehot + at),
                 log_p = load(of.l + at), sp = load(of.spread + at);
    Vec<T> mu = zero<T>(), tau = zero<T>(), nu = zero<T>();
    for (int j = 0; j < tile.classes; j++) {
      const int64_t i = int64_t{j} * kPanel + n * kWidth<T>;
      const Vec<T> d = load(tile.s + i) - m, t = load(ts + i), w = exp(d);
      const Vec<T> p = w * inverse * t;
      const Vec<T> share = fma(sp, set1(tile.weights ? tile.weights[j] : T{1}),
                               select(equal(y, splat<T>(j)), onehot, zero<T>()));
      mu += p;
      tau = fma(share, t, tau);
      nu += select(equal(w, zero<T>()), zero<T>(), p * (d - log_p));
    }
    store(of.mu + at, load(of.mu + at) + mu);
    store(of.tau + at, load(of.tau + at) + tau);
    store(of.nu + at, load(of.nu + at) + nu);
  }
}

// s becomes dz and ts becomes its tangent.
template <class T>
TW_NOINLINE void put_gradient_tangents(const LogitTile<T>& tile, T* ts, T cap,
                                       const TokenLanes<T>& of) {
  alignas(64) T targets[kPanel];
  targets_of(tile, of.target, targets);
  const Exp<T> exp(1);
  const Vec<T> inverse_cap = set1(cap != 0 ? T{1} / cap : T{0});
  for (int n = 0; n < kPanelVecs<T>; n++) {
    const int64_t at = tile.token + n * kWidth<T>;
    auto lane = [&](const T* x) __attribute__((always_inline)) { return load(x + at); };
    const Vec<T> y = load(targets + n * kWidth<T>), m = finite_max<T>(lane(of.m)),
                 alpha = lane(of.alpha), ge = lane(of.ge), h = lane(of.h), mu = lane(of.mu),
                 talpha = lane(of.talpha), tge = lane(of.tge), moved_h = lane(of.moved_h);
    const auto dead = equal(lane(of.live), zero<T>());
    for (int j = 0; j < tile.classes; j++) {
      const int64_t i = int64_t{j} * kPanel + n * kWidth<T>;
      const Vec<T> x = load(tile.s + i), t = load(ts + i), d = x - m, w = exp(d);
      const Vec<T> log_p = select(equal(w, zero<T>()), zero<T>(), d + h), moved = t - mu;
      const Vec<T> c = alpha - ge * log_p, tc = talpha - tge * log_p - ge * (moved + moved_h);
      const auto here = equal(y, splat<T>(j));
      const Vec<T> share = set1(tile.weights ? tile.weights[j] : T{1});
      Vec<T> ds = fma(w, c, -(lane(of.gs) * share)) - select(here, lane(of.go), zero<T>());
      Vec<T> tds = fma(w, fma(moved, c, tc), -(lane(of.tgs) * share)) -
                   select(here, lane(of.tgo), zero<T>());
      if (cap != 0) {
        const Vec<T> f = slope<T>(x, inverse_cap);
        tds = fma(tds, f, ds * splat<T>(-2) * x * inverse_cap * inverse_cap * t);
        ds *= f;
      }
      store(tile.s + i, select(dead, zero<T>(), ds));
      store(ts + i, select(dead, zero<T>(), tds));
    }
  }
}

#include "simd/end.hpp"
