// What the VJP does with the elements of a pair of tiles: p and ds from the scores, and both as the
// products take them.
#pragma once
#include "ops/attention_pairs-inl.hpp"

#include "simd/begin.hpp"

constexpr int kGradChunk = 960;  // queries and keys of a chunk: 5 query tiles, 10 key tiles
static_assert(kGradChunk % kGradQueries == 0 && kGradChunk % kGradKeys == 0);

// p = exp2((s - m) - log_l / ln 2)
template <class T>
TW_INLINE Vec<T> probability(Vec<T> s, Vec<T> m, Vec<T> log2_l) {
  return exp2<T>((s - m) - log2_l);
}
// What p has less than its like in o: of pairs, where the forward pass rounded the weight
// exp2(s - m). The sum of p' dp over keys that is in delta has that p' = p + lack.
template <class T>
TW_INLINE Vec<T> lack(Vec<T> p, Vec<T> l, Vec<T> inverse_l) {
  return fma(rounded_to_bf16(p * l), inverse_l, -p);
}

// p, 0 where masked
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
      Vec<T> w = probability<T>(x, m, l);
      if constexpr (EDGE) w = select(edge_lanes<T>(e.words, j, n), w, zero<T>());
      store(e.p + int64_t{j} * kGradQueries + n * kWidth<T>, w);
    }
    TW_MEMBER void finish() {}
  };
};

