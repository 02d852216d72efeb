// The VJP body, and the JVP of the VJP. Query tiles of kGradQueries against key tiles of kGradKeys;
// each product of a pair of tiles is one chain from zero, then one addition. dq adds its tiles in
// ascending key order; dk and dv add theirs inside a query chunk, and the chunks in ascending order
// under a ticket for each key chunk, so neither threads nor loop order reach the bits.
#pragma once
#include "ops/attention_pairs-inl.hpp"
#include "ops/vjp_schedule.hpp"
#include "runtime/workspace.hpp"

#include "simd/begin.hpp"

constexpr int kGradChunk = 960;  // queries and keys of a chunk: 5 query tiles, 10 key tiles
static_assert(kGradChunk % kGradQueries == 0 && kGradChunk % kGradKeys == 0);

// p = exp2((s - m) - log_l / ln 2), 0 where masked
template <class T, bool EDGE>
struct StoreWeights {
  T* p;
  const T *m, *log2_l;
  const uint16_t* words;
  struct Column {
    const StoreWeights& e;
    int n;
    Vec<T> m, l;
    TW_MEMBER Column(const StoreWeights& epilogue, int reg)
        : e(epilogue), n(reg), m(load(e.m + n * kWidth<T>)), l(load(e.log2_l + n * kWidth<T>)) {}
    TW_MEMBER void put(int j, Vec<T> x) {
      Vec<T> w = exp2<T>((x - m) - l);
      if constexpr (EDGE) w = select(edge_lanes<T>(e.words, j, n), w, zero<T>());
      store(e.p + int64_t{j} * kGradQueries + n * kWidth<T>, w);
    }
    TW_MEMBER void finish() {}
  };
};

// ds = p (dp - delta), 0 where masked
template <class T, bool EDGE>
struct StoreGradient {
  T* ds;
  const T *p, *delta;
  const uint16_t* words;
  struct Column {
    const StoreGradient& e;
    int n;
    Vec<T> delta;
    TW_MEMBER Column(const StoreGradient& epilogue, int reg)
        : e(epilogue), n(reg), delta(load(e.delta + n * kWidth<T>)) {}
    TW_MEMBER void put(int j, Vec<T> x) {
      const int64_t at = int64_t{j} * kGradQueries + n * kWidth<T>;
      Vec<T> d = (x - delta) * load(e.p + at);
      if constexpr (EDGE) d = select(edge_lanes<T>(e.words, j, n), d, zero<T>());
      store(e.ds + at, d);
    }
    TW_MEMBER void finish() {}
  };
};

template <class T>
struct StoreRaw {
  T* s;
  struct Column {
    T* s;
    TW_MEMBER Column(const StoreRaw& e, int n) : s(e.s + n * kWidth<T>) {}
    TW_MEMBER void put(int j, Vec<T> x) { store(s + int64_t{j} * kGradQueries, x); }
    TW_MEMBER void finish() {}
  };
};

// A query tile: packed rows, row statistics, masking, and dq as it grows.
template <class T>
struct QueryTile {
  MaskBlock mask;
  int64_t q0;
  int rows;
  bool finite;
  // [panel][column][kPanel], q scaled for the logits
  T *q_lanes, *do_lanes, *tq_lanes, *tdo_lanes;
  // blocks of kGradWidth columns, q scaled for dk
  T *q_rows, *do_rows, *tq_rows, *tdo_rows;
  T *dq, *m, *log2_l, *delta, *mu, *tdelta, *dbias;
};

template <class T>
class VjpBody {
 public:
  VjpBody(const AttentionInputs& in, const AttentionSaved& saved, const AttentionCotangents& ct,
          const AttentionSecond* second, const AttentionGradients& grads, VjpSchedule& schedule)
      : in_(in),
        saved_(saved),
        ct_(ct),
        second_(second),
        t_(second ? second->inputs : kNoTangents),
        grads_(grads),
        schedule_(schedule),
        products_move_(t_.tq || t_.tk),
        logits_move_(products_move_ || t_.tbias || t_.tsinks),
        logits_wanted_(grads.dq || grads.dk || grads.dbias),
        dp_(padded(in.D)),
        dvp_(padded(in.Dv)) {}

