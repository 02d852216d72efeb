// The forward pass of rows that lie in memory one number after another, with one result or none.
// While a row's exponentials are taken, the row before is written and the maximum of what comes
// next is found: so memory and arithmetic wait for each other as little as possible.
#pragma once
#include "ops/softmax_row-inl.hpp"

#include "simd/begin.hpp"

constexpr int kShortRow = 512;  // 16 rows up to this length are worked on together

// kYAgain takes the exponentials twice, for rows whose weights are too many to keep.
enum class Result { kNone, kY, kYAgain, kLogY };

constexpr uintptr_t kPage = 4096;

// Columns by which stores past the caches have to lead loads. A load waits for any store before it
// whose address has the same last 12 bits, in part, and such stores take long.
template <class X>
TW_INLINE int lead_of(const X* to, const X* from) {
  const auto distance = static_cast<int64_t>(
      (reinterpret_cast<uintptr_t>(to) - reinterpret_cast<uintptr_t>(from)) % kPage);
  constexpr int64_t kLeast = kPage / 8, kMost = 3 * kPage / 4, kStep = kLanesWide * sizeof(X);
  if (kLeast <= distance && distance <= kMost) return 0;
  const int64_t gap = distance < kLeast ? kLeast - distance : kLeast + kPage - distance;
  return static_cast<int>((gap + kStep - 1) / kStep) * kLanesWide;
}

template <class T, class X, Result R>
class SoftmaxForward {
 public:
  SoftmaxForward(const SoftmaxProblem& problem, SoftmaxRow<T>& row, bool stream)
      : p_(problem),
        row_(row),
        chunks_(row.chunks()),
        n_(problem.columns),
        y_(R == Result::kLogY ? problem.log_y : problem.y),
        together_((y_.inner == n_ || p_.inner == 1) &&
                  (y_.outer == n_ * p_.inner || p_.outer == 1)),
        stream_(kStreams && stream && sizeof(X) == sizeof(T) && aligned(y_)),
        exp_(problem.scale) {}

  void place(Arena& arena) {
    states_ = arena.take<ChunkState<T>>(chunks_);
    factors_ = arena.take<T>(chunks_);
    tops_ = arena.take<T>(chunks_);
    const int64_t shift = kPage / sizeof(T);
    if (R == Result::kY) buffer_ = w_ = arena.take<T>((n_ <= kShortRow ? kGroup * n_ : n_) + shift);
  }

  // Rows [begin, end).
  void rows(int64_t begin, int64_t end) {
    end_ = end;
    if (n_ <= kShortRow && !p_.sink) {
      for (int64_t r = begin; r < end; r += kGroup)
        sixteen(r, static_cast<int>(std::min<int64_t>(kGroup, end - r)));
      return;
    }
    constexpr bool kWrites = R != Result::kNone;
    w_ = half_a_page_from(at(p_.x, begin, 0));
    T top = top_of(at(p_.x, begin, 0), width(0));
    for (int64_t r = begin; r < end + kWrites; r++) {
      for (int64_t c = 0; c < chunks_; c++) {
        if (r == begin)
          top = step<true, false>(r, c, top);
        else if (r < end)
          top = step<true, kWrites>(r, c, top);
        else
          step<false, kWrites>(r, c, top);
      }
      if (r < end) close(r);
    }
  }

 private:
  static constexpr int kW = kWidth<T>, kAll = kLanesWide / kW;
  static constexpr T kNone = -std::numeric_limits<T>::infinity();

  static bool aligned(const View3& v) {
    return reinterpret_cast<uintptr_t>(v.data) % sizeof(X) == 0;
  }
  int width(int64_t chunk) const {
    return static_cast<int>(std::min<int64_t>(kChunk, n_ - chunk * kChunk));
  }
  X* at(const View3& v, int64_t row, int64_t chunk) const {
    const int64_t outer = p_.inner == 1 ? row : row / p_.inner,
                  inner = p_.inner == 1 ? 0 : row % p_.inner;
    return static_cast<X*>(const_cast<void*>(v.data)) + outer * v.outer + inner * v.inner +
           chunk * kChunk;
  }
  // That of the chunk which comes some chunks later, or of the last one.
  const X* later(int64_t row, int64_t chunk, int64_t by) const {
    chunk += by;
    row = std::min(row + chunk / chunks_, end_ - 1);
    return at(p_.x, row, chunk % chunks_);
  }

