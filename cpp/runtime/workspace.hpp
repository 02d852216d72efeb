// Scratch memory of one thread, kept between calls. Throws std::bad_alloc.
#pragma once
#include <cstddef>
#include <cstdint>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace tilewise {

#if defined(__SANITIZE_ADDRESS__)
constexpr size_t kGap = 64;  // after each piece, so that a write past its end is found
inline void forbid(void* at, size_t bytes) {
  ASAN_POISON_MEMORY_REGION(at, bytes);
}
#else
constexpr size_t kGap = 0;
inline void forbid(void*, size_t) {}
#endif

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
  T* take(int64_t count) {  // null where count is 0
    const size_t at = used_, bytes = static_cast<size_t>(count) * sizeof(T);
    if (!count) return nullptr;
    used_ += ((bytes + 63) & ~size_t{63}) + kGap;
    if (!base_) return nullptr;
    forbid(base_ + at + bytes, used_ - at - bytes);
    return reinterpret_cast<T*>(base_ + at);
  }
  size_t used() const { return used_; }

 private:
  char* base_;
  size_t used_ = 0;
};

}  // namespace tilewise