  void place(Arena& arena) {
    const int64_t queries =
        std::min<int64_t>(kGradChunk, (in_.N + kGradQueries - 1) / kGradQueries * kGradQueries);
    const int64_t keys =
        std::min<int64_t>(kGradChunk, (in_.Nk + kGradKeys - 1) / kGradKeys * kGradKeys);
    const bool tdo = second_ && second_->tdo;
    tiles_ = arena.take<QueryTile<T>>(queries / kGradQueries);
    for (int64_t t = 0; t < queries / kGradQueries; t++) {
      QueryTile<T> unplaced, &tile = tiles_ ? tiles_[t] : unplaced;
      tile.q_lanes = arena.take<T>(kGradQueries * in_.D);
      tile.do_lanes = arena.take<T>(kGradQueries * in_.Dv);
      tile.q_rows = arena.take<T>(kGradQueries * (dp_ + kGradWidth<T>));
      tile.do_rows = arena.take<T>(kGradQueries * (dvp_ + kGradWidth<T>));
      tile.tq_lanes = arena.take<T>(t_.tq ? kGradQueries * in_.D : 0);
      tile.tq_rows = arena.take<T>(t_.tq ? kGradQueries * (dp_ + kGradWidth<T>) : 0);
      tile.tdo_lanes = arena.take<T>(tdo ? kGradQueries * in_.Dv : 0);
      tile.tdo_rows = arena.take<T>(tdo ? kGradQueries * (dvp_ + kGradWidth<T>) : 0);
      tile.dq = arena.take<T>(kGradQueries * dp_);
      for (T** row : {&tile.m, &tile.log2_l, &tile.delta, &tile.mu, &tile.tdelta, &tile.dbias})
        *row = arena.take<T>(kGradQueries);
    }
    k_ = arena.take<T>(keys * dp_);
    v_ = arena.take<T>(keys * dvp_);
    tk_ = arena.take<T>(t_.tk ? keys * dp_ : 0);
    tv_ = arena.take<T>(t_.tv ? keys * dvp_ : 0);
    dk_ = arena.take<T>(keys * dp_);
    dv_ = arena.take<T>(keys * dvp_);
    dbias_keys_ = arena.take<T>(keys);
    constexpr int64_t kPairs = kGradKeys * kGradQueries;
    p_ = arena.take<T>(kPairs);
    ds_ = arena.take<T>(kPairs);
    tp_ = arena.take<T>(second_ ? kPairs : 0);
    tds_ = arena.take<T>(second_ ? kPairs : 0);
    tanh_ = arena.take<T>(in_.softcap > 0 ? kPairs : 0);
    ttanh_ = arena.take<T>(in_.softcap > 0 && second_ ? kPairs : 0);
    bias_ = arena.take<T>(in_.bias ? kGradKeys * kPanel : 0);
    tbias_ = arena.take<T>(t_.tbias ? kGradKeys * kPanel : 0);
    factors_ = arena.take<T>(in_.dropout.on ? kGradKeys * kPanel : 0);
    columns_ = arena.take<T>(in_.Dv * kPanel);
  }

  // One query chunk of one head against all keys. Steps of a unit: batches, then query heads of its
  // KV heads, then chunks.
  void run(int64_t unit, int64_t step) {
    const int64_t group = in_.H / in_.Hk, units_across = in_.Hk / schedule_.unit_groups;
    const int64_t heads = schedule_.unit_groups * group;
    const int64_t chunk = step % schedule_.query_chunks,
                  head = step / schedule_.query_chunks % heads;
    b_ = unit / units_across * schedule_.unit_batches + step / (schedule_.query_chunks * heads);
    h_ = unit % units_across * heads + head;
    hk_ = h_ / group;
    const Logits<T> logits(in_, b_, h_);
    logits_ = &logits;
    const Dropout<T> dropout(in_, b_, h_);
    dropout_ = &dropout;
    const int64_t q0 = chunk * kGradChunk, q1 = std::min(in_.N, q0 + kGradChunk);
    count_ = 0;
    int64_t begin = in_.Nk, end = 0;
    for (int64_t q = q0; q < q1; q += kGradQueries, count_++) {
      load_queries(tiles_[count_], q, static_cast<int>(std::min<int64_t>(kGradQueries, q1 - q)));
      begin = std::min(begin, tiles_[count_].mask.key_begin);
      end = std::max(end, tiles_[count_].mask.key_end);
    }
    const bool first = head % group == 0 && chunk == 0;  // of this KV head's steps
    for (int64_t c = 0; c < schedule_.key_chunks; c++) key_chunk(unit, step, c, begin, end, first);
    if (grads_.dq)
      for (int t = 0; t < count_; t++) store_queries(tiles_[t]);
  }

