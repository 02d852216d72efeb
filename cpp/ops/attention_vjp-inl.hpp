// The VJP body. Query tiles of kGradQueries against key tiles of kGradKeys; each product of a pair
// of tiles is one chain from zero, then one addition. dq adds its tiles in ascending key order; dk
// and dv add theirs inside a query chunk, and the chunks in ascending order under a ticket for each
// key chunk, so neither threads nor loop order reach the bits.
#pragma once
#include "ops/attention_logits-inl.hpp"
#include "ops/vjp_schedule.hpp"
#include "runtime/workspace.hpp"

#include "simd/begin.hpp"

constexpr int kGradQueries = 192;
constexpr int kGradKeys = 96;
constexpr int kGradChunk = 960;  // queries and keys of a chunk: 5 query tiles, 10 key tiles
constexpr int kGradSteps = kGradKeys / kStep;
constexpr int kGradGroups = kGradQueries / kGroup;
constexpr int kGradPanels = kGradQueries / kPanel;
static_assert(kGradChunk % kGradQueries == 0 && kGradChunk % kGradKeys == 0 &&
              kGradQueries % kPanel == 0);

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

// A query tile: packed q and do, row statistics, masking, and dq as it grows.
template <class T>
struct QueryTile {
  MaskBlock mask;
  int64_t q0;
  int rows;
  bool finite;
  T *q_lanes, *do_lanes;  // [panel][column][kPanel], q scaled for the logits
  T *q_rows, *do_rows;    // blocks of kGradWidth columns, q scaled for dk
  T *dq, *m, *log2_l, *delta, *dbias;
};

template <class T>
class VjpBody {
 public:
  VjpBody(const AttentionInputs& in, const AttentionCotangents& ct, const AttentionGradients& grads,
          VjpSchedule& schedule)
      : in_(in),
        ct_(ct),
        grads_(grads),
        schedule_(schedule),
        dp_(padded(in.D)),
        dvp_(padded(in.Dv)) {}

  void place(Arena& arena) {
    const int64_t queries =
        std::min<int64_t>(kGradChunk, (in_.N + kGradQueries - 1) / kGradQueries * kGradQueries);
    const int64_t keys =
        std::min<int64_t>(kGradChunk, (in_.Nk + kGradKeys - 1) / kGradKeys * kGradKeys);
    tiles_ = arena.take<QueryTile<T>>(queries / kGradQueries);
    for (int64_t t = 0; t < queries / kGradQueries; t++) {
      QueryTile<T> tile;
      tile.q_lanes = arena.take<T>(kGradQueries * in_.D);
      tile.do_lanes = arena.take<T>(kGradQueries * in_.Dv);
      tile.q_rows = arena.take<T>(kGradQueries * (dp_ + kGradWidth<T>));
      tile.do_rows = arena.take<T>(kGradQueries * (dvp_ + kGradWidth<T>));
      tile.dq = arena.take<T>(kGradQueries * dp_);
      tile.m = arena.take<T>(kGradQueries);
      tile.log2_l = arena.take<T>(kGradQueries);
      tile.delta = arena.take<T>(kGradQueries);
      tile.dbias = arena.take<T>(kGradQueries);
      if (tiles_) place_tile(tiles_[t], tile);
    }
    k_ = arena.take<T>(keys * dp_);
    v_ = arena.take<T>(keys * dvp_);
    dk_ = arena.take<T>(keys * dp_);
    dv_ = arena.take<T>(keys * dvp_);
    dbias_keys_ = arena.take<T>(keys);
    p_ = arena.take<T>(kGradKeys * kGradQueries);
    ds_ = arena.take<T>(kGradKeys * kGradQueries);
    tanh_ = arena.take<T>(in_.softcap > 0 ? kGradKeys * kGradQueries : 0);
    bias_ = arena.take<T>(in_.bias ? kGradKeys * kPanel : 0);
    columns_ = arena.take<T>(in_.Dv * kPanel);
    words_ = arena.take<uint16_t>(kGradPanels * kGradKeys * kPanelGroups);
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
    for (int t = 0; t < count_; t++) store_queries(tiles_[t]);
  }

