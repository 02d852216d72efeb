// The JVP body: queries in lanes as in the forward body. The row statistics of the forward pass
// give the probabilities at once, so nothing is rescaled and chunks need no merge.
#pragma once
#include "ops/attention_forward-inl.hpp"

#include "simd/begin.hpp"

template <class T>
class JvpBody {
 public:
  using Element = T;
  template <class... Args>
  static int64_t block_columns(const AttentionInputs& in, const Args&...) {
    return 2 * in.D + in.Dv;
  }

  JvpBody(const AttentionInputs& in, const AttentionSaved& saved, const AttentionTangents& tangents,
          const AttentionOutputTangents& out, int max_panels)
      : in_(in),
        saved_(saved),
        t_(tangents),
        out_(out),
        products_move_(tangents.tq || tangents.tk),
        logits_move_(products_move_ || tangents.tbias),
        panels_(max_panels) {}

  void place(Arena& arena) {
    const int64_t lanes = int64_t{panels_} * kPanel;
    q_ = arena.take<T>(in_.D * lanes);
    tq_ = arena.take<T>(t_.tq ? in_.D * lanes : 0);
    to_ = arena.take<T>(in_.Dv * lanes);
    m_ = arena.take<T>(lanes);
    log2_l_ = arena.take<T>(lanes);
    mu_ = arena.take<T>(lanes);
    s_ = arena.take<T>(kTileKeys * kPanel);
    ts_ = arena.take<T>(kTileKeys * kPanel);
    bias_ = arena.take<T>(in_.bias ? kTileKeys * kPanel : 0);
    tbias_ = arena.take<T>(t_.tbias ? kTileKeys * kPanel : 0);
    ones_ = arena.take<T>(kPanel);
  }

  void run(int64_t b, int64_t h, int64_t q0, int rows, MaskBlock& mask) {
    b_ = b;
    h_ = h;
    hk_ = h / (in_.H / in_.Hk);
    q0_ = q0;
    rows_ = rows;
    const Logits<T> logits(in_, b, h);
    logits_ = &logits;
    const Dropout<T> dropout(in_, b, h);
    dropout_ = &dropout;
    load_queries();
    mask.load(in_.mask, b, h, q0, rows, in_.N, in_.Nk);
    walk(mask, in_.Nk, *this);
    finish();
  }

  void tile(int p, int64_t k0, const Segment* segments, int count, const uint16_t* words) {
    const int at = p * kPanel, D = static_cast<int>(in_.D), Dv = static_cast<int>(in_.Dv);
    const T *k = in_.k.at<T>(b_, hk_, k0), *v = in_.v.at<T>(b_, hk_, k0);
    const T *q = q_ + at * in_.D, *tq = tq_ + at * in_.D;
    const T* tk = t_.tk ? t_.tk.at<T>(b_, hk_, k0) : nullptr;
    const T* tv = t_.tv ? t_.tv.at<T>(b_, hk_, k0) : nullptr;
    if (k0 != touched_) {
      touched_ = k0;
      touch_rows(v, in_.v.row, Dv, segments[count - 1].jb);
      if (tv) touch_rows(tv, t_.tv.row, Dv, segments[count - 1].jb);
    }
    for (int i = 0; i < count; i++) {
      scores<T>(k, in_.k.row, q, D, StoreScores<T>{s_}, segments[i]);
      scores_of_both<T>({t_.tq ? k : nullptr, in_.k.row, tq}, {tk, t_.tk.row, q}, D,
                        StoreScores<T>{ts_}, segments[i]);
      load_biases(at, k0, segments[i]);
    }
    auto elements = logits_->plain && !t_.tbias ? elements_panel<true> : elements_panel<false>;
    elements(*this, at, k0, segments, count, words);
    if (dropout_->on) dropout_->apply(segments, count, q0_ + at, k0, s_, ts_);
    T* to = to_ + at * in_.Dv;
    const Factor<T> moved{v, in_.v.row, ts_}, values{tv, t_.tv.row, s_}, both[] = {moved, values};
    if (logits_move_ && tv)
      weighted_sum<T, 2>(both, Dv, words, segments, count, to, ones_);
    else if (logits_move_ || tv)
      weighted_sum<T, 1>(tv ? &values : &moved, Dv, words, segments, count, to, ones_);
  }