  // -sum over batches and queries of p_sink delta, or its tangent: batches in order, queries in 16
  // lanes
  void sink_gradient(int64_t h) {
    const T z = *in_.sinks.at<T>(0, h) * static_cast<T>(kLog2e);
    const T tz = t_.tsinks ? static_cast<const T*>(t_.tsinks)[h] : T{0};
    T total = 0;
    if (z == -std::numeric_limits<T>::infinity()) {
      static_cast<T*>(grads_.dsinks)[h] = 0;
      return;
    }
    h_ = h;
    hk_ = h / (in_.H / in_.Hk);
    const Logits<T> logits(in_, 0, h);
    logits_ = &logits;
    QueryTile<T>& t = tiles_[0];
    for (b_ = 0; b_ < in_.B; b_++) {
      Vec<T> sum[kRegs<T>] = {};
      for (int64_t q = 0; q < in_.N; q += kGroup) {
        const int n = static_cast<int>(std::min<int64_t>(kGroup, in_.N - q));
        t.q0 = q;
        pack_values(t, 0, n);
        row_terms(t, 0, n);
        for (int v = 0; v < kRegs<T>; v++) {
          const int at = v * kWidth<T>;
          const Vec<T> x = (set1(z) - load(t.m + at)) - load(t.log2_l + at);
          const Vec<T> p = exp2<T>(-max(zero<T>(), -x));
          const int have = std::max(0, std::min(n - at, kWidth<T>));
          Vec<T> term = load(t.delta + at);
          if (second_) term = fma(set1(tz) - load(t.mu + at), term, load(t.tdelta + at));
          sum[v] = fma_where(lanes<T>((1u << have) - 1), -p, term, sum[v]);
        }
      }
      for (int i = 0; i < kGroup; i++) total += sum[i / kWidth<T>][i % kWidth<T>];
    }
    static_cast<T*>(grads_.dsinks)[h] = total + T{0};
  }

 private:
  static inline const AttentionTangents kNoTangents{};

  static int64_t padded(int64_t columns) { return (columns + kGroup - 1) / kGroup * kGroup; }

  int64_t row_index(int64_t q) const { return (b_ * in_.H + h_) * in_.N + q; }

  void load_queries(QueryTile<T>& t, int64_t q0, int rows) {
    t.q0 = q0;
    t.rows = rows;
    t.mask.load(in_.mask, b_, h_, q0, rows, in_.N, in_.Nk);
    const View4 tdo = second_ ? second_->tdo : View4{};
    t.finite = finite(in_.q, in_.D, t) && finite(ct_.d_o, in_.Dv, t) && finite(t_.tq, in_.D, t) &&
               finite(tdo, in_.Dv, t);
    for (int g = 0; g * kGroup < rows; g++) {
      const int n = std::min(kGroup, rows - g * kGroup);
      const int64_t at = lanes_at(g, in_.D);
      pack(in_.q, in_.D, q0 + g * kGroup, n, logits_->q_scale, t.q_lanes + at);
      if (t_.tq) pack(t_.tq, in_.D, q0 + g * kGroup, n, logits_->q_scale, t.tq_lanes + at);
      pack_values(t, g, n);
      row_terms(t, g, n);
    }
    const T scale = static_cast<T>(in_.softmax_scale);
    blocks(in_.q, in_.D, t, scale, t.q_rows);
    blocks(ct_.d_o, in_.Dv, t, T{1}, t.do_rows);
    if (t_.tq) blocks(t_.tq, in_.D, t, scale, t.tq_rows);
    if (tdo) blocks(tdo, in_.Dv, t, T{1}, t.tdo_rows);
    std::memset(t.dq, 0, sizeof(T) * static_cast<size_t>(kGradQueries * dp_));
    std::memset(t.dbias, 0, sizeof(T) * kGradQueries);
  }

