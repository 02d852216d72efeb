// The softmax family of rows side by side, for one target: neighbours in memory, while the columns
// of each lie far apart. A lane of a register is a row, so that nothing is transposed. The chunks
// of a row, its 64 partial sums and the tree they are folded in are those of SoftmaxRow: a partial
// sum is a register here, and the bits are the same.
#pragma once
#include "ops/rows-inl.hpp"
#include "ops/softmax_terms-inl.hpp"
#include "runtime/workspace.hpp"

#include "simd/begin.hpp"

// Columns of rows side by side: the numbers of column j begin at at + j step.
template <class T>
struct Beside {
  T* at = nullptr;
  int64_t step = 0;
  explicit operator bool() const { return at != nullptr; }
};

template <class T>
class SoftmaxStrip {
  static constexpr int kW = kWidth<T>, kWide = 4;  // registers side by side, or one at the margin
  static constexpr T kNone = -std::numeric_limits<T>::infinity();

 public:
  static constexpr int kRows = kWide * kW;
  struct State {
    T m[kRows], l[kRows];
  };
  struct Sums {
    T c[kRows], mu[kRows];  // sum of p gy + gz, and of p tx
  };
  struct Moved {
    T tc[kRows];  // sum of tp gy + p tgy + tgz
  };

  explicit SoftmaxStrip(const SoftmaxProblem& problem)
      : p_(problem),
        exp_(problem.scale),
        exp1_(1),
        sink_scale_{problem.scale},
        scale_(splat<T>(problem.scale)),
        kept_(problem.columns <= kKept),
        cuts_(problem) {}

  void place(Arena& arena) {
    for (T*& scratch : scratch_) scratch = arena.take<T>(kLanesWide * kRows);
    out_ = arena.take<T>(kLanesWide * kRows);
    sums_ = arena.take<T>(kLanesWide * kRows);
    kept_at_ = arena.take<T>(kRows * (kept_ ? p_.columns : kChunk));
  }

  static int64_t units(const SoftmaxProblem& p) { return p.outer * Cuts(p).strips(); }
  int64_t chunks() const { return std::max<int64_t>(1, (p_.columns + kChunk - 1) / kChunk); }

  void take(int64_t strip) {
    const int64_t each = cuts_.strips();
    place_.outer = strip / each;
    place_.inner = cuts_.first(strip % each);
    count_ = static_cast<int>(cuts_.first(strip % each + 1) - place_.inner);
    wide_ = count_ == kRows;
    known_ = 0;
    RowPlace next = place_;
    next.inner += count_;
    if (next.inner == p_.inner) next = {std::min(place_.outer + 1, p_.outer - 1), 0};
    next_ = next;
  }

  // --- Forward -------

  State state(int64_t chunk) { return wide_ ? state<kWide>(chunk) : state<1>(chunk); }

  // Merges the chunks' states and the sinks; one of those who do writes the numbers of the rows.
  void finish(const State* states, bool writes) {
    const bool logs = p_.log_y || p_.lse || p_.log_l;
    for (int i = 0; i < count_; i += kW) {
      Vec<T> m = load(states[0].m + i), l = load(states[0].l + i);
      if (chunks() > 1) {
        m = set1(kNone), l = zero<T>();
        for (int64_t c = 0; c < chunks(); c++)
          add_state<T>(exp_, load(states[c].m + i), load(states[c].l + i), &m, &l);
      }
      if (p_.sink) add_sinks(i, &m, &l);
      const RowResults<T> found(m, l, scale_, logs);
      store(m_ + i, select(unordered(l), l, m));
      store(inverse_ + i, found.inverse);
      store(log_l_ + i, found.log_l);
      if (!writes) continue;
      put_numbers(p_.m, i, found.m);
      put_numbers(p_.log_l, i, found.log_l);
      put_numbers(p_.lse, i, found.lse);
    }
  }

  void write(int64_t chunk, const State* states, bool stream) {
    if (wide_)
      write<kWide>(chunk, states[chunk], stream);
    else
      write<1>(chunk, states[chunk], false);
  }

  // --- Derivatives: sums over rows, chunk by chunk, then what they give -------

