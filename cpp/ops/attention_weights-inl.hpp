// From scores to weighted values, for the bodies with queries in lanes: epilogues of the scores,
// the weights of a panel and their sums, and the rows of a tile of keys.
#pragma once
#include "ops/attention_logits-inl.hpp"
#include "runtime/workspace.hpp"

#include "simd/begin.hpp"

// Epilogue of the score product: store, and for plain logits also mask and fold the maximum.
template <class T>
struct StoreScores {
  T* s;
  struct Column {
    T* s;
    TW_MEMBER Column(const StoreScores& e, int n) : s(e.s + n * kWidth<T>) {}
    TW_MEMBER void put(int j, Vec<T> x) { store(s + int64_t{j} * kPanel, x); }
    TW_MEMBER void finish() {}
  };
};

constexpr int kLinesAhead = 6;              // after 8 keys and one register of queries
constexpr int64_t kBytesAhead = 512 << 10;  // that leave room in the second-level cache

// Rows that the next block of queries will read, asked for line by line while products run.
class RowsToCome {
 public:
  void clear() { count_ = 0, at_ = end_ = nullptr; }
  void add(const View4& x, int64_t b, int64_t h, int64_t r, int64_t rows, int64_t columns) {
    if (rows <= 0 || x.pages) return;
    const int64_t ld = x.row * bytes_of(x.storage), bytes = columns * bytes_of(x.storage);
    const bool together = ld == bytes;
    runs_[count_++] = {row_bytes(x, b, h, r), ld, together ? 1 : rows,
                       together ? rows * ld : bytes};
  }
  template <int LINES>
  TW_MEMBER void touch() {
    if (at_ >= end_ && !next()) return;
    TW_UNROLL for (int i = 0; i < LINES; i++) __builtin_prefetch(at_ + 64 * i, 0, 2);
    at_ += 64 * LINES;
  }

 private:
  struct Run {
    const char* row;
    int64_t ld, rows, bytes;
  };
  TW_MEMBER bool next() {
    if (count_ == 0) return false;
    Run& x = runs_[count_ - 1];
    at_ = x.row;
    end_ = at_ + x.bytes;
    x.row += x.ld;
    if (--x.rows == 0) count_--;
    return true;
  }

  const char *at_ = nullptr, *end_ = nullptr;
  int count_ = 0;
  Run runs_[3];
};

template <class T, bool EDGE>
struct StoreMax {
  T* s;
  T* top;
  const uint16_t* words;
  RowsToCome* to_come;
  struct Column {
    const StoreMax& e;
    int n;
    Vec<T> m;
    TW_MEMBER Column(const StoreMax& epilogue, int reg)
        : e(epilogue), n(reg), m(load(e.top + n * kWidth<T>)) {}
    TW_MEMBER void put(int j, Vec<T> x) {
      if constexpr (EDGE) x = select(edge_lanes<T>(e.words, j, n), x, minus_infinity<T>());
      m = max(m, x);
      store(e.s + int64_t{j} * kPanel + n * kWidth<T>, x);
    }
    TW_MEMBER void finish() {
      store(e.top + n * kWidth<T>, m);
      e.to_come->template touch<kLinesAhead>();
    }
  };
};

// What the tangents ts of a row have in common cancels in `to`, which is the sum of p ts v less mu
// o. So all of them are taken less a centre: their mean in the first tile where the row has
// weights.
template <class T>
constexpr T kNoCentre = std::numeric_limits<T>::quiet_NaN();

// Sums over keys by key index mod 4, of one register of lanes. `term(j, edge)` is what key j adds.
template <class T>
struct KeySums {
  Vec<T> of[4] = {};
  bool seen = false;  // any key
  template <class Term>
  TW_MEMBER KeySums(const Segment* segments, int count, int group, const Term& term) {
    for (int k = 0; k < count; k++) {
      const Segment& g = segments[k];
      if (group < g.na || group >= g.nb) continue;
      seen = true;
      int j = g.ja;
      for (; !g.edge && j + 4 <= g.jb; j += 4)
        TW_UNROLL for (int i = 0; i < 4; i++) of[i] += term(j + i, std::false_type{});
      for (; j < g.jb; j++)
        of[j & 3] += g.edge ? term(j, std::true_type{}) : term(j, std::false_type{});
    }
  }
  TW_MEMBER Vec<T> total() const { return (of[0] + of[2]) + (of[1] + of[3]); }
};