  static int64_t lanes_at(int g, int64_t columns) {
    return g / kPanelGroups * columns * kPanel + g % kPanelGroups * kGroup;
  }
  bool finite(const View4& x, int64_t columns, const QueryTile<T>& t) const {
    return !x || all_finite<T>(x.at<T>(b_, h_, t.q0), x.row, static_cast<int>(columns), t.rows);
  }
  void pack(const View4& x, int64_t columns, int64_t q, int n, T mul, T* to) const {
    pack_lanes<T>(x.at<T>(b_, h_, q), x.row, static_cast<int>(columns), n, mul, to);
  }
  void blocks(const View4& x, int64_t columns, const QueryTile<T>& t, T mul, T* to) const {
    pack_blocks<T, kGradWidth<T>>(x.at<T>(b_, h_, t.q0), x.row, static_cast<int>(columns), t.rows,
                                  mul, to, kGradQueries);
  }

  // do and its tangent of group g, in lanes
  void pack_values(QueryTile<T>& t, int g, int n) const {
    const int64_t q = t.q0 + g * kGroup, at = lanes_at(g, in_.Dv);
    pack(ct_.d_o, in_.Dv, q, n, T{1}, t.do_lanes + at);
    if (second_ && second_->tdo) pack(second_->tdo, in_.Dv, q, n, T{1}, t.tdo_lanes + at);
  }

  // m, log2 l and delta = rowsum(do o) - dlse of group g; also mu = tlse and
  // tdelta = rowsum(tdo o + do to) - tdlse
  void row_terms(QueryTile<T>& t, int g, int n) {
    const int64_t q = t.q0 + g * kGroup, at = row_index(q), lane = lanes_at(g, in_.Dv);
    auto row = [&](const void* x, int i) { return static_cast<const T*>(x)[at + i]; };
    alignas(64) T d[kGroup], td[kGroup] = {}, more[kGroup];
    row_dots(t.do_lanes + lane, saved_.o.at<T>(b_, h_, q), saved_.o.row, n, d);
    if (second_) {
      const View4& to = second_->outputs.to;
      row_dots(t.do_lanes + lane, to.at<T>(b_, h_, q), to.row, n, td);
      if (second_->tdo) {
        row_dots(t.tdo_lanes + lane, saved_.o.at<T>(b_, h_, q), saved_.o.row, n, more);
        for (int i = 0; i < kGroup; i++) td[i] += more[i];
      }
    }
    for (int i = 0; i < kGroup; i++) {
      const int r = std::min(i, n - 1), to = g * kGroup + i;
      const T m = row(saved_.m, r);
      t.m[to] = std::numeric_limits<T>::lowest() > m ? std::numeric_limits<T>::lowest() : m;
      t.log2_l[to] = row(saved_.log_l, r) * static_cast<T>(kLog2e);
      t.delta[to] = ct_.dlse ? d[i] - row(ct_.dlse, r) : d[i];
      if (!second_) continue;
      t.mu[to] = row(second_->outputs.tlse, r);
      t.tdelta[to] = second_->tdlse ? td[i] - row(second_->tdlse, r) : td[i];
    }
  }

  // out[lane] = sum over columns of lanes times rows, one chain. A zero of the rows takes no part:
  // a masked row's cotangent may be NaN.
  void row_dots(const T* lanes, const T* rows, int64_t ld, int n, T* out) {
    T* t = columns_;
    pack_lanes<T>(rows, ld, static_cast<int>(in_.Dv), n, T{1}, t);
    for (int v = 0; v < kGroup; v += kWidth<T>) {
      Vec<T> s = zero<T>();
      for (int64_t d = 0; d < in_.Dv; d++) {
        const Vec<T> o = load(t + d * kPanel + v);
        s = select(equal(o, zero<T>()), s, fma(load(lanes + d * kPanel + v), o, s));
      }
      store(out + v, s);
    }
  }

