// Strided views: strides count elements, the last dimension is contiguous unless said otherwise.
#pragma once
#include <cstdint>

namespace tilewise {

// How elements are stored. Of 16 bits they are computed with in float32.
enum class Storage : uint8_t { kFloat32, kFloat64, kBfloat16, kFloat16 };

constexpr int64_t bytes_of(Storage s) {
  return s == Storage::kFloat64 ? 8 : s == Storage::kFloat32 ? 4 : 2;
}

struct View3 {  // (outer, column, inner); a row runs along the columns
  const void* data = nullptr;
  int64_t outer = 0, column = 0, inner = 0;
  Storage storage = Storage::kFloat32;
  explicit operator bool() const { return data != nullptr; }
};

struct View4 {  // (batch, head, row, column)
  const void* data = nullptr;
  int64_t batch = 0, head = 0, row = 0, column = 1;
  Storage storage = Storage::kFloat32;
  // Rows in pages: row r is row r % page_rows of page pages[r / page_rows]; -1 is one not held.
  const int32_t* pages = nullptr;
  int64_t page_rows = 0, page = 0;

  template <class T>
  const T* at(int64_t b, int64_t h, int64_t r = 0) const {
    return static_cast<const T*>(data) + b * batch + h * head + r * row;
  }
  template <class T>
  T* at_mut(int64_t b, int64_t h, int64_t r = 0) const {
    return const_cast<T*>(at<T>(b, h, r));
  }
  explicit operator bool() const { return data != nullptr; }

  View4 from_batch(int64_t b) const { return shifted(b * batch); }
  View4 from_row(int64_t r) const { return shifted(r * row); }

 private:
  View4 shifted(int64_t elements) const {
    View4 x = *this;
    if (data) x.data = static_cast<const char*>(data) + elements * bytes_of(storage);
    return x;
  }
};

}  // namespace tilewise
