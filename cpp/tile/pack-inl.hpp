// Between rows in memory and columns in lanes. A panel is [column][kPanel lanes].
#pragma once
#include <algorithm>

#include "simd/transpose-inl.hpp"

#include "simd/begin.hpp"

constexpr int kPanelGroups = 3;
constexpr int kPanel = kPanelGroups * kGroup;
template <class T>
constexpr int kPanelVecs = kPanel / kWidth<T>;

// Asks for rows in the order of memory.
template <class T>
TW_INLINE void touch_rows(const T* x, int64_t ld, int columns, int rows) {
  for (int r = 0; r < rows; r++)
    for (int c = 0; c < columns; c += 64 / static_cast<int>(sizeof(T))) prefetch(x + r * ld + c);
}

// One register of lanes: rows 0..last of x, the last repeated. A column is one element E, which is
// one or two of x.
template <class E, class X, class Map>
TW_INLINE void pack_register(const X* x, int64_t ld, int columns, int last, const Map& map,
                             E* out) {
  constexpr int kSize = sizeof(E) / sizeof(X);
  int c = 0;
  for (; c + 4 <= columns; c += 4) {
    Vec<E> t[4];
    load_columns4(x + c * kSize, ld, last, t);
    TW_UNROLL for (int e = 0; e < 4; e++) store(out + int64_t{c + e} * kPanel, map(t[e]));
  }
  for (; c < columns; c++) {
    Vec<E> t;
    for (int r = 0; r < kWidth<E>; r++) {
      const X* from = x + (r < last ? r : last) * ld + c * kSize;
      if constexpr (kSize == 1)
        t[r] = *from;
      else
        std::memcpy(reinterpret_cast<char*>(&t) + r * sizeof(E), from, sizeof(E));
    }
    store(out + int64_t{c} * kPanel, map(t));
  }
}

template <class E, class X, class Map>
TW_INLINE void pack_group(const X* x, int64_t ld, int columns, int rows, const Map& map, E* out) {
  for (int r = 0; r < kGroup; r += kWidth<E>, out += kWidth<E>) {
    const int first = std::min(r, rows - 1), last = std::min(rows - first, kWidth<E>) - 1;
    if (last == kWidth<E> - 1)
      pack_register<E>(x + first * ld, ld, columns, kWidth<E> - 1, map, out);
    else
      pack_register<E>(x + first * ld, ld, columns, last, map, out);
  }
}

// out[c * kPanel + lane r] = mul * x[min(r, rows - 1) * ld + c] for one group of 16 lanes
template <class T>
TW_NOINLINE void pack_lanes(const T* x, int64_t ld, int columns, int rows, T mul, T* out) {
  const Vec<T> s = set1(mul);
  pack_group<T>(
      x, ld, columns, rows, [&](Vec<T> t) __attribute__((always_inline)) { return t * s; }, out);
}

#if defined(TW_HAS_PAIRS)
// out[c / 2 * kPanel + lane r] = columns c and c + 1 of row min(r, rows - 1); columns are even
TW_NOINLINE __attribute__((unused)) void pack_lanes_pairs(const Bf16* x, int64_t ld, int columns,
                                                          int rows, Bf16x2* out) {
  pack_group<Bf16x2>(
      x, ld, columns / 2, rows, [](VecI t) __attribute__((always_inline)) { return t; }, out);
}

// out[e] = {first[e], second[e]} for e < n, then zeros up to `columns`; a null `second` counts as
// zeros
TW_INLINE void interleave_row(const Bf16* first, const Bf16* second, int64_t n, int64_t columns,
                              Bf16x2* out) {
  constexpr int kW = kWidth<Bf16x2>;
  auto halves = [&](const Bf16* x, int64_t e) __attribute__((always_inline)) {
    const int64_t left = x ? std::clamp<int64_t>(n - e, 0, kW) : 0;
    const __mmask16 in = static_cast<__mmask16>((1u << left) - 1);
    return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(in, left ? x + e : first));
  };
  for (int64_t e = 0; e < columns; e += kW) {
    const VecI x =
        (VecI)_mm512_or_si512(halves(first, e), _mm512_slli_epi32(halves(second, e), 16));
    if (e + kW <= columns)
      store(out + e, x);
    else
      _mm512_mask_storeu_epi32(out + e, static_cast<__mmask16>((1u << (columns - e)) - 1),
                               (__m512i)x);
  }
}

// out[j / 2 * ldo + d] = {x[j][d], x[j + 1][d]}, zero beyond the last row and the last column
TW_NOINLINE __attribute__((unused)) void interleave_rows(const Bf16* x, int64_t ld, int rows,
                                                         int columns, Bf16x2* out, int64_t ldo) {
  for (int r = 0; r < rows; r += 2, x += 2 * ld, out += ldo)
    interleave_row(x, r + 1 < rows ? x + ld : nullptr, columns, ldo, out);
}

