// Products of matrices of any size, made of the blocks of products-inl.hpp. Tokens stand in panels
// of kPanel: logits z[class][lane] = W h^T, gradients dh += dz^T W and dW += dz h, all without a
// transposed copy of anything large. Sums are chains of fixed lengths, counted from the first
// column, class or token, that are added in their order, so neither blocks nor threads reach the
// bits. An element E is a number or a pair of terms.
#pragma once
#include "tile/products-inl.hpp"
#include "tile/rows-inl.hpp"

#include "simd/begin.hpp"

constexpr int kChainColumns = 256;  // elements of a chain of a logit
constexpr int kChainClasses = 192;  // terms of a chain of dh
constexpr int kChainPanels = 4;     // panels of tokens of a chain of dW
constexpr int kChainTokens = kChainPanels * kPanel;
template <class E>
constexpr int kPanelElements = kPanel / kFold<E>;  // of a row of gradients over tokens

// --- Logits: z[j][lane] = sum_k A[j][k] B[k][lane] ---------

// Sums that are kept or added to what is there.
template <class T, bool SET>
struct KeepSums {
  T* z;
  struct Column {
    T* z;
    TW_MEMBER Column(const KeepSums& e, int n) : z(e.z + n * kWidth<T>) {}
    TW_MEMBER void put(int j, Vec<T> x) {
      T* to = z + int64_t{j} * kPanel;
      store(to, SET ? x : load(to) + x);
    }
    TW_MEMBER void finish() {}
  };
};

// Terms [k0, k0 + depth) of `rows` rows; the first chain of all sets z.
template <class E>
TW_INLINE void add_logits(const E* a, int64_t lda, int rows, const E* panel, int depth, bool set,
                          Acc<E>* z) {
  using T = Acc<E>;
  const Segment all{0, rows, 0, kPanelGroups, false};
  if (set)
    scores<E>(a, lda, panel, depth, KeepSums<T, true>{z}, all);
  else
    scores<E>(a, lda, panel, depth, KeepSums<T, false>{z}, all);
}

// --- Gradients of rows: C[i][column] += A B with columns in lanes. Where a row's columns end
// inside a register, the block is made beside and copied ---------

// f(to, ldc, columns) for a block of C, whose columns are then a multiple of the width
template <class T, class F>
TW_INLINE void with_whole_registers(T* c, int64_t ldc, int rows, int columns, const F& f) {
  if (columns % kWidth<T> == 0) return f(c, ldc, columns);
  alignas(64) T whole[kGradRows * kGradWidth<T>];
  std::memset(whole, 0, sizeof whole);
  for (int r = 0; r < rows; r++)
    std::memcpy(whole + r * kGradWidth<T>, c + r * ldc, sizeof(T) * static_cast<size_t>(columns));
  f(whole, int64_t{kGradWidth<T>}, (columns + kWidth<T> - 1) / kWidth<T> * kWidth<T>);
  for (int r = 0; r < rows; r++)
    std::memcpy(c + r * ldc, whole + r * kGradWidth<T>, sizeof(T) * static_cast<size_t>(columns));
}

// Terms of a chain that follow one another: columns of A, and rows of a block of kGradWidth
// columns.
template <class E>
struct TermRun {
  const E *a, *b;
  int count;
};

// One chain over runs. A is [term][lane of a panel] where TRANSPOSED, else [row][term of a panel];
// the block's first row is `offset` from where a run begins. `set`: C holds nothing.
template <class E, int MR, int NR, bool TRANSPOSED>
TW_INLINE void runs_block(const TermRun<E>* runs, int count, int64_t offset, bool set, Acc<E>* c,
                          int64_t ldc) {
  using T = Acc<E>;
  constexpr int kRow = TRANSPOSED ? 1 : kPanelElements<E>, kTerm = TRANSPOSED ? kPanel : 1;
  Vec<T> acc[MR][NR];
  TW_UNROLL for (int i = 0; i < MR; i++) TW_UNROLL for (int n = 0; n < NR; n++) acc[i][n] =
      zero<T>();
  TW_UNROLL for (int i = 0; i < MR; i++) TW_UNROLL for (int n = 0; n < NR; n++)
      prefetch(c + i * ldc + n * kWidth<E>);
  for (; count > 0; count--, runs++) {
    const E *a = runs->a + offset, *b = runs->b;
    for (int k = 0; k < runs->count; k++, a += kTerm, b += kGradWidth<E>) {
      Vec<E> x[NR];
      TW_UNROLL for (int n = 0; n < NR; n++) x[n] = load_once(b + n * kWidth<E>);
      TW_UNROLL for (int i = 0; i < MR; i++) {
        const Vec<E> y = broadcast(a + i * kRow);
        TW_UNROLL for (int n = 0; n < NR; n++) acc[i][n] = multiply_add(y, x[n], acc[i][n]);
      }
    }
  }
  TW_UNROLL for (int i = 0; i < MR; i++) TW_UNROLL for (int n = 0; n < NR; n++) {
    T* to = c + i * ldc + n * kWidth<E>;
    store(to, set ? acc[i][n] : load(to) + acc[i][n]);
  }
}

