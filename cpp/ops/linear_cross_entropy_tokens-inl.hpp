// The numbers of all tokens of a call: what they start from, and what the caller gets.
#pragma once
#include "ops/cross_entropy_lanes-inl.hpp"
#include "ops/rows-inl.hpp"

#include "simd/begin.hpp"

template <class T>
constexpr Storage storage_of_numbers() {
  return sizeof(T) == 8 ? Storage::kFloat64 : Storage::kFloat32;
}

template <class T>
class TokenNumbers {
 public:
  explicit TokenNumbers(const LinearCrossEntropyProblem& problem) : p_(problem) {}

  void place(Arena& arena) {
    padded_ = (p_.T + kPanel - 1) / kPanel * kPanel;
    of_.place(arena, padded_);
    before_ = arena.take<T>(p_.class_weight ? (p_.V + kFoldClasses - 1) / kFoldClasses + 1 : 0);
  }

  const TokenLanes<T>& lanes() const { return of_; }
  const GradientForm<T>& form() const { return form_; }
  bool plain() const { return plain_; }
  // Whether some gradient comes from the token.
  bool wanted(int64_t t) const { return of_.live[t] != 0; }

  // Whether a token of a panel is kept, or some gradient comes from one.
  bool any(int64_t first, bool kept) const {
    const T* of = kept ? of_.kept : of_.live;
    for (int i = 0; i < kPanel; i++)
      if (of[first + i] != 0) return true;
    return false;
  }
  // Whether something is asked that ignored tokens have too.
  bool of_all() const {
    const CrossEntropyResults& o = p_.out;
    return o.lse || o.m || o.log_l || o.entropy || o.argmax;
  }

  void begin() {
    const CrossEntropyOptions& o = p_.options;
    const double spread = o.label_smoothing / double(std::max<int64_t>(o.v_total, 1));
    const T* weights = static_cast<const T*>(p_.class_weight);
    double total = weights ? 0 : double(p_.V);
    for (int64_t v = 0; weights && v < p_.V; v++) {
      if (v % kFoldClasses == 0) before_[v / kFoldClasses] = static_cast<T>(total);
      total += double(weights[v]);
    }
    total_ = static_cast<T>(total);
    spread_ = spread != 0;
    extra_ = spread_ || p_.out.entropy || p_.out.argmax;
    form_ = {bool(p_.rows.g_entropy), o.gradient_filter > 0, static_cast<T>(o.softcap)};
    plain_ = !spread_ && !form_.entropy && !form_.filter && o.softcap == 0;
    for (int64_t t = 0; t < padded_; t++) begin_token(t, spread);
  }

  // The statistics of kFoldClasses classes, or fewer.
  void add_fold(const LogitTile<T>& tile) const {
    const T before = before_ && p_.class_weight ? before_[tile.first / kFoldClasses]
                                                : static_cast<T>(tile.first);
    add_statistics<T>(tile, before, extra_, form_.cap, of_);
  }

  // What statistics make of tokens [first, first + count). One without a logit above -inf has no
  // loss.
  void write_results(int64_t first, int64_t count) const {
    const CrossEntropyResults& out = p_.out;
    const T zeta = static_cast<T>(p_.options.z_loss);
    for (int64_t t = first; t < first + count; t++) {
      const T l = of_.l[t];
      const T log_l = l == 0 ? T{0} : l != l ? l : log<T>(set1(l))[0];
      const T top = of_.m[t], m = l != l ? l : top + T{0};
      const T lse = top == std::numeric_limits<T>::infinity() ? top : m + log_l;
      of_.m[t] = m;
      of_.l[t] = log_l;
      const bool counts = of_.kept[t] != 0 && l != 0;
      const T squared = zeta != 0 && counts ? zeta * lse * lse : T{0};
      put(out.m, t, m);
      put(out.log_l, t, log_l);
      put(out.lse, t, lse);
      put(out.mass, t, of_.mass[t]);
      put(out.entropy, t, log_l - (l == 0 ? T{0} : of_.entropy[t] / l));
      if (out.argmax) out.argmax[t] = p_.options.v_start + of_.argmax[t];
      put(out.z_loss, t, squared);
      T loss = of_.mass[t] * log_l, picked = 0;
      if (of_.onehot[t] != 0) {
        loss += of_.onehot[t] * (m - of_.picked[t]);
        picked = of_.onehot[t] * of_.picked[t];
      }
      if (of_.spread[t] != 0) {
        loss -= of_.spread[t] * of_.spread_sum[t];
        picked += of_.spread[t] * (of_.spread_sum[t] + total_ * m);
      }
      put(out.picked, t, picked);
      put(out.loss, t, counts ? loss + squared : T{0});
    }
  }