// ds = p (dp - delta), 0 where masked; of pairs `error` gains what p' makes of it less ds
template <class E, bool EDGE>
struct StoreGradient {
  using T = Acc<E>;
  T* ds;
  const T *p, *delta, *l, *inverse_l;
  T* error;
  const uint16_t* words;
  struct Column {
    const StoreGradient& e;
    int n;
    Vec<T> delta, l, inverse_l, error;
    TW_MEMBER Column(const StoreGradient& epilogue, int reg)
        : e(epilogue), n(reg), delta(load(e.delta + n * kWidth<T>)) {
      if constexpr (kPairs<E>) {
        l = load(e.l + n * kWidth<T>);
        inverse_l = load(e.inverse_l + n * kWidth<T>);
        error = load(e.error + n * kWidth<T>);
      }
    }
    TW_MEMBER void put(int j, Vec<T> x) {
      const int64_t at = int64_t{j} * kGradQueries + n * kWidth<T>;
      const Vec<T> w = load(e.p + at), by_delta = x - delta;
      Vec<T> d = by_delta * w;
      if constexpr (EDGE) d = select(edge_lanes<T>(e.words, j, n), d, zero<T>());
      store(e.ds + at, d);
      if constexpr (kPairs<E>) {
        // where masked, w and its lack are zero but by_delta may not be finite
        const Vec<T> more = fma(by_delta, lack<T>(w, l, inverse_l), error);
        error = EDGE ? select(edge_lanes<T>(e.words, j, n), more, error) : more;
      }
    }
    TW_MEMBER void finish() {
      if constexpr (kPairs<E>) store(e.error + n * kWidth<T>, error);
    }
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
template <class E>
struct QueryTile {
  using T = Acc<E>;
  MaskBlock mask;
  int64_t q0;
  int rows;
  bool finite;
  // [panel][column][kPanel]; numbers of q scaled for the logits
  E *q_lanes, *do_lanes, *tq_lanes, *tdo_lanes;
  // blocks of kGradWidth columns; numbers of q scaled for dk. Or pairs of neighbouring rows.
  E *q_rows, *do_rows, *tq_rows, *tdo_rows;
  T *dq, *m, *log2_l, *delta, *mu, *tdelta, *dbias;
  // of pairs: exp(log_l) and 1 over it; the sum over keys of (p' - p) (dp - delta), in this tile of
  // them and so far, which is what delta has too much; what ds lacks so far, and the last key seen
  T *l, *inverse_l, *error, *delta_error, *lost;
  int64_t* last;
};

// The errors of one register of queries over a run of keys. With dropout o has the weights that
// were kept, rounded, and is divided by the sum of all: `times` is dp then, else dp - delta.
template <class E>
struct LackInPairs {
  using T = Acc<E>;
  LackInPairs(const QueryTile<E>& t, int at, bool softcap) : capped(softcap) {
    if constexpr (kPairs<E>) {
      l = load(t.l + at), inverse_l = load(t.inverse_l + at);
      error = load(t.error + at), lost = load(t.lost + at);
    }
  }
  TW_MEMBER void add(Lanes<T> in, Vec<T> kept, Vec<T> times, Vec<T> slope) {
    if constexpr (kPairs<E>) {
      const Vec<T> e = times * lack<T>(kept, l, inverse_l);
      error = select(in, error + e, error);
      if (capped) lost = select(in, fma(e, slope, lost), lost);
    }
  }
  TW_MEMBER void store_to(QueryTile<E>* t, int at) const {
    if constexpr (kPairs<E>) store(t->error + at, error), store(t->lost + at, lost);
  }
  bool capped;  // ds is multiplied by the slope of the soft cap later
  Vec<T> l, inverse_l, error, lost;
};

// Hands the errors of a tile of keys on: to the rounding of ds, where that is not done, and to
// delta.
template <class E>
TW_INLINE void settle_errors(QueryTile<E>& t, bool softcap) {
  using T = Acc<E>;
  for (int q = 0; q < t.rows; q += kWidth<T>) {
    const Vec<T> e = load(t.error + q);
    if (!softcap) store(t.lost + q, load(t.lost + q) + e);
    store(t.delta_error + q, load(t.delta_error + q) + e);
    store(t.error + q, zero<T>());
  }
}

// Weights [key][query] as sums over queries and over keys take them: in pairs of neighbours, with
// zeros for what is not there.
template <class E>
TW_NOINLINE const E* of_queries(const PairMask& mask, const Acc<E>* weights, E* pairs) {
  using T = Acc<E>;
  if constexpr (!kPairs<E>)
    return weights;
  else {
    for (int j = 0; j < mask.keys(); j++)
      for (int q = 0; q < mask.groups() * kGroup; q += 2 * kGroup) {
        const T* at = weights + j * kGradQueries + q;
        const bool both = q + kGroup < mask.groups() * kGroup;
        Vec<T> first = load(at), second = both ? load(at + kGroup) : zero<T>();
#if defined(TW_HAS_TILES)
        first = tiled::first_lanes(mask.rows() - q, first);
        second = tiled::first_lanes(mask.rows() - q - kGroup, second);
#endif
        store_row_pairs(pairs + (j * kGradQueries + q) / 2, first, second);
      }
    return pairs;
  }
}
// Rounds ds to bf16 so that its sum over keys becomes that of p' (dp - delta), often zero: it is
// what a common part of the keys is multiplied by. An eighth of what is lost so far goes to each
// key that the query sees, which makes the rounding 7 % coarser; what is left in the end goes to
// the last.
template <class E>
TW_NOINLINE void round_in_balance([[maybe_unused]] const PairMask& mask,
                                  [[maybe_unused]] Acc<E>* ds, [[maybe_unused]] QueryTile<E>& t,
                                  [[maybe_unused]] int64_t k0) {
#if defined(TW_HAS_PAIRS)
  if constexpr (kPairs<E>) {
    using T = Acc<E>;
    for (int q = 0; q < mask.groups() * kGroup; q += kWidth<T>) {
      Vec<T> lost = load(t.lost + q), last = zero<T>();
      for (int j = 0; j < mask.keys(); j++) {
        T* at = ds + j * kGradQueries + q;
        const Vec<T> d = load(at), r = rounded_to_bf16(fma(lost, splat<T>(0.125), d));
        const auto hidden = equal(d, zero<T>());
        store(at, select(hidden, d, r));
        lost = select(hidden, lost, lost + (d - r));
        last = select(hidden, last, splat<T>(j + 1));
      }
      store(t.lost + q, lost);
      for (int i = 0; i < kWidth<T>; i++)
        if (last[i] != 0) t.last[q + i] = k0 + static_cast<int64_t>(last[i]) - 1;
    }
  }
#endif
}
template <class E>
TW_NOINLINE const E* of_keys(const PairMask& mask, const Acc<E>* weights, E* pairs) {
  using T = Acc<E>;
  if constexpr (!kPairs<E>)
    return weights;
  else if constexpr (kTiled<E>) {
#if defined(TW_HAS_TILES)
    for (int q = 0; q < mask.rows(); q += kGroup)
      tiled::pack_weights(weights + q, kGradQueries, mask.keys(), pairs + q * (kGradKeys / 2),
                          kGradKeys / 2);
#endif
    return pairs;
  } else {
    for (int j = 0; j < mask.keys(); j += 2)
      for (int q = 0; q < mask.groups() * kGroup; q += kWidth<T>) {
        const T* at = weights + j * kGradQueries + q;
        const bool both = j + 1 < mask.keys();
        store_pairs(pairs + j / 2 * kGradQueries + q, load(at),
                    both ? load(at + kGradQueries) : zero<T>());
      }
    return pairs;
  }
}

#include "simd/end.hpp"