template <class T>
TW_INLINE bool has_centres(const T* centre) {
  bool all = true;
  for (int i = 0; i < kWidth<T>; i++) all &= centre[i] == centre[i];
  return all;
}
template <class T>
TW_INLINE Vec<T> centre_or_zero(Vec<T> centre) {
  return select(unordered(centre), zero<T>(), centre);
}
// Centres where there are none yet, from the sums of weights and of weights times ts.
template <class T>
TW_INLINE void set_centres(T* centre, Vec<T> weights, Vec<T> moments) {
  const Vec<T> old = load(centre), mean = moments / weights;
  const auto none = equal(weights, zero<T>());
  Vec<T> fresh = select(unordered(mean - mean), zero<T>(), mean);  // not finite
  fresh = select(none, old, fresh);
  store(centre, select(unordered(old), fresh, old));
}

// Softmax states of the panels of one block, columns of o in [panel][Dv][kPanel]. With tangents
// also to, the sum of w (ts - c) v + w tv, and mu, that of w (ts - c), with their centre c.
template <class T>
struct States {
  T *o, *m, *l, *e, *to, *mu, *centre;
  // of pairs: row sums of the weights as they are rounded, and row maxima, for m is a whole number
  T *rounded, *top;
  void clear(int panels, int Dv) {
    const size_t lanes = static_cast<size_t>(panels) * kPanel;
    std::memset(o, 0, sizeof(T) * lanes * static_cast<size_t>(Dv));
    if (to) std::memset(to, 0, sizeof(T) * lanes * static_cast<size_t>(Dv));
    if (mu) std::memset(mu, 0, sizeof(T) * lanes);
    for (size_t i = 0; centre && i < lanes; i++) centre[i] = kNoCentre<T>;
    for (int i = 0; i < panels * kPanel; i++)
      m[i] = -std::numeric_limits<T>::infinity(), l[i] = 0, e[i] = 0;
    if (rounded) std::memset(rounded, 0, sizeof(T) * lanes);
    for (int i = 0; top && i < panels * kPanel; i++) top[i] = -std::numeric_limits<T>::infinity();
  }
};

// Weights w = exp2(s - m) in place, the row sums, and the rescaling alpha of what was summed
// before. Pairs E of weights go to `pairs` instead, as from weights_of. With WHOLE m is rounded up
// to a whole number: the rounding of weights to bf16 then does not depend on it, and a backward
// pass has the weights that o was made of.
template <class T, bool ENTROPY, bool WHOLE, class E = T>
TW_NOINLINE void weights_panel(T* s, const Segment* segments, int count, const T* top, T* m, T* l,
                               T* e, T* alpha, [[maybe_unused]] E* pairs) {
#if defined(TW_HAS_TILES)
  if constexpr (kPairs<E>) tiled::clear_weights(segments, count, pairs);
#endif
  for (int n = 0; n < kPanelVecs<T>; n++) {
    const int at = n * kWidth<T>, group = at / kGroup;
    Vec<T> here = load(top + at);
    if constexpr (WHOLE) here = whole_above(here);
    const Vec<T> old = load(m + at), fresh = max(old, here), high = finite_max<T>(fresh);
    Vec<T> sum[4] = {}, ent[4] = {};  // by key index mod 4
    bool seen = false;
    for (int k = 0; k < count; k++) {
      const Segment& g = segments[k];
      if (group < g.na || group >= g.nb) continue;
      seen = true;
      T* p = s + int64_t{g.ja} * kPanel + at;
      [[maybe_unused]] Vec<T> even = zero<T>();
      auto put = [&](bool odd, int j, T* to, Vec<T> w) __attribute__((always_inline)) {
        if constexpr (!kPairs<E>)
          store(to, w);
        else if (odd)
          store_pairs(pairs + int64_t{j >> 1} * kPanel + at, even, w);
        else
          even = w;
      };
      int j = g.ja;
      for (; j + 4 <= g.jb; j += 4, p += 4 * kPanel) TW_UNROLL for (int i = 0; i < 4; i++) {
          const Vec<T> x = load(p + i * kPanel) - high, w = exp2<T>(x);
          put(i & 1, j + i, p + i * kPanel, w);
          sum[i] += w;
          if (ENTROPY) ent[i] += select(equal(w, zero<T>()), w, w * x);
        }
      for (; j < g.jb; j++, p += kPanel) {
        const Vec<T> x = load(p) - high, w = exp2<T>(x);
        put(j & 1, j, p, w);
        sum[j & 3] += w;
        if (ENTROPY) ent[j & 3] += select(equal(w, zero<T>()), w, w * x);
      }
      if constexpr (kPairs<E>)
        if (j & 1) store_pairs(pairs + int64_t{j >> 1} * kPanel + at, even, zero<T>());
    }
    if (!seen) {
      store(alpha + at, splat<T>(1));
      continue;
    }
    const Vec<T> a = exp2<T>(finite_max<T>(old) - high), before = load(l + at);
    store(alpha + at, a);
    store(m + at, fresh);
    store(l + at, fma(before, a, (sum[0] + sum[2]) + (sum[1] + sum[3])));
    if (ENTROPY)
      store(e + at, moved_entropy<T>(load(e + at), before, old, fresh, a) +
                        ((ent[0] + ent[2]) + (ent[1] + ent[3])));
  }
}