  // Where loads of x and of kept weights do not wait for stores to the other.
  T* half_a_page_from(const X* x) const {
    if (!buffer_) return nullptr;
    const uintptr_t away =
        reinterpret_cast<uintptr_t>(x) + kPage / 2 - reinterpret_cast<uintptr_t>(buffer_);
    return buffer_ + away % kPage / 64 * 64 / sizeof(T);
  }
  static T top_of(const X* x, int n) {
    Lanes64<T> top(kNone);
    each_register<T>(n, [&](int j, int u, int left) __attribute__((always_inline)) {
      top.of[u] = max(load_some(x + j, left, kNone), top.of[u]);
    });
    return top.top();
  }

  void close(int64_t r) {
    row_.take(r);
    row_.finish(states_, true);
    if (R == Result::kY || R == Result::kYAgain)
      for (int64_t c = 0; c < chunks_; c++) {
        factors_[c] = row_.factor(states_[c]);
        tops_[c] = states_[c].m;
      }
  }

  // What is written of columns [j, j + left) of a chunk.
  struct Back {
    const T* w;
    const X* x;
    Vec<T> high, scale, last;  // `last` is a factor of y, a term of log_y
    Exp<T> exp;
    TW_MEMBER Vec<T> operator()(int j, int left) const {
      if constexpr (R == Result::kY)
        return load_some(w + j, left, T{0}) * last;
      else if constexpr (R == Result::kYAgain)
        return exp(load_some(x + j, left, T{0}) - high) * last;
      else
        return fma(load_some(x + j, left, T{0}) - high, scale, last);
    }
  };
  Back back(int64_t r, int64_t c) const {
    const Vec<T> high = R == Result::kYAgain ? finite_max<T>(set1(tops_[c])) : row_.high(),
                 last = set1(R == Result::kLogY ? -row_.log_l() : factors_[c]);
    return {w_ + c * kChunk, at(p_.x, r, c), high, set1(row_.scale()), last, exp_};
  }

  template <bool FRONT, bool BACK>
  T step(int64_t r, int64_t c, T top) {
    if constexpr (BACK && kStreams && sizeof(X) == sizeof(T))
      if (stream_) return step<FRONT, BACK, true>(r, c, top);
    return step<FRONT, BACK, false>(r, c, top);
  }
  // Takes the exponentials of chunk c of row r, whose maximum is `top`, writes that chunk of the
  // row before and returns the maximum of the next chunk.
  template <bool FRONT, bool BACK, bool STREAM>
  __attribute__((noinline)) T step(int64_t r, int64_t c, T top) {
    const int n = width(c);
    const int64_t next_c = c + 1 < chunks_ ? c + 1 : 0, next_r = c + 1 < chunks_ ? r : r + 1;
    const bool more = FRONT && next_r < end_;
    const int next_n = more ? width(next_c) : n;
    const X* x = FRONT ? at(p_.x, r, c) : nullptr;
    const X* next = more ? at(p_.x, next_r, next_c) : x;
    const X* far = FRONT ? later(next_r, next_c, 1 + (kAhead - 1) / n) : nullptr;
    T* w = w_ + c * kChunk;
    X* to = BACK ? at(y_, r - 1, c) : nullptr;
    const Back written = back(BACK ? r - 1 : r, c);
    const Vec<T> high = finite_max<T>(set1(top));
    const Exp<T> exp = exp_;
    Vec<T> top_of[kAll], sum_of[kAll];  // as registers: an object's would stay in memory
    TW_UNROLL_LANES for (int u = 0; u < kAll; u++) {
      top_of[u] = set1(kNone);
      sum_of[u] = zero<T>();
    }
    const bool joined = STREAM && chunk_follows(r - 1, c);
    // the last line, where it is not stored whole
    if (STREAM && !joined && numbers_before_aligned(to)) __builtin_prefetch(to + n - 1, 1);
    const int lead = STREAM ? write_head(to, n, x, written) : 0;
    const int common = std::min(n - lead, next_n);
    int j = 0;
    for (; j + kLanesWide <= common; j += kLanesWide)
      TW_UNROLL_LANES for (int u = 0; u < kAll; u++) {
        const int i = j + u * kW;
        if constexpr (BACK) put<STREAM>(to + i + lead, written(i + lead, kW));
        if constexpr (FRONT) {
          if (u * kW * sizeof(X) % 64 == 0) prefetch_ahead(far + i);
          top_of[u] = max(load_wide(next + i), top_of[u]);
          const Vec<T> e = exp(load_wide(x + i) - high);
          sum_of[u] += e;
          if constexpr (R == Result::kY) store(w + i, e);
        }
      }
    if constexpr (BACK) {
      int i = j + lead;
      for (; i + kW <= n; i += kW) put<STREAM>(to + i, written(i, kW));
      if constexpr (STREAM)
        end_run(to + i, n - i, joined,
                [&]() __attribute__((always_inline)) { return written(i, n - i); });
      else if (i < n)
        store_some(to + i, n - i, written(i, n - i));
    }
    if constexpr (!FRONT) return top;
    Lanes64<T> tops, sums;
    TW_UNROLL_LANES for (int u = 0; u < kAll; u++) {
      tops.of[u] = top_of[u];
      sums.of[u] = sum_of[u];
    }
    each_register<T>(j, next_n, [&](int i, int u, int left) __attribute__((always_inline)) {
      tops.of[u] = max(load_some(next + i, left, kNone), tops.of[u]);
    });
    each_register<T>(j, n, [&](int i, int u, int left) __attribute__((always_inline)) {
      const Vec<T> e = exp(load_some(x + i, left, kNone) - high);
      sums.of[u] += e;
      if constexpr (R == Result::kY) store_some(w + i, left, e);
    });
    const T l = sums.total();
    states_[c] = {l == l ? top : top_with_nan(top, x, n), l};
    return tops.top();
  }

