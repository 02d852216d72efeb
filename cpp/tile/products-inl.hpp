// Products of tiles. Every element is made of chains of fused multiply-adds in ascending order,
// begun at zero, so block sizes, register counts and vector widths never reach the bits.
// Micro-kernels are leaves: accumulators never live across a call. An element E is a number or a
// pair of terms; depths and strides count elements, sums are Acc<E>.
#pragma once
#include "tile/segments-inl.hpp"
#include "tile/tiles-inl.hpp"

#include "simd/begin.hpp"

// Registers: 8 x 3 accumulators of 32 (AVX-512), 4 x 3 of 16 elsewhere; 6 x 4 and 6 x 2 for
// products with columns in lanes.
constexpr int kRowBlock = kVectorBytes == 64 ? 8 : 4;
constexpr int kVecBlock = 3;
constexpr int kGradRows = 6;
constexpr int kGradVecs = kVectorBytes == 64 ? 4 : 2;
template <class T>
constexpr int kGradWidth = kGradVecs * kWidth<T>;

// --- Scores: C[j][lane] = sum_d A[j][d] B[d][lane], handed to Epilogue::Column(epilogue,
// register).put(j, value); with two factors the sum goes on over the second ---------

template <class E, int MR, int NR, int COUNT, class Epilogue>
TW_INLINE void scores_block(const Factor<E>* factors, int depth, const Epilogue& epilogue,
                            Acc<E> scale, int j, int n0) {
  using T = Acc<E>;
  Vec<T> acc[MR][NR];
  TW_UNROLL for (int i = 0; i < MR; i++) TW_UNROLL for (int n = 0; n < NR; n++) acc[i][n] =
      zero<T>();
  for (int f = 0; f < COUNT; f++) {
    const int64_t lda = factors[f].lda;
    const E *a = factors[f].a + j * lda, *b = factors[f].b + n0 * kWidth<E>;
    for (int d = 0; d < depth; d++, b += kPanel) {
      Vec<E> x[NR];
      TW_UNROLL for (int n = 0; n < NR; n++) x[n] = load_once(b + n * kWidth<E>);
      TW_UNROLL for (int i = 0; i < MR; i++) {
        const Vec<E> y = broadcast(a + i * lda + d);
        TW_UNROLL for (int n = 0; n < NR; n++) acc[i][n] = multiply_add(y, x[n], acc[i][n]);
      }
    }
  }
  TW_UNROLL for (int n = 0; n < NR; n++) {
    typename Epilogue::Column column(epilogue, n0 + n);
    TW_UNROLL for (int i = 0; i < MR; i++) {
      if constexpr (kFold<E> > 1) acc[i][n] *= set1(scale);
      column.put(j + i, acc[i][n]);
    }
    column.finish();
  }
}

template <class E, int NR, int COUNT, class Epilogue>
TW_NOINLINE void scores_columns(const Factor<E>* factors, int depth, const Epilogue& epilogue,
                                Acc<E> scale, int ja, int jb, int n0) {
  constexpr int MR = NR == 1 ? 2 * kRowBlock : kRowBlock;
  int j = ja;
  auto block = [&](auto rows) __attribute__((always_inline)) {
    scores_block<E, rows(), NR, COUNT>(factors, depth, epilogue, scale, j, n0);
    j += rows();
  };
  while (j + MR <= jb) block(std::integral_constant<int, MR>{});
  if constexpr (MR > 8)
    if (j + 8 <= jb) block(std::integral_constant<int, 8>{});
  if constexpr (MR > 4)
    if (j + 4 <= jb) block(std::integral_constant<int, 4>{});
  if (j + 2 <= jb) block(std::integral_constant<int, 2>{});
  if (j < jb) block(std::integral_constant<int, 1>{});
}

