// Products of tiles. Every element is made of chains of fused multiply-adds in ascending order,
// begun at zero, so block sizes, register counts and vector widths never reach the bits.
// Micro-kernels are leaves: accumulators never live across a call.
#pragma once
#include "math/softmax_state-inl.hpp"
#include "tile/pack-inl.hpp"

#include "simd/begin.hpp"

// Registers: 8 x 3 accumulators of 32 (AVX-512), 4 x 3 of 16 elsewhere; 6 x 4 and 6 x 2 for
// products with columns in lanes.
constexpr int kRowBlock = kVectorBytes == 64 ? 8 : 4;
constexpr int kVecBlock = 3;
constexpr int kGradRows = 6;
constexpr int kGradVecs = kVectorBytes == 64 ? 4 : 2;
template <class T>
constexpr int kGradWidth = kGradVecs * kWidth<T>;

// A run of keys [ja, jb) of a tile seen by the panel's groups [na, nb). `edge`: some pairs in it
// are masked.
struct Segment {
  int ja, jb, na, nb;
  bool edge;
};

// The lanes of register n of a panel that see key j: `words` holds kPanelGroups words of 16 lanes a
// key.
template <class T>
TW_INLINE Lanes<T> edge_lanes(const uint16_t* words, int j, int n) {
  const int lane = n * kWidth<T>;
  return lanes<T>(
      static_cast<uint32_t>(words[j * kPanelGroups + lane / kGroup] >> (lane % kGroup)) &
      ((1u << kWidth<T>)-1));
}

// --- Scores: C[j][lane] = sum_d A[j][d] B[d][lane], handed to Epilogue::Column(epilogue,
// register).put(j, value); with two factors the sum goes on over the second ---------

// `a` is the tile's first key, `b` the panel.
template <class T>
struct Factor {
  const T* a;
  int64_t lda;
  const T* b;
};

template <class T, int MR, int NR, int COUNT, class Epilogue>
TW_INLINE void scores_block(const Factor<T>* factors, int depth, const Epilogue& epilogue, int j,
                            int n0) {
  Vec<T> acc[MR][NR];
  TW_UNROLL for (int i = 0; i < MR; i++) TW_UNROLL for (int n = 0; n < NR; n++) acc[i][n] =
      zero<T>();
  for (int f = 0; f < COUNT; f++) {
    const int64_t lda = factors[f].lda;
    const T *a = factors[f].a + j * lda, *b = factors[f].b + n0 * kWidth<T>;
    for (int d = 0; d < depth; d++, b += kPanel) {
      Vec<T> x[NR];
      TW_UNROLL for (int n = 0; n < NR; n++) x[n] = load_once(b + n * kWidth<T>);
      TW_UNROLL for (int i = 0; i < MR; i++) {
        const Vec<T> y = set1(a[i * lda + d]);
        TW_UNROLL for (int n = 0; n < NR; n++) acc[i][n] = fma(y, x[n], acc[i][n]);
      }
    }
  }
  TW_UNROLL for (int n = 0; n < NR; n++) {
    typename Epilogue::Column column(epilogue, n0 + n);
    TW_UNROLL for (int i = 0; i < MR; i++) column.put(j + i, acc[i][n]);
    column.finish();
  }
}

template <class T, int NR, int COUNT, class Epilogue>
TW_NOINLINE void scores_columns(const Factor<T>* factors, int depth, const Epilogue& epilogue,
                                int ja, int jb, int n0) {
  constexpr int MR = NR == 1 ? 2 * kRowBlock : kRowBlock;
  int j = ja;
  for (; j + MR <= jb; j += MR) scores_block<T, MR, NR, COUNT>(factors, depth, epilogue, j, n0);
  if constexpr (MR > 8)
    if (j + 8 <= jb) scores_block<T, 8, NR, COUNT>(factors, depth, epilogue, j, n0), j += 8;
  if constexpr (MR > 4)
    if (j + 4 <= jb) scores_block<T, 4, NR, COUNT>(factors, depth, epilogue, j, n0), j += 4;
  if (j + 2 <= jb) scores_block<T, 2, NR, COUNT>(factors, depth, epilogue, j, n0), j += 2;
  if (j < jb) scores_block<T, 1, NR, COUNT>(factors, depth, epilogue, j, n0);
}

