// Rows as the products take them, however they are stored: in other dtypes, or in pages.
#pragma once
#include <algorithm>

#include "runtime/views.hpp"
#include "tile/pack-inl.hpp"
#include "tile/tiles-inl.hpp"

#include "simd/begin.hpp"

template <class E>
constexpr bool kPairs = kFold<E> == 2;

template <class E>
constexpr Storage kStorage = kPairs<E>                   ? Storage::kBfloat16
                             : std::is_same_v<E, double> ? Storage::kFloat64
                                                         : Storage::kFloat32;

template <class E>
struct Rows {
  const E* at;
  int64_t ld;
};

// Whether rows are read without a copy.
template <class E>
TW_INLINE bool in_place(const View4& x) {
  return x.storage == kStorage<E> && !x.pages && x.row % kFold<E> == 0;
}

// Row r of head h, or null where its page is not held.
TW_INLINE const char* row_bytes(const View4& x, int64_t b, int64_t h, int64_t r) {
  int64_t at = b * x.batch + h * x.head;
  if (x.pages) {
    const int32_t page = x.pages[r / x.page_rows];
    if (page < 0) return nullptr;
    at += page * x.page + r % x.page_rows * x.row;
  } else {
    at += r * x.row;
  }
  return static_cast<const char*>(x.data) + at * bytes_of(x.storage);
}

template <class E>
TW_INLINE void convert_row(const char* from, Storage storage, int columns, E* to) {
  if (!from)
    std::memset(static_cast<void*>(to), 0, sizeof(E) * static_cast<size_t>(columns));
  else if (storage == kStorage<E>)
    std::memcpy(static_cast<void*>(to), from, sizeof(E) * static_cast<size_t>(columns));
  else if constexpr (std::is_same_v<E, float>) {
    if (storage == Storage::kBfloat16)
      widen_row(reinterpret_cast<const Bf16*>(from), columns, to);
    else
      widen_row(reinterpret_cast<const F16*>(from), columns, to);
  }
}

// Rows [r, r + n) of `columns` elements: where they stand, or copied to `scratch`.
template <class E>
TW_NOINLINE Rows<E> read_rows(const View4& x, int64_t b, int64_t h, int64_t r, int n, int columns,
                              E* scratch) {
  const bool together = !x.pages || r % x.page_rows + n <= x.page_rows;
  if (x.storage == kStorage<E> && together && x.row % kFold<E> == 0)
    if (const char* from = row_bytes(x, b, h, r))
      return {reinterpret_cast<const E*>(from), x.row / kFold<E>};
  for (int i = 0; i < n; i++)
    convert_row<E>(row_bytes(x, b, h, r + i), x.storage, columns, scratch + int64_t{i} * columns);
  return {scratch, columns};
}

#if defined(TW_HAS_TILES)
namespace tiled {

// The same rows on whole cache lines, one after another, with zeros after them where `n` are fewer
// than a tile register has.
TW_INLINE Rows<E> aligned_rows(Rows<E> rows, int n, int columns, E* scratch) {
  const bool here = rows.ld == columns && reinterpret_cast<uintptr_t>(rows.at) % 64 == 0;
  if (here && n >= kSide) return rows;
  const size_t bytes = sizeof(E) * static_cast<size_t>(columns);
  for (int r = 0; r < n && rows.at != scratch; r++)
    std::memcpy(static_cast<void*>(scratch + r * columns), rows.at + r * rows.ld, bytes);
  if (n < kSide)
    std::memset(static_cast<void*>(scratch + n * columns), 0,
                static_cast<size_t>(kSide - n) * bytes);
  return {scratch, columns};
}

}  // namespace tiled
#endif

// Where rows of T are to be written: in place or, stored otherwise, in `scratch` for put_rows.
template <class T>
TW_INLINE T* rows_to(const View4& x, int64_t b, int64_t h, int64_t r, T* scratch, int64_t columns,
                     int64_t* ld) {
  const bool here = x.storage == kStorage<T>;
  *ld = here ? x.row : columns;
  return here ? x.at_mut<T>(b, h, r) : scratch;
}

template <class T>
TW_INLINE void put_row(const View4& x, int64_t b, int64_t h, int64_t r, const T* from,
                       int64_t columns) {
  char* to = const_cast<char*>(row_bytes(x, b, h, r));
  const int n = static_cast<int>(columns);
  if (reinterpret_cast<const char*>(from) == to) return;
  if (x.storage == kStorage<T>)
    std::memcpy(to, from, sizeof(T) * static_cast<size_t>(columns));
  else if constexpr (std::is_same_v<T, float>) {
    if (x.storage == Storage::kBfloat16)
      narrow_row(from, n, reinterpret_cast<Bf16*>(to));
    else
      narrow_row(from, n, reinterpret_cast<F16*>(to));
  }
}

template <class T>
TW_INLINE void put_rows(const View4& x, int64_t b, int64_t h, int64_t r, int n, const T* from,
                        int64_t ld, int64_t columns) {
  for (int i = 0; i < n; i++) put_row<T>(x, b, h, r + i, from + i * ld, columns);
}

// Rows as lanes of a panel's group; of numbers `mul` times.
template <class E>
TW_INLINE void pack_rows(const View4& x, int64_t b, int64_t h, int64_t r, int n, int64_t columns,
                         Acc<E> mul, E* scratch, E* to) {
  const int count = static_cast<int>(columns) / kFold<E>;
  const Rows<E> rows = read_rows<E>(x, b, h, r, n, count, scratch);
  if constexpr (kPairs<E>)
    pack_lanes_pairs(reinterpret_cast<const Bf16*>(rows.at), rows.ld * 2, static_cast<int>(columns),
                     n, to);
  else
    pack_lanes<E>(rows.at, rows.ld, count, n, mul, to);
}

#include "simd/end.hpp"