// One segment. The sums of pairs are multiplied by `scale`; of numbers it is a factor of B already.
template <int COUNT, class E, class Epilogue>
TW_INLINE void scores_of(const Factor<E>* factors, int depth, const Epilogue& epilogue,
                         const Segment& s, Acc<E> scale = 1) {
#if defined(TW_HAS_TILES)
  if constexpr (kTiled<E>) return tiled::scores_of<COUNT>(factors, depth, epilogue, s, scale);
#endif
  const int end = s.nb * kRegs<E>;
  for (int n = s.na * kRegs<E>; n < end;) {
    const int left = end - n;
    if (left >= 3 && left != 4) {
      scores_columns<E, 3, COUNT>(factors, depth, epilogue, scale, s.ja, s.jb, n), n += 3;
    } else if (left >= 2) {
      scores_columns<E, 2, COUNT>(factors, depth, epilogue, scale, s.ja, s.jb, n), n += 2;
    } else {
      scores_columns<E, 1, COUNT>(factors, depth, epilogue, scale, s.ja, s.jb, n), n += 1;
    }
  }
}

template <class E, class Epilogue>
TW_INLINE void scores(const E* a, int64_t lda, const E* b, int depth, const Epilogue& epilogue,
                      const Segment& s, Acc<E> scale = 1) {
  const Factor<E> factor{a, lda, b};
  scores_of<1>(&factor, depth, epilogue, s, scale);
}

// The sum of those of two factors that are there (a null `a` is none). False where neither is.
template <class E, class Epilogue>
TW_INLINE bool scores_of_both(Factor<E> x, Factor<E> y, int depth, const Epilogue& epilogue,
                              const Segment& s, Acc<E> scale = 1) {
  const Factor<E> both[] = {x.a ? x : y, y};
  if (x.a && y.a)
    scores_of<2>(both, depth, epilogue, s, scale);
  else if (x.a || y.a)
    scores_of<1>(both, depth, epilogue, s, scale);
  return x.a || y.a;
}

// --- Weighted sum: C[d][lane] = C alpha + sum_j A[j][d] B[j][lane]; with two factors the sum goes
// on over the second. Rows of A and B are elements: with pairs, those of keys 2j and 2j + 1. Hidden
// weights are +0 -------

// Keys of one chain. delta = rowsum(do o) inherits the error of o, and dq that of delta times the
// mean key: chains of 64 keys halve the error of o and dq on real heads against chains of 256,
// for 1.5 % of the time.
constexpr int kChainKeys = 64;

// What a lane leaves out of a run of keys: nothing, elements it sees no key of, or of the others
// also the values of the hidden key, which may not be finite.
enum class Hidden { kNothing, kElements, kHalves };

template <class E, int MR, int NA, int NB, Hidden HIDDEN>
TW_INLINE void weighted_run(Vec<Acc<E>> (&acc)[MR][kVecBlock], const E* v, int64_t ldv, const E* p,
                            const uint16_t* words, int ja, int jb, int n0) {
  constexpr int kKeys = kFold<E>;
  v += ja / kKeys * ldv;
  p += int64_t{ja / kKeys} * kPanel;
  for (int j = ja; j < jb; j += kKeys, v += ldv, p += kPanel) {
    Vec<E> x[kVecBlock];
    TW_UNROLL for (int n = NA; n < NB; n++) x[n] = load_once(p + n * kWidth<E>);
    if constexpr (HIDDEN != Hidden::kNothing) {
      Lanes<E> m[kVecBlock];
      [[maybe_unused]] Vec<E> seen[kVecBlock];
      TW_UNROLL for (int n = NA; n < NB; n++) {
        m[n] = edge_lanes<E>(words, j, n0 + n);
        if constexpr (kKeys == 2) {
          const Lanes<E> second = j + 1 < jb ? edge_lanes<E>(words, j + 1, n0 + n) : Lanes<E>{};
          if constexpr (HIDDEN == Hidden::kHalves) seen[n] = seen_halves(m[n], second);
          m[n] |= second;
        }
      }
      TW_UNROLL for (int i = 0; i < MR; i++) {
        const Vec<E> y = broadcast(v + i);
        TW_UNROLL for (int n = NA; n < NB; n++) {
          if constexpr (HIDDEN == Hidden::kHalves)
            acc[i][n] = multiply_add_where(m[n], y & seen[n], x[n], acc[i][n]);
          else
            acc[i][n] = multiply_add_where(m[n], y, x[n], acc[i][n]);
        }
      }
    } else {
      TW_UNROLL for (int i = 0; i < MR; i++) {
        const Vec<E> y = broadcast(v + i);
        TW_UNROLL for (int n = NA; n < NB; n++) acc[i][n] = multiply_add(y, x[n], acc[i][n]);
      }
    }
  }
}

