// The cross-entropy for one target: rows in memory, and how a call is cut into tasks. Included once
// by each unit in ops/targets/.
#pragma once
#include <atomic>
#include <vector>

#include "ops/cross_entropy.hpp"
#include "ops/cross_entropy_row-inl.hpp"
#include "ops/rows-inl.hpp"
#include "runtime/thread_pool.hpp"

#include "simd/begin.hpp"

constexpr int64_t kEntropyTaskColumns = 1 << 15;   // columns that are worth a task
constexpr int64_t kEntropyStreamBytes = 16 << 20;  // results from this size on go past the caches

enum class CrossEntropyKind { kForward, kVjp, kJvp, kVjpJvp };

// What a chunk leaves for its row.
template <class T>
struct RowPart {
  RowSums<T> sums;
  TangentSums<T> tangents;
};

// One row after the other. Its functions are called in this order: take, part of each chunk,
// finish, write of each chunk.
template <class T>
class CrossEntropyRow {
 public:
  CrossEntropyRow(const CrossEntropyProblem& problem, CrossEntropyKind kind, bool stream)
      : p_(problem),
        kind_(kind),
        stream_(stream),
        cap_(static_cast<T>(problem.softcap)),
        zeta_(static_cast<T>(problem.z_loss)) {}

  void place(Arena& arena) {
    for (T*& scratch : scratch_) scratch = arena.take<T>(kChunk);
  }
  int64_t chunks() const { return (p_.columns + kChunk - 1) / kChunk; }
  bool has_parts() const { return kind_ != CrossEntropyKind::kVjp; }
  bool has_results() const {
    return kind_ == CrossEntropyKind::kVjp || kind_ == CrossEntropyKind::kVjpJvp;
  }

  void take(int64_t row) {
    place_ = {row / p_.inner, row % p_.inner};
    take_target(p_.targets ? p_.targets[row] : -1);
    if (kind_ == CrossEntropyKind::kForward) return;
    state_ = RowState<T>(place_.number<T>(p_.m), place_.number<T>(p_.log_l));
    total_ = place_.number<T>(p_.total);
    of_ = {place_.number<T>(p_.g_loss), place_.number<T>(p_.g_lse), place_.number<T>(p_.g_z)};
    moved_ = {place_.number<T>(p_.tg_loss), place_.number<T>(p_.tg_lse), place_.number<T>(p_.tg_z)};
    if (kind_ == CrossEntropyKind::kVjp)
      moves_.of = row_cotangents(state_, of_, target_, total_, zeta_);
  }

  RowPart<T> part(int64_t chunk) {
    RowPart<T> found;
    const int n = width(chunk);
    const T* z = read(p_.x, chunk, 0);
    const TargetRow<T> target = target_of(chunk);
    if (kind_ == CrossEntropyKind::kForward)
      add_row_sums(z, n, target, cap_, scratch_[2], &found.sums);
    else
      add_tangent_sums(z, read(p_.tx, chunk, 2), read(p_.tprobabilities, chunk, 3), n, state_,
                       target, cap_, &found.tangents);
    return found;
  }

  // Merges the parts; one of those who do writes the numbers of the row.
  void finish(const RowPart<T>* parts, bool writes) {
    if (kind_ == CrossEntropyKind::kForward) {
      RowSums<T> sums;
      for (int64_t c = 0; c < chunks(); c++) merge_sums(parts[c].sums, &sums);
      if (writes) put(FinishedRow<T>(sums, target_, zeta_));
    } else if (has_parts()) {
      TangentSums<T> sums;
      for (int64_t c = 0; c < chunks(); c++) sums.add(parts[c].tangents);
      if (kind_ == CrossEntropyKind::kVjpJvp)
        moves_ = moved_cotangents(state_, sums, of_, moved_, target_, total_, zeta_);
      else if (writes)
        put(OutputTangents<T>(state_, sums, target_, total_, zeta_));
    }
  }