  void store_queries(QueryTile<T>& t) {
    const T scale = static_cast<T>(in_.softmax_scale);
    for (int r = 0; r < t.rows; r++) {
      T* to = grads_.dq.at_mut<T>(b_, h_, t.q0 + r);
      T* row = t.dq + r * dp_;
      for (int64_t d = 0; d < dp_; d += kWidth<T>) store(row + d, load(row + d) * set1(scale));
      add_row<T>(to, row, in_.D, true);
    }
  }

  void add_bias_rows() {
    for (int i = 0; i < count_; i++)
      for (int r = 0; r < tiles_[i].rows; r++)
        *grads_.dbias.at_mut<T>(b_, h_, tiles_[i].q0 + r) += tiles_[i].dbias[r];
  }

  // Keys [k0, k1) against all query tiles; dk and dv of the chunk grow here and are added in the
  // order of the steps.
  void key_chunk(int64_t unit, int64_t step, int64_t c, int64_t begin, int64_t end, bool first) {
    const int64_t k0 = c * kGradChunk, k1 = std::min(in_.Nk, k0 + kGradChunk);
    loaded_ = 0;
    if (std::max(begin, k0) < std::min(end, k1)) {
      if (schedule_.bias_shared) schedule_.wait(unit, c, step);
      for (int i = 0; i < count_; i++) {
        QueryTile<T>& t = tiles_[i];
        const int64_t from = std::max(k0, t.mask.key_begin / kGradKeys * kGradKeys),
                      to = std::min(k1, t.mask.key_end);
        for (int64_t k = from; k < to; k += kGradKeys)
          pair_of_tiles(t, k, static_cast<int>(std::min<int64_t>(kGradKeys, k1 - k)), k - k0);
      }
    }
    schedule_.wait(unit, c, step);
    if (first || loaded_) add_keys(k0, k1, first);
    if (schedule_.bias == BiasGradient::kOverKeys && c + 1 == schedule_.key_chunks) add_bias_rows();
    schedule_.pass(unit, c, step);
  }

  // dk and dv of the chunk: the first step of a KV head sets them, later ones add
  void add_keys(int64_t k0, int64_t k1, bool first) {
    const bool over_queries =
        schedule_.bias == BiasGradient::kOverQueries || schedule_.bias == BiasGradient::kOverBoth;
    for (int64_t k = k0; k < k1; k++) {
      const bool seen = loaded_ >> ((k - k0) / kGradKeys) & 1;
      if (!seen && !first) continue;
      add_key(grads_.dk, k, seen ? dk_ + (k - k0) * dp_ : nullptr, in_.D, first);
      add_key(grads_.dv, k, seen ? dv_ + (k - k0) * dvp_ : nullptr, in_.Dv, first);
      if (seen && over_queries)
        grads_.dbias.at_mut<T>(b_, h_)[k * grads_.dbias.column] += dbias_keys_[k - k0];
    }
  }

  void add_key(const View4& to, int64_t k, const T* from, int64_t columns, bool first) const {
    if (!to) return;
    T* row = to.at_mut<T>(b_, hk_, k);
    if (from)
      add_row<T>(row, from, columns, first);
    else
      std::memset(row, 0, sizeof(T) * static_cast<size_t>(columns));
  }

  // Packs a key tile when the chunk's first pair of it is seen, and clears its gradients.
  void load_keys(int64_t k0, int keys, int64_t row) {
    const int tile = static_cast<int>(row / kGradKeys);
    if (loaded_ >> tile & 1) return;
    loaded_ |= 1u << tile;
    keys_finite_[tile] = true;
    copy_keys(in_.k, in_.D, dp_, k0, keys, k_ + row * dp_, tile);
    copy_keys(in_.v, in_.Dv, dvp_, k0, keys, v_ + row * dvp_, tile);
    if (t_.tk) copy_keys(t_.tk, in_.D, dp_, k0, keys, tk_ + row * dp_, tile);
    if (t_.tv) copy_keys(t_.tv, in_.Dv, dvp_, k0, keys, tv_ + row * dvp_, tile);
    std::memset(dk_ + row * dp_, 0, sizeof(T) * static_cast<size_t>(keys * dp_));
    std::memset(dv_ + row * dvp_, 0, sizeof(T) * static_cast<size_t>(keys * dvp_));
    std::memset(dbias_keys_ + row, 0, sizeof(T) * static_cast<size_t>(keys));
  }

