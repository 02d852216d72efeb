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
// p as it was in o: of pairs, with the weight exp2(s - m) rounded as the forward pass did it, so
// that the sum of p dp over keys is the one in delta.
template <class E>
TW_INLINE Vec<Acc<E>> p_of_o(Vec<Acc<E>> p, Vec<Acc<E>> l, Vec<Acc<E>> inverse_l) {
  if constexpr (kPairs<E>)
    return rounded_to_bf16(p * l) * inverse_l;
  else
    return p;
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

// ds = p (dp - delta), 0 where masked
template <class E, bool EDGE>
struct StoreGradient {
  using T = Acc<E>;
  T* ds;
  const T *p, *delta, *l, *inverse_l;
  const uint16_t* words;
  struct Column {
    const StoreGradient& e;
    int n;
    Vec<T> delta, l, inverse_l;
    TW_MEMBER Column(const StoreGradient& epilogue, int reg)
        : e(epilogue), n(reg), delta(load(e.delta + n * kWidth<T>)) {
      if constexpr (kPairs<E>) {
        l = load(e.l + n * kWidth<T>);
        inverse_l = load(e.inverse_l + n * kWidth<T>);
      }
    }
    TW_MEMBER void put(int j, Vec<T> x) {
      const int64_t at = int64_t{j} * kGradQueries + n * kWidth<T>;
      Vec<T> d = (x - delta) * p_of_o<E>(load(e.p + at), l, inverse_l);
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
  // of pairs: exp(log_l) and 1 over it, the sums over keys that rounding ds took away so far, and
  // the last key seen
  T *l, *inverse_l, *lost;
  int64_t* last;
};

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
// Rounds ds to bf16 so that its sum over keys, often zero, stays: it is what a common part of the
// keys is multiplied by. An eighth of what was lost so far goes to each key that the query sees,
// which makes the rounding 3 % coarser; what is left in the end goes to the last of them.
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
