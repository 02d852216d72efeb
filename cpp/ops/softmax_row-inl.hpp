// The softmax family for one target. Rows are cut into chunks of kChunk columns, counted from
// column 0: each has its own maximum and sum, in 64 lanes and a fixed tree, and chunks are merged
// in ascending order. So neither threads nor strides nor vector widths reach the bits.
#pragma once
#include <algorithm>

#include "ops/softmax.hpp"
#include "ops/softmax_terms-inl.hpp"
#include "runtime/workspace.hpp"

#include "simd/begin.hpp"

template <class T>
class SoftmaxRow {
 public:
  static constexpr int kRows = 1;  // that are worked on at once
  using State = ChunkState<T>;
  struct Sums {
    T c, mu;  // sum of p gy + gz, and of p tx
  };
  using Moved = T;

  explicit SoftmaxRow(const SoftmaxProblem& problem)
      : p_(problem),
        scale_(static_cast<T>(problem.scale)),
        exp_(problem.scale),
        exp1_(1),
        sink_scale_{problem.scale},
        kept_(problem.columns <= kKept) {}

  void place(Arena& arena) {
    const int64_t row = kept_ ? chunks() * kChunk : kChunk;
    x_ = arena.take<T>(row);
    weights_ = arena.take<T>(row);
    for (T*& scratch : scratch_) scratch = arena.take<T>(kChunk);
    out_ = arena.take<T>(kChunk);
  }

  static int64_t units(const SoftmaxProblem& p) { return p.outer * p.inner; }
  // one, without columns, of an empty row
  int64_t chunks() const { return std::max<int64_t>(1, (p_.columns + kChunk - 1) / kChunk); }

  void take(int64_t row) {
    outer_ = p_.inner == 1 ? row : row / p_.inner;
    inner_ = p_.inner == 1 ? 0 : row % p_.inner;
    known_ = 0;
  }

  // --- Forward -------

  ChunkState<T> state(int64_t chunk) {
    const int n = width(chunk);
    const T* x = logits(chunk);
    constexpr T kNone = -std::numeric_limits<T>::infinity();
    // max(a, b) is b where either is NaN: one may be lost here, but not in the sum below
    Lanes64<T> top(kNone);
    each_register<T>(n, [&](int j, int u, int left) __attribute__((always_inline)) {
      top.of[u] = max(load_some(x + j, left, kNone), top.of[u]);
    });
    const T m = top.top();
    const Vec<T> high = finite_max<T>(set1(m));
    const T l = kept_ ? sum_of_weights<true>(x, n, high, weights_ + chunk * kChunk)
                      : sum_of_weights<false>(x, n, high, nullptr);
    return {l == l ? m : top_with_nan(m, x, n), l};
  }

  // Merges the chunks' states and the sink; one of those who do writes the numbers of the row.
  void finish(const ChunkState<T>* states, bool writes) {
    T m = -std::numeric_limits<T>::infinity(), l = 0;
    if (chunks() == 1) {
      m = states[0].m, l = states[0].l;
    } else {
      Vec<T> all_m = set1(m), all_l = zero<T>();
      for (int64_t c = 0; c < chunks(); c++)
        add_state<T>(exp_, set1(states[c].m), set1(states[c].l), &all_m, &all_l);
      m = all_m[0], l = all_l[0];
    }
    if (p_.sink) {
      const T z = number(p_.sink);
      if (!(z == -std::numeric_limits<T>::infinity())) add_sink(z, &m, &l);
    }
    m_ = l == l ? m : l;
    const RowResults<T> found(set1(m), set1(l), set1(scale_), p_.log_y || p_.lse || p_.log_l);
    inverse_ = found.inverse[0];
    log_l_ = found.log_l[0];
    if (!writes) return;
    put_number(p_.m, found.m[0]);
    put_number(p_.log_l, log_l_);
    put_number(p_.lse, found.lse[0]);
  }

  // What makes results of a row that is finished. y is the product of a weight, which is relative
  // to its chunk's maximum, with the chunk's factor.
  Vec<T> high() const { return finite_max<T>(set1(m_)); }
  T inverse() const { return inverse_; }
  T log_l() const { return log_l_; }
  T scale() const { return scale_; }
  T factor(const ChunkState<T>& state) const {
    return factor_of_chunk<T>(exp_, set1(state.m), set1(m_), set1(inverse_))[0];
  }

