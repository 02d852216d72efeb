// Scratch memory of one thread, kept between calls. Throws std::bad_alloc.
#pragma once
#include <cstddef>
#include <cstdint>

namespace tilewise {

// At least `bytes` bytes, 64-byte aligned, uninitialised, valid until the thread's next call.
void* workspace(size_t bytes);

// Memory of one call that its threads share, 64-byte aligned, uninitialised. Throws std::bad_alloc.
class Buffer {
 public:
  explicit Buffer(size_t bytes);
  ~Buffer();
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  void* data() const { return data_; }

 private:
  void* data_;
};

class Arena {  // hands out pieces of a workspace; with a null base it only counts
 public:
  explicit Arena(void* base) : base_(static_cast<char*>(base)) {}
  template <class T>
  T* take(int64_t count) {
    size_t at = used_;
    used_ += (static_cast<size_t>(count) * sizeof(T) + 63) & ~size_t{63};
    return base_ ? reinterpret_cast<T*>(base_ + at) : nullptr;
  }
  size_t used() const { return used_; }

 private:
  char* base_;
  size_t used_ = 0;
};

}  // namespace tilewise
