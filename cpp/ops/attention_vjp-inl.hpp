// The VJP body, and the JVP of the VJP. Query tiles of kGradQueries against key tiles of kGradKeys;
// each product of a pair of tiles is one chain from zero, then one addition. dq adds its tiles in
// ascending key order; dk and dv add theirs inside a query chunk, and the chunks in ascending order
// under a ticket for each key chunk, so neither threads nor loop order reach the bits.
#pragma once
#include "ops/attention_gradient-inl.hpp"
#include "ops/vjp_schedule.hpp"
#include "runtime/workspace.hpp"

#include "simd/begin.hpp"

// E is what the products take, T what they are summed in.
template <class E>
class VjpBody {
  using T = Acc<E>;
  static constexpr int kP = kFold<E>;

 public:
  // `moves`: the JVP of the VJP.
  VjpBody(const AttentionProblem& problem, bool moves, VjpSchedule& schedule)
      : in_(problem.in),
        saved_(problem.saved),
        ct_(problem.cotangents),
        second_(moves ? &problem.second : nullptr),
        t_(moves ? problem.second.inputs : kNoTangents),
        grads_(problem.gradients),
        schedule_(schedule),
        products_move_(t_.tq || t_.tk),
        logits_move_(products_move_ || t_.tbias || t_.tsinks),
        logits_wanted_(grads_.dq || grads_.dk || grads_.dbias || (kPairs<E> && grads_.dsinks)),
        dp_(padded(in_.D)),
        dvp_(padded(in_.Dv)) {}

  void place(Arena& arena) {
    const int64_t queries =
        std::min<int64_t>(kGradChunk, (in_.N + kGradQueries - 1) / kGradQueries * kGradQueries);
    const int64_t keys =
        std::min<int64_t>(kGradChunk, (in_.Nk + kGradKeys - 1) / kGradKeys * kGradKeys);
    const bool tdo = second_ && second_->tdo;
    constexpr int64_t kLanes = kGradQueries / kP, kPairsOfTiles = kGradKeys * kGradQueries;
    tiles_ = arena.take<QueryTile<E>>(queries / kGradQueries);
    for (int64_t t = 0; t < queries / kGradQueries; t++) {
      QueryTile<E> unplaced, &tile = tiles_ ? tiles_[t] : unplaced;
      tile.q_lanes = arena.take<E>(kLanes * in_.D);
      tile.do_lanes = arena.take<E>(kLanes * in_.Dv);
      tile.q_rows = arena.take<E>(kLanes * (dp_ + kGradWidth<T>));
      tile.do_rows = arena.take<E>(kLanes * (dvp_ + kGradWidth<T>));
      tile.tq_lanes = arena.take<E>(t_.tq ? kLanes * in_.D : 0);
      tile.tq_rows = arena.take<E>(t_.tq ? kLanes * (dp_ + kGradWidth<T>) : 0);
      tile.tdo_lanes = arena.take<E>(tdo ? kLanes * in_.Dv : 0);
      tile.tdo_rows = arena.take<E>(tdo ? kLanes * (dvp_ + kGradWidth<T>) : 0);
      tile.dq = arena.take<T>(kGradQueries * dp_);
      for (T** row : {&tile.m, &tile.log2_l, &tile.delta, &tile.mu, &tile.tdelta, &tile.dbias,
                      &tile.l, &tile.inverse_l, &tile.error, &tile.delta_error, &tile.lost})
        *row = arena.take<T>(kGradQueries);
      tile.last = arena.take<int64_t>(kPairs<E> ? kGradQueries : 0);
    }
    k_ = arena.take<E>(keys / kP * dp_);
    v_ = arena.take<E>(keys / kP * dvp_);
    tk_ = arena.take<E>(t_.tk ? keys / kP * dp_ : 0);
    tv_ = arena.take<E>(t_.tv ? keys / kP * dvp_ : 0);
    k_pairs_ = arena.take<E>(kPairs<E> ? keys / kP * dp_ : 0);
    tk_pairs_ = arena.take<E>(kPairs<E> && t_.tk ? keys / kP * dp_ : 0);
    dk_ = arena.take<T>(keys * dp_);
    dv_ = arena.take<T>(keys * dvp_);
    dbias_keys_ = arena.take<T>(keys);
    p_ = arena.take<T>(kPairsOfTiles);
    ds_ = arena.take<T>(kPairsOfTiles);
    tp_ = arena.take<T>(second_ ? kPairsOfTiles : 0);
    tds_ = arena.take<T>(second_ ? kPairsOfTiles : 0);
    for (E** x : {&p_queries_, &ds_queries_, &ds_keys_})
      *x = arena.take<E>(kPairs<E> ? kPairsOfTiles / kP : 0);
    for (E** x : {&tp_queries_, &tds_queries_, &tds_keys_})
      *x = arena.take<E>(kPairs<E> && second_ ? kPairsOfTiles / kP : 0);
    slope_ = arena.take<T>(in_.softcap > 0 ? kPairsOfTiles : 0);
    tslope_ = arena.take<T>(in_.softcap > 0 && second_ ? kPairsOfTiles : 0);
    bias_ = arena.take<T>(in_.bias ? kGradKeys * kPanel : 0);
    tbias_ = arena.take<T>(t_.tbias ? kGradKeys * kPanel : 0);
    factors_ = arena.take<T>(in_.dropout.on ? kGradKeys * kPanel : 0);
    halves_ = arena.take<E>(kGradQueries * std::max(dp_, dvp_));
    rows_ = arena.take<T>(kGroup * in_.Dv);
    more_columns_ = arena.take<T>(kPairs<E> ? in_.Dv * kPanel : 0);
    columns_ = arena.take<T>(std::max(in_.D, in_.Dv) * kPanel);
  }