  void chunk_end(bool) {}

 private:
  void load_queries() {
    const int D = static_cast<int>(in_.D);
    const int64_t row = (b_ * in_.H + h_) * in_.N + q0_;
    const T *m = static_cast<const T*>(saved_.m) + row,
            *log_l = static_cast<const T*>(saved_.log_l) + row;
    const int used = (rows_ + kPanel - 1) / kPanel * kPanel;
    for (int i = 0; i < used; i++) {
      const int r = std::min(i, rows_ - 1);
      m_[i] = std::numeric_limits<T>::lowest() > m[r] ? std::numeric_limits<T>::lowest() : m[r];
      log2_l_[i] = log_l[r] * static_cast<T>(kLog2e);
      mu_[i] = 0;
    }
    for (int g = 0; g * kGroup < rows_; g++) {
      const int n = std::min(kGroup, rows_ - g * kGroup);
      const int64_t at = g / kPanelGroups * in_.D * kPanel + g % kPanelGroups * kGroup;
      pack_lanes<T>(in_.q.at<T>(b_, h_, q0_ + g * kGroup), in_.q.row, D, n, logits_->q_scale,
                    q_ + at);
      if (t_.tq)
        pack_lanes<T>(t_.tq.at<T>(b_, h_, q0_ + g * kGroup), t_.tq.row, D, n, logits_->q_scale,
                      tq_ + at);
    }
    std::memset(to_, 0, sizeof(T) * static_cast<size_t>(used * in_.Dv));
    for (int i = 0; i < kPanel; i++) ones_[i] = 1;
    touched_ = -1;
  }

  void load_biases(int at, int64_t k0, const Segment& s) {
    const int64_t q = q0_ + at;
    const int rows = std::min(kPanel, rows_ - at);
    if (logits_->bias) logits_->bias.panel(q, rows, k0, s.ja, s.jb, bias_);
    if (t_.tbias) BiasHead<T>(t_.tbias, b_, h_).panel(q, rows, k0, s.ja, s.jb, tbias_);
  }

  // In place: s becomes p, and ts, so far the moved product, p ts. Adds the row sums of p ts to mu.
  template <bool PLAIN>
  TW_NOINLINE void elements_panel(const JvpBody& body, int at, int64_t k0, const Segment* segments,
                                  int count, const uint16_t* words) {
    for (int n = 0; n < kPanelVecs<T>; n++) {
      const int lane = n * kWidth<T>, group = lane / kGroup;
      const Elements<PLAIN> elements(body, at, k0, n, words);
      Vec<T> sum[4] = {};  // by key index mod 4
      bool seen = false;
      for (int i = 0; i < count; i++) {
        const Segment& s = segments[i];
        if (group < s.na || group >= s.nb) continue;
        seen = true;
        int j = s.ja;
        if (s.edge) {
          for (; j < s.jb; j++) sum[j & 3] += elements.template at<true>(j);
        } else {
          for (; j + 4 <= s.jb; j += 4)
            TW_UNROLL for (int u = 0; u < 4; u++) sum[u] += elements.template at<false>(j + u);
          for (; j < s.jb; j++) sum[j & 3] += elements.template at<false>(j);
        }
      }
      if (!seen) continue;
      T* mu = body.mu_ + at + lane;
      store(mu, load(mu) + ((sum[0] + sum[2]) + (sum[1] + sum[3])));
    }
  }

  // Register n of the panel at lane `at`.
  template <bool PLAIN>
  struct Elements {
    const Logits<T>& logits;
    const uint16_t* words;
    T *s, *ts;
    const T *bias, *tbias;  // null where there is none
    Vec<T> m, l, position;
    T moves;
    int n;

    TW_MEMBER Elements(const JvpBody& body, int at, int64_t k0, int reg, const uint16_t* w)
        : logits(*body.logits_),
          words(w),
          s(body.s_ + reg * kWidth<T>),
          ts(body.ts_ + reg * kWidth<T>),
          bias(logits.bias ? body.bias_ + reg * kWidth<T> : nullptr),
          tbias(body.t_.tbias ? body.tbias_ + reg * kWidth<T> : nullptr),
          m(load(body.m_ + at + reg * kWidth<T>)),
          l(load(body.log2_l_ + at + reg * kWidth<T>)),
          moves(body.products_move_ ? static_cast<T>(kLn2) : T{0}),
          n(reg) {
      alignas(64) T x[kWidth<T>];
      positions<T>(body.q0_ + at + reg * kWidth<T> + body.in_.Nk - body.in_.N - k0, kWidth<T>, x);
      position = load(x);
    }