  // finish() of 16 rows of one chunk and without a sink, of which `count` are written.
  void put_sixteen(int64_t r, int count, const T* m, const T* l, T* inverse, T* log_l) {
    alignas(64) T kept[kGroup], lse[kGroup];
    const bool logs = p_.log_y || p_.lse || p_.log_l;
    for (int i = 0; i < kGroup; i += kWidth<T>) {
      const RowResults<T> found(load(m + i), load(l + i), set1(scale_), logs);
      store(inverse + i, found.inverse);
      store(log_l + i, found.log_l);
      store(kept + i, found.m);
      store(lse + i, found.lse);
    }
    for (int i = 0; i < count && (p_.m || p_.log_l || p_.lse); i++) {
      take(r + i);
      put_number(p_.m, kept[i]);
      put_number(p_.log_l, log_l[i]);
      put_number(p_.lse, lse[i]);
    }
  }

  void write(int64_t chunk, const ChunkState<T>* states, bool stream) {
    const int n = width(chunk);
    if (p_.y) {
      const Vec<T> factor = set1(this->factor(states[chunk])),
                   top = finite_max<T>(set1(states[chunk].m));
      const T *w = weights_ + chunk * kChunk, *x = kept_ ? nullptr : logits(chunk);
      emit(p_.y, chunk, n, stream, T{0}, [&](int j, int left) __attribute__((always_inline)) {
        if (!x) return load_some(w + j, left, T{0}) * factor;
        return exp_(load_some(x + j, left, T{0}) - top) * factor;
      });
    }
    if (!p_.log_y) return;
    const T* x = logits(chunk);
    const Vec<T> high = this->high();
    constexpr T kNone = -std::numeric_limits<T>::infinity();
    emit(p_.log_y, chunk, n, stream, kNone, [&](int j, int left) __attribute__((always_inline)) {
      return fma(load_some(x + j, left, T{0}) - high, set1(scale_), set1(-log_l_));
    });
  }

  // --- Derivatives: sums over a row, chunk by chunk, then what they give -------

  // The numbers of a row that derivatives start from.
  void load_row() {
    m_ = number(p_.m);
    log_l_ = number(p_.log_l);
    empty_ = m_ == -std::numeric_limits<T>::infinity();
    inverse_ = empty_ ? T{0} : exp1_(-log_l_);
    sink_ = T{0};
    if (p_.sink && !empty_) {
      const T z = number(p_.sink);
      sink_ = exp_sink(z) * inverse_;
    }
  }

  Sums sums(int64_t chunk) {
    const int n = width(chunk);
    const T* p = probabilities(chunk);
    Lanes64<T> c, mu;
    if (p_.gy) {
      const T* gy = read(p_.gy, chunk, n, T{0}, scratch_[0]);
      add(n, &c, [&](int j, int left) __attribute__((always_inline)) {
        prefetch_ahead(gy + j + kAhead);
        return load_some(p + j, left, T{0}) * load_some(gy + j, left, T{0});
      });
    }
    if (p_.gz) {
      const T* gz = read(p_.gz, chunk, n, T{0}, scratch_[0]);
      add(n, &c, [&](int j, int left) __attribute__((always_inline)) {
        return load_some(gz + j, left, T{0});
      });
    }
    if (p_.tx) {
      const T* tx = read(p_.tx, chunk, n, T{0}, scratch_[0]);
      add(n, &mu, [&](int j, int left) __attribute__((always_inline)) {
        return load_some(p + j, left, T{0}) * load_some(tx + j, left, T{0});
      });
    }
    return {c.total(), mu.total()};
  }
  void finish_sums(const Sums* parts) {
    T c = 0, mu = 0;
    for (int64_t k = 0; k < chunks(); k++) c += parts[k].c, mu += parts[k].mu;
    c_ = p_.gl ? c - number(p_.gl) : c;
    tsink_ = p_.tsink ? number(p_.tsink) : T{0};
    mu_ = mu * scale_;
    if (p_.sink) mu_ += sink_ * tsink_;
    if (empty_) c_ = mu_ = 0;
  }