  void write(int64_t chunk) {
    const int n = width(chunk);
    const bool second = kind_ == CrossEntropyKind::kVjpJvp;
    const TargetRow<T> target = target_of(chunk);
    const T* z = read(p_.x, chunk, 0);
    const T* tz = second ? read(p_.tx, chunk, 2) : nullptr;
    // before dx, which may take the place of x
    if (p_.dprobabilities)
      emit(p_.dprobabilities, chunk, [&](T* to) {
        if (second)
          probability_gradient_tangent(z, tz, n, state_, moves_, target, cap_, to);
        else
          probability_gradient(z, n, state_, moves_.of.g, target, cap_, to);
      });
    if (!p_.dx) return;
    const T* tq = second ? read(p_.tprobabilities, chunk, 3) : nullptr;
    emit(p_.dx, chunk, [&](T* to) {
      if (second)
        row_gradient_tangent(z, tz, tq, n, state_, moves_, target, cap_, static_cast<T*>(nullptr),
                             to);
      else
        row_gradient(z, n, state_, moves_.of, target, cap_, to);
    });
  }

 private:
  int width(int64_t chunk) const {
    return static_cast<int>(std::min<int64_t>(kChunk, p_.columns - chunk * kChunk));
  }
  const T* read(const View3& v, int64_t chunk, int scratch) {
    return read_columns<T>(v, place_, chunk * kChunk, width(chunk), scratch_[scratch]);
  }

  void take_target(int64_t y) {
    const double smoothing = p_.label_smoothing;
    const T* weights = static_cast<const T*>(p_.weight);
    target_ = {};
    target_.weights = weights;
    if (p_.targets) {
      target_.ignored = y == p_.ignore_index || y < 0 || y >= p_.columns;
      if (target_.ignored) return;
      target_.index = y;
      target_.onehot = static_cast<T>(1 - smoothing) * (weights ? weights[y] : T{1});
    } else {
      target_.keep = static_cast<T>(1 - smoothing);
    }
    target_.spread = static_cast<T>(smoothing / static_cast<double>(p_.columns));
  }
  TargetRow<T> target_of(int64_t chunk) {
    TargetRow<T> target = target_.from(chunk * kChunk);
    target.probabilities = read(p_.probabilities, chunk, 1);
    return target;
  }

  void put(const FinishedRow<T>& row) const {
    place_.put_number(p_.loss, row.loss);
    place_.put_number(p_.lse, row.lse);
    place_.put_number(p_.z, row.z_loss);
    place_.put_number(p_.m, row.m);
    place_.put_number(p_.log_l, row.log_l);
    place_.put_number(p_.total, row.total);
  }
  void put(const OutputTangents<T>& row) const {
    place_.put_number(p_.t_loss, row.loss);
    place_.put_number(p_.t_lse, row.lse);
    place_.put_number(p_.t_z, row.z_loss);
  }

  // Writes f(where to) as a chunk of an array.
  template <class F>
  void emit(const View3& v, int64_t chunk, const F& f) {
    const int64_t first = chunk * kChunk;
    const bool streamed = stream_ && v.data != p_.x.data;
    if (in_place<T>(v) && !streamed) return f(place_.at<T>(v, first));
    f(scratch_[4]);
    if (in_place<T>(v))
      copy_past_caches(scratch_[4], width(chunk), place_.at<T>(v, first));
    else
      write_columns(v, place_, first, width(chunk), scratch_[4]);
  }

  const CrossEntropyProblem& p_;
  const CrossEntropyKind kind_;
  const bool stream_;
  const T cap_, zeta_;
  RowPlace place_;
  TargetRow<T> target_;
  RowState<T> state_{T{0}, T{0}};
  T total_ = 0;
  OutputCotangents<T> of_, moved_;
  MovedCotangents<T> moves_;
  T* scratch_[5] = {};  // x, probabilities, tangents of both (or s), results
};

template <class T>
void place_in_workspace(CrossEntropyRow<T>& row) {
  Arena count(nullptr);
  row.place(count);
  Arena arena(workspace(count.used()));
  row.place(arena);
}