  // The numbers of rows that derivatives start from.
  void load_row() {
    for (int i = 0; i < count_; i += kW) {
      const Vec<T> m = numbers(p_.m, i), log_l = numbers(p_.log_l, i);
      const auto empty = equal(m, set1(kNone));
      const Vec<T> inverse = select(empty, zero<T>(), exp1_(-log_l));
      store(m_ + i, m);
      store(log_l_ + i, log_l);
      store(inverse_ + i, inverse);
      Vec<T> share = zero<T>();
      if (p_.sink) share = select(empty, share, weights_of_sinks(numbers(p_.sink, i), m) * inverse);
      store(sink_ + i, share);
    }
  }

  Sums sums(int64_t chunk) { return wide_ ? sums<kWide>(chunk) : sums<1>(chunk); }
  void finish_sums(const Sums* parts) {
    for (int i = 0; i < count_; i += kW) {
      Vec<T> c = zero<T>(), mu = zero<T>();
      for (int64_t k = 0; k < chunks(); k++) {
        c += load(parts[k].c + i);
        mu += load(parts[k].mu + i);
      }
      if (p_.gl) c -= numbers(p_.gl, i);
      const Vec<T> tsink = p_.tsink ? numbers(p_.tsink, i) : zero<T>();
      mu = mu * scale_;
      if (p_.sink) mu += load(sink_ + i) * tsink;
      const auto empty = equal(load(m_ + i), set1(kNone));
      store(tsink_ + i, tsink);
      store(c_ + i, select(empty, zero<T>(), c));
      store(mu_ + i, select(empty, zero<T>(), mu));
    }
  }

  Moved moved_sum(int64_t chunk) { return wide_ ? moved_sum<kWide>(chunk) : moved_sum<1>(chunk); }
  void finish_moved(const Moved* parts) {
    for (int i = 0; i < count_; i += kW) {
      Vec<T> tc = zero<T>();
      for (int64_t k = 0; k < chunks(); k++) tc += load(parts[k].tc + i);
      if (p_.tgl) tc -= numbers(p_.tgl, i);
      store(tc_ + i, select(equal(load(m_ + i), set1(kNone)), zero<T>(), tc));
    }
  }

  void write_vjp(int64_t chunk, bool stream) {
    if (wide_)
      write_vjp<kWide>(chunk, stream);
    else
      write_vjp<1>(chunk, false);
    for (int i = 0; i < count_ && chunk == 0; i += kW)
      put_numbers(p_.dsink, i, terms(i).dsink(load(sink_ + i)));
  }
  void write_jvp(int64_t chunk, bool stream) {
    if (wide_)
      write_jvp<kWide>(chunk, stream);
    else
      write_jvp<1>(chunk, false);
    for (int i = 0; i < count_ && chunk == 0; i += kW)
      put_numbers(p_.tl, i, load(mu_ + i) + zero<T>());
  }
  void write_vjp_jvp(int64_t chunk, bool stream) {
    if (wide_)
      write_vjp_jvp<kWide>(chunk, stream);
    else
      write_vjp_jvp<1>(chunk, false);
    for (int i = 0; i < count_ && chunk == 0; i += kW)
      put_numbers(p_.dsink, i, terms(i).tdsink(load(sink_ + i), load(tsink_ + i)));
  }

