// Pieces of rows of arrays (outer, column, inner), of any storage and strides, as numbers T.
#pragma once
#include "runtime/views.hpp"
#include "simd/simd-inl.hpp"

#include "simd/begin.hpp"

template <class T>
constexpr Storage kStorageOf = sizeof(T) == 8 ? Storage::kFloat64 : Storage::kFloat32;

struct RowPlace {
  int64_t outer = 0, inner = 0;
  template <class X>
  X* at(const View3& v, int64_t column = 0) const {
    return static_cast<X*>(const_cast<void*>(v.data)) + outer * v.outer + column * v.column +
           inner * v.inner;
  }
  // A number for each row; 0 where there is none.
  template <class T>
  T number(const View3& v) const {
    return v ? *at<T>(v) : T{0};
  }
  template <class T>
  void put_number(const View3& v, T value) const {
    if (v) *at<T>(v) = value;
  }
};

// Whether the numbers of a row can be read and written where they are.
template <class T>
bool in_place(const View3& v) {
  return v.storage == kStorageOf<T> && v.column == 1;
}

template <class X, class T>
void gather_columns(const X* from, int64_t step, int n, T* to) {
  if constexpr (std::is_same_v<X, T>) {
    if (step == 1) std::memcpy(to, from, sizeof(T) * static_cast<size_t>(n));
    for (int i = 0; step != 1 && i < n; i++) to[i] = from[i * step];
  } else {
    if (step == 1) widen_row(from, n, to);
    for (int i = 0; step != 1 && i < n; i++) to[i] = to_float(from[i * step]);
  }
}
template <class X, class T>
void scatter_columns(const T* from, int64_t step, int n, X* to) {
  if constexpr (std::is_same_v<X, T>) {
    if (step == 1) std::memcpy(to, from, sizeof(T) * static_cast<size_t>(n));
    for (int i = 0; step != 1 && i < n; i++) to[i * step] = from[i];
  } else {
    if (step == 1) narrow_row(from, n, to);
    for (int i = 0; step != 1 && i < n; i++) from_float(from[i], to + i * step);
  }
}

// Columns [first, first + n) of a row: in place or in `scratch`; null where there is no array.
template <class T>
const T* read_columns(const View3& v, const RowPlace& row, int64_t first, int n, T* scratch) {
  if (!v || in_place<T>(v)) return v ? row.at<const T>(v, first) : nullptr;
  if (v.storage == kStorageOf<T>)
    gather_columns(row.at<const T>(v, first), v.column, n, scratch);
  else if constexpr (sizeof(T) == 4) {
    if (v.storage == Storage::kBfloat16)
      gather_columns(row.at<const Bf16>(v, first), v.column, n, scratch);
    else
      gather_columns(row.at<const F16>(v, first), v.column, n, scratch);
  }
  return scratch;
}
template <class T>
void write_columns(const View3& v, const RowPlace& row, int64_t first, int n, const T* from) {
  if (v.storage == kStorageOf<T>)
    scatter_columns(from, v.column, n, row.at<T>(v, first));
  else if constexpr (sizeof(T) == 4) {
    if (v.storage == Storage::kBfloat16)
      scatter_columns(from, v.column, n, row.at<Bf16>(v, first));
    else
      scatter_columns(from, v.column, n, row.at<F16>(v, first));
  }
}

// A copy that leaves nothing of `to` in the caches.
template <class T>
void copy_past_caches(const T* from, int n, T* to) {
  int j = 0;
#if defined(TILEWISE_TARGET_AVX512)
  j = static_cast<int>(-reinterpret_cast<uintptr_t>(to) % 64 / sizeof(T));
  if (j >= n) j = n;
  std::memcpy(to, from, sizeof(T) * static_cast<size_t>(j));
  for (; j + kWidth<T> <= n; j += kWidth<T>)
    _mm512_stream_si512(reinterpret_cast<__m512i*>(to + j), (__m512i)load(from + j));
#endif
  std::memcpy(to + j, from + j, sizeof(T) * static_cast<size_t>(n - j));
}

#include "simd/end.hpp"