// Keys [begin, begin + kChainKeys) of the tile; the first such run rescales C even where it sees
// nothing. Columns from d, registers from n0.
template <class E, int MR, int COUNT>
TW_INLINE void weighted_chain(const Factor<E>* factors, const Run& run, int begin, int d, Acc<E>* c,
                              const Acc<E>* alpha, int n0) {
  using T = Acc<E>;
  Vec<T> acc[MR][kVecBlock];
  TW_UNROLL for (int i = 0; i < MR; i++) TW_UNROLL for (int n = 0; n < kVecBlock; n++) acc[i][n] =
      zero<T>();
  bool some = begin == 0;
  for (int f = 0; f < COUNT; f++) {
    const int64_t ldv = factors[f].lda;
    const E *v = factors[f].a + d, *p = factors[f].b + n0 * kWidth<E>;
    for (int k = 0; k < run.count; k++) {
      const Segment& s = run.segments[k];
      const int na = std::max(s.na * kRegs<E> - n0, 0),
                nb = std::min(s.nb * kRegs<E> - n0, kVecBlock);
      const int ja = std::max(s.ja, begin), jb = std::min(s.jb, begin + kChainKeys);
      if (na >= nb || ja >= jb) continue;
      some = true;
      auto go = [&](auto a, auto b) __attribute__((always_inline)) {
        if (!s.edge) {
          weighted_run<E, MR, a(), b(), Hidden::kNothing>(acc, v, ldv, p, run.words, ja, jb, n0);
          return;
        }
        if constexpr (kFold<E> > 1)
          if (!run.finite) {
            weighted_run<E, MR, a(), b(), Hidden::kHalves>(acc, v, ldv, p, run.words, ja, jb, n0);
            return;
          }
        weighted_run<E, MR, a(), b(), Hidden::kElements>(acc, v, ldv, p, run.words, ja, jb, n0);
      };
#define TW_RUN(A, B)                                                        \
  case A * 4 + B:                                                           \
    go(std::integral_constant<int, A>{}, std::integral_constant<int, B>{}); \
    break;
      switch (na * 4 + nb) {
        TW_RUN(0, 1) TW_RUN(0, 2) TW_RUN(0, 3) TW_RUN(1, 2) TW_RUN(1, 3) TW_RUN(2, 3)
      }
#undef TW_RUN
    }
  }
  if (!some) return;
  TW_UNROLL for (int n = 0; n < kVecBlock; n++) {
    const Vec<T> al = begin == 0 ? load(alpha + n * kWidth<T>) : splat<T>(1);
    TW_UNROLL for (int i = 0; i < MR; i++) {
      T* to = c + int64_t{d + i} * kPanel + n * kWidth<T>;
      store(to, fma(load(to), al, acc[i][n]));
    }
  }
}

template <class E, int MR, int COUNT>
TW_INLINE void weighted_block(const Factor<E>* factors, const Run& run, int d, Acc<E>* c,
                              const Acc<E>* alpha, int n0) {
  const int end = run.segments[run.count - 1].jb;
  for (int begin = 0; begin < end; begin += kChainKeys)
    weighted_chain<E, MR, COUNT>(factors, run, begin, d, c, alpha, n0);
}

// Segments count keys: of pairs ja is even, and a missing last key has weight and value +0.
template <class E, int COUNT>
TW_NOINLINE void weighted_sum(const Factor<E>* factors, int columns, const uint16_t* words,
                              const Segment* segments, int count, Acc<E>* c, const Acc<E>* alpha,
                              bool finite = true) {
  const Run run{words, segments, count, finite};
#if defined(TW_HAS_TILES)
  if constexpr (kTiled<E>) return tiled::weighted_sum<COUNT>(factors, columns, run, c, alpha);
#endif
  for (int n0 = 0; n0 < kPanelVecs<E>; n0 += kVecBlock) {
    auto block = [&](auto rows, int d) __attribute__((always_inline)) {
      weighted_block<E, rows(), COUNT>(factors, run, d, c + n0 * kWidth<E>, alpha + n0 * kWidth<E>,
                                       n0);
    };
    int d = 0;
    for (; d + kRowBlock <= columns; d += kRowBlock)
      block(std::integral_constant<int, kRowBlock>{}, d);
    if constexpr (kRowBlock > 4)
      if (d + 4 <= columns) block(std::integral_constant<int, 4>{}, d), d += 4;
    if (d + 2 <= columns) block(std::integral_constant<int, 2>{}, d), d += 2;
    if (d < columns) block(std::integral_constant<int, 1>{}, d);
  }
}

