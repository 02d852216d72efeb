// The forward body: queries in lanes, one panel of 48 queries at a time against a tile of keys.
// With tangents of the inputs it folds those of the outputs beside the softmax state.
#pragma once
#include "ops/attention_weights-inl.hpp"

#include "simd/begin.hpp"

// E is what the products take, T what they are summed in. A block has several panels of one query
// head, or one of each of several heads that share their keys.
template <class E>
class ForwardBody {
  using T = Acc<E>;

 public:
  using Element = T;
  static constexpr bool kSharesKeys = true;
  static int64_t block_columns(const AttentionInputs& in, bool moves) {
    return (in.D / kFold<E> + 2 * in.Dv) * (moves ? 2 : 1);
  }

  // `moves`: with the tangents.
  ForwardBody(const AttentionProblem& problem, int max_panels, bool moves)
      : in_(problem.in),
        out_(problem.out),
        t_(moves ? &problem.tangents : nullptr),
        out_t_(problem.moved),
        panels_(max_panels) {
    logits_move_ = t_ && (t_->tq || t_->tk || t_->tbias);
  }

  void place(Arena& arena) {
    const int64_t lanes = int64_t{panels_} * kPanel;
    q_ = arena.take<E>(in_.D / kFold<E> * lanes);
    for (States<T>& s : states_) {
      s.o = arena.take<T>(in_.Dv * lanes);
      s.m = arena.take<T>(lanes);
      s.l = arena.take<T>(lanes);
      s.e = arena.take<T>(lanes);
      s.to = t_ ? arena.take<T>(in_.Dv * lanes) : nullptr;
      s.mu = t_ ? arena.take<T>(lanes) : nullptr;
      s.centre = t_ ? arena.take<T>(lanes) : nullptr;
      s.rounded = kPairs<E> ? arena.take<T>(lanes) : nullptr;
      s.top = kPairs<E> ? arena.take<T>(lanes) : nullptr;
    }
    tq_ = arena.take<E>(t_ && t_->tq ? in_.D / kFold<E> * lanes : 0);
    ts_ = arena.take<T>(t_ ? kTileKeys * kPanel : 0);
    tbias_ = arena.take<T>(t_ && t_->tbias ? kTileKeys * kPanel : 0);
    s_ = arena.take<T>(kTileKeys * kPanel);
    bias_ = arena.take<T>(in_.bias ? kTileKeys * kPanel : 0);
    top_ = arena.take<T>(kPanel);
    alpha_ = arena.take<T>(kPanel);
    weights_ = arena.take<E>(kPairs<E> ? kTileKeys / 2 * kPanel : 0);
    moments_ = arena.take<E>(kPairs<E> && t_ ? kTileKeys / 2 * kPanel : 0);
    k_.place(arena, in_.k, in_.D);
    v_.place(arena, in_.v, in_.Dv);
    if (t_) tk_.place(arena, t_->tk, in_.D);
    if (t_) tv_.place(arena, t_->tv, in_.Dv);
    pack_ = arena.take<E>(kGroup * in_.D);
    o_scratch_ = arena.take<T>(kGroup * in_.Dv);
    to_scratch_ = arena.take<T>(t_ ? kGroup * in_.Dv : 0);
    head_logits_ = arena.take<Logits<T>>(panels_);
    head_dropout_ = arena.take<Dropout<T>>(panels_);
  }

  // The block that this thread will probably work on after the next call of run().
  void expect(int64_t b, int64_t h, int64_t q0, int64_t rows) {
    to_come_.clear();
    to_come_.add(in_.q, b, h, q0, rows, in_.D);
    const int64_t hk = h / (in_.H / in_.Hk);
    const int64_t row = in_.D * bytes_of(in_.k.storage) + in_.Dv * bytes_of(in_.v.storage);
    if ((b == b_ && hk == hk_) || in_.Nk * row > kBytesAhead) return;
    to_come_.add(in_.k, b, hk, 0, in_.Nk, in_.D);
    to_come_.add(in_.v, b, hk, 0, in_.Nk, in_.Dv);
  }