  // What the caller has kept of them.
  void take_saved() const {
    for (int64_t t = 0; t < p_.T; t++) {
      of_.m[t] = number(p_.rows.m, t);
      of_.l[t] = number(p_.rows.log_l, t);
      of_.h[t] = number(p_.rows.entropy, t) - of_.l[t];
    }
  }
  // Where there are tangents, only the maximum: all sums have to be of the same weights, and the
  // others may be of products of pairs.
  void take_maximum() const {
    for (int64_t t = 0; t < p_.T; t++) of_.m[t] = number(p_.rows.m, t);
  }

  // What the sums of a tangent pass make of the statistics, mu and moved_h.
  void finish_tangent_sums() const {
    for (int64_t t = 0; t < p_.T; t++) {
      const T l = of_.l[t], inverse = l == 0 ? T{0} : T{1} / l, gap = of_.entropy[t] * inverse;
      of_.l[t] = l == 0 ? T{0} : l != l ? l : log<T>(set1(l))[0];
      of_.h[t] = -gap;
      of_.mu[t] *= inverse;
      of_.moved_h[t] = gap * of_.mu[t] - of_.nu[t] * inverse;
    }
  }

  // The coefficients of gradients from cotangents and statistics.
  void take_cotangents(int64_t first, int64_t count) const {
    const Exp<T> exp(1);
    const T zeta2 = T{2} * static_cast<T>(p_.options.z_loss);
    for (int64_t t = first; t < first + count; t++) {
      const T m = of_.m[t], log_l = of_.l[t], inverse = exp(-log_l), lse = m + log_l;
      const bool kept = of_.kept[t] != 0;
      const T g = kept ? number(p_.rows.g, t) : T{0}, gz = kept ? number(p_.rows.g_z, t) : T{0};
      const T ge = number(p_.rows.g_entropy, t);
      T alpha = g * of_.mass[t] + number(p_.rows.g_lse, t);
      if (zeta2 != 0) alpha += (g + gz) * zeta2 * lse;
      if (m == -std::numeric_limits<T>::infinity()) of_.live[t] = 0;
      of_.inverse[t] = inverse;
      of_.alpha[t] = alpha * inverse;
      of_.ge[t] = ge * inverse;
      of_.go[t] = g * of_.onehot[t];
      of_.gs[t] = g * of_.spread[t];
      of_.least[t] = static_cast<T>(p_.options.gradient_filter) * magnitude(g);
      const T rest = T{1} - inverse, low = static_cast<T>(0x1p-20);
      of_.large[t] = (magnitude(alpha) * (rest > low ? rest : low) + magnitude(of_.gs[t] * total_) +
                      magnitude(ge)) /
                     T{16};
    }
  }

  void write_tangents() const {
    const T zeta2 = T{2} * static_cast<T>(p_.options.z_loss);
    for (int64_t t = 0; t < p_.T; t++) {
      const T mu = of_.mu[t], lse = of_.m[t] + of_.l[t];
      const bool kept = of_.kept[t] != 0 && of_.m[t] != -std::numeric_limits<T>::infinity();
      const T squared = kept && zeta2 != 0 ? zeta2 * lse * mu : T{0};
      put(p_.out.loss, t, kept ? of_.mass[t] * mu - of_.tau[t] + squared : T{0});
      put(p_.out.lse, t, mu);
      put(p_.out.z_loss, t, squared);
      put(p_.out.entropy, t, of_.moved_h[t]);
    }
  }