 private:
  // Where strips begin: after some rows before the first whole register of the results in memory
  // come wide strips, then narrow ones.
  struct Cuts {
    int64_t inner, ahead = 0, wide, narrow;
    explicit Cuts(const SoftmaxProblem& p) : inner(p.inner) {
      const View3& to = p.y ? p.y : p.log_y ? p.log_y : p.dx ? p.dx : p.ty ? p.ty : p.tz;
      if (to && inner >= kRows && lines_match(to)) ahead = numbers_before_aligned(start_of(to));
      wide = (inner - ahead) / kRows;
      narrow = ((inner - ahead) % kRows + kW - 1) / kW;
    }
    int64_t strips() const { return (ahead > 0) + wide + narrow; }
    int64_t first(int64_t strip) const {
      if (ahead > 0 && strip-- == 0) return 0;
      return std::min(
          inner, ahead + std::min(strip, wide) * kRows + std::max<int64_t>(0, strip - wide) * kW);
    }
  };
  static const T* start_of(const View3& v) { return static_cast<const T*>(v.data); }
  // Whether registers begin at the same place of a line in all columns.
  static bool lines_match(const View3& v) {
    constexpr int64_t kSize = sizeof(T);
    return v.storage == kStorageOf<T> && v.inner == 1 &&
           reinterpret_cast<uintptr_t>(v.data) % sizeof(T) == 0 &&
           (v.column * kSize) % kVectorBytes == 0 && (v.outer * kSize) % kVectorBytes == 0;
  }
  int width(int64_t chunk) const {
    return static_cast<int>(std::min<int64_t>(kChunk, p_.columns - chunk * kChunk));
  }

  // f(first column of the chunk, how many) for blocks of up to 64 columns
  template <class F>
  static TW_MEMBER void each_block(int n, const F& f) {
    for (int j = 0; j < n; j += kLanesWide) f(j, std::min(kLanesWide, n - j));
  }
  // f(column, register) for n columns
  template <int REGS, class F>
  static TW_MEMBER void each(int n, const F& f) {
    for (int j = 0; j < n; j++) TW_UNROLL_LANES for (int r = 0; r < REGS; r++) f(j, r);
  }

  template <int REGS>
  State state(int64_t chunk) {
    const int n = width(chunk);
    T* kept = kept_columns<REGS>(chunk);
    Vec<T> top[REGS];
    for (Vec<T>& v : top) v = set1(kNone);
    each_block(n, [&](int first, int many) __attribute__((always_inline)) {
      const Beside<const T> x = read<REGS>(p_.x, chunk, first, many, kNone, scratch_[0]);
      T* to = kept + first * (REGS * kW);
      each<REGS>(many, [&](int j, int r) __attribute__((always_inline)) {
        const Vec<T> v = number<REGS>(x, j, r);
        top[r] = max(v, top[r]);
        store(to + (j * REGS + r) * kW, v);
      });
    });
    State found;
    TW_UNROLL_LANES for (int r = 0; r < REGS; r++) store(found.m + r * kW, top[r]);
    if (kept_ && p_.y)
      add_weights<REGS, true>(chunk, n, top, kept);
    else
      add_weights<REGS, false>(chunk, n, top, kept);
    fold<REGS>(n, found.l);
    bool finite = true;
    TW_UNROLL_LANES for (int r = 0; r < REGS; r++) finite &=
        !any(unordered(load(found.l + r * kW)));
    if (!finite) put_nan_tops<REGS>(chunk, n, found.m);
    return found;
  }
  template <int REGS>
  __attribute__((noinline)) void put_nan_tops(int64_t chunk, int n, T* m) {
    each_block(n, [&](int first, int many) {
      const Beside<const T> x = read<REGS>(p_.x, chunk, first, many, kNone, scratch_[0]);
      each<REGS>(many, [&](int j, int r) {
        const Vec<T> v = number<REGS>(x, j, r);
        store(m + r * kW, select(unordered(v), v, load(m + r * kW)));
      });
    });
  }
  // Partial sums of exp(x - m); the weights take the place of x where they are kept.
  template <int REGS, bool KEPT>
  TW_MEMBER void add_weights(int64_t chunk, int n, const Vec<T> (&m)[REGS], T* kept) {
    Vec<T> high[REGS];
    TW_UNROLL_LANES for (int r = 0; r < REGS; r++) high[r] = finite_max<T>(m[r]);
    const Exp<T> exp = exp_;
    const bool last = chunk + 1 == chunks();
    const int64_t ahead = last ? 0 : chunk + 1, bytes = bytes_of(p_.x.storage);
    const char* far = (last ? next_ : place_).template at<const char>(scaled(p_.x, bytes));
    far += ahead * kChunk * p_.x.column * bytes;
    const int known = width(ahead);
    each_block(n, [&](int first, int many) __attribute__((always_inline)) {
      T* at = kept + first * (REGS * kW);
      add<REGS>(first == 0, many, [&](int j, int r) __attribute__((always_inline)) {
        if (first + j < known)
          prefetch_ahead(far + (first + j) * p_.x.column * bytes + r * kW * bytes);
        T* w = at + (j * REGS + r) * kW;
        const Vec<T> e = exp(load(w) - high[r]);
        if constexpr (KEPT) store(w, e);
        return e;
      });
    });
  }
  static View3 scaled(View3 v, int64_t bytes) {
    v.outer *= bytes;
    v.inner *= bytes;
    return v;
  }