  // Whether what is written after a chunk of y lies behind it in memory.
  bool chunk_follows(int64_t r, int64_t c) const {
    return c + 1 < chunks_ || (together_ && r + 1 < end_);
  }

  // --- Stores past the caches take whole registers: what is left of a run in memory is held back
  // for the next one, if that begins where it ends -------

  // Stores what comes before the first aligned of n numbers, and what is held; returns how many of
  // the n that were.
  template <class F>
  TW_MEMBER int begin_run(X* to, int n, const F& first) {
    const int ahead = std::min(n, numbers_before_aligned(to));
    if (ahead == 0) return 0;
    if (held_ == 0) {
      store_some(to, ahead, first(ahead));
      return ahead;
    }
    store_some(line_ + held_, ahead, first(ahead));
    held_ += ahead;
    if (held_ == kW) {
      put<true>(to + ahead - kW, load(line_));
      held_ = 0;
    }
    return ahead;
  }
  // The last n numbers of a run, fewer than a register's.
  template <class F>
  TW_MEMBER void end_run(X* to, int n, bool joined, const F& last) {
    if (n > 0 && joined) {
      store(line_, last());
      held_ = n;
    } else if (n > 0) {
      store_some(to, n, last());
    } else if (held_ && !joined) {
      store_some(to - held_, held_, load(line_));
      held_ = 0;
    }
  }

  // Returns how many columns these are.
  int write_head(X* to, int n, const X* x, const Back& written) {
    const int ahead = begin_run(
        to, n, [&](int count) __attribute__((always_inline)) { return written(0, count); });
    const int lead = x ? lead_of<X>(to + ahead, x) : 0, end = std::min(n, ahead + lead);
    int j = ahead;
    for (; j + kW <= end; j += kW) put<true>(to + j, written(j, kW));
    return j;
  }