template <class E, int NR, bool TRANSPOSED>
TW_NOINLINE void runs_rows(int rows, const TermRun<E>* runs, int count, int64_t offset, bool set,
                           Acc<E>* c, int64_t ldc) {
  auto block = [&](auto mr) __attribute__((always_inline)) {
    runs_block<E, mr(), NR, TRANSPOSED>(runs, count, offset, set, c, ldc);
  };
  switch (rows) {
    case 6:
      return block(std::integral_constant<int, 6>{});
    case 5:
      return block(std::integral_constant<int, 5>{});
    case 4:
      return block(std::integral_constant<int, 4>{});
    case 3:
      return block(std::integral_constant<int, 3>{});
    case 2:
      return block(std::integral_constant<int, 2>{});
    default:
      return block(std::integral_constant<int, 1>{});
  }
}

// At most kGradRows rows and kGradWidth columns, a multiple of the width.
template <class E, bool TRANSPOSED>
TW_INLINE void add_runs(int rows, int columns, const TermRun<E>* runs, int count, int64_t offset,
                        bool set, Acc<E>* c, int64_t ldc) {
  auto block = [&](auto nr) __attribute__((always_inline)) {
    runs_rows<E, nr(), TRANSPOSED>(rows, runs, count, offset, set, c, ldc);
  };
  switch (columns / kWidth<E>) {
    case 1:
      return block(std::integral_constant<int, 1>{});
    case 2:
      return block(std::integral_constant<int, 2>{});
    case 3:
      if constexpr (kGradVecs > 2) return block(std::integral_constant<int, 3>{});
      break;
    default:
      if constexpr (kGradVecs > 2) return block(std::integral_constant<int, 4>{});
  }
}

// Which kFilledClasses classes of a tile have gradients other than zero, a bit each. Leaving the
// others out leaves the bits of all sums.
constexpr int kFilledClasses = 16;
constexpr uint32_t kAllFilled = ~0u;

// dh[token][column] += sum over classes of dz[class][token] W[class][column] for the first `tokens`
// of a panel, in one chain over `depth` elements of classes; `weights` is a block of kGradWidth
// columns.
template <class E>
TW_INLINE void add_hidden_gradient(const E* dz, int tokens, const E* weights, int depth,
                                   uint32_t filled, int columns, Acc<E>* dh, int64_t ldc) {
  constexpr int kStep = kFilledClasses / kFold<E>;
  TermRun<E> runs[kChainClasses / kFilledClasses];
  int count = 0;
  for (int k = 0, bit = 0; k < depth; k += kStep, bit++) {
    if (!(filled >> bit & 1)) continue;
    const int left = std::min(kStep, depth - k);
    const E* a = dz + int64_t{k} * kPanel;
    if (count && runs[count - 1].a + int64_t{runs[count - 1].count} * kPanel == a)
      runs[count - 1].count += left;
    else
      runs[count++] = {a, weights + int64_t{k} * kGradWidth<E>, left};
  }
  if (count == 0) return;
  for (int i = 0; i < tokens; i += kGradRows) {
    const int rows = std::min(tokens - i, kGradRows);
    with_whole_registers(dh + i * ldc, ldc, rows, columns,
                         [&](auto* c, int64_t ld, int n) __attribute__((always_inline)) {
                           add_runs<E, true>(rows, n, runs, count, i, false, c, ld);
                         });
  }
}

// dW[class][column] += sum over tokens of dz[class][token] h[token][column]; panels of dz are
// `next` elements apart, filled(panel) tells of each, and `hidden` is a block of kGradWidth
// columns. `set`: dW holds nothing.
template <class E, class Filled>
TW_INLINE void add_weight_gradient(const E* dz, int64_t next, int classes, int panels,
                                   const Filled& filled, const E* hidden, int columns, bool set,
                                   Acc<E>* dw, int64_t ldc) {
  for (int i = 0; i < classes; i += kGradRows) {
    const int rows = std::min(classes - i, kGradRows);
    const uint32_t bits =
        1u << i / kFilledClasses | 1u << (i + rows - 1) / kFilledClasses;  // of the block's rows
    with_whole_registers(dw + i * ldc, ldc, rows, columns,
                         [&](auto* c, int64_t ld, int n) __attribute__((always_inline)) {
                           for (int p = 0; p < panels; p += kChainPanels) {
                             TermRun<E> runs[kChainPanels];
                             int count = 0;
                             for (int q = p; q < std::min(panels, p + kChainPanels); q++)
                               if (filled(q) & bits)
                                 runs[count++] = {
                                     dz + q * next,
                                     hidden + int64_t{q} * kPanelElements<E> * kGradWidth<E>,
                                     kPanelElements<E>};
                             const bool first = set && p == 0;
                             if (count || first)
                               add_runs<E, false>(rows, n, runs, count,
                                                  int64_t{i} * kPanelElements<E>, first, c, ld);
                           }
                         });
  }
}

#include "simd/end.hpp"