// In place: ts becomes w (ts - c), with the weights w; mu gains its row sums after the rescaling
// alpha. Sets the centres c that are not set.
template <class T>
TW_NOINLINE void moments_panel(const T* w, T* ts, const Segment* segments, int count,
                               const uint16_t* words, T unit, T* centre, T* mu, const T* alpha) {
  for (int n = 0; n < kPanelVecs<T>; n++) {
    const int at = n * kWidth<T>, group = at / kGroup;
    auto seen = [&](int j, auto edge, Vec<T> x) __attribute__((always_inline)) {
      return edge ? select(edge_lanes<T>(words, j, n), x, zero<T>()) : x;
    };
    auto weight = [&](int j, auto edge) __attribute__((always_inline)) {
      return seen(j, edge, load(w + int64_t{j} * kPanel + at));
    };
    auto moment = [&](int j, auto edge, Vec<T> c) __attribute__((always_inline)) {
      return seen(j, edge, fma(load(ts + int64_t{j} * kPanel + at), set1(unit), -c)) *
             weight(j, edge);
    };
    if (!has_centres(centre + at)) {
      const KeySums<T> weights(segments, count, group, weight);
      const KeySums<T> moments(segments, count, group,
                               [&](int j, auto edge) __attribute__((always_inline)) {
                                 return moment(j, edge, zero<T>());
                               });
      set_centres(centre + at, weights.total(), moments.total());
    }
    const Vec<T> c = centre_or_zero<T>(load(centre + at));
    const KeySums<T> sums(segments, count, group,
                          [&](int j, auto edge) __attribute__((always_inline)) {
                            const Vec<T> d = moment(j, edge, c);
                            store(ts + int64_t{j} * kPanel + at, d);
                            return d;
                          });
    store(mu + at, fma(load(mu + at), load(alpha + at), sums.total()));
  }
}

// Weights as the values' product takes them: in pairs of neighbouring keys, where it takes pairs.
template <class E>
TW_NOINLINE const E* weights_of(const Acc<E>* s, const Segment* segments, int count, E* pairs) {
  if constexpr (kPairs<E>) {
    using T = Acc<E>;
#if defined(TW_HAS_TILES)
    tiled::clear_weights(segments, count, pairs);
#endif
    for (int i = 0; i < count; i++) {
      const Segment& g = segments[i];
      for (int j = g.ja; j < g.jb; j += 2)
        for (int n = g.na * kRegs<float>; n < g.nb * kRegs<float>; n++) {
          const T* at = s + int64_t{j} * kPanel + n * kWidth<float>;
          const Vec<T> second = j + 1 < g.jb ? load(at + kPanel) : zero<T>();
          store_pairs(pairs + int64_t{j / 2} * kPanel + n * kWidth<float>, load(at), second);
        }
    }
    return pairs;
  } else {
    return s;
  }
}