// One segment.
template <int COUNT, class T, class Epilogue>
TW_INLINE void scores_of(const Factor<T>* factors, int depth, const Epilogue& epilogue,
                         const Segment& s) {
  const int end = s.nb * kRegs<T>;
  for (int n = s.na * kRegs<T>; n < end;) {
    const int left = end - n;
    if (left >= 3 && left != 4) {
      scores_columns<T, 3, COUNT>(factors, depth, epilogue, s.ja, s.jb, n), n += 3;
    } else if (left >= 2) {
      scores_columns<T, 2, COUNT>(factors, depth, epilogue, s.ja, s.jb, n), n += 2;
    } else {
      scores_columns<T, 1, COUNT>(factors, depth, epilogue, s.ja, s.jb, n), n += 1;
    }
  }
}

template <class T, class Epilogue>
TW_INLINE void scores(const T* a, int64_t lda, const T* b, int depth, const Epilogue& epilogue,
                      const Segment& s) {
  const Factor<T> factor{a, lda, b};
  scores_of<1>(&factor, depth, epilogue, s);
}

// The sum of those of two factors that are there (a null `a` is none). False where neither is.
template <class T, class Epilogue>
TW_INLINE bool scores_of_both(Factor<T> x, Factor<T> y, int depth, const Epilogue& epilogue,
                              const Segment& s) {
  const Factor<T> both[] = {x.a ? x : y, y};
  if (x.a && y.a)
    scores_of<2>(both, depth, epilogue, s);
  else if (x.a || y.a)
    scores_of<1>(both, depth, epilogue, s);
  return x.a || y.a;
}

// --- Weighted sum: C[d][lane] = C alpha + sum_j A[j][d] B[j][lane]; with two factors the sum goes
// on over the second ---------

// Keys of one chain. delta = rowsum(do o) inherits the error of o, and dq that of delta times the
// mean key: chains of 64 keys halve the error of o and dq on real heads against chains of 256,
// for 1.5 % of the time.
constexpr int kChainKeys = 64;

template <class T, int MR, int NA, int NB, bool EDGE>
TW_INLINE void weighted_run(Vec<T> (&acc)[MR][kVecBlock], const T* v, int64_t ldv, const T* p,
                            const uint16_t* words, int ja, int jb, int n0) {
  v += ja * ldv;
  p += int64_t{ja} * kPanel;
  for (int j = ja; j < jb; j++, v += ldv, p += kPanel) {
    Vec<T> x[kVecBlock];
    TW_UNROLL for (int n = NA; n < NB; n++) x[n] = load_once(p + n * kWidth<T>);
    if constexpr (EDGE) {
      Lanes<T> m[kVecBlock];
      TW_UNROLL for (int n = NA; n < NB; n++) m[n] = edge_lanes<T>(words, j, n0 + n);
      TW_UNROLL for (int i = 0; i < MR; i++) {
        const Vec<T> y = set1(v[i]);
        TW_UNROLL for (int n = NA; n < NB; n++) acc[i][n] = fma_where(m[n], y, x[n], acc[i][n]);
      }
    } else {
      TW_UNROLL for (int i = 0; i < MR; i++) {
        const Vec<T> y = set1(v[i]);
        TW_UNROLL for (int n = NA; n < NB; n++) acc[i][n] = fma(y, x[n], acc[i][n]);
      }
    }
  }
}

