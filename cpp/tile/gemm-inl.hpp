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
constexpr int kChainClasses = 384;  // terms of a chain of dh
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

// dh[token][column] += sum over classes of dz[class][token] W[class][column] for the first `tokens`
// of a panel, in one chain; `weights` is a block of kGradWidth columns.
template <class E>
TW_INLINE void add_hidden_gradient(const E* dz, int tokens, const E* weights, int depth,
                                   int columns, Acc<E>* dh, int64_t ldc) {
  for (int i = 0; i < tokens; i += kGradRows) {
    const int rows = std::min(tokens - i, kGradRows);
    with_whole_registers(dh + i * ldc, ldc, rows, columns,
                         [&](auto* c, int64_t ld, int n) __attribute__((always_inline)) {
                           add_product<E, true>(rows, n, dz + i, kPanel, weights, kGradWidth<E>,
                                                depth, c, ld);
                         });
  }
}

// One chain over panels `next` apart: C[i][column] += sum over tokens of A[i][token] B[token].
template <class E, int MR, int NR>
TW_INLINE void weight_block(const E* a, int64_t next, int panels, const E* b, bool set, Acc<E>* c,
                            int64_t ldc) {
  using T = Acc<E>;
  Vec<T> acc[MR][NR];
  TW_UNROLL for (int i = 0; i < MR; i++) TW_UNROLL for (int n = 0; n < NR; n++) acc[i][n] =
      zero<T>();
  TW_UNROLL for (int i = 0; i < MR; i++) TW_UNROLL for (int n = 0; n < NR; n++)
      prefetch(c + i * ldc + n * kWidth<E>);
  for (int p = 0; p < panels; p++, a += next)
    for (int k = 0; k < kPanelElements<E>; k++, b += kGradWidth<E>) {
      Vec<E> x[NR];
      TW_UNROLL for (int n = 0; n < NR; n++) x[n] = load_once(b + n * kWidth<E>);
      TW_UNROLL for (int i = 0; i < MR; i++) {
        const Vec<E> y = broadcast(a + i * kPanelElements<E> + k);
        TW_UNROLL for (int n = 0; n < NR; n++) acc[i][n] = multiply_add(y, x[n], acc[i][n]);
      }
    }
  TW_UNROLL for (int i = 0; i < MR; i++) TW_UNROLL for (int n = 0; n < NR; n++) {
    T* to = c + i * ldc + n * kWidth<E>;
    store(to, set ? acc[i][n] : load(to) + acc[i][n]);
  }
}

template <class E, int NR>
TW_NOINLINE void weight_rows(int rows, const E* a, int64_t next, int panels, const E* b, bool set,
                             Acc<E>* c, int64_t ldc) {
  switch (rows) {
    case 6:
      return weight_block<E, 6, NR>(a, next, panels, b, set, c, ldc);
    case 5:
      return weight_block<E, 5, NR>(a, next, panels, b, set, c, ldc);
    case 4:
      return weight_block<E, 4, NR>(a, next, panels, b, set, c, ldc);
    case 3:
      return weight_block<E, 3, NR>(a, next, panels, b, set, c, ldc);
    case 2:
      return weight_block<E, 2, NR>(a, next, panels, b, set, c, ldc);
    default:
      return weight_block<E, 1, NR>(a, next, panels, b, set, c, ldc);
  }
}

// At most kGradRows classes and kGradWidth columns, a multiple of the width.
template <class E>
TW_INLINE void add_weight_chain(int rows, int columns, const E* a, int64_t next, int panels,
                                const E* b, bool set, Acc<E>* c, int64_t ldc) {
  switch (columns / kWidth<E>) {
    case 1:
      return weight_rows<E, 1>(rows, a, next, panels, b, set, c, ldc);
    case 2:
      return weight_rows<E, 2>(rows, a, next, panels, b, set, c, ldc);
    case 3:
      if constexpr (kGradVecs > 2) return weight_rows<E, 3>(rows, a, next, panels, b, set, c, ldc);
      break;
    default:
      if constexpr (kGradVecs > 2) return weight_rows<E, 4>(rows, a, next, panels, b, set, c, ldc);
  }
}

// dW[class][column] += sum over tokens of dz[class][token] h[token][column]; panels of dz are
// `next` elements apart, and `hidden` is a block of kGradWidth columns. `set`: dW holds nothing.
template <class E>
TW_INLINE void add_weight_gradient(const E* dz, int64_t next, int classes, int panels,
                                   const E* hidden, int columns, bool set, Acc<E>* dw,
                                   int64_t ldc) {
  for (int i = 0; i < classes; i += kGradRows) {
    const int rows = std::min(classes - i, kGradRows);
    with_whole_registers(dw + i * ldc, ldc, rows, columns,
                         [&](auto* c, int64_t ld, int n) __attribute__((always_inline)) {
                           const E *a = dz + int64_t{i} * kPanelElements<E>, *b = hidden;
                           for (int p = 0; p < panels; p += kChainPanels) {
                             add_weight_chain<E>(rows, n, a, next,
                                                 std::min(panels - p, kChainPanels), b,
                                                 set && p == 0, c, ld);
                             a += kChainPanels * next;
                             b += int64_t{kChainPanels} * kPanelElements<E> * kGradWidth<E>;
                           }
                         });
  }
}

#include "simd/end.hpp"
