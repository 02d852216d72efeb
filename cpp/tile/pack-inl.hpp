// Between rows in memory and columns in lanes. A panel is [column][kPanel lanes].
#pragma once
#include <algorithm>

#include "simd/simd-inl.hpp"

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

// One register of lanes: rows 0..last of x, the last repeated.
template <class T>
TW_INLINE void pack_register(const T* x, int64_t ld, int columns, int last, Vec<T> mul, T* out) {
  int c = 0;
  for (; c + 4 <= columns; c += 4) {
    Vec<T> t[4];
    load_columns4(x + c, ld, last, t);
    TW_UNROLL for (int e = 0; e < 4; e++) store(out + int64_t{c + e} * kPanel, t[e] * mul);
  }
  for (; c < columns; c++) {
    Vec<T> t;
    for (int r = 0; r < kWidth<T>; r++) t[r] = x[(r < last ? r : last) * ld + c];
    store(out + int64_t{c} * kPanel, t * mul);
  }
}

// out[c * kPanel + lane r] = mul * x[min(r, rows - 1) * ld + c] for one group of 16 lanes
template <class T>
TW_NOINLINE void pack_lanes(const T* x, int64_t ld, int columns, int rows, T mul, T* out) {
  for (int r = 0; r < kGroup; r += kWidth<T>, out += kWidth<T>) {
    const int first = std::min(r, rows - 1), last = std::min(rows - first, kWidth<T>) - 1;
    if (last == kWidth<T> - 1)
      pack_register<T>(x + first * ld, ld, columns, kWidth<T> - 1, set1(mul), out);
    else
      pack_register<T>(x + first * ld, ld, columns, last, set1(mul), out);
  }
}

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
template <class T>
TW_NOINLINE bool all_finite(const T* x, int64_t ld, int columns, int rows) {
  Vec<T> bad = zero<T>();
  T tail = 0;
  for (int r = 0; r < rows; r++) {
    const T* p = x + r * ld;
    int c = 0;
    for (; c + kWidth<T> <= columns; c += kWidth<T>) {
      const Vec<T> t = load(p + c);
      bad += t - t;
    }
    for (; c < columns; c++) tail += p[c] - p[c];
  }
  for (int i = 0; i < kWidth<T>; i++) tail += bad[i];
  return tail == 0;
}

#include "simd/end.hpp"
