// The order in which the tasks of a VJP may add to what they share, whatever the number of threads.
#pragma once
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

namespace tilewise {

// How the bias's gradient is summed: over which of the queries and keys of a head.
enum class BiasGradient { kNone, kFull, kOverQueries, kOverKeys, kOverBoth };

// A unit is the batches and KV heads that add to common gradients; its steps (one head's query
// chunk each) are ordered by a ticket for every key chunk. Tasks are dealt in order, so the step a
// task waits for is always being worked on.
class VjpSchedule {
 public:
  VjpSchedule(int64_t unit_count, int64_t steps_of_unit, int64_t key_chunk_count, int threads)
      : units(unit_count),
        steps(steps_of_unit),
        key_chunks(key_chunk_count),
        lanes_(std::max<int64_t>(1, std::min<int64_t>(threads, unit_count))),
        tickets_(static_cast<size_t>(unit_count * key_chunk_count)) {}

  const int64_t units, steps, key_chunks;
  BiasGradient bias = BiasGradient::kNone;
  bool bias_shared = false;  // several heads or batches add to one dbias
  int64_t unit_groups = 1, query_chunks = 1;
  // of each step, where delta has an error that the gradient of the sinks must not have
  std::vector<float> sink_errors;

  // Neighbouring tasks belong to different units where there are several. False when all are taken.
  bool take(int64_t* unit, int64_t* step) {
    const int64_t task = next_.fetch_add(1);
    if (task >= units * steps) return false;
    const int64_t first = task / (lanes_ * steps) * lanes_, width = std::min(lanes_, units - first);
    *unit = first + (task - first * steps) % width;
    *step = (task - first * steps) / width;
    return true;
  }
  void wait(int64_t unit, int64_t chunk, int64_t step) {
    for (int spins = 0; ticket(unit, chunk).load(std::memory_order_acquire) != step; spins++)
      if (spins > 1000) std::this_thread::yield();
  }
  void pass(int64_t unit, int64_t chunk, int64_t step) {
    ticket(unit, chunk).store(step + 1, std::memory_order_release);
  }

 private:
  std::atomic<int64_t>& ticket(int64_t unit, int64_t chunk) {
    return tickets_[static_cast<size_t>(unit * key_chunks + chunk)];
  }

  const int64_t lanes_;
  std::atomic<int64_t> next_{0};
  std::vector<std::atomic<int64_t>> tickets_;
};

}  // namespace tilewise
