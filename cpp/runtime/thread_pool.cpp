#include "runtime/thread_pool.hpp"

#include <pthread.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdlib>
#include <exception>
#include <mutex>
#include <stdexcept>
#include <string>
#include <system_error>
#include <thread>
#include <vector>

namespace tilewise {
namespace {

constexpr int kMaxThreads = 1024;

int checked(long n, const char* name) {
  if (n < 1 || n > kMaxThreads)
    throw std::invalid_argument(std::string(name) + " must be an integer from 1 to 1024, got " +
                                std::to_string(n));
  return static_cast<int>(n);
}

int default_threads() {
  if (const char* text = std::getenv("TILEWISE_NUM_THREADS"); text && *text) {
    char* end = nullptr;
    long n = std::strtol(text, &end, 10);
    if (*end)
      throw std::invalid_argument("TILEWISE_NUM_THREADS must be an integer from 1 to 1024, got '" +
                                  std::string(text) + "'");
    return checked(n, "TILEWISE_NUM_THREADS");
  }
#if defined(__linux__)
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) == 0) return CPU_COUNT(&set) > 0 ? CPU_COUNT(&set) : 1;
#endif
  unsigned n = std::thread::hardware_concurrency();
  return n ? static_cast<int>(n) : 1;
}

class Pool {
 public:
  // Runs body on `threads` slots, or returns false where another call holds the pool.
  bool run(int threads, const std::function<void(int)>& body) {
    std::unique_lock<std::mutex> call(call_, std::try_to_lock);
    if (!call.owns_lock()) return false;
    threads = 1 + grow(threads - 1);
    {
      std::lock_guard<std::mutex> lock(mutex_);
      body_ = &body;
      active_ = threads;
      pending_ = threads - 1;
      error_ = nullptr;
      round_++;
    }
    wake_.notify_all();
    std::exception_ptr error = guarded(body, 0);
    std::unique_lock<std::mutex> lock(mutex_);
    done_.wait(lock, [this] { return pending_ == 0; });
    if (!error) error = error_;
    if (error) std::rethrow_exception(error);
    return true;
  }

 private:
  // The number of workers to use: fewer than wanted where the system refuses a thread.
  int grow(int wanted) {
    try {
      while (static_cast<int>(workers_.size()) < wanted)
        workers_.emplace_back([this, slot = static_cast<int>(workers_.size()) + 1, seen = round_] {
          work(slot, seen);
        });
    } catch (const std::system_error&) {
    }
    return std::min(wanted, static_cast<int>(workers_.size()));
  }

  static std::exception_ptr guarded(const std::function<void(int)>& body, int slot) {
    try {
      body(slot);
      return nullptr;
    } catch (...) {
      return std::current_exception();
    }
  }

  void work(int slot, long seen) {
    for (;;) {
      const std::function<void(int)>* body;
      {
        std::unique_lock<std::mutex> lock(mutex_);
        wake_.wait(lock, [&] { return round_ != seen; });
        seen = round_;
        if (slot >= active_) continue;
        body = body_;
      }
      std::exception_ptr error = guarded(*body, slot);
      std::lock_guard<std::mutex> lock(mutex_);
      if (error && !error_) error_ = error;
      if (--pending_ == 0) done_.notify_one();
    }
  }

  std::mutex call_, mutex_;
  std::condition_variable wake_, done_;
  std::vector<std::thread> workers_;
  const std::function<void(int)>* body_ = nullptr;
  int active_ = 0, pending_ = 0;
  long round_ = 0;
  std::exception_ptr error_;
};

std::atomic<int> wanted{0};
std::atomic<Pool*> pool{nullptr};

// A pool is never destroyed: its threads sleep until the process ends, and in a forked child they
// do not exist.
Pool& the_pool() {
  static const int registered = pthread_atfork(nullptr, nullptr, [] { pool.store(nullptr); });
  (void)registered;
  Pool* p = pool.load();
  if (!p) {
    Pool* fresh = new Pool;
    if (pool.compare_exchange_strong(p, fresh)) return *fresh;
    delete fresh;
  }
  return *p;
}

}  // namespace

int num_threads() {
  if (wanted.load() == 0) {
    int none = 0;
    wanted.compare_exchange_strong(none, default_threads());
  }
  return wanted.load();
}

void set_num_threads(int n) {
  wanted.store(checked(n, "num_threads"));
}

void run_parallel(int threads, const std::function<void(int)>& body) {
  if (threads <= 1 || !the_pool().run(threads, body)) body(0);
}

}  // namespace tilewise
