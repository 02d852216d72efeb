// The JVP body: queries in lanes as in the forward body. The row statistics of the forward pass
// give the probabilities at once, so nothing is rescaled and chunks need no merge.
#pragma once
#include "ops/attention_forward-inl.hpp"

#include "simd/begin.hpp"

template <class E>
class JvpBody {
  using T = Acc<E>;

 public:
  using Element = T;
  static constexpr bool kSharesKeys = false;
  static int64_t block_columns(const AttentionInputs& in, bool) {
    return 2 * in.D / kFold<E> + in.Dv;
  }

  JvpBody(const AttentionProblem& problem, int max_panels, bool)
      : in_(problem.in),
        saved_(problem.saved),
        t_(problem.tangents),
        out_(problem.moved),
        products_move_(t_.tq || t_.tk),
        logits_move_(products_move_ || t_.tbias),
        panels_(max_panels) {}

  void place(Arena& arena) {
    const int64_t lanes = int64_t{panels_} * kPanel;
    q_ = arena.take<E>(depth() * lanes);
    tq_ = arena.take<E>(t_.tq ? depth() * lanes : 0);
    to_ = arena.take<T>(in_.Dv * lanes);
    m_ = arena.take<T>(lanes);
    log2_l_ = arena.take<T>(lanes);
    mu_ = arena.take<T>(lanes);
    centre_ = arena.take<T>(lanes);
    s_ = arena.take<T>(kTileKeys * kPanel);
    ts_ = arena.take<T>(kTileKeys * kPanel);
    bias_ = arena.take<T>(in_.bias ? kTileKeys * kPanel : 0);
    tbias_ = arena.take<T>(t_.tbias ? kTileKeys * kPanel : 0);
    ones_ = arena.take<T>(kPanel);
    weights_ = arena.take<E>(kPairs<E> ? kTileKeys / 2 * kPanel : 0);
    moments_ = arena.take<E>(kPairs<E> ? kTileKeys / 2 * kPanel : 0);
    k_.place(arena, in_.k, in_.D);
    v_.place(arena, in_.v, in_.Dv);
    tk_.place(arena, t_.tk, in_.D);
    tv_.place(arena, t_.tv, in_.Dv);
    pack_ = arena.take<E>(kGroup * in_.D);
    to_scratch_ = arena.take<T>(kGroup * in_.Dv);
    o_scratch_ = arena.take<T>(kGroup * in_.Dv);
  }

  void run(int64_t b, int64_t h, int, int64_t q0, int rows, MaskBlock& mask) {
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
    const int at = p * kPanel, Dv = static_cast<int>(in_.Dv);
    if (k0 != loaded_) load_tile(k0);
    const E *q = q_ + at * depth(), *tq = tq_ + at * depth();
    const T scale = product_scale<E>(*logits_);
    for (int i = 0; i < count; i++) {
      const Factor<E> product{k_.rows.at, k_.rows.ld, q};
      scores_of<1>(&product, depth(), StoreScores<T>{s_}, segments[i], scale);
      scores_of_both<E>({t_.tq ? k_.rows.at : nullptr, k_.rows.ld, tq},
                        {t_.tk ? tk_.rows.at : nullptr, tk_.rows.ld, q}, depth(),
                        StoreScores<T>{ts_}, segments[i], scale);
      load_biases(at, k0, segments[i]);
    }
    auto elements = logits_->plain && !t_.tbias ? elements_panel<true> : elements_panel<false>;
    elements(*this, at, k0, segments, count, words);
    if (dropout_->on) dropout_->apply(segments, count, q0_ + at, k0, s_, ts_);
    T* to = to_ + at * in_.Dv;
    const E* w = t_.tv ? weights_of<E>(s_, segments, count, weights_) : nullptr;
    const E* moved_w = logits_move_ ? weights_of<E>(ts_, segments, count, moments_) : nullptr;
    const Factor<E> both[] = {{v_.rows.at, v_.rows.ld, moved_w}, {tv_.rows.at, tv_.rows.ld, w}};
    const bool finite = v_.finite && tv_.finite;
    if (logits_move_ && t_.tv)
      weighted_sum<E, 2>(both, Dv, words, segments, count, to, ones_, finite);
    else if (logits_move_ || t_.tv)
      weighted_sum<E, 1>(t_.tv ? both + 1 : both, Dv, words, segments, count, to, ones_, finite);
  }