  // The part of tc that a chunk has: sum of tp gy + p tgy + tgz.
  T moved_sum(int64_t chunk) {
    const int n = width(chunk);
    const T* p = probabilities(chunk);
    const T *tx = maybe(p_.tx, chunk, n, scratch_[0]), *gy = maybe(p_.gy, chunk, n, scratch_[1]),
            *tgy = maybe(p_.tgy, chunk, n, scratch_[2]),
            *tgz = maybe(p_.tgz, chunk, n, scratch_[3]);
    Lanes64<T> sum;
    const SoftmaxTerms<T> terms = this->terms();
    add(n, &sum, [&](int j, int left) __attribute__((always_inline)) {
      return terms.tc_of(load_some(p + j, left, T{0}), some(tx, j, left), some(gy, j, left),
                         some(tgy, j, left), some(tgz, j, left));
    });
    return sum.total();
  }
  void finish_moved(const T* parts) {
    T tc = 0;
    for (int64_t k = 0; k < chunks(); k++) tc += parts[k];
    tc_ = p_.tgl ? tc - number(p_.tgl) : tc;
    // the sink is one more column, without cotangents of its own
    if (empty_) tc_ = 0;
  }

  void write_vjp(int64_t chunk, bool stream) {
    const int n = width(chunk);
    const T* p = probabilities(chunk);
    const T *gy = maybe(p_.gy, chunk, n, scratch_[0]), *gz = maybe(p_.gz, chunk, n, scratch_[1]);
    const SoftmaxTerms<T> terms = this->terms();
    if (p_.dx)
      emit(p_.dx, chunk, n, stream, T{0}, [&](int j, int left) __attribute__((always_inline)) {
        return alive(terms.dx(load_some(p + j, left, T{0}), some(gy, j, left), some(gz, j, left)));
      });
    if (chunk == 0) put_number(p_.dsink, terms.dsink(set1(sink_))[0]);
  }

  void write_jvp(int64_t chunk, bool stream) {
    const int n = width(chunk);
    const T* p = probabilities(chunk);
    const T* tx = maybe(p_.tx, chunk, n, scratch_[0]);
    const SoftmaxTerms<T> terms = this->terms();
    if (p_.ty)
      emit(p_.ty, chunk, n, stream, T{0}, [&](int j, int left) __attribute__((always_inline)) {
        return terms.ty(load_some(p + j, left, T{0}), some(tx, j, left));
      });
    if (p_.tz)
      emit(p_.tz, chunk, n, stream, T{0}, [&](int j, int left) __attribute__((always_inline)) {
        return alive(terms.tz(some(tx, j, left)));
      });
    if (chunk == 0) put_number(p_.tl, mu_ + T{0});
  }

  void write_vjp_jvp(int64_t chunk, bool stream) {
    const int n = width(chunk);
    const T* p = probabilities(chunk);
    const T *tx = maybe(p_.tx, chunk, n, scratch_[0]), *gy = maybe(p_.gy, chunk, n, scratch_[1]),
            *tgy = maybe(p_.tgy, chunk, n, scratch_[2]),
            *tgz = maybe(p_.tgz, chunk, n, scratch_[3]);
    const SoftmaxTerms<T> terms = this->terms();
    if (p_.dx)
      emit(p_.dx, chunk, n, stream, T{0}, [&](int j, int left) __attribute__((always_inline)) {
        return alive(terms.tdx(load_some(p + j, left, T{0}), some(tx, j, left), some(gy, j, left),
                               some(tgy, j, left), some(tgz, j, left)));
      });
    if (chunk == 0) put_number(p_.dsink, terms.tdsink(set1(sink_), set1(tsink_))[0]);
  }

 private:
  TW_MEMBER SoftmaxTerms<T> terms() const { return {set1(scale_), set1(c_), set1(mu_), set1(tc_)}; }
  TW_MEMBER Vec<T> alive(Vec<T> x) const { return empty_ ? zero<T>() : x; }
  int width(int64_t chunk) const {
    return static_cast<int>(std::min<int64_t>(kChunk, p_.columns - chunk * kChunk));
  }