// Keys [begin, begin + kChainKeys) of the tile; the first such run rescales C even where it sees
// nothing. Columns from d, registers from n0.
template <class T, int MR, int COUNT>
TW_INLINE void weighted_chain(const Factor<T>* factors, const uint16_t* words,
                              const Segment* segments, int count, int begin, int d, T* c,
                              const T* alpha, int n0) {
  Vec<T> acc[MR][kVecBlock];
  TW_UNROLL for (int i = 0; i < MR; i++) TW_UNROLL for (int n = 0; n < kVecBlock; n++) acc[i][n] =
      zero<T>();
  bool some = begin == 0;
  for (int f = 0; f < COUNT; f++) {
    const int64_t ldv = factors[f].lda;
    const T *v = factors[f].a + d, *p = factors[f].b + n0 * kWidth<T>;
    for (int k = 0; k < count; k++) {
      const Segment& s = segments[k];
      const int na = std::max(s.na * kRegs<T> - n0, 0),
                nb = std::min(s.nb * kRegs<T> - n0, kVecBlock);
      const int ja = std::max(s.ja, begin), jb = std::min(s.jb, begin + kChainKeys);
      if (na >= nb || ja >= jb) continue;
      some = true;
#define TW_RUN(A, B)                                                       \
  case A * 4 + B:                                                          \
    if (s.edge)                                                            \
      weighted_run<T, MR, A, B, true>(acc, v, ldv, p, words, ja, jb, n0);  \
    else                                                                   \
      weighted_run<T, MR, A, B, false>(acc, v, ldv, p, words, ja, jb, n0); \
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

template <class T, int MR, int COUNT>
TW_INLINE void weighted_block(const Factor<T>* factors, const uint16_t* words,
                              const Segment* segments, int count, int d, T* c, const T* alpha,
                              int n0) {
  const int end = segments[count - 1].jb;
  for (int begin = 0; begin < end; begin += kChainKeys)
    weighted_chain<T, MR, COUNT>(factors, words, segments, count, begin, d, c, alpha, n0);
}

template <class T, int COUNT>
TW_NOINLINE void weighted_sum(const Factor<T>* factors, int columns, const uint16_t* words,
                              const Segment* segments, int count, T* c, const T* alpha) {
  for (int n0 = 0; n0 < kPanelVecs<T>; n0 += kVecBlock) {
    auto block = [&](auto rows, int d) __attribute__((always_inline)) {
      weighted_block<T, rows(), COUNT>(factors, words, segments, count, d, c + n0 * kWidth<T>,
                                       alpha + n0 * kWidth<T>, n0);
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

template <class T, int MR, int NR, bool TRANSPOSED>
TW_INLINE void add_block(const T* a, int64_t lda, const T* b, int64_t ldb, int depth, T* c,
                         int64_t ldc) {
  Vec<T> acc[MR][NR];
  TW_UNROLL for (int i = 0; i < MR; i++) TW_UNROLL for (int n = 0; n < NR; n++) acc[i][n] =
      zero<T>();
  for (int k = 0; k < depth; k++, b += ldb) {
    Vec<T> x[NR];
    TW_UNROLL for (int n = 0; n < NR; n++) x[n] = load_once(b + n * kWidth<T>);
    TW_UNROLL for (int i = 0; i < MR; i++) {
      const Vec<T> y = set1(TRANSPOSED ? a[i] : a[i * lda + k]);
      TW_UNROLL for (int n = 0; n < NR; n++) acc[i][n] = fma(y, x[n], acc[i][n]);
    }
    if constexpr (TRANSPOSED) a += lda;
  }
  TW_UNROLL for (int i = 0; i < MR; i++) TW_UNROLL for (int n = 0; n < NR; n++) {
    T* to = c + i * ldc + n * kWidth<T>;
    store(to, load(to) + acc[i][n]);
  }
}

template <class T, int NR, bool TRANSPOSED>
TW_NOINLINE void add_rows(int rows, const T* a, int64_t lda, const T* b, int64_t ldb, int depth,
                          T* c, int64_t ldc) {
  switch (rows) {
    case 6:
      return add_block<T, 6, NR, TRANSPOSED>(a, lda, b, ldb, depth, c, ldc);
    case 5:
      return add_block<T, 5, NR, TRANSPOSED>(a, lda, b, ldb, depth, c, ldc);
    case 4:
      return add_block<T, 4, NR, TRANSPOSED>(a, lda, b, ldb, depth, c, ldc);
    case 3:
      return add_block<T, 3, NR, TRANSPOSED>(a, lda, b, ldb, depth, c, ldc);
    case 2:
      return add_block<T, 2, NR, TRANSPOSED>(a, lda, b, ldb, depth, c, ldc);
    default:
      return add_block<T, 1, NR, TRANSPOSED>(a, lda, b, ldb, depth, c, ldc);
  }
}

// At most kGradRows rows and kGradWidth columns (a multiple of the width).
template <class T, bool TRANSPOSED>
TW_INLINE void add_product(int rows, int columns, const T* a, int64_t lda, const T* b, int64_t ldb,
                           int depth, T* c, int64_t ldc) {
  if (depth <= 0) return;
  switch (columns / kWidth<T>) {
    case 1:
      return add_rows<T, 1, TRANSPOSED>(rows, a, lda, b, ldb, depth, c, ldc);
    case 2:
      return add_rows<T, 2, TRANSPOSED>(rows, a, lda, b, ldb, depth, c, ldc);
    case 3:
      if constexpr (kGradVecs > 2)
        return add_rows<T, 3, TRANSPOSED>(rows, a, lda, b, ldb, depth, c, ldc);
      break;
    default:
      if constexpr (kGradVecs > 2)
        return add_rows<T, 4, TRANSPOSED>(rows, a, lda, b, ldb, depth, c, ldc);
  }
}

#include "simd/end.hpp"