    // p ts of key j
    template <bool EDGE>
    TW_MEMBER Vec<T> at(int j) const {
      const int64_t from = int64_t{j} * kPanel;
      Vec<T> x = load(s + from), moved = zero<T>(), t = zero<T>();
      if (moves != 0) moved = load(ts + from);
      if constexpr (!PLAIN)
        x = logits(x, abs(position - splat<T>(j)), bias ? load(bias + from) : zero<T>(), &t);
      if (!PLAIN && logits.softcap)
        moved = moved * set1(logits.natural_cap) * fma(-t, t, splat<T>(1));
      else
        moved = moved * set1(moves);
      if (!PLAIN && tbias) moved += load(tbias + from);
      Vec<T> w = exp2<T>((x - m) - l), d = w * moved;
      if constexpr (EDGE) {
        const Lanes<T> in = edge_lanes<T>(words, j, n);
        w = select(in, w, zero<T>());
        d = select(in, d, zero<T>());
      }
      store(s + from, w);
      store(ts + from, d);
      return d;
    }
  };

  // tlse = mu with the sink's share, to -= mu o; a row without keys and sink has neither
  void finish() {
    const int64_t row = (b_ * in_.H + h_) * in_.N + q0_;
    const T* m = static_cast<const T*>(saved_.m) + row;
    T* tlse = static_cast<T*>(out_.tlse) + row;
    if (in_.sinks && t_.tsinks)
      add_sink(*in_.sinks.at<T>(0, h_), static_cast<const T*>(t_.tsinks)[h_]);
    for (int g = 0; g * kGroup < rows_; g++) {
      const int at = g * kGroup, n = std::min(kGroup, rows_ - at);
      alignas(64) T alive[kGroup];
      for (int i = 0; i < kGroup; i++)
        alive[i] = m[at + std::min(i, n - 1)] == -std::numeric_limits<T>::infinity() ? T{0} : T{1};
      const int64_t from = g / kPanelGroups * in_.Dv * kPanel + g % kPanelGroups * kGroup;
      unpack_lanes<T>(to_ + from, static_cast<int>(in_.Dv), n, alive,
                      out_.to.at_mut<T>(b_, h_, q0_ + at), out_.to.row);
      for (int i = 0; i < n; i++) {
        const T mu = alive[i] == 0 ? T{0} : mu_[at + i] + T{0};
        tlse[at + i] = mu;
        if (alive[i] != 0 && (logits_move_ || t_.tsinks))
          add_scaled_row<T>(out_.to.at_mut<T>(b_, h_, q0_ + at + i),
                            saved_.o.at<T>(b_, h_, q0_ + at + i), in_.Dv, set1(-mu));
      }
    }
  }

  void add_sink(T sink, T tsink) {
    if (sink == -std::numeric_limits<T>::infinity()) return;
    const Vec<T> z = set1(sink * static_cast<T>(kLog2e));
    for (int i = 0; i < rows_; i += kWidth<T>) {
      const Vec<T> x = (z - load(m_ + i)) - load(log2_l_ + i), p = exp2<T>(-max(zero<T>(), -x));
      store(mu_ + i, fma(p, set1(tsink), load(mu_ + i)));
    }
  }

  const AttentionInputs& in_;
  const AttentionSaved& saved_;
  const AttentionTangents& t_;
  const AttentionOutputTangents& out_;
  const bool products_move_, logits_move_;  // whether q k, and the logits, have tangents
  const Logits<T>* logits_ = nullptr;
  const Dropout<T>* dropout_ = nullptr;
  int panels_, rows_ = 0;
  int64_t b_ = 0, h_ = 0, hk_ = 0, q0_ = 0, touched_ = -1;
  T *q_ = nullptr, *tq_ = nullptr, *to_ = nullptr, *m_ = nullptr, *log2_l_ = nullptr,
    *mu_ = nullptr, *s_ = nullptr, *ts_ = nullptr, *bias_ = nullptr, *tbias_ = nullptr,
    *ones_ = nullptr;
};

#include "simd/end.hpp"