  // `heads` query heads from h; more than one only where their mask is the same and each has one
  // panel.
  void run(int64_t b, int64_t h, int heads, int64_t q0, int rows, MaskBlock& mask) {
    b_ = b;
    first_head_ = h;
    heads_ = heads;
    hk_ = h / (in_.H / in_.Hk);
    q0_ = q0;
    rows_ = rows;
    used_ = heads > 1 ? heads : (rows + kPanel - 1) / kPanel;
    for (int i = 0; i < heads; i++) {
      head_logits_[i] = Logits<T>(in_, b, h + i);
      head_dropout_[i] = Dropout<T>(in_, b, h + i);
      take_head(i);
      pack(in_.q, q_);
      if (t_ && t_->tq) pack(t_->tq, tq_);
    }
    now_ = &states_[0];
    total_ = &states_[1];
    first_ = true;
    loaded_ = -1;
    now_->clear(used_, static_cast<int>(in_.Dv));
    mask.load(in_.mask, b, h, q0, rows, in_.N, in_.Nk);
    walk(mask, in_.Nk, *this);
    if (first_) chunk_end(true);
    for (int i = 0; i < heads; i++) {
      take_head(i);
      finish();
    }
  }

  void tile(int p, int64_t k0, const Segment* segments, int count, const uint16_t* words) {
    if (k0 != loaded_) load_tile(k0);
    for (int i = 0; i < heads_; i++) {
      take_head(i);
      head_tile(p, k0, segments, count, words);
    }
  }

  void chunk_end(bool last) {
    if (first_) {
      first_ = false;
      std::swap(now_, total_);
    } else {
      merge_chunk();
    }
    if (!last) now_->clear(used_, static_cast<int>(in_.Dv));
  }

 private:
  // Where group g of the present head is in a block of panels.
  int64_t panel(int g, int64_t columns) const {
    return (g / kPanelGroups + slot_) * columns * kPanel + g % kPanelGroups * kGroup;
  }

  int depth() const { return static_cast<int>(in_.D) / kFold<E>; }

  void take_head(int i) {
    slot_ = i;
    h_ = first_head_ + i;
    logits_ = head_logits_ + i;
    dropout_ = head_dropout_ + i;
  }

  void head_tile(int p, int64_t k0, const Segment* segments, int count, const uint16_t* words) {
    const E* q = q_ + int64_t{slot_ + p} * depth() * kPanel;
    for (int i = 0; i < kPanel; i += kWidth<T>) store(top_ + i, minus_infinity<T>());
    for (int i = 0; i < count; i++) {
      const Factor<E> factor{k_.rows.at, k_.rows.ld, q};
      auto into = [&](const auto& epilogue) __attribute__((always_inline)) {
        scores_of<1>(&factor, depth(), epilogue, segments[i], product_scale<E>(*logits_));
      };
      if (!logits_->plain)
        into(StoreScores<T>{s_});
      else if (segments[i].edge)
        into(StoreMax<T, true>{s_, top_, words, &to_come_});
      else
        into(StoreMax<T, false>{s_, top_, words, &to_come_});
    }
    const int at = (slot_ + p) * kPanel;
    if (logits_move_) move_logits(p, k0, segments, count);
    if (!logits_->plain) apply_options(p, k0, segments, count, words);
    const bool direct = kTiled<E> && !logits_move_ && !dropout_->on;
    if (direct)
      fold_weights(at, segments, count, weights_);
    else
      fold_weights<T>(at, segments, count, nullptr);
    if (logits_move_)
      moments_panel<T>(s_, ts_, segments, count, words,
                       options_move() ? T{1} : static_cast<T>(kLn2), now_->centre + at,
                       now_->mu + at, alpha_);
    if (dropout_->on)
      dropout_->apply(segments, count, q0_ + p * kPanel, k0, s_, logits_move_ ? ts_ : nullptr);
    const int Dv = static_cast<int>(in_.Dv);
    const E* w = direct ? weights_ : weights_of<E>(s_, segments, count, weights_);
#if defined(TW_HAS_PAIRS)
    if constexpr (kPairs<E>)
      if (!dropout_->on) sum_rounded(w, segments, count, alpha_, now_->rounded + at);
#endif
    const Factor<E> values{v_.rows.at, v_.rows.ld, w};
    weighted_sum<E, 1>(&values, Dv, words, segments, count, now_->o + at * in_.Dv, alpha_,
                       v_.finite);
    if (!t_) return;
    const E* moved_w = logits_move_ ? weights_of<E>(ts_, segments, count, moments_) : nullptr;
    const Factor<E> moved[] = {{v_.rows.at, v_.rows.ld, moved_w}, {tv_.rows.at, tv_.rows.ld, w}};
    const bool finite = v_.finite && tv_.finite;
    T* to = now_->to + at * in_.Dv;
    if (logits_move_ && t_->tv)
      weighted_sum<E, 2>(moved, Dv, words, segments, count, to, alpha_, finite);
    else if (logits_move_ || t_->tv)
      weighted_sum<E, 1>(moved + (t_->tv ? 1 : 0), Dv, words, segments, count, to, alpha_, finite);
  }