  // The coefficients of the gradients' tangents, from the sums of a tangent pass.
  void take_second() const {
    const T zeta2 = T{2} * static_cast<T>(p_.options.z_loss);
    for (int64_t t = 0; t < p_.T; t++) {
      const T mu = of_.mu[t], inverse = of_.inverse[t], lse = of_.m[t] + of_.l[t];
      const bool kept = of_.kept[t] != 0;
      auto of_kept = [&](const void* x) { return kept ? number(x, t) : T{0}; };
      const T g = of_kept(p_.rows.g), gz = of_kept(p_.rows.g_z), tg = of_kept(p_.rows.tg),
              tgz = of_kept(p_.rows.tg_z);
      T talpha = tg * of_.mass[t] + number(p_.rows.tg_lse, t);
      if (zeta2 != 0) talpha += (tg + tgz) * zeta2 * lse + (g + gz) * zeta2 * mu;
      of_.talpha[t] = talpha * inverse;
      of_.tge[t] = number(p_.rows.tg_entropy, t) * inverse;
      of_.tgo[t] = tg * of_.onehot[t];
      of_.tgs[t] = tg * of_.spread[t];
    }
  }

 private:
  static T number(const void* x, int64_t t) { return x ? static_cast<const T*>(x)[t] : T{0}; }
  static void put(void* x, int64_t t, T value) {
    if (x) static_cast<T*>(x)[t] = value;
  }
  static T magnitude(T x) { return x < 0 ? -x : x; }

  void begin_token(int64_t t, double spread) const {
    const CrossEntropyOptions& o = p_.options;
    const bool there = t < p_.T, kept = there && p_.targets[t] != o.ignore_index;
    const int64_t y = kept ? p_.targets[t] - o.v_start : -1;
    const bool here = y >= 0 && y < p_.V;
    const T* weights = static_cast<const T*>(p_.class_weight);
    of_.target[t] = here ? y : -1;
    of_.kept[t] = kept ? T{1} : T{0};
    of_.onehot[t] =
        here ? static_cast<T>(1 - o.label_smoothing) * (weights ? weights[y] : T{1}) : T{0};
    of_.spread[t] = kept ? static_cast<T>(spread) : T{0};
    of_.mass[t] = of_.onehot[t] + of_.spread[t] * total_;
    if (there && kept && p_.rows.mass) of_.mass[t] = number(p_.rows.mass, t);
    of_.m[t] = there ? -std::numeric_limits<T>::infinity() : T{0};
    of_.argmax[t] = 0;
    for (T* x : {of_.l,  of_.entropy, of_.spread_sum, of_.picked,  of_.alpha,   of_.ge, of_.h,
                 of_.go, of_.gs,      of_.least,      of_.large,   of_.inverse, of_.mu, of_.tau,
                 of_.nu, of_.talpha,  of_.tge,        of_.moved_h, of_.tgo,     of_.tgs})
      x[t] = 0;
    const CrossEntropyRows& r = p_.rows;
    bool live = false;
    for (const void* x : {r.g, r.g_z, r.tg, r.tg_z}) live |= kept && !(number(x, t) == 0);
    for (const void* x : {r.g_lse, r.g_entropy, r.tg_lse, r.tg_entropy})
      live |= there && !((there ? number(x, t) : T{0}) == 0);
    of_.live[t] = live ? T{1} : T{0};
  }

  const LinearCrossEntropyProblem& p_;
  TokenLanes<T> of_;
  GradientForm<T> form_{};
  int64_t padded_ = 0;
  T* before_ = nullptr;  // sums of class weights before each fold
  T total_ = 0;
  bool spread_ = false, extra_ = false, plain_ = false;
};

#include "simd/end.hpp"