  static int64_t head_of(const VjpSchedule& schedule, const AttentionInputs& in, int64_t unit,
                         int64_t step) {
    const int64_t heads = schedule.unit_groups * (in.H / in.Hk);
    return unit % (in.H / heads) * heads + step / schedule.query_chunks % heads;
  }

  // One query chunk of one head of batch b against all keys. Steps of a unit: batches, then query
  // heads of its KV heads, then chunks.
  void run(int64_t unit, int64_t step, int64_t b) {
    const int64_t group = in_.H / in_.Hk, chunk = step % schedule_.query_chunks;
    b_ = b;
    h_ = head_of(schedule_, in_, unit, step);
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
    first_ = h_ % group == 0 && chunk == 0;  // of this KV head's steps
    last_ = h_ % group == group - 1 && chunk == schedule_.query_chunks - 1;
    for (int64_t c = 0; c < schedule_.key_chunks; c++) key_chunk(unit, step, c, begin, end);
    if (grads_.dq)
      for (int t = 0; t < count_; t++) store_queries(tiles_[t]);
    if (!schedule_.sink_errors.empty())
      schedule_.sink_errors[static_cast<size_t>(unit * schedule_.steps + step)] = sink_error();
  }

  // -sum over batches and queries of p_sink delta, or its tangent, after `total`: batches in order,
  // queries in 16 lanes
  T sink_gradient(int64_t h, T total) {
    const T z = sink(h);
    const T tz = t_.tsinks ? static_cast<const T*>(t_.tsinks)[h] : T{0};
    if (z == -std::numeric_limits<T>::infinity()) return 0;
    h_ = h;
    hk_ = h / (in_.H / in_.Hk);
    const Logits<T> logits(in_, 0, h);
    logits_ = &logits;
    QueryTile<E>& t = tiles_[0];
    for (b_ = 0; b_ < in_.B; b_++) {
      Vec<T> sum[kRegs<T>] = {};
      for (int64_t q = 0; q < in_.N; q += kGroup) {
        const int n = static_cast<int>(std::min<int64_t>(kGroup, in_.N - q));
        t.q0 = q;
        pack_values(t, 0, n);
        row_terms(t, 0, n);
        for (int v = 0; v < kRegs<T>; v++) {
          const int at = v * kWidth<T>;
          const Vec<T> p = sink_probability(t, z, at);
          const int have = std::max(0, std::min(n - at, kWidth<T>));
          Vec<T> term = load(t.delta + at);
          if (second_) term = fma(set1(tz) - load(t.mu + at), term, load(t.tdelta + at));
          sum[v] = fma_where(lanes<T>((1u << have) - 1), -p, term, sum[v]);
        }
      }
      for (int i = 0; i < kGroup; i++) total += sum[i / kWidth<T>][i % kWidth<T>];
    }
    return total;
  }

 private:
  static inline const AttentionTangents kNoTangents{};