  void copy_keys(const View4& x, int64_t columns, int64_t ld, int64_t k0, int keys, T* to,
                 int tile) {
    for (int r = 0; r < keys; r++)
      copy_row<T>(x.at<T>(b_, hk_, k0 + r), columns, ld, splat<T>(1), to + r * ld);
    keys_finite_[tile] &= all_finite<T>(to, ld, static_cast<int>(ld), keys);
  }

  // Keys [k0, k0 + keys), which stand at `row` of the chunk.
  void pair_of_tiles(QueryTile<T>& t, int64_t k0, int keys, int64_t row) {
    if (!mask_.load(t.mask, t.rows, k0, keys)) return;
    load_keys(k0, keys, row);
    for (int p = 0; p * kPanel < t.rows; p++) panel(t, p, k0, row);
    if (schedule_.bias != BiasGradient::kNone) add_bias(t, k0, keys, row);
    if (logits_->softcap && logits_wanted_) through_softcap();
    add_products(t, row);
  }

  // dv += p' do, dk += ds' q, dq += ds k; of the JVP, the tangents of these products
  void add_products(QueryTile<T>& t, int64_t row) {
    const bool finite = keys_finite_[row / kGradKeys] && t.finite;
    Terms<T> dv, dk, dq;
    if (second_) {
      if (logits_move_) dv.add(tp_, t.do_rows);
      dv.add(p_, second_->tdo ? t.tdo_rows : nullptr);
      dk.add(tds_, t.q_rows);
      dk.add(ds_, t_.tq ? t.tq_rows : nullptr);
      dq.add(tds_, k_ + row * dp_);
      dq.add(ds_, t_.tk ? tk_ + row * dp_ : nullptr);
    } else {
      dv.add(p_, t.do_rows);
      dk.add(ds_, t.q_rows);
      dq.add(ds_, k_ + row * dp_);
    }
    if (grads_.dv) sum_over_queries<T>(mask_, dv, finite, dv_ + row * dvp_, dvp_);
    if (grads_.dk) sum_over_queries<T>(mask_, dk, finite, dk_ + row * dp_, dp_);
    if (grads_.dq) sum_over_keys<T>(mask_, dq, finite, t.dq, dp_);
  }

  // p and ds of one panel, zero where nothing is seen; of the JVP their tangents too
  void panel(QueryTile<T>& t, int p, int64_t k0, int64_t row) {
    const int at = p * kPanel, D = static_cast<int>(in_.D), Dv = static_cast<int>(in_.Dv);
    const T *k = k_ + row * dp_, *v = v_ + row * dvp_;
    const T *q = t.q_lanes + int64_t{at} * D, *d_o = t.do_lanes + int64_t{at} * Dv;
    T *prob = p_ + at, *ds = ds_ + at;
    if (!mask_.whole) clear_panel(at);
    for (int i = 0; i < mask_.counts[p]; i++) {
      const Segment& s = mask_.segments[p][i];
      if (!second_ && logits_->plain && !dropout_->on) {
        if (s.edge)
          plain_segment<true>(t, p, k, v, s);
        else
          plain_segment<false>(t, p, k, v, s);
        continue;
      }
      scores<T>(k, dp_, q, D, StoreRaw<T>{prob}, s);
      if (logits_wanted_) scores<T>(v, dvp_, d_o, Dv, StoreRaw<T>{ds}, s);
      if (second_) {
        scores_of_both<T>({t_.tq ? k : nullptr, dp_, t.tq_lanes + int64_t{at} * D},
                          {t_.tk ? tk_ + row * dp_ : nullptr, dp_, q}, D, StoreRaw<T>{tds_ + at},
                          s);
        if (logits_wanted_)
          scores_of_both<T>({second_->tdo ? v : nullptr, dvp_, t.tdo_lanes + int64_t{at} * Dv},
                            {t_.tv ? tv_ + row * dvp_ : nullptr, dvp_, d_o}, Dv,
                            StoreRaw<T>{tp_ + at}, s);
      }
      const int64_t q0 = t.q0 + at;
      const int rows = std::min(kPanel, t.rows - at);
      if (logits_->bias) logits_->bias.panel(q0, rows, k0, s.ja, s.jb, bias_);
      if (t_.tbias) BiasHead<T>(t_.tbias, b_, h_).panel(q0, rows, k0, s.ja, s.jb, tbias_);
      if (dropout_->on) dropout_->panel(s, q0, k0, factors_);
      for (int n = s.na * kRegs<T>; n < s.nb * kRegs<T>; n++) {
        if (second_)
          second_elements(t, p, k0, s, n);
        else
          elements(t, p, k0, s, n);
      }
    }
  }

