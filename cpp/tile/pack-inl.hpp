// Between rows in memory and columns in lanes. A panel is [column][kPanel lanes].
#pragma once
#include "simd/simd-inl.hpp"

#include "simd/begin.hpp"

constexpr int kPanelGroups = 3;
constexpr int kPanel = kPanelGroups * kGroup;
template <class T>
constexpr int kPanelVecs = kPanel / kWidth<T>;

// out[c * kPanel + lane r] = mul * x[min(r, rows - 1) * ld + c] for one group of 16 lanes
template <class T>
TW_NOINLINE void pack_lanes(const T* x, int64_t ld, int columns, int rows, T mul, T* out) {
  const Vec<T> s = set1(mul);
  for (int v = 0; v < kRegs<T>; v++, out += kWidth<T>) {
    const int first = v * kWidth<T> < rows ? v * kWidth<T> : rows - 1;
    const int last = (rows < (v + 1) * kWidth<T> ? rows : (v + 1) * kWidth<T>)-1 - first;
    const T* p = x + first * ld;
    int c = 0;
    for (; c + 4 <= columns; c += 4) {
      Vec<T> t[4];
      load_columns4(p + c, ld, last, t);
      TW_UNROLL for (int e = 0; e < 4; e++) store(out + int64_t{c + e} * kPanel, t[e] * s);
    }
    for (; c < columns; c++)
      for (int r = 0; r < kWidth<T>; r++) out[int64_t{c} * kPanel + r] = p[(r < last ? r : last) * ld + c] * mul;
  }
}

// x[r * ld + c] = mul[lane r] * in[c * kPanel + lane r] for rows of one group, +0 where mul is 0. The addition of zero settles
// the sign of zero.
template <class T>
TW_NOINLINE void unpack_lanes(const T* in, int columns, int rows, const T* mul, T* x, int64_t ld) {
  for (int v = 0; v < kRegs<T> && v * kWidth<T> < rows; v++) {
    const T* p = in + v * kWidth<T>;
    T* to = x + v * kWidth<T> * ld;
    const int last = (rows - v * kWidth<T> < kWidth<T> ? rows - v * kWidth<T> : kWidth<T>)-1;
    const Vec<T> s = load(mul + v * kWidth<T>);
    const Lanes<T> none = equal(s, zero<T>());
    int c = 0;
    for (; c + 4 <= columns; c += 4) {
      Vec<T> t[4];
      TW_UNROLL for (int e = 0; e < 4; e++)
        t[e] = select(none, zero<T>(), load(p + int64_t{c + e} * kPanel) * s + zero<T>());
      store_columns4(to + c, ld, last, t);
    }
    for (; c < columns; c++) {
      const Vec<T> t = select(none, zero<T>(), load(p + int64_t{c} * kPanel) * s + zero<T>());
      for (int r = 0; r <= last; r++) to[r * ld + c] = t[r];
    }
  }
}

// out[(c / W) * rows_ld * W + r * W + c % W] = mul * x[r * ld + c]: blocks of W columns, zero beyond the last column
template <class T, int W>
TW_NOINLINE void pack_blocks(const T* x, int64_t ld, int columns, int rows, T mul, T* out, int64_t rows_ld) {
  for (int c = 0; c < columns; c += W, out += rows_ld * W) {
    const int n = columns - c < W ? columns - c : W;
    for (int r = 0; r < rows; r++) {
      const T* p = x + r * ld + c;
      T* to = out + int64_t{r} * W;
      for (int e = 0; e < n; e++) to[e] = p[e] * mul;
      for (int e = n; e < W; e++) to[e] = 0;
    }
  }
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