TW_INLINE void settle_entropy_streams() {
#if defined(TILEWISE_TARGET_AVX512)
  _mm_sfence();
#endif
}

// Rows are dealt to the threads in blocks.
template <class T>
void entropy_by_blocks(const CrossEntropyProblem& problem, CrossEntropyKind kind, bool stream,
                       int threads) {
  const int64_t rows = problem.outer * problem.inner;
  const int64_t block = std::max<int64_t>(1, kEntropyTaskColumns / problem.columns);
  std::atomic<int64_t> next{0};
  run_parallel(threads, [&](int) {
    CrossEntropyRow<T> row(problem, kind, stream);
    place_in_workspace(row);
    const int64_t chunks = row.chunks();
    std::vector<RowPart<T>> parts(static_cast<size_t>(chunks));
    const FloatingPointMode mode;
    for (int64_t r; (r = next.fetch_add(block)) < rows;)
      for (const int64_t end = std::min(rows, r + block); r < end; r++) {
        row.take(r);
        for (int64_t c = 0; row.has_parts() && c < chunks; c++)
          parts[static_cast<size_t>(c)] = row.part(c);
        row.finish(parts.data(), true);
        for (int64_t c = 0; row.has_results() && c < chunks; c++) row.write(c);
      }
    settle_entropy_streams();
  });
}

// Few long rows: the chunks of each are dealt to the threads, first for the sums.
template <class T>
void entropy_by_chunks(const CrossEntropyProblem& problem, CrossEntropyKind kind, bool stream,
                       int threads) {
  const int64_t rows = problem.outer * problem.inner, block = kEntropyTaskColumns / kChunk;
  const CrossEntropyRow<T> shape(problem, kind, stream);
  const int64_t chunks = shape.chunks();
  std::vector<RowPart<T>> parts(static_cast<size_t>(chunks));
  auto deal = [&](int64_t r, bool writes) {
    std::atomic<int64_t> next{0};
    run_parallel(threads, [&](int slot) {
      CrossEntropyRow<T> row(problem, kind, stream);
      place_in_workspace(row);
      const FloatingPointMode mode;
      row.take(r);
      if (writes) row.finish(parts.data(), slot == 0);
      for (int64_t c; (!writes || row.has_results()) && (c = next.fetch_add(block)) < chunks;)
        for (const int64_t end = std::min(chunks, c + block); c < end; c++) {
          if (writes)
            row.write(c);
          else
            parts[static_cast<size_t>(c)] = row.part(c);
        }
      settle_entropy_streams();
    });
  };
  for (int64_t r = 0; r < rows; r++) {
    if (shape.has_parts()) deal(r, false);
    deal(r, true);
  }
}

template <class T, CrossEntropyKind KIND>
void cross_entropy_function(const CrossEntropyProblem& problem) {
  const int64_t rows = problem.outer * problem.inner, size = rows * problem.columns;
  if (size == 0) return;
  const bool stream = size * static_cast<int64_t>(sizeof(T)) >= kEntropyStreamBytes;
  const int threads =
      static_cast<int>(std::clamp<int64_t>(size / kEntropyTaskColumns, 1, num_threads()));
  if (rows < threads && problem.columns > kEntropyTaskColumns)
    entropy_by_chunks<T>(problem, KIND, stream, threads);
  else
    entropy_by_blocks<T>(problem, KIND, stream, threads);
}

template <class T>
constexpr CrossEntropyFunctions cross_entropy_table() {
  using Kind = CrossEntropyKind;
  return {cross_entropy_function<T, Kind::kForward>, cross_entropy_function<T, Kind::kVjp>,
          cross_entropy_function<T, Kind::kJvp>, cross_entropy_function<T, Kind::kVjpJvp>};
}

inline const CrossEntropyKernels* cross_entropy_kernels() {
  static const CrossEntropyKernels table{cross_entropy_table<float>(),
                                         cross_entropy_table<double>()};
  return &table;
}

#include "simd/end.hpp"
