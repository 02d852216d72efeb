// Cross-entropy of tokens in lanes: what a tile of logits z[class][kPanel] adds to the statistics
// of its tokens, and what it becomes: gradients, or their tangents. A lane never meets another, so
// a token's bits depend on its own logits alone.
#pragma once
#include "ops/linear_cross_entropy.hpp"
#include "ops/softcap-inl.hpp"
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
  // tangents: means of ts and sums of t ts; of w = e^(s - m), sums of w ts (s - m); and what ds
  // has, of its tangent
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

// A tile: classes [first, first + classes) of a panel whose first token is `token`, at most
// kFoldClasses for statistics. `weights` are those of the tile's classes, or null.
template <class T>
struct LogitTile {
  T* s;  // z before the soft cap, where there is one
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

// Adds a number of each class, in place.
template <class T>
TW_NOINLINE void add_bias_of(T* z, int classes, const T* bias) {
  for (int j = 0; j < classes; j++, z += kPanel) {
    const Vec<T> b = set1(bias[j]);
    TW_UNROLL_LANES for (int n = 0; n < kPanelVecs<T>; n++) {
      T* to = z + n * kWidth<T>;
      store(to, load(to) + b);
    }
  }
}

// With a cap other than 0, s from z; and ts from tz, in place.
template <class T>
TW_NOINLINE void cap_logits(const T* z, int classes, T cap, T* s) {
  const Softcap<T, true> f(cap);
  for (int64_t i = 0; i < int64_t{classes} * kPanel; i += kWidth<T>) store(s + i, f(load(z + i)));
}
template <class T>
TW_NOINLINE void cap_tangents(const T* z, int classes, T cap, T* tz) {
  const Softcap<T, true> f(cap);
  for (int64_t i = 0; i < int64_t{classes} * kPanel; i += kWidth<T>)
    store(tz + i, f.with_slope(load(z + i)).slope * load(tz + i));
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
      const T weight = tile.weights ? tile.weights[j] : T{1};
      if (weight != 0) u = fma(set1(weight), d, u);
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
TW_NOINLINE void add_statistics(LogitTile<T> tile, T before, bool extra, T cap,
                                const TokenLanes<T>& of) {
  alignas(64) T targets[kPanel], capped[kFoldClasses * kPanel];
  if (cap != 0) {
    cap_logits(tile.s, tile.classes, cap, capped);
    tile.s = capped;
  }
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
  const Softcap<T, true> f(form.cap != 0 ? form.cap : T{1});
  const Exp<T> exp(1);
  for (int j = 0; j < tile.classes; j++, s += kPanel) {
    Capped<T> x{load(s), splat<T>(1), zero<T>()};
    if (!PLAIN && form.cap != 0) x = f.with_slope(x.s);
    const Vec<T> d = x.s - m, w = exp(d);
    const auto here = equal(y, splat<T>(j));
    Vec<T> c = alpha, out;
    if constexpr (PLAIN) {
      out = fma(w, c, -select(here, go, zero<T>()));
    } else {
      if (form.entropy) c = alpha - ge * select(equal(w, zero<T>()), zero<T>(), d + h);
      out = fma(w, c, -(gs * set1(tile.weights ? tile.weights[j] : T{1})));
      out -= select(here, go, zero<T>());
      if (form.cap != 0) out *= x.slope;
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

// Adds what the tangents of results consist of: to l and entropy as statistics are, to mu, tau and
// nu. The maximum is that of the forward pass, or one of logits that were rounded in another way.
template <class T>
TW_NOINLINE void add_tangent_sums(LogitTile<T> tile, const T* ts, T cap, const TokenLanes<T>& of) {
  alignas(64) T targets[kPanel], capped[kFoldClasses * kPanel];
  if (cap != 0) {
    cap_logits(tile.s, tile.classes, cap, capped);
    tile.s = capped;
  }
  targets_of(tile, of.target, targets);
  const Exp<T> exp(1);
  for (int n = 0; n < kPanelVecs<T>; n++) {
    const int64_t at = tile.token + n * kWidth<T>;
    const Vec<T> y = load(targets + n * kWidth<T>), m = finite_max<T>(load(of.m + at)),
                 onehot = load(of.onehot + at), sp = load(of.spread + at);
    Vec<T> l = zero<T>(), e = zero<T>(), mu = zero<T>(), tau = zero<T>(), nu = zero<T>();
    for (int j = 0; j < tile.classes; j++) {
      const int64_t i = int64_t{j} * kPanel + n * kWidth<T>;
      const Vec<T> d = load(tile.s + i) - m, t = load(ts + i), w = exp(d);
      const Vec<T> wd = select(equal(w, zero<T>()), zero<T>(), w * d);
      const Vec<T> share = fma(sp, set1(tile.weights ? tile.weights[j] : T{1}),
                               select(equal(y, splat<T>(j)), onehot, zero<T>()));
      l += w;
      e += wd;
      mu = fma(w, t, mu);
      tau = fma(share, t, tau);
      nu = fma(wd, t, nu);
    }
    store(of.l + at, load(of.l + at) + l);
    store(of.entropy + at, load(of.entropy + at) + e);
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
  const Softcap<T, true> f(cap != 0 ? cap : T{1});
  for (int n = 0; n < kPanelVecs<T>; n++) {
    const int64_t at = tile.token + n * kWidth<T>;
    auto lane = [&](const T* x) __attribute__((always_inline)) { return load(x + at); };
    const Vec<T> y = load(targets + n * kWidth<T>), m = finite_max<T>(lane(of.m)),
                 alpha = lane(of.alpha), ge = lane(of.ge), h = lane(of.h), mu = lane(of.mu),
                 talpha = lane(of.talpha), tge = lane(of.tge), moved_h = lane(of.moved_h);
    const auto dead = equal(lane(of.live), zero<T>());
    for (int j = 0; j < tile.classes; j++) {
      const int64_t i = int64_t{j} * kPanel + n * kWidth<T>;
      Capped<T> x{load(tile.s + i), splat<T>(1), zero<T>()};
      if (cap != 0) x = f.with_slope(x.s);
      const Vec<T> t = load(ts + i), d = x.s - m, w = exp(d);
      const Vec<T> log_p = select(equal(w, zero<T>()), zero<T>(), d + h), moved = t - mu;
      const Vec<T> c = alpha - ge * log_p, tc = talpha - tge * log_p - ge * (moved + moved_h);
      const auto here = equal(y, splat<T>(j));
      const Vec<T> share = set1(tile.weights ? tile.weights[j] : T{1});
      Vec<T> ds = fma(w, c, -(lane(of.gs) * share)) - select(here, lane(of.go), zero<T>());
      Vec<T> tds = fma(w, fma(moved, c, tc), -(lane(of.tgs) * share)) -
                   select(here, lane(of.tgo), zero<T>());
      if (cap != 0) {
        // ts has the slope already, and the bend of z is that of s times the slope
        tds = fma(tds, x.slope, ds * (splat<T>(-2) * x.s * f.inverse * f.inverse) * t);
        ds *= x.slope;
      }
      store(tile.s + i, select(dead, zero<T>(), ds));
      store(ts + i, select(dead, zero<T>(), tds));
    }
  }
}

#include "simd/end.hpp"