#if defined(TW_HAS_PAIRS)
// Adds the row sums of weights in pairs to `sums` after the rescaling alpha: o divided by them has
// weights that sum to one, so that what the values have in common loses nothing by the rounding.
TW_NOINLINE void sum_rounded(const Bf16x2* pairs, const Segment* segments, int count,
                             const float* alpha, float* sums) {
  const Vec<Bf16x2> one = set1(Bf16x2{{0x3f80}, {0x3f80}});
  for (int n = 0; n < kPanelVecs<float>; n++) {
    const int at = n * kWidth<float>, group = at / kGroup;
    Vec<float> sum[4] = {};  // by pair index mod 4
    for (int k = 0; k < count; k++) {
      const Segment& g = segments[k];
      if (group < g.na || group >= g.nb) continue;
      const Bf16x2* p = pairs + int64_t{g.ja / 2} * kPanel + at;
      const int some = (g.jb - g.ja + 1) / 2;
      auto add = [&](int i) __attribute__((always_inline)) {
        sum[i] = multiply_add(load(p + i * kPanel), one, sum[i]);
      };
      int i = 0;
      for (; i + 4 <= some; i += 4, p += 4 * kPanel) TW_UNROLL for (int u = 0; u < 4; u++) add(u);
      TW_UNROLL for (int u = 0; u < 3; u++) if (i + u < some) add(u);
    }
    store(sums + at, fma(load(sums + at), load(alpha + at), (sum[0] + sum[2]) + (sum[1] + sum[3])));
  }
}
#endif

// The end of rows whose weights were rounded: o is divided by their sums instead of l.
template <class T>
TW_INLINE void divide_by_rounded(RowEnd<T>* end, const T* l, const T* rounded) {
  for (int i = 0; i < kGroup; i += kWidth<T>) {
    const Vec<T> r = load(rounded + i), scale = load(end->o_scale + i);
    store(end->o_scale + i, select(equal(r, zero<T>()), scale, scale * (load(l + i) / r)));
  }
}

// Keys or values of a tile as a product takes them: rows, or pairs of neighbouring rows.
template <class E>
struct TileRows {
  Rows<E> rows{};
  E *scratch = nullptr, *pairs = nullptr;
  bool finite = true;

  void place(Arena& arena, const View4& x, int64_t columns) {
    if (!x) return;
    scratch = arena.take<E>(in_place<E>(x) && !kPairs<E> ? 0 : kTileKeys * columns);
    pairs = arena.take<E>(kPairs<E> ? kTileKeys / 2 * columns : 0);
  }
  // Rows from k0 for the scores: `columns` numbers are the terms of a score.
  void load_terms(const View4& x, int64_t b, int64_t h, int64_t k0, int keys, int64_t columns) {
    if (!x) return;
    rows = read_rows<E>(x, b, h, k0, keys, static_cast<int>(columns) / kFold<E>, scratch);
#if defined(TW_HAS_TILES)
    if constexpr (kTiled<E>)
      rows = tiled::aligned_rows(rows, keys, static_cast<int>(columns) / kFold<E>, scratch);
#endif
  }
  // Rows from k0 for a sum over keys.
  void load_values(const View4& x, int64_t b, int64_t h, int64_t k0, int keys, int64_t columns) {
    if (!x) return;
    const int n = static_cast<int>(columns);
    if constexpr (kPairs<E>) {
      const Rows<E> halves = read_rows<E>(x, b, h, k0, keys, n / 2, scratch);
      const Bf16* from = reinterpret_cast<const Bf16*>(halves.at);
      finite = all_finite(from, 2 * halves.ld, n, keys);
#if defined(TW_HAS_TILES)
      rows = {pairs, kTileKeys / 2 * kSide};
      tiled::pack_values(from, 2 * halves.ld, keys, n, pairs, rows.ld);
#else
      interleave_rows(from, 2 * halves.ld, keys, n, pairs, n);
      rows = {pairs, n};
#endif
    } else {
      rows = read_rows<E>(x, b, h, k0, keys, n, scratch);
      // Values are read in columns, of rows far apart: they come in while the keys are worked on.
      if (in_place<E>(x)) touch_rows(rows.at, rows.ld, n, keys);
    }
  }
};

#include "simd/end.hpp"