  template <bool EDGE>
  void plain_segment(QueryTile<T>& t, int p, const T* k, const T* v, const Segment& s) {
    const int at = p * kPanel, D = static_cast<int>(in_.D), Dv = static_cast<int>(in_.Dv);
    T *prob = p_ + at, *ds = ds_ + at;
    const uint16_t* words = mask_.words(p);
    scores<T>(k, dp_, t.q_lanes + int64_t{at} * D, D,
              StoreWeights<T, EDGE>{prob, t.m + at, t.log2_l + at, words}, s);
    if (logits_wanted_)
      scores<T>(v, dvp_, t.do_lanes + int64_t{at} * Dv, Dv,
                StoreGradient<T, EDGE>{ds, prob, t.delta + at, words}, s);
  }

  void clear_panel(int at) {
    for (T* x : {p_, ds_, tp_, tds_})
      for (int j = 0; x && j < mask_.keys(); j++)
        for (int i = 0; i < kPanel; i += kWidth<T>) store(x + j * kGradQueries + at + i, zero<T>());
  }

  // The logits of register n of panel p and key j, from the raw products.
  struct Lane {
    int at;  // in a row of kGradQueries
    Vec<T> m, l, delta, position;
    Lane(const VjpBody& body, const QueryTile<T>& t, int p, int64_t k0, int n)
        : at(p * kPanel + n * kWidth<T>),
          m(load(t.m + at)),
          l(load(t.log2_l + at)),
          delta(load(t.delta + at)) {
      alignas(64) T x[kWidth<T>];
      positions<T>(t.q0 + at + body.in_.Nk - body.in_.N - k0, kWidth<T>, x);
      position = load(x);
    }
  };
  TW_MEMBER Vec<T> weight(const Lane& lane, int j, int n, Vec<T> raw, Vec<T>* tanh_out) const {
    const Vec<T> added =
        logits_->bias ? load(bias_ + int64_t{j} * kPanel + n * kWidth<T>) : zero<T>();
    return exp2<T>(((*logits_)(raw, abs(lane.position - splat<T>(j)), added, tanh_out) - lane.m) -
                   lane.l);
  }

  __attribute__((noinline)) void elements(QueryTile<T>& t, int p, int64_t k0, const Segment& s,
                                          int n) {
    const Lane lane(*this, t, p, k0, n);
    const uint16_t* words = mask_.words(p);
    for (int j = s.ja; j < s.jb; j++) {
      const int64_t at = int64_t{j} * kGradQueries + lane.at;
      Vec<T> slope = zero<T>(), dp = load(ds_ + at);
      Vec<T> w = weight(lane, j, n, load(p_ + at), &slope), kept = w;
      if (dropout_->on) {
        const Vec<T> f = load(factors_ + int64_t{j} * kPanel + n * kWidth<T>);
        kept = w * f;
        dp = dp * f;
      }
      Vec<T> d = (dp - lane.delta) * w;
      if (s.edge) {
        const Lanes<T> in = edge_lanes<T>(words, j, n);
        kept = select(in, kept, zero<T>());
        d = select(in, d, zero<T>());
        slope = select(in, slope, zero<T>());
      }
      store(p_ + at, kept);
      store(ds_ + at, d);
      if (logits_->softcap) store(tanh_ + at, slope);
    }
  }