  template <int REGS>
  void write(int64_t chunk, const State& state, bool stream) {
    const int n = width(chunk);
    const T* kept = kept_columns<REGS>(chunk);
    Vec<T> factor[REGS], high[REGS], log_l[REGS];
    TW_UNROLL_LANES for (int r = 0; r < REGS; r++) {
      const Vec<T> m = load(m_ + r * kW), chunk_m = load(state.m + r * kW);
      factor[r] = factor_of_chunk<T>(exp_, chunk_m, m, load(inverse_ + r * kW));
      high[r] = finite_max<T>(chunk_m);
    }
    if (p_.y)
      each_block(n, [&](int first, int many) __attribute__((always_inline)) {
        const T* w = kept + first * (REGS * kW);
        if (kept_)
          return emit<REGS>(p_.y, chunk, first, many, T{0}, stream,
                            [&](int j, int r) __attribute__((always_inline)) {
                              return load(w + (j * REGS + r) * kW) * factor[r];
                            });
        const Beside<const T> x = read<REGS>(p_.x, chunk, first, many, kNone, scratch_[0]);
        emit<REGS>(p_.y, chunk, first, many, T{0}, stream,
                   [&](int j, int r) __attribute__((always_inline)) {
                     return exp_(number<REGS>(x, j, r) - high[r]) * factor[r];
                   });
      });
    if (!p_.log_y) return;
    TW_UNROLL_LANES for (int r = 0; r < REGS; r++) {
      high[r] = finite_max<T>(load(m_ + r * kW));
      log_l[r] = load(log_l_ + r * kW);
    }
    each_block(n, [&](int first, int many) __attribute__((always_inline)) {
      Beside<const T> x{kept + first * (REGS * kW), REGS * kW};
      if (!kept_ || p_.y) x = read<REGS>(p_.x, chunk, first, many, kNone, scratch_[0]);
      emit<REGS>(p_.log_y, chunk, first, many, kNone, stream,
                 [&](int j, int r) __attribute__((always_inline)) {
                   return fma(number<REGS>(x, j, r) - high[r], scale_, -log_l[r]);
                 });
    });
  }

  template <int REGS>
  Sums sums(int64_t chunk) {
    Sums found{};
    const int n = width(chunk);
    auto add_products = [&](const View3& v, bool anew,
                            bool weighted) __attribute__((always_inline)) {
      each_block(n, [&](int first, int many) __attribute__((always_inline)) {
        const Beside<const T> g = read<REGS>(v, chunk, first, many, T{0}, scratch_[1]);
        if (!weighted)
          return add<REGS>(anew && first == 0, many,
                           [&](int j, int r)
                               __attribute__((always_inline)) { return number<REGS>(g, j, r); });
        const T* p = probabilities<REGS>(chunk, first, many);
        add<REGS>(anew && first == 0, many, [&](int j, int r) __attribute__((always_inline)) {
          return load(p + (j * REGS + r) * kW) * number<REGS>(g, j, r);
        });
      });
    };
    if (p_.gy) add_products(p_.gy, true, true);
    if (p_.gz) add_products(p_.gz, !p_.gy, false);
    if (p_.gy || p_.gz) fold<REGS>(n, found.c);
    if (p_.tx) add_products(p_.tx, true, true), fold<REGS>(n, found.mu);
    return found;
  }