  void load_tile(int64_t k0) {
    loaded_ = k0;
    const int keys = static_cast<int>(std::min<int64_t>(kTileKeys, in_.Nk - k0));
    k_.load_terms(in_.k, b_, hk_, k0, keys, in_.D);
    v_.load_values(in_.v, b_, hk_, k0, keys, in_.Dv);
    if (!t_) return;
    tk_.load_terms(t_->tk, b_, hk_, k0, keys, in_.D);
    tv_.load_values(t_->tv, b_, hk_, k0, keys, in_.Dv);
  }

  void pack(const View4& x, E* to) const {
    for (int g = 0; g * kGroup < rows_; g++)
      pack_rows<E>(x, b_, h_, q0_ + g * kGroup, std::min(kGroup, rows_ - g * kGroup), in_.D,
                   logits_->q_scale, pack_, to + panel(g, depth()));
  }

  // The panel at row `at`: weights in s_ or, where nothing else is done to them, in pairs.
  template <class Out>
  void fold_weights(int at, const Segment* segments, int count, Out* pairs) {
    constexpr bool kWhole = kPairs<E>;
    if constexpr (kWhole)
      for (int i = 0; i < kPanel; i += kWidth<T>)
        store(now_->top + at + i, max(load(now_->top + at + i), load(top_ + i)));
    auto weights =
        out_.entropy ? weights_panel<T, true, kWhole, Out> : weights_panel<T, false, kWhole, Out>;
    weights(s_, segments, count, top_, now_->m + at, now_->l + at, now_->e + at, alpha_, pairs);
  }

  bool options_move() const { return logits_->softcap || t_->tbias; }

  // ts, the moved products, and with options the moved logits; s still holds the raw products
  // where there are options.
  __attribute__((noinline)) void move_logits(int p, int64_t k0, const Segment* segments,
                                             int count) {
    const int64_t q = q0_ + int64_t{p} * kPanel;
    const int rows = std::min(kPanel, rows_ - p * kPanel);
    const int64_t at = int64_t{slot_ + p} * depth() * kPanel;
    const Factor<E> x{t_->tq ? k_.rows.at : nullptr, k_.rows.ld, tq_ + at},
        y{t_->tk ? tk_.rows.at : nullptr, tk_.rows.ld, q_ + at};
    for (int i = 0; i < count; i++) {
      const Segment& g = segments[i];
      const bool moved =
          scores_of_both<E>(x, y, depth(), StoreScores<T>{ts_}, g, product_scale<E>(*logits_));
      if (t_->tbias) BiasHead<T>(t_->tbias, b_, h_).panel(q, rows, k0, g.ja, g.jb, tbias_);
      if (!options_move()) continue;
      for (int n = g.na * kRegs<T>; n < g.nb * kRegs<T>; n++)
        for (int j = g.ja; j < g.jb; j++) {
          const int64_t at = int64_t{j} * kPanel + n * kWidth<T>;
          Vec<T> ts = zero<T>();
          if (moved && logits_->softcap) {
            const Vec<T> slope = tanh_and_slope<T>(load(s_ + at)).slope;
            ts = load(ts_ + at) * set1(logits_->natural_cap) * slope;
          } else if (moved) {
            ts = load(ts_ + at) * splat<T>(kLn2);
          }
          store(ts_ + at, t_->tbias ? ts + load(tbias_ + at) : ts);
        }
    }
  }