  // Sum of exp(x - high), each kept in w where wanted.
  template <bool KEPT>
  TW_MEMBER T sum_of_weights(const T* x, int n, Vec<T> high, T* w) const {
    constexpr T kNone = -std::numeric_limits<T>::infinity();
    const Exp<T> exp = exp_;
    Lanes64<T> sum;
    each_register<T>(n, [&](int j, int u, int left) __attribute__((always_inline)) {
      prefetch_ahead(x + j + kAhead);
      const Vec<T> e = exp(load_some(x + j, left, kNone) - high);
      sum.of[u] += e;
      if constexpr (KEPT) store_some(w + j, left, e);
    });
    return sum.total();
  }

  T exp_sink(T z) const { return exp1_(sink_scale_.below<T>(z, m_)); }
  void add_sink(T z, T* m, T* l) {
    const T x = sink_scale_.x<T>(z), top = x > *m ? x : *m;
    const T lowest = std::numeric_limits<T>::lowest();
    *l = *l * exp_((lowest > *m ? lowest : *m) - top);
    *m = m_ = z != z ? z : top;
    *l += z != z ? z : exp_sink(z);
  }

  // --- Memory -------

  T number(const View3& v) const {
    return static_cast<const T*>(v.data)[outer_ * v.outer + inner_ * v.inner];
  }
  void put_number(const View3& v, T value) const {
    if (v) static_cast<T*>(const_cast<void*>(v.data))[outer_ * v.outer + inner_ * v.inner] = value;
  }
  template <class U>
  static const U* element(const View3& v, int64_t outer, int64_t column, int64_t inner) {
    return static_cast<const U*>(v.data) + outer * v.outer + column * v.column + inner * v.inner;
  }
  template <class U>
  const U* first_of(const View3& v, int64_t chunk) const {
    return element<U>(v, outer_, chunk * kChunk, inner_);
  }
  static constexpr Storage kOwn = sizeof(T) == 8 ? Storage::kFloat64 : Storage::kFloat32;

  bool plain(const View3& v) const { return v.storage == kOwn && v.column == 1 && !p_.where; }

  // A chunk as numbers, `hidden` where the mask hides it: in place or in `scratch`.
  const T* read(const View3& v, int64_t chunk, int n, T hidden, T* scratch) const {
    if (plain(v)) return first_of<T>(v, chunk);
    if (v.storage == kOwn)
      gather(first_of<T>(v, chunk), v.column, n, scratch);
    else if constexpr (sizeof(T) == 4) {
      if (v.storage == Storage::kBfloat16)
        gather(first_of<Bf16>(v, chunk), v.column, n, scratch);
      else
        gather(first_of<F16>(v, chunk), v.column, n, scratch);
    }
    hide(chunk, n, hidden, scratch);
    return scratch;
  }
  static void gather(const T* from, int64_t step, int n, T* to) {
    if (step == 1) std::memcpy(to, from, sizeof(T) * static_cast<size_t>(n));
    for (int i = 0; step != 1 && i < n; i++) to[i] = from[i * step];
  }
  template <class X>
  static void gather(const X* from, int64_t step, int n, T* to) {
    if (step == 1) widen_row(from, n, to);
    for (int i = 0; step != 1 && i < n; i++) to[i] = to_float(from[i * step]);
  }
  void hide(int64_t chunk, int n, T hidden, T* x) const {
    if (!p_.where) return;
    const uint8_t* seen = first_of<uint8_t>(p_.where, chunk);
    for (int i = 0; i < n; i++)
      if (!seen[i * p_.where.column]) x[i] = hidden;
  }
  const T* maybe(const View3& v, int64_t chunk, int n, T* scratch) const {
    return v ? read(v, chunk, n, T{0}, scratch) : nullptr;
  }
  static TW_MEMBER Vec<T> some(const T* p, int j, int left) {
    return p ? load_some(p + j, left, T{0}) : zero<T>();
  }
  const T* logits(int64_t chunk) {
    constexpr T kNone = -std::numeric_limits<T>::infinity();
    return read(p_.x, chunk, width(chunk), kNone, kept_ ? x_ + chunk * kChunk : x_);
  }