  void chunk_end(bool) {}

 private:
  int depth() const { return static_cast<int>(in_.D) / kFold<E>; }

  void load_tile(int64_t k0) {
    loaded_ = k0;
    const int keys = static_cast<int>(std::min<int64_t>(kTileKeys, in_.Nk - k0));
    k_.load_terms(in_.k, b_, hk_, k0, keys, in_.D);
    v_.load_values(in_.v, b_, hk_, k0, keys, in_.Dv);
    tk_.load_terms(t_.tk, b_, hk_, k0, keys, in_.D);
    tv_.load_values(t_.tv, b_, hk_, k0, keys, in_.Dv);
  }

  void load_queries() {
    const int64_t row = in_.row_at(b_, h_, q0_);
    const T *m = static_cast<const T*>(saved_.m) + row,
            *log_l = static_cast<const T*>(saved_.log_l) + row;
    const int used = (rows_ + kPanel - 1) / kPanel * kPanel;
    for (int i = 0; i < used; i++) {
      const int r = std::min(i, rows_ - 1);
      m_[i] = std::numeric_limits<T>::lowest() > m[r] ? std::numeric_limits<T>::lowest() : m[r];
      log2_l_[i] = log_l[r] * static_cast<T>(kLog2e);
      mu_[i] = 0;
      centre_[i] = kNoCentre<T>;
    }
    for (int g = 0; g * kGroup < rows_; g++) {
      const int n = std::min(kGroup, rows_ - g * kGroup);
      const int64_t at = g / kPanelGroups * depth() * kPanel + g % kPanelGroups * kGroup;
      pack_rows<E>(in_.q, b_, h_, q0_ + g * kGroup, n, in_.D, logits_->q_scale, pack_, q_ + at);
      if (t_.tq)
        pack_rows<E>(t_.tq, b_, h_, q0_ + g * kGroup, n, in_.D, logits_->q_scale, pack_, tq_ + at);
    }
    std::memset(to_, 0, sizeof(T) * static_cast<size_t>(used * in_.Dv));
    for (int i = 0; i < kPanel; i++) ones_[i] = 1;
    loaded_ = -1;
  }

  void load_biases(int at, int64_t k0, const Segment& s) {
    const int64_t q = q0_ + at;
    const int rows = std::min(kPanel, rows_ - at);
    if (logits_->bias) logits_->bias.panel(q, rows, k0, s.ja, s.jb, bias_);
    if (t_.tbias) BiasHead<T>(t_.tbias, b_, h_).panel(q, rows, k0, s.ja, s.jb, tbias_);
  }

