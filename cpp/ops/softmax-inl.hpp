// The softmax family for one target: how a call is cut into tasks. Included once by each unit in
// ops/targets/.
#pragma once
#include <atomic>
#include <vector>

#include "ops/softmax_forward-inl.hpp"
#include "ops/softmax_strip-inl.hpp"
#include "runtime/thread_pool.hpp"

#include "simd/begin.hpp"

constexpr int64_t kTaskColumns = 1 << 15;  // columns that are worth a task
constexpr int64_t kKeptForward = 1 << 20;  // rows up to this length have their weights kept
constexpr int kLeastBeside = 5;            // rows side by side: of fewer, too many lanes are empty
constexpr int kBlocksOfThread = 8;
constexpr int64_t kStreamBytes = 16 << 20;  // results from this size on go past the caches

enum class SoftmaxKind { kForward, kVjp, kJvp, kVjpJvp };

// What chunks leave for their row; Row is SoftmaxRow, or SoftmaxStrip for rows side by side.
template <class Row>
struct RowParts {
  std::vector<typename Row::State> states;
  std::vector<typename Row::Sums> sums;
  std::vector<typename Row::Moved> moved;

  RowParts(SoftmaxKind kind, int64_t chunks) {
    const size_t n = static_cast<size_t>(chunks);
    if (kind == SoftmaxKind::kForward)
      states.resize(n);
    else
      sums.resize(n);
    if (kind == SoftmaxKind::kVjpJvp) moved.resize(n);
  }
};

constexpr int phases_of(SoftmaxKind kind) {
  return kind == SoftmaxKind::kVjpJvp ? 2 : 1;
}

template <class Row>
void part_of_row(Row& row, SoftmaxKind kind, int phase, int64_t chunk, RowParts<Row>* parts) {
  const size_t c = static_cast<size_t>(chunk);
  if (kind == SoftmaxKind::kForward)
    parts->states[c] = row.state(chunk);
  else if (phase == 0)
    parts->sums[c] = row.sums(chunk);
  else
    parts->moved[c] = row.moved_sum(chunk);
}

template <class Row>
void close_phase(Row& row, SoftmaxKind kind, int phase, const RowParts<Row>& parts, bool writes) {
  if (kind == SoftmaxKind::kForward)
    row.finish(parts.states.data(), writes);
  else if (phase == 0)
    row.finish_sums(parts.sums.data());
  else
    row.finish_moved(parts.moved.data());
}

template <class Row>
void write_part(Row& row, SoftmaxKind kind, int64_t chunk, const RowParts<Row>& parts,
                bool stream) {
  switch (kind) {
    case SoftmaxKind::kForward:
      return row.write(chunk, parts.states.data(), stream);
    case SoftmaxKind::kVjp:
      return row.write_vjp(chunk, stream);
    case SoftmaxKind::kJvp:
      return row.write_jvp(chunk, stream);
    default:
      return row.write_vjp_jvp(chunk, stream);
  }
}

template <class... R>
void place(R&... users) {
  Arena count(nullptr);
  (users.place(count), ...);
  Arena arena(workspace(count.used()));
  (users.place(arena), ...);
}

TW_INLINE void begin_row(auto& row, SoftmaxKind kind, int64_t r) {
  row.take(r);
  if (kind != SoftmaxKind::kForward) row.load_row();
}

TW_INLINE void settle_streams() {
#if defined(TILEWISE_TARGET_AVX512)
  _mm_sfence();
#endif
}

// Rows are dealt to the threads in blocks, each of which starts anew.
inline int64_t rows_of_block(const SoftmaxProblem& problem, int threads) {
  const int64_t rows = problem.outer * problem.inner, most = rows / (threads * kBlocksOfThread);
  return std::max({int64_t{1}, kTaskColumns / std::max<int64_t>(1, problem.columns), most});
}

template <class T, class X, Result R>
void forward_blocks(const SoftmaxProblem& problem, bool stream, int threads) {
  const int64_t rows = problem.outer * problem.inner, block = rows_of_block(problem, threads);
  std::atomic<int64_t> next{0};
  run_parallel(threads, [&](int) {
    SoftmaxRow<T> row(problem);
    SoftmaxForward<T, X, R> forward(problem, row, stream);
    place(row, forward);
    const FloatingPointMode mode;
    for (int64_t r; (r = next.fetch_add(block)) < rows;) forward.rows(r, std::min(rows, r + block));
    settle_streams();
  });
}

// Whether forward_blocks() serves a call: one result or none, in rows without gaps and mask.
inline bool in_rows(const SoftmaxProblem& p) {
  auto fits = [&](const View3& v) { return !v || (v.column == 1 && v.storage == p.x.storage); };
  return p.columns > 0 && fits(p.x) && fits(p.y) && fits(p.log_y) && !p.where && !(p.y && p.log_y);
}

template <class T, class X>
void forward_in_rows(const SoftmaxProblem& p, bool stream, int threads) {
  if (p.log_y)
    forward_blocks<T, X, Result::kLogY>(p, stream, threads);
  else if (!p.y)
    forward_blocks<T, X, Result::kNone>(p, stream, threads);
  else if (p.columns <= kKeptForward)
    forward_blocks<T, X, Result::kY>(p, stream, threads);
  else
    forward_blocks<T, X, Result::kYAgain>(p, stream, threads);
}
template <class T>
void forward_of_storage(const SoftmaxProblem& p, bool stream, int threads) {
  if constexpr (sizeof(T) == 4) {
    if (p.x.storage == Storage::kBfloat16) return forward_in_rows<T, Bf16>(p, stream, threads);
    if (p.x.storage == Storage::kFloat16) return forward_in_rows<T, F16>(p, stream, threads);
  }
  forward_in_rows<T, T>(p, stream, threads);
}