  // p of a chunk, kept where the row is short.
  const T* probabilities(int64_t chunk) {
    T* p = kept_ ? weights_ + chunk * kChunk : weights_;
    if (kept_ && chunk < known_) return p;
    known_ = chunk + 1;
    const T* x = logits(chunk);
    const Vec<T> high = finite_max<T>(set1(m_));
    each_register<T>(width(chunk), [&](int j, int, int left) __attribute__((always_inline)) {
      prefetch_ahead(x + j + kAhead);
      store_some(p + j, left, exp_(load_some(x + j, left, T{0}) - high) * set1(inverse_));
    });
    return p;
  }

  template <class F>
  static TW_MEMBER void add(int n, Lanes64<T>* sum, const F& f) {
    each_register<T>(n, [&](int j, int u, int left)
                            __attribute__((always_inline)) { sum->of[u] += f(j, left); });
  }

  // Writes f(column of the chunk, how many) to an array, `hidden` where the mask hides it.
  template <class F>
  TW_MEMBER void emit(const View3& v, int64_t chunk, int n, bool stream, T hidden, const F& f) {
    const bool here = plain(v);
    T* to = here ? const_cast<T*>(first_of<T>(v, chunk)) : out_;
    int j = 0;
    if (here && stream) j = emit_past_caches(n, to, f);
    constexpr int W = kWidth<T>;
    for (; j + 4 * W <= n; j += 4 * W)
      TW_UNROLL_LANES for (int u = 0; u < 4; u++) store(to + j + u * W, f(j + u * W, W));
    for (; j + W <= n; j += W) store(to + j, f(j, W));
    if (j < n) store_some(to + j, n - j, f(j, n - j));
    if (!here) scatter(v, chunk, n, hidden);
  }
  // Returns the first column that is left.
  template <class F>
  TW_MEMBER static int emit_past_caches([[maybe_unused]] int n, [[maybe_unused]] T* to,
                                        [[maybe_unused]] const F& f) {
    int j = 0;
#if defined(TILEWISE_TARGET_AVX512)
    const int ahead = static_cast<int>(-reinterpret_cast<uintptr_t>(to) % 64 / sizeof(T));
    if (ahead >= n) return 0;
    if (ahead) store_some(to, ahead, f(0, ahead));
    for (j = ahead; j + kWidth<T> <= n; j += kWidth<T>)
      _mm512_stream_si512(reinterpret_cast<__m512i*>(to + j), (__m512i)f(j, kWidth<T>));
#endif
    return j;
  }
  void scatter(const View3& v, int64_t chunk, int n, T hidden) {
    hide(chunk, n, hidden, out_);
    if (v.storage == kOwn)
      put(first_of<T>(v, chunk), v.column, n);
    else if constexpr (sizeof(T) == 4) {
      if (v.storage == Storage::kBfloat16)
        put(first_of<Bf16>(v, chunk), v.column, n);
      else
        put(first_of<F16>(v, chunk), v.column, n);
    }
  }
  template <class X>
  void put(const X* at, int64_t step, int n) const {
    X* to = const_cast<X*>(at);
    if constexpr (std::is_same_v<X, T>) {
      for (int i = 0; i < n; i++) to[i * step] = out_[i];
    } else {
      if (step == 1) narrow_row(out_, n, to);
      for (int i = 0; step != 1 && i < n; i++) from_float(out_[i], to + i * step);
    }
  }

  const SoftmaxProblem& p_;
  const T scale_;
  const Exp<T> exp_, exp1_;
  const SinkScale sink_scale_;
  const bool kept_;
  int64_t outer_ = 0, inner_ = 0, known_ = 0;
  bool empty_ = false;
  T m_ = 0, log_l_ = 0, inverse_ = 0, sink_ = 0, tsink_ = 0, c_ = 0, mu_ = 0, tc_ = 0;
  T *x_ = nullptr, *weights_ = nullptr, *out_ = nullptr, *scratch_[4] = {};
};

#include "simd/end.hpp"
