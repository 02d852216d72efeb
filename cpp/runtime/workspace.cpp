#include "runtime/workspace.hpp"

#include <cstdlib>
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace tilewise {
namespace {

constexpr size_t kPage = size_t{2} << 20;
constexpr size_t kKept = size_t{64}
                         << 20;  // more than this is given back when a smaller piece is asked for

struct Block {
  void* data = nullptr;
  size_t size = 0;
  ~Block() { std::free(data); }
};

thread_local Block block;

void* allocate(size_t bytes, size_t* size) {
  constexpr size_t unit = kGap ? 64 : kPage;
  *size = (bytes + unit - 1) / unit * unit;
  if (*size < bytes) throw std::bad_alloc();
  void* data = std::aligned_alloc(unit, *size);
  if (!data) throw std::bad_alloc();
#if defined(__linux__)
  if (!kGap) madvise(data, *size, MADV_HUGEPAGE);
#endif
  return data;
}

}  // namespace

Buffer::Buffer(size_t bytes) {
  size_t size;
  data_ = allocate(bytes ? bytes : 1, &size);
}

Buffer::~Buffer() {
  std::free(data_);
}

void* workspace(size_t bytes) {
  const bool fits = bytes <= block.size && block.size <= (bytes > kKept ? bytes : kKept);
  if (fits && !kGap) return block.data;
  std::free(block.data);
  block = {};
  size_t size;
  void* data = allocate(bytes, &size);
  block.data = data;
  block.size = size;
  return data;
}

}  // namespace tilewise