  // The arrays of a second derivative, of a block of columns.
  struct Second {
    Beside<const T> tx, gy, tgy, tgz;
  };
  template <int REGS>
  Second second(int64_t chunk, int first, int many) {
    return {read<REGS>(p_.tx, chunk, first, many, T{0}, scratch_[0]),
            read<REGS>(p_.gy, chunk, first, many, T{0}, scratch_[1]),
            read<REGS>(p_.tgy, chunk, first, many, T{0}, scratch_[2]),
            read<REGS>(p_.tgz, chunk, first, many, T{0}, scratch_[3])};
  }
  template <int REGS>
  Moved moved_sum(int64_t chunk) {
    Moved found{};
    const int n = width(chunk);
    each_block(n, [&](int first, int many) __attribute__((always_inline)) {
      const T* p = probabilities<REGS>(chunk, first, many);
      const Second s = second<REGS>(chunk, first, many);
      add<REGS>(first == 0, many, [&](int j, int r) __attribute__((always_inline)) {
        return terms(r * kW).tc_of(load(p + (j * REGS + r) * kW), number<REGS>(s.tx, j, r),
                                   number<REGS>(s.gy, j, r), number<REGS>(s.tgy, j, r),
                                   number<REGS>(s.tgz, j, r));
      });
    });
    fold<REGS>(n, found.tc);
    return found;
  }

  template <int REGS>
  void write_vjp(int64_t chunk, bool stream) {
    if (!p_.dx) return;
    each_block(width(chunk), [&](int first, int many) __attribute__((always_inline)) {
      const T* p = probabilities<REGS>(chunk, first, many);
      const Beside<const T> gy = read<REGS>(p_.gy, chunk, first, many, T{0}, scratch_[0]),
                            gz = read<REGS>(p_.gz, chunk, first, many, T{0}, scratch_[1]);
      emit<REGS>(p_.dx, chunk, first, many, T{0}, stream,
                 [&](int j, int r) __attribute__((always_inline)) {
                   return alive(
                       r, terms(r * kW).dx(load(p + (j * REGS + r) * kW), number<REGS>(gy, j, r),
                                           number<REGS>(gz, j, r)));
                 });
    });
  }
  template <int REGS>
  void write_jvp(int64_t chunk, bool stream) {
    each_block(width(chunk), [&](int first, int many) __attribute__((always_inline)) {
      const Beside<const T> tx = read<REGS>(p_.tx, chunk, first, many, T{0}, scratch_[0]);
      if (p_.ty) {
        const T* p = probabilities<REGS>(chunk, first, many);
        emit<REGS>(p_.ty, chunk, first, many, T{0}, stream,
                   [&](int j, int r) __attribute__((always_inline)) {
                     return terms(r * kW).ty(load(p + (j * REGS + r) * kW), number<REGS>(tx, j, r));
                   });
      }
      if (p_.tz)
        emit<REGS>(p_.tz, chunk, first, many, T{0}, stream,
                   [&](int j, int r) __attribute__((always_inline)) {
                     return alive(r, terms(r * kW).tz(number<REGS>(tx, j, r)));
                   });
    });
  }
  template <int REGS>
  void write_vjp_jvp(int64_t chunk, bool stream) {
    if (!p_.dx) return;
    each_block(width(chunk), [&](int first, int many) __attribute__((always_inline)) {
      const T* p = probabilities<REGS>(chunk, first, many);
      const Second s = second<REGS>(chunk, first, many);
      emit<REGS>(p_.dx, chunk, first, many, T{0}, stream,
                 [&](int j, int r) __attribute__((always_inline)) {
                   return alive(
                       r, terms(r * kW).tdx(load(p + (j * REGS + r) * kW), number<REGS>(s.tx, j, r),
                                            number<REGS>(s.gy, j, r), number<REGS>(s.tgy, j, r),
                                            number<REGS>(s.tgz, j, r)));
                 });
    });
  }

  TW_MEMBER SoftmaxTerms<T> terms(int i) const {
    return {scale_, load(c_ + i), load(mu_ + i), load(tc_ + i)};
  }
  TW_MEMBER Vec<T> alive(int r, Vec<T> x) const {
    return select(equal(load(m_ + r * kW), set1(kNone)), zero<T>(), x);
  }