template <class Row>
void by_blocks_of_rows(const SoftmaxProblem& problem, SoftmaxKind kind, bool stream, int threads) {
  const int64_t units = Row::units(problem),
                block = std::max<int64_t>(1, rows_of_block(problem, threads) / Row::kRows);
  std::atomic<int64_t> next{0};
  run_parallel(threads, [&](int) {
    Row row(problem);
    place(row);
    RowParts<Row> parts(kind, row.chunks());
    const FloatingPointMode mode;
    for (int64_t r; (r = next.fetch_add(block)) < units;) {
      const int64_t end = std::min(units, r + block);
      for (; r < end; r++) {
        begin_row(row, kind, r);
        for (int phase = 0; phase < phases_of(kind); phase++) {
          for (int64_t c = 0; c < row.chunks(); c++) part_of_row(row, kind, phase, c, &parts);
          close_phase(row, kind, phase, parts, true);
        }
        for (int64_t c = 0; c < row.chunks(); c++) write_part(row, kind, c, parts, stream);
      }
    }
    settle_streams();
  });
}

// Few long rows: the chunks of each are dealt to the threads.
template <class Row>
void by_chunks(const SoftmaxProblem& problem, SoftmaxKind kind, bool stream, int threads) {
  const int64_t units = Row::units(problem),
                block = std::max<int64_t>(1, kTaskColumns / kChunk / Row::kRows);
  for (int64_t r = 0; r < units; r++) {
    RowParts<Row> parts(kind, Row(problem).chunks());
    for (int phase = 0; phase <= phases_of(kind); phase++) {
      std::atomic<int64_t> next{0};
      run_parallel(threads, [&](int slot) {
        Row row(problem);
        place(row);
        const FloatingPointMode mode;
        begin_row(row, kind, r);
        const bool last = phase == phases_of(kind);
        for (int done = 0; done < phase; done++)
          close_phase(row, kind, done, parts, last && slot == 0);
        for (int64_t c; (c = next.fetch_add(block)) < row.chunks();)
          for (const int64_t end = std::min(row.chunks(), c + block); c < end; c++) {
            if (last)
              write_part(row, kind, c, parts, stream);
            else
              part_of_row(row, kind, phase, c, &parts);
          }
        settle_streams();
      });
    }
  }
}

// The same rows, with those inside that lie closer together.
inline SoftmaxProblem with_near_rows_inside(SoftmaxProblem p) {
  if (p.outer == 1 || (p.inner > 1 && std::abs(p.x.inner) <= std::abs(p.x.outer))) return p;
  std::swap(p.outer, p.inner);
  for (View3* v :
       {&p.x,  &p.where, &p.sink, &p.y,   &p.log_y, &p.lse, &p.m,     &p.log_l, &p.gy, &p.gz, &p.gl,
        &p.tx, &p.tsink, &p.tgy,  &p.tgz, &p.tgl,   &p.dx,  &p.dsink, &p.ty,    &p.tz, &p.tl})
    std::swap(v->outer, v->inner);
  return p;
}
inline bool side_by_side(const SoftmaxProblem& p) {
  return p.inner >= kLeastBeside && std::abs(p.x.inner) < std::abs(p.x.column);
}

template <class T>
void run_softmax(const SoftmaxProblem& given, SoftmaxKind kind) {
  const SoftmaxProblem turned = with_near_rows_inside(given);
  const bool beside = side_by_side(turned);
  const SoftmaxProblem& problem = beside ? turned : given;
  const int64_t rows = problem.outer * problem.inner, columns = problem.columns;
  if (rows == 0) return;
  const int64_t size = rows * columns;
  const bool stream = size * static_cast<int64_t>(sizeof(T)) >= kStreamBytes;
  const int threads = static_cast<int>(std::clamp<int64_t>(size / kTaskColumns, 1, num_threads()));
  using Strip = SoftmaxStrip<T>;
  if (beside && Strip::units(problem) < threads && columns > kKept)
    by_chunks<Strip>(problem, kind, stream, threads);
  else if (beside)
    by_blocks_of_rows<Strip>(problem, kind, stream, threads);
  else if (rows < threads && columns > kKept)
    by_chunks<SoftmaxRow<T>>(problem, kind, stream, threads);
  else if (kind == SoftmaxKind::kForward && in_rows(problem))
    forward_of_storage<T>(problem, stream, threads);
  else
    by_blocks_of_rows<SoftmaxRow<T>>(problem, kind, stream, threads);
}

template <class T, SoftmaxKind KIND>
void softmax_function(const SoftmaxProblem& problem) {
  run_softmax<T>(problem, KIND);
}

template <class T>
constexpr SoftmaxFunctions softmax_table() {
  return {softmax_function<T, SoftmaxKind::kForward>, softmax_function<T, SoftmaxKind::kVjp>,
          softmax_function<T, SoftmaxKind::kJvp>, softmax_function<T, SoftmaxKind::kVjpJvp>};
}

inline const SoftmaxKernels* softmax_kernels() {
  static const SoftmaxKernels table{softmax_table<float>(), softmax_table<double>()};
  return &table;
}

#include "simd/end.hpp"
