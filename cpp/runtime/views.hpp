// Strided views: strides count elements, the last dimension is contiguous unless said otherwise.
#pragma once
#include <cstdint>

namespace tilewise {

struct View4 {  // (batch, head, row, column)
  const void* data = nullptr;
  int64_t batch = 0, head = 0, row = 0, column = 1;
  template <class T>
  const T* at(int64_t b, int64_t h, int64_t r = 0) const {
    return static_cast<const T*>(data) + b * batch + h * head + r * row;
  }
  template <class T>
  T* at_mut(int64_t b, int64_t h, int64_t r = 0) const {
    return const_cast<T*>(at<T>(b, h, r));
  }
  explicit operator bool() const { return data != nullptr; }
};

}  // namespace tilewise