  // In place: s becomes p, and ts, so far the moved product, p (ts - c). Adds its row sums to mu.
  template <bool PLAIN>
  TW_NOINLINE void elements_panel(const JvpBody& body, int at, int64_t k0, const Segment* segments,
                                  int count, const uint16_t* words) {
    for (int n = 0; n < kPanelVecs<T>; n++) {
      const int lane = at + n * kWidth<T>, group = n * kWidth<T> / kGroup;
      const Elements<PLAIN> elements(body, at, k0, n, words);
      const bool apart = body.logits_move_ && !has_centres(body.centre_ + lane);
      auto sum = [&](const auto& term) __attribute__((always_inline)) {
        return KeySums<T>(segments, count, group, term);
      };
      if (apart) {
        const KeySums<T> weights = sum([&](int j, auto edge) __attribute__((always_inline)) {
          return elements.prepare(j, edge);
        });
        const KeySums<T> moments = sum([&](int j, auto) __attribute__((always_inline)) {
          return elements.prepared(j, zero<T>());
        });
        set_centres(body.centre_ + lane, weights.total(), moments.total());
      }
      const Vec<T> c = centre_or_zero<T>(load(body.centre_ + lane));
      const KeySums<T> sums = sum([&](int j, auto edge) __attribute__((always_inline)) {
        if (!apart) elements.prepare(j, edge);
        const Vec<T> d = elements.prepared(j, c);
        store(elements.ts + int64_t{j} * kPanel, d);
        return d;
      });
      T* mu = body.mu_ + lane;
      if (sums.seen) store(mu, load(mu) + sums.total());
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

    // Stores p of key j, which it returns, and the tangent of the logit, both 0 where masked.
    TW_MEMBER Vec<T> prepare(int j, bool edge) const {
      const int64_t from = int64_t{j} * kPanel;
      Vec<T> x = load(s + from), moved = zero<T>();
      TanhAndSlope<T> cap{};
      if (moves != 0) moved = load(ts + from);
      if constexpr (!PLAIN)
        x = logits(x, abs(position - splat<T>(j)), bias ? load(bias + from) : zero<T>(), &cap);
      if (!PLAIN && logits.softcap)
        moved = moved * set1(logits.natural_cap) * cap.slope;
      else
        moved = moved * set1(moves);
      if (!PLAIN && tbias) moved += load(tbias + from);
      Vec<T> w = exp2<T>((x - m) - l);
      if (edge) {
        const Lanes<T> in = edge_lanes<T>(words, j, n);
        w = select(in, w, zero<T>());
        moved = select(in, moved, zero<T>());
      }
      store(s + from, w);
      store(ts + from, moved);
      return w;
    }
    // p (ts - c) of what was prepared
    TW_MEMBER Vec<T> prepared(int j, Vec<T> c) const {
      return load(s + int64_t{j} * kPanel) * (load(ts + int64_t{j} * kPanel) - c);
    }
  };

  // tlse = mu with the sink's share, to -= (mu - c) o; a row without keys and sink has neither
  void finish() {
    const int64_t row = in_.row_at(b_, h_, q0_);
    const T* m = static_cast<const T*>(saved_.m) + row;
    T* tlse = static_cast<T*>(out_.tlse) + row;
    const int Dv = static_cast<int>(in_.Dv);
    if (in_.sinks)
      add_sink(*in_.sinks.at<T>(0, h_), t_.tsinks ? static_cast<const T*>(t_.tsinks)[h_] : T{0});
    for (int g = 0; g * kGroup < rows_; g++) {
      const int at = g * kGroup, n = std::min(kGroup, rows_ - at);
      alignas(64) T alive[kGroup];
      for (int i = 0; i < kGroup; i++)
        alive[i] = m[at + std::min(i, n - 1)] == -std::numeric_limits<T>::infinity() ? T{0} : T{1};
      const int64_t from = g / kPanelGroups * in_.Dv * kPanel + g % kPanelGroups * kGroup;
      int64_t ld;
      T* to = rows_to<T>(out_.to, b_, h_, q0_ + at, to_scratch_, in_.Dv, &ld);
      unpack_lanes<T>(to_ + from, Dv, n, alive, to, ld);
      const Rows<T> o = read_rows<T>(saved_.o, b_, h_, q0_ + at, n, Dv, o_scratch_);
      for (int i = 0; i < n; i++) {
        const T mu = alive[i] == 0 ? T{0} : mu_[at + i] + T{0}, c = centre_[at + i];
        tlse[at + i] = alive[i] != 0 && c == c ? mu + c : mu;
        if (alive[i] != 0 && (logits_move_ || t_.tsinks))
          add_scaled_row<T>(to + i * ld, o.at + i * o.ld, in_.Dv, set1(-mu));
      }
      put_rows<T>(out_.to, b_, h_, q0_ + at, n, to, ld, in_.Dv);
    }
  }

  void add_sink(T sink, T tsink) {
    if (sink == -std::numeric_limits<T>::infinity()) return;
    const Vec<T> z = set1(sink * static_cast<T>(kLog2e));
    for (int i = 0; i < rows_; i += kWidth<T>) {
      const Vec<T> x = (z - load(m_ + i)) - load(log2_l_ + i), p = exp2<T>(-max(zero<T>(), -x));
      store(mu_ + i, fma(p, set1(tsink) - centre_or_zero<T>(load(centre_ + i)), load(mu_ + i)));
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
  int64_t b_ = 0, h_ = 0, hk_ = 0, q0_ = 0, loaded_ = -1;
  E *q_ = nullptr, *tq_ = nullptr, *weights_ = nullptr, *moments_ = nullptr, *pack_ = nullptr;
  TileRows<E> k_, v_, tk_, tv_;
  T *to_ = nullptr, *m_ = nullptr, *log2_l_ = nullptr, *mu_ = nullptr, *centre_ = nullptr,
    *s_ = nullptr, *ts_ = nullptr, *bias_ = nullptr, *tbias_ = nullptr, *ones_ = nullptr,
    *to_scratch_ = nullptr, *o_scratch_ = nullptr;
};

#include "simd/end.hpp"