  // p of a block of columns, kept where rows are short.
  template <int REGS>
  const T* probabilities(int64_t chunk, int first, int many) {
    const int64_t column = chunk * kChunk + first;
    T* p = kept_at_ + (kept_ ? column * (REGS * kW) : 0);
    if (kept_ && column < known_) return p;
    known_ = column + many;
    const Beside<const T> x = read<REGS>(p_.x, chunk, first, many, kNone, scratch_[3]);
    const Exp<T> exp = exp_;
    Vec<T> high[REGS], inverse[REGS];
    TW_UNROLL_LANES for (int r = 0; r < REGS; r++) {
      high[r] = finite_max<T>(load(m_ + r * kW));
      inverse[r] = load(inverse_ + r * kW);
    }
    each<REGS>(many, [&](int j, int r) __attribute__((always_inline)) {
      store(p + (j * REGS + r) * kW, exp(number<REGS>(x, j, r) - high[r]) * inverse[r]);
    });
    return p;
  }
  template <int REGS>
  T* kept_columns(int64_t chunk) const {
    return kept_at_ + (kept_ ? chunk * kChunk * (REGS * kW) : 0);
  }

  // --- Partial sums -------

  // Adds f(column, register) to the partial sums of a block of columns, or begins them anew.
  template <int REGS, class F>
  TW_MEMBER void add(bool anew, int many, const F& f) {
    if (anew)
      each<REGS>(many, [&](int j, int r) __attribute__((always_inline)) {
        store(sums_ + (j * REGS + r) * kW, f(j, r) + zero<T>());
      });
    else
      each<REGS>(many, [&](int j, int r) __attribute__((always_inline)) {
        T* sum = sums_ + (j * REGS + r) * kW;
        store(sum, load(sum) + f(j, r));
      });
  }
  // Folds the partial sums of n columns, in the order of Lanes64.
  template <int REGS>
  void fold(int n, T* to) {
    constexpr int kS = REGS * kW;
    const int lanes = n <= kGroup ? kGroup : kLanesWide;
    for (int k = std::min(n, lanes) * kS; k < lanes * kS; k += kW) store(sums_ + k, zero<T>());
    auto sum = [&](int k) __attribute__((always_inline)) { return load(sums_ + k); };
    constexpr int kQuarter = kGroup * kS;
    for (int k = 0; k < kQuarter && lanes > kGroup; k += kW)
      store(sums_ + k,
            (sum(k) + sum(k + 2 * kQuarter)) + (sum(k + kQuarter) + sum(k + 3 * kQuarter)));
    for (int half = kQuarter / 2; half >= kS; half /= 2)
      for (int k = 0; k < half; k += kW) store(sums_ + k, sum(k) + sum(k + half));
    for (int k = 0; k < kS; k += kW) store(to + k, sum(k));
  }

  // --- Sinks -------

  Vec<T> weights_of_sinks(Vec<T> z, Vec<T> m) const {
    Vec<T> d;
    for (int i = 0; i < kW; i++) d[i] = sink_scale_.below<T>(z[i], m[i]);
    return exp1_(d);
  }
  void add_sinks(int i, Vec<T>* m, Vec<T>* l) const {
    const Vec<T> z = numbers(p_.sink, i);
    Vec<T> x;
    for (int k = 0; k < kW; k++) x[k] = sink_scale_.x<T>(z[k]);
    const Vec<T> top = max(x, *m), before = *l * exp_(finite_max<T>(*m) - top);
    const Vec<T> after = before + select(unordered(z), z, weights_of_sinks(z, top));
    const auto none = equal(z, set1(kNone));
    *l = select(none, *l, after);
    *m = select(none, *m, select(unordered(z), z, top));
  }

  // --- Memory -------

  Vec<T> numbers(const View3& v, int i) const {
    RowPlace row = place_;
    row.inner += i;
    Vec<T> x = zero<T>();
    for (int k = 0; k < kW && i + k < count_; k++, row.inner++) x[k] = *row.at<const T>(v);
    return x;
  }
  void put_numbers(const View3& v, int i, Vec<T> x) const {
    RowPlace row = place_;
    row.inner += i;
    for (int k = 0; k < kW && i + k < count_ && v; k++, row.inner++) *row.at<T>(v) = x[k];
  }