  // -sum over batches and queries of p_sink delta: batches in order, queries in 16 lanes
  void sink_gradient(int64_t h) {
    const T z = *in_.sinks.at<T>(0, h) * static_cast<T>(kLog2e);
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
        pack_lanes<T>(ct_.d_o.at<T>(b_, h, q), ct_.d_o.row, static_cast<int>(in_.Dv), n, T{1},
                      t.do_lanes);
        row_terms(t, 0, n, t.do_lanes);
        for (int v = 0; v < kRegs<T>; v++) {
          const int at = v * kWidth<T>;
          const Vec<T> x = (set1(z) - load(t.m + at)) - load(t.log2_l + at);
          const Vec<T> p = exp2<T>(-max(zero<T>(), -x));
          const int have = std::max(0, std::min(n - at, kWidth<T>));
          sum[v] = fma_where(lanes<T>((1u << have) - 1), -p, load(t.delta + at), sum[v]);
        }
      }
      for (int i = 0; i < kGroup; i++) total += sum[i / kWidth<T>][i % kWidth<T>];
    }
    static_cast<T*>(grads_.dsinks)[h] = total + T{0};
  }

 private:
  static int64_t padded(int64_t columns) { return (columns + kGroup - 1) / kGroup * kGroup; }

  static void place_tile(QueryTile<T>& to, const QueryTile<T>& from) {
    to.q_lanes = from.q_lanes, to.do_lanes = from.do_lanes, to.q_rows = from.q_rows,
    to.do_rows = from.do_rows;
    to.dq = from.dq, to.m = from.m, to.log2_l = from.log2_l, to.delta = from.delta,
    to.dbias = from.dbias;
  }

  int64_t row_index(int64_t q) const { return (b_ * in_.H + h_) * in_.N + q; }

  void load_queries(QueryTile<T>& t, int64_t q0, int rows) {
    t.q0 = q0;
    t.rows = rows;
    t.mask.load(in_.mask, b_, h_, q0, rows, in_.N, in_.Nk);
    const T *q = in_.q.at<T>(b_, h_, q0), *d_o = ct_.d_o.at<T>(b_, h_, q0);
    const int D = static_cast<int>(in_.D), Dv = static_cast<int>(in_.Dv);
    t.finite = all_finite<T>(q, in_.q.row, D, rows) && all_finite<T>(d_o, ct_.d_o.row, Dv, rows);
    for (int g = 0; g * kGroup < rows; g++) {
      const int n = std::min(kGroup, rows - g * kGroup);
      const int64_t panel = g / kPanelGroups, lane = g % kPanelGroups * kGroup;
      pack_lanes<T>(q + g * kGroup * in_.q.row, in_.q.row, D, n, logits_->q_scale,
                    t.q_lanes + panel * D * kPanel + lane);
      pack_lanes<T>(d_o + g * kGroup * ct_.d_o.row, ct_.d_o.row, Dv, n, T{1},
                    t.do_lanes + panel * Dv * kPanel + lane);
      row_terms(t, g, n, t.do_lanes + panel * Dv * kPanel + lane);
    }
    pack_blocks<T, kGradWidth<T>>(q, in_.q.row, D, rows, static_cast<T>(in_.softmax_scale),
                                  t.q_rows, kGradQueries);
    pack_blocks<T, kGradWidth<T>>(d_o, ct_.d_o.row, Dv, rows, T{1}, t.do_rows, kGradQueries);
    std::memset(t.dq, 0, sizeof(T) * static_cast<size_t>(kGradQueries * dp_));
    std::memset(t.dbias, 0, sizeof(T) * kGradQueries);
  }

  // m, log2 l and delta = rowsum(do o) - dlse of group g
  void row_terms(QueryTile<T>& t, int g, int n, const T* do_lanes) {
    const int64_t q = t.q0 + g * kGroup, at = row_index(q);
    const T *m = static_cast<const T*>(ct_.m) + at, *log_l = static_cast<const T*>(ct_.log_l) + at;
    const T* dlse = ct_.dlse ? static_cast<const T*>(ct_.dlse) + at : nullptr;
    alignas(64) T d[kGroup];
    row_dots(do_lanes, ct_.o.at<T>(b_, h_, q), ct_.o.row, n, d);
    for (int i = 0; i < kGroup; i++) {
      const int r = std::min(i, n - 1), to = g * kGroup + i;
      t.m[to] = std::numeric_limits<T>::lowest() > m[r] ? std::numeric_limits<T>::lowest() : m[r];
      t.log2_l[to] = log_l[r] * static_cast<T>(kLog2e);
      t.delta[to] = dlse ? d[i] - dlse[r] : d[i];
    }
  }

  // out[lane] = sum over columns of do times o, one chain. A zero of o takes no part: a masked
  // row's do may be NaN.
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
      T *dk = grads_.dk.at_mut<T>(b_, hk_, k), *dv = grads_.dv.at_mut<T>(b_, hk_, k);
      if (!seen) {
        std::memset(dk, 0, sizeof(T) * static_cast<size_t>(in_.D));
        std::memset(dv, 0, sizeof(T) * static_cast<size_t>(in_.Dv));
        continue;
      }
      add_row<T>(dk, dk_ + (k - k0) * dp_, in_.D, first);
      add_row<T>(dv, dv_ + (k - k0) * dvp_, in_.Dv, first);
      if (over_queries)
        grads_.dbias.at_mut<T>(b_, h_)[k * grads_.dbias.column] += dbias_keys_[k - k0];
    }
  }

  // Packs a key tile when the chunk's first pair of it is seen, and clears its gradients.
  void load_keys(int64_t k0, int keys, int64_t row) {
    const int tile = static_cast<int>(row / kGradKeys);
    if (loaded_ >> tile & 1) return;
    loaded_ |= 1u << tile;
    T *k = k_ + row * dp_, *v = v_ + row * dvp_;
    for (int r = 0; r < keys; r++) {
      copy_row<T>(in_.k.at<T>(b_, hk_, k0 + r), in_.D, dp_, splat<T>(1), k + r * dp_);
      copy_row<T>(in_.v.at<T>(b_, hk_, k0 + r), in_.Dv, dvp_, splat<T>(1), v + r * dvp_);
    }
    keys_finite_[tile] = all_finite<T>(k, dp_, static_cast<int>(dp_), keys) &&
                         all_finite<T>(v, dvp_, static_cast<int>(dvp_), keys);
    std::memset(dk_ + row * dp_, 0, sizeof(T) * static_cast<size_t>(keys * dp_));
    std::memset(dv_ + row * dvp_, 0, sizeof(T) * static_cast<size_t>(keys * dvp_));
    std::memset(dbias_keys_ + row, 0, sizeof(T) * static_cast<size_t>(keys));
  }

  // Keys [k0, k0 + keys), which stand at `row` of the chunk.
  void pair_of_tiles(QueryTile<T>& t, int64_t k0, int keys, int64_t row) {
    Segment segments[kGradPanels][kGradSteps];
    int counts[kGradPanels];
    if (!look(t, k0, keys, segments, counts)) return;
    load_keys(k0, keys, row);
    const T *k = k_ + row * dp_, *v = v_ + row * dvp_;
    for (int p = 0; p * kPanel < t.rows; p++) panel(t, p, k0, keys, k, v, segments[p], counts[p]);
    if (schedule_.bias != BiasGradient::kNone) add_bias(t, k0, keys, row);
    if (logits_->softcap) through_softcap(t, keys);
    if (!whole_ && !(keys_finite_[row / kGradKeys] && t.finite))
      add_products_checked(t, keys, row);
    else
      add_products(t, keys, row);
  }

  // Fills seen_, the edge words and the segments of every panel. False where no pair is seen.
  bool look(const QueryTile<T>& t, int64_t k0, int keys, Segment (*segments)[kGradSteps],
            int* counts) {
    std::memset(seen_, 0, sizeof seen_);
    bool any = false;
    whole_ = true;
    for (int p = 0; p * kPanel < t.rows; p++) {
      counts[p] = t.mask.segments(p * kPanelGroups, k0, keys, segments[p],
                                  words_ + p * kGradKeys * kPanelGroups);
      const int groups = std::min(kPanelGroups, t.mask.groups - p * kPanelGroups);
      int pairs = 0;
      for (int i = 0; i < counts[p]; i++) {
        Segment& s = segments[p][i];
        s.nb = std::min(s.nb, groups);
        any = true;
        whole_ &= !s.edge;
        pairs += (s.jb - s.ja) * (s.nb - s.na);
        for (int j = s.ja; j < s.jb; j += kStep)
          for (int g = s.na; g < s.nb; g++)
            seen_[j / kStep][p * kPanelGroups + g] = s.edge ? Seen::kSome : Seen::kAll;
      }
      whole_ &= pairs == keys * groups;
    }
    return any;
  }

  // p and ds of one panel, zero where nothing is seen
  void panel(QueryTile<T>& t, int p, int64_t k0, int keys, const T* k, const T* v,
             const Segment* segments, int count) {
    const int at = p * kPanel, D = static_cast<int>(in_.D), Dv = static_cast<int>(in_.Dv);
    const uint16_t* words = words_ + p * kGradKeys * kPanelGroups;
    const T *q = t.q_lanes + int64_t{at} * D, *d_o = t.do_lanes + int64_t{at} * Dv;
    T *prob = p_ + at, *ds = ds_ + at;
    if (!whole_)
      for (int j = 0; j < keys; j++)
        for (int i = 0; i < kPanel; i += kWidth<T>) {
          store(prob + j * kGradQueries + i, zero<T>());
          store(ds + j * kGradQueries + i, zero<T>());
        }
    for (int i = 0; i < count; i++) {
      const Segment& s = segments[i];
      if (!logits_->plain) {
        scores<T>(k, dp_, q, D, StoreRaw<T>{prob}, s);
        scores<T>(v, dvp_, d_o, Dv, StoreRaw<T>{ds}, s);
        apply_options(t, p, k0, s, words);
      } else if (s.edge) {
        scores<T>(k, dp_, q, D, StoreWeights<T, true>{prob, t.m + at, t.log2_l + at, words}, s);
        scores<T>(v, dvp_, d_o, Dv, StoreGradient<T, true>{ds, prob, t.delta + at, words}, s);
      } else {
        scores<T>(k, dp_, q, D, StoreWeights<T, false>{prob, t.m + at, t.log2_l + at, words}, s);
        scores<T>(v, dvp_, d_o, Dv, StoreGradient<T, false>{ds, prob, t.delta + at, words}, s);
      }
    }
  }

  __attribute__((noinline)) void apply_options(QueryTile<T>& t, int p, int64_t k0, const Segment& s,
                                               const uint16_t* words) {
    const int at = p * kPanel;
    if (logits_->bias)
      logits_->bias_panel(t.q0 + at, std::min(kPanel, t.rows - at), k0, s.ja, s.jb, bias_);
    alignas(64) T position[kPanel];
    positions<T>(t.q0 + at + logits_->offset - k0, kPanel, position);
    for (int n = s.na * kRegs<T>; n < s.nb * kRegs<T>; n++) {
      const int lane = at + n * kWidth<T>;
      const Vec<T> m = load(t.m + lane), l = load(t.log2_l + lane), delta = load(t.delta + lane);
      const Vec<T> pos = load(position + n * kWidth<T>);
      for (int j = s.ja; j < s.jb; j++) {
        T *prob = p_ + j * kGradQueries + lane, *ds = ds_ + j * kGradQueries + lane;
        const Vec<T> added =
            logits_->bias ? load(bias_ + int64_t{j} * kPanel + n * kWidth<T>) : zero<T>();
        Vec<T> slope = zero<T>();
        Vec<T> w = exp2<T>(((*logits_)(load(prob), abs(pos - splat<T>(j)), added, &slope) - m) - l);
        Vec<T> d = (load(ds) - delta) * w;
        if (s.edge) {
          const Lanes<T> in = edge_lanes<T>(words, j, n);
          w = select(in, w, zero<T>());
          d = select(in, d, zero<T>());
          slope = select(in, slope, zero<T>());
        }
        store(prob, w);
        store(ds, d);
        if (logits_->softcap) store(tanh_ + j * kGradQueries + lane, slope);
      }
    }
  }

  // ds is the gradient by the capped logit; by the product it is ds (1 - tanh^2)
  void through_softcap(const QueryTile<T>& t, int keys) {
    for (int j = 0; j < keys; j++)
      for (int g = 0; g < t.mask.groups; g++) {
        if (seen_[j / kStep][g] == Seen::kNone) continue;
        for (int i = g * kGroup; i < (g + 1) * kGroup; i += kWidth<T>) {
          const Vec<T> x = load(tanh_ + j * kGradQueries + i);
          T* ds = ds_ + j * kGradQueries + i;
          store(ds, load(ds) * fma(-x, x, splat<T>(1)));
        }
      }
  }

  void add_bias(QueryTile<T>& t, int64_t k0, int keys, int64_t row) {
    const View4& to = grads_.dbias;
    if (schedule_.bias == BiasGradient::kFull) {
      for (int r = 0; r < t.rows; r++) {
        T* out = to.at_mut<T>(b_, h_, t.q0 + r) + k0 * to.column;
        for (int j = 0; j < keys; j++) out[j * to.column] += ds_[j * kGradQueries + r];
      }
    } else if (schedule_.bias == BiasGradient::kOverKeys) {
      for (int r = 0; r < t.rows; r += kWidth<T>) {
        Vec<T> s = zero<T>();
        for (int j = 0; j < keys; j++) s += load(ds_ + j * kGradQueries + r);
        store(t.dbias + r, load(t.dbias + r) + s);
      }
    } else {
      for (int j = 0; j < keys; j++) {
        T s = 0;
        for (int r = 0; r < t.rows; r++) s += ds_[j * kGradQueries + r];
        dbias_keys_[row + j] += s;
      }
    }
  }

  // dv += p' do, dk += ds' q, dq += ds k. Ranges that no pair of a block sees are left out.
  void add_products(QueryTile<T>& t, int keys, int64_t row) {
    for (int j = 0; j < keys; j += kGradRows) {
      const int rows = std::min(kGradRows, keys - j);
      int qa = 0, qb = t.rows;
      if (!whole_) query_range(t, j, j + rows, &qa, &qb);
      add_rows_of(p_ + j * kGradQueries + qa, rows, t.do_rows + int64_t{qa} * kGradWidth<T>,
                  qb - qa, dv_ + (row + j) * dvp_, dvp_);
      add_rows_of(ds_ + j * kGradQueries + qa, rows, t.q_rows + int64_t{qa} * kGradWidth<T>,
                  qb - qa, dk_ + (row + j) * dp_, dp_);
    }
    for (int64_t d = 0; d < dp_; d += kGradWidth<T>)
      for (int q = 0; q < t.rows; q += kGradRows) {
        const int rows = std::min(kGradRows, t.rows - q);
        int ja = 0, jb = keys;
        if (!whole_) key_range(q, q + rows, keys, &ja, &jb);
        add_product<T, true>(rows, static_cast<int>(std::min<int64_t>(kGradWidth<T>, dp_ - d)),
                             ds_ + ja * kGradQueries + q, kGradQueries, k_ + (row + ja) * dp_ + d,
                             dp_, jb - ja, t.dq + q * dp_ + d, dp_);
      }
  }

  void add_rows_of(const T* a, int rows, const T* b, int depth, T* c, int64_t ldc) {
    for (int64_t d = 0; d < ldc; d += kGradWidth<T>, b += kGradQueries * kGradWidth<T>)
      add_product<T, false>(rows, static_cast<int>(std::min<int64_t>(kGradWidth<T>, ldc - d)), a,
                            kGradQueries, b, kGradWidth<T>, depth, c + d, ldc);
  }

  void query_range(const QueryTile<T>& t, int ja, int jb, int* qa, int* qb) const {
    int ga = kGradGroups, gb = 0;
    for (int s = ja / kStep; s * kStep < jb; s++)
      for (int g = 0; g < t.mask.groups; g++)
        if (seen_[s][g] != Seen::kNone) ga = std::min(ga, g), gb = std::max(gb, g + 1);
    *qa = std::min(ga * kGroup, t.rows);
    *qb = std::min(gb * kGroup, t.rows);
  }

  void key_range(int qa, int qb, int keys, int* ja, int* jb) const {
    int sa = kGradSteps, sb = 0;
    for (int g = qa / kGroup; g * kGroup < qb; g++)
      for (int s = 0; s < kGradSteps; s++)
        if (seen_[s][g] != Seen::kNone) sa = std::min(sa, s), sb = std::max(sb, s + 1);
    *ja = std::min(sa * kStep, keys);
    *jb = std::min(sb * kStep, keys);
  }

  bool sees(int j, int q) const {
    const int g = q / kGroup;
    const Seen s = seen_[j / kStep][g];
    if (s != Seen::kSome) return s == Seen::kAll;
    return words_[(g / kPanelGroups * kGradKeys + j) * kPanelGroups + g % kPanelGroups] >>
               (q % kGroup) &
           1;
  }

  // The same sums pair by pair, for tiles where 0 times a masked NaN or infinity would spread it.
  __attribute__((noinline)) void add_products_checked(QueryTile<T>& t, int keys, int64_t row) {
    for (int j = 0; j < keys; j++) {
      add_seen(
          t.rows, [&](int q) { return sees(j, q); },
          [&](int q) { return p_[j * kGradQueries + q]; },
          [&](int q, int64_t d) { return block_row(t.do_rows, q, d); }, dv_ + (row + j) * dvp_,
          dvp_);
      add_seen(
          t.rows, [&](int q) { return sees(j, q); },
          [&](int q) { return ds_[j * kGradQueries + q]; },
          [&](int q, int64_t d) { return block_row(t.q_rows, q, d); }, dk_ + (row + j) * dp_, dp_);
    }
    for (int q = 0; q < t.rows; q++)
      add_seen(
          keys, [&](int j) { return sees(j, q); }, [&](int j) { return ds_[j * kGradQueries + q]; },
          [&](int j, int64_t d) { return k_ + (row + j) * dp_ + d; }, t.dq + q * dp_, dp_);
  }

  static const T* block_row(const T* blocks, int q, int64_t d) {
    return blocks + d / kGradWidth<T> * kGradQueries * kGradWidth<T> + int64_t{q} * kGradWidth<T> +
           d % kGradWidth<T>;
  }

  template <class In, class Weight, class Row>
  static void add_seen(int n, const In& in, const Weight& weight, const Row& row, T* c,
                       int64_t columns) {
    for (int64_t d = 0; d < columns; d += kWidth<T>) {
      Vec<T> acc = zero<T>();
      for (int i = 0; i < n; i++)
        if (in(i)) acc = fma(set1(weight(i)), load(row(i, d)), acc);
      store(c + d, load(c + d) + acc);
    }
  }

  const AttentionInputs& in_;
  const AttentionCotangents& ct_;
  const AttentionGradients& grads_;
  VjpSchedule& schedule_;
  const Logits<T>* logits_ = nullptr;
  int64_t dp_, dvp_, b_ = 0, h_ = 0, hk_ = 0;
  int count_ = 0;
  uint32_t loaded_ = 0;  // key tiles of the chunk that some query sees
  bool keys_finite_[kGradChunk / kGradKeys] = {}, whole_ = true;
  QueryTile<T>* tiles_ = nullptr;
  T *k_ = nullptr, *v_ = nullptr, *dk_ = nullptr, *dv_ = nullptr, *dbias_keys_ = nullptr,
    *p_ = nullptr, *ds_ = nullptr, *tanh_ = nullptr, *bias_ = nullptr, *columns_ = nullptr;
  uint16_t* words_ = nullptr;
  Seen seen_[kGradSteps][kGradGroups];
};

#include "simd/end.hpp"