// --- Gradients: C[i][column] += sum_k A[i][k] B[k][column], columns in lanes; A is read transposed
// where TRANSPOSED -------

template <class E, int MR, int NR, bool TRANSPOSED>
TW_INLINE void add_block(const E* a, int64_t lda, const E* b, int64_t ldb, int depth, Acc<E>* c,
                         int64_t ldc) {
  using T = Acc<E>;
  Vec<T> acc[MR][NR];
  TW_UNROLL for (int i = 0; i < MR; i++) TW_UNROLL for (int n = 0; n < NR; n++) acc[i][n] =
      zero<T>();
  for (int k = 0; k < depth; k++, b += ldb) {
    Vec<E> x[NR];
    TW_UNROLL for (int n = 0; n < NR; n++) x[n] = load_once(b + n * kWidth<E>);
    TW_UNROLL for (int i = 0; i < MR; i++) {
      const Vec<E> y = broadcast(TRANSPOSED ? a + i : a + i * lda + k);
      TW_UNROLL for (int n = 0; n < NR; n++) acc[i][n] = multiply_add(y, x[n], acc[i][n]);
    }
    if constexpr (TRANSPOSED) a += lda;
  }
  TW_UNROLL for (int i = 0; i < MR; i++) TW_UNROLL for (int n = 0; n < NR; n++) {
    T* to = c + i * ldc + n * kWidth<E>;
    store(to, load(to) + acc[i][n]);
  }
}

template <class E, int NR, bool TRANSPOSED>
TW_NOINLINE void add_rows(int rows, const E* a, int64_t lda, const E* b, int64_t ldb, int depth,
                          Acc<E>* c, int64_t ldc) {
  switch (rows) {
    case 6:
      return add_block<E, 6, NR, TRANSPOSED>(a, lda, b, ldb, depth, c, ldc);
    case 5:
      return add_block<E, 5, NR, TRANSPOSED>(a, lda, b, ldb, depth, c, ldc);
    case 4:
      return add_block<E, 4, NR, TRANSPOSED>(a, lda, b, ldb, depth, c, ldc);
    case 3:
      return add_block<E, 3, NR, TRANSPOSED>(a, lda, b, ldb, depth, c, ldc);
    case 2:
      return add_block<E, 2, NR, TRANSPOSED>(a, lda, b, ldb, depth, c, ldc);
    default:
      return add_block<E, 1, NR, TRANSPOSED>(a, lda, b, ldb, depth, c, ldc);
  }
}

// At most kGradRows rows and kGradWidth columns (a multiple of the width).
template <class E, bool TRANSPOSED>
TW_INLINE void add_product(int rows, int columns, const E* a, int64_t lda, const E* b, int64_t ldb,
                           int depth, Acc<E>* c, int64_t ldc) {
  if (depth <= 0) return;
  switch (columns / kWidth<E>) {
    case 1:
      return add_rows<E, 1, TRANSPOSED>(rows, a, lda, b, ldb, depth, c, ldc);
    case 2:
      return add_rows<E, 2, TRANSPOSED>(rows, a, lda, b, ldb, depth, c, ldc);
    case 3:
      if constexpr (kGradVecs > 2)
        return add_rows<E, 3, TRANSPOSED>(rows, a, lda, b, ldb, depth, c, ldc);
      break;
    default:
      if constexpr (kGradVecs > 2)
        return add_rows<E, 4, TRANSPOSED>(rows, a, lda, b, ldb, depth, c, ldc);
  }
}

#include "simd/end.hpp"