  __attribute__((noinline)) static void options_panel(const Logits<T>& logits, const T* bias, T* s,
                                                      T* top, const Segment& g,
                                                      const uint16_t* words,
                                                      int64_t first_position) {
    alignas(64) T position[kPanel];
    positions<T>(first_position, kPanel, position);
    for (int n = g.na * kRegs<T>; n < g.nb * kRegs<T>; n++) {
      const int at = n * kWidth<T>;
      Vec<T> m = load(top + at);
      const Vec<T> pos = load(position + at);
      for (int j = g.ja; j < g.jb; j++) {
        T* p = s + int64_t{j} * kPanel + at;
        const Vec<T> added = bias ? load(bias + int64_t{j} * kPanel + at) : zero<T>();
        Vec<T> x = logits(load(p), abs(pos - splat<T>(j)), added, nullptr);
        if (g.edge) x = select(edge_lanes<T>(words, j, n), x, minus_infinity<T>());
        m = max(m, x);
        store(p, x);
      }
      store(top + at, m);
    }
  }

  void apply_options(int p, int64_t k0, const Segment* segments, int count, const uint16_t* words) {
    const int64_t q = q0_ + int64_t{p} * kPanel;
    const int rows = std::min(kPanel, rows_ - p * kPanel);
    for (int i = 0; i < count; i++) {
      if (logits_->bias) logits_->bias.panel(q, rows, k0, segments[i].ja, segments[i].jb, bias_);
      options_panel(*logits_, logits_->bias ? bias_ : nullptr, s_, top_, segments[i], words,
                    q + logits_->offset - k0);
    }
  }

  void merge_chunk() {
    for (int at = 0; at < used_ * kPanel; at += kWidth<T>) {
      const Vec<T> ma = load(total_->m + at), mb = load(now_->m + at), la = load(total_->l + at),
                   lb = load(now_->l + at);
      const Merge<T> merge(ma, mb);
      store(total_->m + at, merge.m);
      store(total_->l + at, merge(la, lb));
      store(total_->e + at,
            merge.entropy(load(total_->e + at), la, ma, load(now_->e + at), lb, mb));
      if constexpr (kPairs<E>)
        store(total_->rounded + at, merge(load(total_->rounded + at), load(now_->rounded + at))),
            store(total_->top + at, max(load(total_->top + at), load(now_->top + at)));
      const int64_t from = at / kPanel * in_.Dv * kPanel + at % kPanel;
      merge_columns(merge, total_->o + from, now_->o + from);
      if (!t_) continue;
      if (logits_move_) move_centre(at, lb, now_->o + from, now_->to + from);
      merge_columns(merge, total_->to + from, now_->to + from);
      store(total_->mu + at, merge(load(total_->mu + at), load(now_->mu + at)));
    }
  }

  // The present chunk's sums for the centre of the earlier ones, or theirs for its own.
  void move_centre(int at, Vec<T> l, const T* o, T* to) const {
    const Vec<T> old = load(total_->centre + at), fresh = load(now_->centre + at);
    const auto none = unordered(old);
    store(total_->centre + at, select(none, fresh, old));
    const Vec<T> by = select(none, zero<T>(), centre_or_zero<T>(fresh - old));
    store(now_->mu + at, fma(by, l, load(now_->mu + at)));
    for (int64_t d = 0; d < in_.Dv; d++)
      store(to + d * kPanel, fma(by, load(o + d * kPanel), load(to + d * kPanel)));
  }

  void merge_columns(const Merge<T>& merge, T* x, const T* y) const {
    for (int64_t d = 0; d < in_.Dv; d++)
      store(x + d * kPanel, merge(load(x + d * kPanel), load(y + d * kPanel)));
  }