  // Rows that are not there hold zeros.
  template <int REGS>
  TW_MEMBER Vec<T> number(const Beside<const T>& x, int j, int r) const {
    if (!x) return zero<T>();
    const T* at = x.at + j * x.step + r * kW;
    return REGS == 1 ? load_some(at, count_, T{0}) : load(at);
  }
  bool lies_here(const View3& v) const {
    return v.storage == kStorageOf<T> && v.inner == 1 && !p_.where;
  }
  // A block of columns of an array, `hidden` where the mask hides it: in place or in `scratch`.
  template <int REGS>
  Beside<const T> read(const View3& v, int64_t chunk, int first, int many, T hidden, T* scratch) {
    const int64_t column = chunk * kChunk + first;
    if (!v) return {};
    if (lies_here(v)) return {place_.at<const T>(v, column), v.column};
    for (int j = 0; j < many; j++) read_rows(v, column + j, count_, scratch + j * (REGS * kW));
    hide<REGS>(column, many, hidden, scratch);
    return {scratch, REGS * kW};
  }
  void read_rows(const View3& v, int64_t column, int n, T* to) const {
    const View3 turned{v.data, v.outer, v.inner, v.column, v.storage};
    if (in_place<T>(turned))
      gather_columns(place_.at<const T>(v, column), 1, n, to);
    else
      read_columns(turned, {place_.outer, column}, place_.inner, n, to);
  }
  template <int REGS>
  void hide(int64_t column, int many, T hidden, T* x) const {
    if (!p_.where) return;
    for (int j = 0; j < many; j++, column++) {
      const uint8_t* seen = place_.at<const uint8_t>(p_.where, column);
      for (int i = 0; i < count_; i++)
        if (!seen[i * p_.where.inner]) x[j * (REGS * kW) + i] = hidden;
    }
  }

  // Writes f(column, register) of a block of columns, `hidden` where the mask hides it.
  template <int REGS, class F>
  TW_MEMBER void emit(const View3& v, int64_t chunk, int first, int many, T hidden, bool stream,
                      const F& f) {
    const int64_t column = chunk * kChunk + first;
    const bool here = lies_here(v);
    T* to = here ? place_.at<T>(v, column) : out_;
    const int64_t step = here ? v.column : REGS * kW;
    if (here && stream && REGS > 1 && whole_lines(to, step))
      each<REGS>(many, [&](int j, int r) __attribute__((always_inline)) {
        put<true>(to + j * step + r * kW, f(j, r));
      });
    else
      each<REGS>(many, [&](int j, int r) __attribute__((always_inline)) {
        store_some(to + j * step + r * kW, REGS == 1 ? count_ : kW, f(j, r));
      });
    if (here) return;
    hide<REGS>(column, many, hidden, out_);
    const View3 turned{v.data, v.outer, v.inner, v.column, v.storage};
    for (int j = 0; j < many; j++)
      write_columns(turned, {place_.outer, column + j}, place_.inner, count_, to + j * step);
  }
  static bool whole_lines(const T* to, int64_t step) {
    return kStreams && reinterpret_cast<uintptr_t>(to) % kVectorBytes == 0 &&
           step * static_cast<int64_t>(sizeof(T)) % kVectorBytes == 0;
  }

  const SoftmaxProblem& p_;
  const Exp<T> exp_, exp1_;
  const SinkScale sink_scale_;
  const Vec<T> scale_;
  const bool kept_;
  const Cuts cuts_;
  RowPlace place_, next_;
  bool wide_ = false;
  int count_ = 0;
  int64_t known_ = 0;
  T m_[kRows] = {}, log_l_[kRows] = {}, inverse_[kRows] = {}, sink_[kRows] = {};
  T tsink_[kRows] = {}, c_[kRows] = {}, mu_[kRows] = {}, tc_[kRows] = {};
  T *kept_at_ = nullptr, *sums_ = nullptr, *out_ = nullptr, *scratch_[4] = {};
};

#include "simd/end.hpp"