  // Rows [r, r + count) of up to 16: what a row needs besides its columns is done for all at once.
  void sixteen(int64_t r, int count) {
    const int n = static_cast<int>(n_);
    const X* x[kGroup];
    alignas(64) T part[kGroup * kGroup], m[kGroup], l[kGroup], high[kGroup];
    for (int i = 0; i < kGroup; i++) x[i] = at(p_.x, r + std::min(i, count - 1), 0);
    if (count < kGroup)
      for (T& lane : part) lane = 1;  // rows that are not there have a logarithm too
    auto keep = [&](int i, const Lanes64<T>& of, auto op) __attribute__((always_inline)) {
      Vec<T> v[kRegs<T>];
      of.fold(op, v);
      TW_UNROLL_LANES for (int k = 0; k < kRegs<T>; k++) store(part + i * kGroup + k * kW, v[k]);
    };
    for (int i = 0; i < count; i++) {
      Lanes64<T> top(kNone);
      each_register<T>(n, [&](int j, int u, int left) __attribute__((always_inline)) {
        top.of[u] = max(load_some(x[i] + j, left, kNone), top.of[u]);
      });
      keep(i, top, Top{});
    }
    trees<T>(part, Top{}, m);
    for (int i = 0; i < kGroup; i += kW) store(high + i, finite_max<T>(load(m + i)));
    const Exp<T> exp = exp_;
    for (int i = 0; i < count; i++) {
      Lanes64<T> sum;
      const Vec<T> top = set1(high[i]);
      const X* far = x[i] + kGroup * n_;
      each_register<T>(n, [&](int j, int u, int left) __attribute__((always_inline)) {
        if (u * kW * sizeof(X) % 64 == 0) prefetch_ahead(far + j);
        const Vec<T> e = exp(load_some(x[i] + j, left, kNone) - top);
        sum.of[u] += e;
        if constexpr (R == Result::kY) store_some(w_ + i * n + j, left, e);
      });
      keep(i, sum, Sum{});
    }
    trees<T>(part, Sum{}, l);
    for (int i = 0; i < count; i++)
      if (l[i] != l[i]) m[i] = top_with_nan(m[i], x[i], n);
    finish_sixteen(r, count, m, l, high);
  }
  void finish_sixteen(int64_t r, int count, const T* m, const T* l, const T* high) {
    alignas(64) T inverse[kGroup], log_l[kGroup];
    row_.put_sixteen(r, count, m, l, inverse, log_l);
    if constexpr (R == Result::kY && kStreams && sizeof(X) == sizeof(T))
      if (stream_ && together_) return write_together(r, count, inverse);
    if constexpr (R != Result::kNone)
      for (int i = 0; i < count; i++) {
        const int n = static_cast<int>(n_);
        const T last = R == Result::kY ? inverse[i] : -log_l[i];
        const Back written{w_ + i * n,         at(p_.x, r + i, 0), set1(high[i]),
                           set1(row_.scale()), set1(last),         exp_};
        X* to = at(y_, r + i, 0);
        constexpr bool kMay = kStreams && sizeof(X) == sizeof(T);
        if (kMay && stream_)
          write<kMay>(to, n, written);
        else
          write<false>(to, n, written);
      }
  }
  // Rows one after another as one run, which has a head and a tail once.
  void write_together(int64_t r, int count, const T* inverse) {
    const int n = static_cast<int>(n_), all = count * n;
    X* to = at(y_, r, 0);
    int i = 0, end = n;  // a row, and where it ends
    // of the numbers [j, stop) of a register, which may be those of several rows
    auto factors = [&](int j, int stop) __attribute__((always_inline)) {
      Vec<T> f = set1(inverse[i]);
      for (; end < stop; end += n)
        f = select(lanes<T>((1u << (end - j)) - 1), f, set1(inverse[++i]));
      return f;
    };
    int j = begin_run(to, all, [&](int ahead) __attribute__((always_inline)) {
      return load_some(w_, ahead, T{0}) * factors(0, ahead);
    });
    while (j + kW <= all) {
      const Vec<T> last = set1(inverse[i]);
      for (; j + kW <= end; j += kW) put<true>(to + j, load(w_ + j) * last);
      if (j + kW > all) break;
      put<true>(to + j, load(w_ + j) * factors(j, j + kW));
      j += kW;
    }
    end_run(to + j, all - j, r + count < end_, [&]() __attribute__((always_inline)) {
      return load_some(w_ + j, all - j, T{0}) * factors(j, all);
    });
  }
  template <bool STREAM>
  TW_MEMBER static void write(X* to, int n, const Back& written) {
    int j = STREAM ? std::min(n, numbers_before_aligned(to)) : 0;
    if (j) store_some(to, j, written(0, j));
    for (; j + kW <= n; j += kW) put<STREAM>(to + j, written(j, kW));
    if (j < n) store_some(to + j, n - j, written(j, n - j));
  }

  const SoftmaxProblem& p_;
  SoftmaxRow<T>& row_;
  const int64_t chunks_, n_;
  const View3 y_;
  const bool together_;  // rows of y without gaps
  const bool stream_;
  const Exp<T> exp_;
  int64_t end_ = 0;
  alignas(64) T line_[kW];
  int held_ = 0;  // numbers of line_ that are still to be stored
  ChunkState<T>* states_ = nullptr;
  T *factors_ = nullptr, *tops_ = nullptr, *buffer_ = nullptr, *w_ = nullptr;
};

#include "simd/end.hpp"