  // tlse = mu with the sink's share, to = sum - (mu - c) o
  void finish_tangents(int g, int rows, const RowEnd<T>& end, T sink, const T* o, int64_t ldo) {
    const int at = g * kGroup, lane = slot_ * kPanel + at;
    const bool has_sink = in_.sinks && sink != -std::numeric_limits<T>::infinity();
    const T tsink = t_->tsinks ? static_cast<const T*>(t_->tsinks)[h_] : T{0};
    alignas(64) T mu[kGroup], tlse[kGroup];
    for (int i = 0; i < kGroup; i += kWidth<T>) {
      const Vec<T> scale = load(end.o_scale + i),
                   c = centre_or_zero<T>(load(total_->centre + lane + i));
      Vec<T> x = select(equal(scale, zero<T>()), zero<T>(), load(total_->mu + lane + i) * scale);
      if (has_sink) {
        const Vec<T> z = set1(sink * static_cast<T>(kLog2e)) - load(end.m + i);
        const Vec<T> p = exp2<T>(-max(zero<T>(), load(end.log_l + i) * splat<T>(kLog2e) - z));
        x = fma(p, set1(tsink) - c, x);
      }
      store(mu + i, x);
      store(tlse + i, (x + c) + zero<T>());
    }
    RowEnd<T>::put(out_t_.tlse, in_.row_at(b_, h_, q0_ + at), tlse, rows);
    int64_t ld;
    T* to = rows_to<T>(out_t_.to, b_, h_, q0_ + at, to_scratch_, in_.Dv, &ld);
    unpack_lanes<T>(total_->to + panel(g, in_.Dv), static_cast<int>(in_.Dv), rows, end.o_scale, to,
                    ld);
    if (logits_move_ || t_->tsinks)
      for (int i = 0; i < rows; i++)
        if (end.o_scale[i] != 0) add_scaled_row<T>(to + i * ld, o + i * ldo, in_.Dv, set1(-mu[i]));
    put_rows<T>(out_t_.to, b_, h_, q0_ + at, rows, to, ld, in_.Dv);
  }

  void finish() {
    alignas(64) T sink[kGroup] = {};
    if (in_.sinks)
      for (T& z : sink) z = *in_.sinks.at<T>(0, h_);
    const View4& first = out_.o_full ? out_.o_full : out_.o;
    for (int g = 0; g * kGroup < rows_; g++) {
      const int at = g * kGroup, rows = std::min(kGroup, rows_ - at);
      const int lane = slot_ * kPanel + at;
      RowEnd<T> end(total_->m + lane, total_->l + lane, total_->e + lane, bool(in_.sinks), sink,
                    kPairs<E> ? total_->top + lane : nullptr);
      if constexpr (kPairs<E>)
        if (!dropout_->on) divide_by_rounded(&end, total_->l + lane, total_->rounded + lane);
      end.write(out_, in_.row_at(b_, h_, q0_ + at), rows);
      int64_t ld;
      T* o = rows_to<T>(first, b_, h_, q0_ + at, o_scratch_, in_.Dv, &ld);
      unpack_lanes<T>(total_->o + panel(g, in_.Dv), static_cast<int>(in_.Dv), rows, end.o_scale, o,
                      ld);
      put_rows<T>(out_.o, b_, h_, q0_ + at, rows, o, ld, in_.Dv);
      if (t_) finish_tangents(g, rows, end, sink[0], o, ld);
    }
  }

  const AttentionInputs& in_;
  const AttentionResults& out_;
  const AttentionTangents* t_;  // null where there are none
  const AttentionOutputTangents& out_t_;
  bool logits_move_;
  // of the heads of a block, and of the one at hand
  Logits<T>* head_logits_ = nullptr;
  Dropout<T>* head_dropout_ = nullptr;
  const Logits<T>* logits_ = nullptr;
  const Dropout<T>* dropout_ = nullptr;
  int panels_, used_ = 0, rows_ = 0, heads_ = 1, slot_ = 0;
  int64_t b_ = 0, first_head_ = 0, h_ = 0, hk_ = 0, q0_ = 0;
  bool first_ = true;
  int64_t loaded_ = -1;
  E *q_ = nullptr, *tq_ = nullptr, *weights_ = nullptr, *moments_ = nullptr, *pack_ = nullptr;
  TileRows<E> k_, v_, tk_, tv_;
  RowsToCome to_come_;
  T *s_ = nullptr, *bias_ = nullptr, *top_ = nullptr, *alpha_ = nullptr, *ts_ = nullptr,
    *tbias_ = nullptr, *o_scratch_ = nullptr, *to_scratch_ = nullptr;
  States<T> states_[2] = {}, *now_ = nullptr, *total_ = nullptr;
};

#include "simd/end.hpp"
