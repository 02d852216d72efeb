// The process's own threads. They are created on first use and again in a forked child; no OpenMP
// runtime is involved.
#pragma once
#include <functional>

namespace tilewise {

// Threads used by a call: TILEWISE_NUM_THREADS, else the CPUs that the process may run on. Throws
// std::invalid_argument.
int num_threads();
void set_num_threads(int n);

// Runs body(slot) once for each slot in [0, threads), slot 0 on the calling thread. Where the pool
// is busy with another caller's work, body(0) alone runs. Returns when all have returned and
// rethrows the first exception. A body takes its share of the work from a common counter, so any
// number of slots finishes all of it.
void run_parallel(int threads, const std::function<void(int)>& body);

}  // namespace tilewise