  T sink(int64_t h) const { return *in_.sinks.at<T>(0, h) * static_cast<T>(kLog2e); }
  static Vec<T> sink_probability(const QueryTile<E>& t, T z, int at) {
    const Vec<T> x = (set1(z) - load(t.m + at)) - load(t.log2_l + at);
    return exp2<T>(-max(zero<T>(), -x));
  }
  // What the error of delta took from the sink's gradient in this chunk of queries.
  T sink_error() const {
    T total = 0;
    const T z = sink(h_);
    if (z == -std::numeric_limits<T>::infinity()) return 0;
    for (int i = 0; i < count_; i++)
      for (int r = 0; r < tiles_[i].rows; r++) {
        const QueryTile<E>& t = tiles_[i];
        const int lane = r % kWidth<T>;
        total += sink_probability(t, z, r - lane)[lane] * t.delta_error[r];
      }
    return total;
  }

  static int64_t padded(int64_t columns) { return (columns + kGroup - 1) / kGroup * kGroup; }

  int64_t row_index(int64_t q) const { return in_.row_at(b_, h_, q); }

  void load_queries(QueryTile<E>& t, int64_t q0, int rows) {
    t.q0 = q0;
    t.rows = rows;
    t.mask.load(in_.mask, b_, h_, q0, rows, in_.N, in_.Nk);
    const View4 tdo = second_ ? second_->tdo : View4{};
    t.finite = true;
    for (int g = 0; g * kGroup < rows; g++) {
      const int n = std::min(kGroup, rows - g * kGroup);
      const int64_t at = lanes_at(g, in_.D / kP);
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
    for (T* sums : {t.error, t.delta_error, t.lost}) std::memset(sums, 0, sizeof(T) * kGradQueries);
  }

  static int64_t lanes_at(int g, int64_t columns) {
    return g / kPanelGroups * columns * kPanel + g % kPanelGroups * kGroup;
  }
  void pack(const View4& x, int64_t columns, int64_t q, int n, T mul, E* to) const {
    pack_rows<E>(x, b_, h_, q, n, columns, mul, halves_, to);
  }
  void blocks(const View4& x, int64_t columns, QueryTile<E>& t, T mul, E* to) const {
    const int n = static_cast<int>(columns);
    const Rows<E> rows = read_rows<E>(x, b_, h_, t.q0, t.rows, n / kP, halves_);
    if constexpr (kPairs<E>) {
      const Bf16* from = reinterpret_cast<const Bf16*>(rows.at);
      t.finite &= all_finite(from, 2 * rows.ld, n, t.rows);
      interleave_blocks<kGradWidth<T>>(from, 2 * rows.ld, n, t.rows, to, kGradQueries / 2);
#if defined(TW_HAS_TILES)
      for (int64_t c = 0; c < n; c += kGradWidth<T>)
        tiled::clear_pairs(t.rows, kGradWidth<T>, to + c * (kGradQueries / 2));
#endif
    } else {
      t.finite &= all_finite<T>(rows.at, rows.ld, n, t.rows);
      pack_blocks<T, kGradWidth<T>>(rows.at, rows.ld, n, t.rows, mul, to, kGradQueries);
    }
  }

  // do and its tangent of group g, in lanes
  void pack_values(QueryTile<E>& t, int g, int n) const {
    const int64_t q = t.q0 + g * kGroup, at = lanes_at(g, in_.Dv / kP);
    pack(ct_.d_o, in_.Dv, q, n, T{1}, t.do_lanes + at);
    if (second_ && second_->tdo) pack(second_->tdo, in_.Dv, q, n, T{1}, t.tdo_lanes + at);
  }

  // m, log2 l and delta = rowsum(do o) - dlse of group g; also mu = tlse and
  // tdelta = rowsum(tdo o + do to) - tdlse
  void row_terms(QueryTile<E>& t, int g, int n) {
    const int64_t q = t.q0 + g * kGroup, at = row_index(q), lane = lanes_at(g, in_.Dv / kP);
    auto row = [&](const void* x, int i) { return static_cast<const T*>(x)[at + i]; };
    alignas(64) T d[kGroup], td[kGroup] = {}, more[kGroup];
    row_dots(ct_.d_o, t.do_lanes + lane, saved_.o, q, n, d);
    if (second_) {
      row_dots(ct_.d_o, t.do_lanes + lane, second_->outputs.to, q, n, td);
      if (second_->tdo) {
        row_dots(second_->tdo, t.tdo_lanes + lane, saved_.o, q, n, more);
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
    for (int i = g * kGroup; kPairs<E> && i < (g + 1) * kGroup; i += kWidth<T>) {
      const Vec<T> l = load(t.log2_l + i);
      store(t.inverse_l + i, exp2<T>(-l));
      store(t.l + i, splat<T>(1) / load(t.inverse_l + i));
    }
  }

  // out[lane] = sum over columns of x times y, one chain; `lanes` holds the rows of x where they
  // are numbers. A zero of y takes no part: a masked row's cotangent may be NaN.
  void row_dots(const View4& x, const E* lanes, const View4& y, int64_t q, int n, T* out) {
    const T* a = numbers(x, lanes, q, n);
    pack_rows<T>(y, b_, h_, q, n, in_.Dv, T{1}, rows_, columns_);
    for (int v = 0; v < kGroup; v += kWidth<T>) {
      Vec<T> s = zero<T>();
      for (int64_t d = 0; d < in_.Dv; d++) {
        const Vec<T> o = load(columns_ + d * kPanel + v);
        s = select(equal(o, zero<T>()), s, fma(load(a + d * kPanel + v), o, s));
      }
      store(out + v, s);
    }
  }
  const T* numbers(const View4& x, const E* lanes, int64_t q, int n) {
    if constexpr (kPairs<E>) {
      pack_rows<T>(x, b_, h_, q, n, in_.Dv, T{1}, rows_, more_columns_);
      return more_columns_;
    } else {
      return lanes;
    }
  }

  void store_queries(QueryTile<E>& t) {
    const T scale = static_cast<T>(in_.softmax_scale);
    for (int r = 0; r < t.rows; r++) {
      T* row = t.dq + r * dp_;
      if (kPairs<E> && !second_) add_lost(t, r);
      for (int64_t d = 0; d < dp_; d += kWidth<T>)
        store(row + d, load(row + d) * set1(scale) + zero<T>());
      put_row<T>(grads_.dq, b_, h_, t.q0 + r, row, in_.D);
    }
  }

  void add_bias_rows() {
    for (int i = 0; i < count_; i++)
      for (int r = 0; r < tiles_[i].rows; r++)
        *grads_.dbias.at_mut<T>(b_, h_, tiles_[i].q0 + r) += tiles_[i].dbias[r];
  }

  // Keys [k0, k1) against all query tiles; dk and dv of the chunk grow here and are added in the
  // order of the steps.
  void key_chunk(int64_t unit, int64_t step, int64_t c, int64_t begin, int64_t end) {
    const int64_t k0 = c * kGradChunk, k1 = std::min(in_.Nk, k0 + kGradChunk);
    loaded_ = 0;
    if (std::max(begin, k0) < std::min(end, k1)) {
      if (schedule_.bias_shared) schedule_.wait(unit, c, step);
      for (int i = 0; i < count_; i++) {
        QueryTile<E>& t = tiles_[i];
        const int64_t from = std::max(k0, t.mask.key_begin / kGradKeys * kGradKeys),
                      to = std::min(k1, t.mask.key_end);
        for (int64_t k = from; k < to; k += kGradKeys)
          pair_of_tiles(t, k, static_cast<int>(std::min<int64_t>(kGradKeys, k1 - k)), k - k0);
      }
    }
    schedule_.wait(unit, c, step);
    if (first_ || last_ || loaded_) add_keys(k0, k1);
    if (schedule_.bias == BiasGradient::kOverKeys && c + 1 == schedule_.key_chunks) add_bias_rows();
    schedule_.pass(unit, c, step);
  }

  // dk and dv of the chunk: the first step of a KV head sets them, later ones add
  void add_keys(int64_t k0, int64_t k1) {
    const bool over_queries =
        schedule_.bias == BiasGradient::kOverQueries || schedule_.bias == BiasGradient::kOverBoth;
    const T scale = kPairs<E> ? static_cast<T>(in_.softmax_scale) : T{1};
    for (int64_t k = k0; k < k1; k++) {
      const bool seen = loaded_ >> ((k - k0) / kGradKeys) & 1;
      T* dk = seen ? dk_ + (k - k0) * dp_ : nullptr;
      if (seen && kPairs<E>)
        for (int64_t d = 0; d < dp_; d += kWidth<T>) store(dk + d, load(dk + d) * set1(scale));
      add_key(grads_.dk, grads_.dk_sum, k, dk, in_.D);
      add_key(grads_.dv, grads_.dv_sum, k, seen ? dv_ + (k - k0) * dvp_ : nullptr, in_.Dv);
      if (seen && over_queries)
        grads_.dbias.at_mut<T>(b_, h_)[k * grads_.dbias.column] += dbias_keys_[k - k0];
    }
  }

  // `sum` holds the gradient in T until the last step, where `to` holds another type.
  void add_key(const View4& to, const View4& sum, int64_t k, const T* from, int64_t columns) const {
    if (!to) return;
    const bool here = in_place<T>(to);
    T* row = here ? to.at_mut<T>(b_, hk_, k) : sum ? sum.at_mut<T>(b_, hk_, k) : nullptr;
    if (row && from)
      add_row<T>(row, from, columns, first_);
    else if (row && first_)
      std::memset(row, 0, sizeof(T) * static_cast<size_t>(columns));
    if (here || !last_) return;
    const T* whole = row ? row : from;
    char* bytes = const_cast<char*>(row_bytes(to, b_, hk_, k));
    if (whole)
      put_row<T>(to, b_, hk_, k, whole, columns);
    else
      std::memset(bytes, 0, static_cast<size_t>(columns * bytes_of(to.storage)));
  }

  // Packs a key tile when the chunk's first pair of it is seen, and clears its gradients.
  void load_keys(int64_t k0, int keys, int64_t row) {
    const int tile = static_cast<int>(row / kGradKeys);
    if (loaded_ >> tile & 1) return;
    loaded_ |= 1u << tile;
    keys_finite_[tile] = true;
    const int64_t in_k = row / kP * dp_, in_v = row / kP * dvp_;
    copy_keys(in_.k, in_.D, dp_, k0, keys, k_ + in_k, k_pairs_ + in_k, tile);
    copy_keys(in_.v, in_.Dv, dvp_, k0, keys, v_ + in_v, nullptr, tile);
    if (t_.tk) copy_keys(t_.tk, in_.D, dp_, k0, keys, tk_ + in_k, tk_pairs_ + in_k, tile);
    if (t_.tv) copy_keys(t_.tv, in_.Dv, dvp_, k0, keys, tv_ + in_v, nullptr, tile);
    std::memset(dk_ + row * dp_, 0, sizeof(T) * static_cast<size_t>(keys * dp_));
    std::memset(dv_ + row * dvp_, 0, sizeof(T) * static_cast<size_t>(keys * dvp_));
    std::memset(dbias_keys_ + row, 0, sizeof(T) * static_cast<size_t>(keys));
  }

  // Rows of `ld` numbers, zeros after the first `columns`; `pairs` of neighbouring rows where the
  // products take them.
  void copy_keys(const View4& x, int64_t columns, int64_t ld, int64_t k0, int keys, E* to, E* pairs,
                 int tile) {
    const int n = static_cast<int>(columns);
    const Rows<E> rows = read_rows<E>(x, b_, hk_, k0, keys, n / kP, halves_);
    if constexpr (kPairs<E>) {
      for (int r = 0; r < keys; r++) {
        E* row = to + r * (ld / 2);
        std::memcpy(row, rows.at + r * rows.ld, sizeof(E) * static_cast<size_t>(n / 2));
        std::memset(row + n / 2, 0, sizeof(E) * static_cast<size_t>(ld / 2 - n / 2));
      }
      const Bf16* from = reinterpret_cast<const Bf16*>(rows.at);
      if (pairs) interleave_rows(from, 2 * rows.ld, keys, n, pairs, ld);
#if defined(TW_HAS_TILES)
      if (pairs) tiled::clear_pairs(keys, static_cast<int>(ld), pairs);
#endif
      keys_finite_[tile] &= all_finite(from, 2 * rows.ld, n, keys);
    } else {
      for (int r = 0; r < keys; r++)
        copy_row<T>(rows.at + r * rows.ld, columns, ld, splat<T>(1), to + r * ld);
      keys_finite_[tile] &= all_finite<T>(to, ld, static_cast<int>(ld), keys);
    }
  }

  // Keys [k0, k0 + keys), which stand at `row` of the chunk.
  void pair_of_tiles(QueryTile<E>& t, int64_t k0, int keys, int64_t row) {
    if (!mask_.load(t.mask, t.rows, k0, keys)) return;
    load_keys(k0, keys, row);
    for (int p = 0; p * kPanel < t.rows; p++) panel(t, p, k0, row);
    if (schedule_.bias != BiasGradient::kNone) add_bias(t, k0, keys, row);
    if (logits_->softcap && logits_wanted_) through_softcap();
    if constexpr (kPairs<E>)
      if (!second_) settle_errors(t, logits_->softcap);
    add_products(t, k0, row);
  }

  // dv += p' do, dk += ds' q, dq += ds k; of the JVP, the tangents of these products
  void add_products(QueryTile<E>& t, int64_t k0, int64_t row) {
    const bool finite = keys_finite_[row / kGradKeys] && t.finite;
    const bool tdo = second_ && second_->tdo;
    const E *k = keys_of(k_, k_pairs_, row), *tk = t_.tk ? keys_of(tk_, tk_pairs_, row) : nullptr;
    Terms<E> dv, dk, dq;
    if (grads_.dv) {
      if (second_ && logits_move_) dv.add(of_queries<E>(mask_, tp_, tp_queries_), t.do_rows);
      if (!second_ || tdo)
        dv.add(of_queries<E>(mask_, p_, p_queries_), second_ ? t.tdo_rows : t.do_rows);
      sum_over_queries<E>(mask_, dv, finite, dv_ + row * dvp_, dvp_);
    }
    if (grads_.dk) {
      if (second_) dk.add(of_queries<E>(mask_, tds_, tds_queries_), t.q_rows);
      if (!second_ || t_.tq)
        dk.add(of_queries<E>(mask_, ds_, ds_queries_), second_ ? t.tq_rows : t.q_rows);
      sum_over_queries<E>(mask_, dk, finite, dk_ + row * dp_, dp_);
    }
    if (grads_.dq) {
      if (kPairs<E> && !second_) round_in_balance<E>(mask_, ds_, t, k0);
      if (second_) dq.add(of_keys<E>(mask_, tds_, tds_keys_), k);
      if (!second_ || tk) dq.add(of_keys<E>(mask_, ds_, ds_keys_), second_ ? tk : k);
      sum_over_keys<E>(mask_, dq, finite, t.dq, dp_);
    }
  }

  // A tile's rows for the sums over keys.
  const E* keys_of(const E* rows, const E* pairs, int64_t row) const {
    return kPairs<E> ? pairs + row / kP * dp_ : rows + row * dp_;
  }
  void add_lost(QueryTile<E>& t, int r) {
    if (t.lost[r] == 0) return;
    const Rows<T> key =
        read_rows<T>(in_.k, b_, hk_, t.last[r], 1, static_cast<int>(in_.D), columns_);
    add_scaled_row<T>(t.dq + r * dp_, key.at, in_.D, set1(t.lost[r]));
  }

  // p and ds of one panel, zero where nothing is seen; of the JVP their tangents too
  void panel(QueryTile<E>& t, int p, int64_t k0, int64_t row) {
    const int at = p * kPanel, D = static_cast<int>(in_.D) / kP, Dv = static_cast<int>(in_.Dv) / kP;
    const int64_t ld = dp_ / kP, ldv = dvp_ / kP;
    const E *k = k_ + row * ld, *v = v_ + row * ldv;
    const E *q = t.q_lanes + int64_t{at} * D, *d_o = t.do_lanes + int64_t{at} * Dv;
    const T scale = product_scale<E>(*logits_);
    T *prob = p_ + at, *ds = ds_ + at;
    if (!mask_.whole) clear_hidden(p);
    for (int i = 0; i < mask_.counts[p]; i++) {
      const Segment& s = mask_.segments[p][i];
      if (!second_ && logits_->plain && !dropout_->on) {
        if (s.edge)
          plain_segment<true>(t, p, k, v, s);
        else
          plain_segment<false>(t, p, k, v, s);
        continue;
      }
      scores<E>(k, ld, q, D, StoreRaw<T>{prob}, s, scale);
      if (logits_wanted_) scores<E>(v, ldv, d_o, Dv, StoreRaw<T>{ds}, s);
      if (second_) {
        scores_of_both<E>({t_.tq ? k : nullptr, ld, t.tq_lanes + int64_t{at} * D},
                          {t_.tk ? tk_ + row * ld : nullptr, ld, q}, D, StoreRaw<T>{tds_ + at}, s,
                          scale);
        if (logits_wanted_)
          scores_of_both<E>({second_->tdo ? v : nullptr, ldv, t.tdo_lanes + int64_t{at} * Dv},
                            {t_.tv ? tv_ + row * ldv : nullptr, ldv, d_o}, Dv,
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
  void plain_segment(QueryTile<E>& t, int p, const E* k, const E* v, const Segment& s) {
    const int at = p * kPanel, D = static_cast<int>(in_.D) / kP, Dv = static_cast<int>(in_.Dv) / kP;
    T *prob = p_ + at, *ds = ds_ + at;
    const uint16_t* words = mask_.words(p);
    scores<E>(k, dp_ / kP, t.q_lanes + int64_t{at} * D, D,
              StoreWeights<T, EDGE>{prob, t.m + at, t.log2_l + at, words}, s,
              product_scale<E>(*logits_));
    if (logits_wanted_)
      scores<E>(v, dvp_ / kP, t.do_lanes + int64_t{at} * Dv, Dv,
                StoreGradient<E, EDGE>{ds, prob, t.delta + at, t.l + at, t.inverse_l + at,
                                       t.error + at, words},
                s);
  }

  // Zeros where a group of queries sees none of a step's keys; the rest is written.
  void clear_hidden(int p) {
    const int groups = std::min(kPanelGroups, mask_.groups() - p * kPanelGroups);
    for (int j = 0; j < mask_.keys(); j += kStep)
      for (int g = p * kPanelGroups; g < p * kPanelGroups + groups; g++) {
        if (!mask_.none(j, g)) continue;
        for (T* x : {p_, ds_, tp_, tds_})
          for (int i = 0; x && i < kStep * kGroup; i += kWidth<T>)
            store(x + (j + i / kGroup) * kGradQueries + g * kGroup + i % kGroup, zero<T>());
      }
  }

  // The logits of register n of panel p and key j, from the raw products.
  struct Lane {
    int at;  // in a row of kGradQueries
    Vec<T> m, l, delta, position;
    Lane(const VjpBody& body, const QueryTile<E>& t, int p, int64_t k0, int n)
        : at(p * kPanel + n * kWidth<T>),
          m(load(t.m + at)),
          l(load(t.log2_l + at)),
          delta(load(t.delta + at)) {
      alignas(64) T x[kWidth<T>];
      positions<T>(t.q0 + at + body.in_.Nk - body.in_.N - k0, kWidth<T>, x);
      position = load(x);
    }
  };
  TW_MEMBER Vec<T> weight(const Lane& lane, int j, int n, Vec<T> raw,
                          TanhAndSlope<T>* tanh_out) const {
    const Vec<T> added =
        logits_->bias ? load(bias_ + int64_t{j} * kPanel + n * kWidth<T>) : zero<T>();
    return probability<T>((*logits_)(raw, abs(lane.position - splat<T>(j)), added, tanh_out),
                          lane.m, lane.l);
  }

  __attribute__((noinline)) void elements(QueryTile<E>& t, int p, int64_t k0, const Segment& s,
                                          int n);
  __attribute__((noinline)) void second_elements(QueryTile<E>& t, int p, int64_t k0,
                                                 const Segment& s, int n);
  void through_softcap();
  void add_bias(QueryTile<E>& t, int64_t k0, int keys, int64_t row);

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
  bool first_ = false, last_ = false;  // of the steps of a KV head
  uint32_t loaded_ = 0;                // key tiles of the chunk that some query sees
  bool keys_finite_[kGradChunk / kGradKeys] = {};
  QueryTile<E>* tiles_ = nullptr;
  E *k_ = nullptr, *v_ = nullptr, *tk_ = nullptr, *tv_ = nullptr, *k_pairs_ = nullptr,
    *tk_pairs_ = nullptr, *p_queries_ = nullptr, *ds_queries_ = nullptr, *ds_keys_ = nullptr,
    *tp_queries_ = nullptr, *tds_queries_ = nullptr, *tds_keys_ = nullptr, *halves_ = nullptr;
  T *dk_ = nullptr, *dv_ = nullptr, *dbias_keys_ = nullptr, *p_ = nullptr, *ds_ = nullptr,
    *tp_ = nullptr, *tds_ = nullptr, *slope_ = nullptr, *tslope_ = nullptr, *bias_ = nullptr,
    *tbias_ = nullptr, *factors_ = nullptr, *columns_ = nullptr, *more_columns_ = nullptr,
    *rows_ = nullptr;
  PairMask mask_;
};

#include "simd/end.hpp"