  // In: raw products s, dp, their tangents in tds and tp. Out: p and tp with dropout, ds, tds.
  __attribute__((noinline)) void second_elements(QueryTile<T>& t, int p, int64_t k0,
                                                 const Segment& s, int n) {
    const Lane lane(*this, t, p, k0, n);
    const Vec<T> mu = load(t.mu + lane.at), tdelta = load(t.tdelta + lane.at);
    const uint16_t* words = mask_.words(p);
    const bool values_move = logits_wanted_ && (second_->tdo || t_.tv);
    for (int j = s.ja; j < s.jb; j++) {
      const int64_t at = int64_t{j} * kGradQueries + lane.at;
      const int64_t in_panel = int64_t{j} * kPanel + n * kWidth<T>;
      Vec<T> slope = zero<T>(), tslope = zero<T>(), dp = load(ds_ + at),
             tdp = values_move ? load(tp_ + at) : zero<T>();
      const Vec<T> w = weight(lane, j, n, load(p_ + at), &slope);
      Vec<T> ts = products_move_ ? load(tds_ + at) : zero<T>();
      if (logits_->softcap) {
        tslope = ts * fma(-slope, slope, splat<T>(1));
        ts = tslope * set1(logits_->natural_cap);
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
        for (Vec<T>* x : {&kept, &tkept, &d, &td, &slope, &tslope}) *x = select(in, *x, zero<T>());
      }
      store(p_ + at, kept);
      store(tp_ + at, tkept);
      store(ds_ + at, d);
      store(tds_ + at, td);
      if (logits_->softcap) {
        store(tanh_ + at, slope);
        store(ttanh_ + at, tslope);
      }
    }
  }

  // ds is the gradient by the capped logit; by the product it is ds (1 - tanh^2)
  void through_softcap() {
    for (int j = 0; j < mask_.keys(); j++)
      for (int g = 0; g < mask_.groups(); g++) {
        if (mask_.none(j, g)) continue;
        for (int i = g * kGroup; i < (g + 1) * kGroup; i += kWidth<T>) {
          const int64_t at = j * kGradQueries + i;
          const Vec<T> x = load(tanh_ + at), d = load(ds_ + at), slope = fma(-x, x, splat<T>(1));
          store(ds_ + at, d * slope);
          if (second_)
            store(tds_ + at, fma(load(tds_ + at), slope, splat<T>(-2) * x * load(ttanh_ + at) * d));
        }
      }
  }

  void add_bias(QueryTile<T>& t, int64_t k0, int keys, int64_t row) {
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

  const AttentionInputs& in_;
  const AttentionSaved& saved_;
  const AttentionCotangents& ct_;
  const AttentionSecond* second_;
  const AttentionTangents& t_;
  const AttentionGradients& grads_;
  VjpSchedule& schedule_;
  // whether q k, and the logits, have tangents; whether anything but dv is wanted
  const bool products_move_, logits_move_, logits_wanted_;
  const Logits<T>* logits_ = nullptr;
  const Dropout<T>* dropout_ = nullptr;
  int64_t dp_, dvp_, b_ = 0, h_ = 0, hk_ = 0;
  int count_ = 0;
  uint32_t loaded_ = 0;  // key tiles of the chunk that some query sees
  bool keys_finite_[kGradChunk / kGradKeys] = {};
  QueryTile<T>* tiles_ = nullptr;
  T *k_ = nullptr, *v_ = nullptr, *tk_ = nullptr, *tv_ = nullptr, *dk_ = nullptr, *dv_ = nullptr,
    *dbias_keys_ = nullptr, *p_ = nullptr, *ds_ = nullptr, *tp_ = nullptr, *tds_ = nullptr,
    *tanh_ = nullptr, *ttanh_ = nullptr, *bias_ = nullptr, *tbias_ = nullptr, *factors_ = nullptr,
    *columns_ = nullptr;
  PairMask mask_;
};

#include "simd/end.hpp"