// The same in blocks of W columns, block c / W at out + c / W * pairs_ld * W.
template <int W>
TW_NOINLINE void interleave_blocks(const Bf16* x, int64_t ld, int columns, int rows, Bf16x2* out,
                                   int64_t pairs_ld) {
  for (int c = 0; c < columns; c += W, out += pairs_ld * W)
    for (int r = 0; r < rows; r += 2) {
      const Bf16* from = x + r * ld + c;
      interleave_row(from, r + 1 < rows ? from + ld : nullptr, std::min(columns - c, W), W,
                     out + int64_t{r / 2} * W);
    }
}
#endif

template <class T>
TW_INLINE void unpack_register(const T* in, int columns, int last, Vec<T> mul, T* x, int64_t ld) {
  const Lanes<T> none = equal(mul, zero<T>());
  auto value = [&](int c) __attribute__((always_inline)) {
    return select(none, zero<T>(), load(in + int64_t{c} * kPanel) * mul + zero<T>());
  };
  int c = 0;
  for (; c + 4 <= columns; c += 4) {
    Vec<T> t[4] = {value(c), value(c + 1), value(c + 2), value(c + 3)};
    store_columns4(x + c, ld, last, t);
  }
  for (; c < columns; c++) {
    const Vec<T> t = value(c);
    for (int r = 0; r <= last; r++) x[r * ld + c] = t[r];
  }
}

// x[r * ld + c] = mul[lane r] * in[c * kPanel + lane r] for rows of one group, +0 where mul is 0.
// The addition of zero settles the sign of zero.
template <class T>
TW_NOINLINE void unpack_lanes(const T* in, int columns, int rows, const T* mul, T* x, int64_t ld) {
  for (int r = 0; r < rows; r += kWidth<T>) {
    const int last = std::min(rows - r, kWidth<T>) - 1;
    if (last == kWidth<T> - 1)
      unpack_register<T>(in + r, columns, kWidth<T> - 1, load(mul + r), x + r * ld, ld);
    else
      unpack_register<T>(in + r, columns, last, load(mul + r), x + r * ld, ld);
  }
}

// out[e] = mul * x[e] for e < n, then zeros up to `columns`, a multiple of the width; out may hold
// a register more
template <class T>
TW_INLINE void copy_row(const T* x, int64_t n, int64_t columns, Vec<T> mul, T* out) {
  int64_t e = 0;
  for (; e + kWidth<T> <= n; e += kWidth<T>) store(out + e, load(x + e) * mul);
  if (e < columns) {
    alignas(64) T tail[kWidth<T>] = {};
    for (int64_t i = e; i < n; i++) tail[i - e] = x[i];
    store(out + e, load(tail) * mul);
    for (e += kWidth<T>; e < columns; e += kWidth<T>) store(out + e, zero<T>());
  }
}

// out[(c / W) * rows_ld * W + r * W + c % W] = mul * x[r * ld + c]: blocks of W columns, zero
// beyond the last column
template <class T, int W>
TW_NOINLINE void pack_blocks(const T* x, int64_t ld, int columns, int rows, T mul, T* out,
                             int64_t rows_ld) {
  const Vec<T> s = set1(mul);
  for (int c = 0; c < columns; c += W, out += rows_ld * W)
    for (int r = 0; r < rows; r++)
      copy_row<T>(x + r * ld + c, std::min(columns - c, W), W, s, out + int64_t{r} * W);
}

// to[e] += from[e], or = where `set`
template <class T>
TW_INLINE void add_row(T* to, const T* from, int64_t n, bool set) {
  int64_t e = 0;
  for (; e + kWidth<T> <= n; e += kWidth<T>)
    store(to + e, (set ? zero<T>() : load(to + e)) + load(from + e));
  for (; e < n; e++) to[e] = (set ? T{0} : to[e]) + from[e];
}

// to[e] = to[e] + scale * from[e], settling the sign of zero
template <class T>
TW_INLINE void add_scaled_row(T* to, const T* from, int64_t n, Vec<T> scale) {
  int64_t e = 0;
  for (; e + kWidth<T> <= n; e += kWidth<T>)
    store(to + e, fma(scale, load(from + e), load(to + e)) + zero<T>());
  if (e == n) return;
  const size_t left = sizeof(T) * static_cast<size_t>(n - e);
  alignas(64) T x[kWidth<T>] = {}, y[kWidth<T>] = {};
  std::memcpy(x, to + e, left);
  std::memcpy(y, from + e, left);
  store(x, fma(scale, load(y), load(x)) + zero<T>());
  std::memcpy(to + e, x, left);
}

// Whether every element is finite: x - x is 0 only then.
template <class X>
TW_NOINLINE bool all_finite(const X* x, int64_t ld, int columns, int rows) {
  using T = Wide<X>;
  Vec<T> bad = zero<T>();
  T tail = 0;
  for (int r = 0; r < rows; r++) {
    const X* p = x + r * ld;
    int c = 0;
    for (; c + kWidth<T> <= columns; c += kWidth<T>) {
      const Vec<T> t = load_wide(p + c);
      bad += t - t;
    }
    for (; c < columns; c++) tail += wide(p[c]) - wide(p[c]);
  }
  for (int i = 0; i < kWidth<T>; i++) tail += bad[i];
  return tail == 0;
}

#include "simd/end.hpp"
