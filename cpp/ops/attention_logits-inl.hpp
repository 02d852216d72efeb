// What all attention bodies share: logits with their options, and the end of a row.
#pragma once
#include <cmath>
#include <cstring>

#include "ops/dropout-inl.hpp"
#include "tile/rows-inl.hpp"

#include "simd/begin.hpp"

// One head of the bias or of its tangent, at query 0 and key 0.
template <class T>
struct BiasHead {
  View4 x;
  int64_t b = 0, h = 0;

  BiasHead(const View4& view, int64_t batch, int64_t head) : x(view), b(batch), h(head) {}
  explicit operator bool() const { return bool(x); }

  // The entry of a query and a key.
  T operator()(int64_t q, int64_t k) const {
    const int64_t at = b * x.batch + h * x.head + q * x.row + k * x.column;
    T value;
    convert_row<T>(static_cast<const char*>(x.data) + at * bytes_of(x.storage), x.storage, 1,
                   &value);
    return value;
  }

  // out[j * kPanel + lane] = entry of query q0 + lane and key k0 + j, for keys [ja, jb) and `rows`
  // lanes (the last repeated)
  __attribute__((noinline)) void panel(int64_t q0, int rows, int64_t k0, int ja, int jb,
                                       T* out) const {
    alignas(64) T scratch[kGroup * kTileKeys];
    for (int g = 0; g * kGroup < rows; g++) {
      const int n = std::min(kGroup, rows - g * kGroup);
      const int64_t q = q0 + g * kGroup, k = k0 + ja;
      T* to = out + int64_t{ja} * kPanel + g * kGroup;
      if (x.column == 1) {
        View4 here = x;
        here.data = static_cast<const char*>(x.data) + k * bytes_of(x.storage);
        const Rows<T> entries = read_rows<T>(here, b, h, q, n, jb - ja, scratch);
        pack_lanes<T>(entries.at, entries.ld, jb - ja, n, T{1}, to);
      } else {
        for (int j = 0; j < jb - ja; j++)
          for (int i = 0; i < kGroup; i++)
            to[j * kPanel + i] = (*this)(q + std::min(i, n - 1), k + j);
      }
    }
  }
};

// The options of one head. Logits are in base 2: softcap, then ALiBi, then bias; masking comes
// after.
template <class T>
struct Logits {
  BiasHead<T> bias;
  T q_scale = 1, cap = 0, natural_cap = 0, slope = 0;
  bool softcap = false, alibi = false, plain = true;
  int64_t offset = 0;  // of a query's position among the keys

  Logits(const AttentionInputs& in, int64_t b, int64_t h) : bias(in.bias, b, h) {
    softcap = in.softcap > 0;
    q_scale = static_cast<T>(softcap ? in.softmax_scale / in.softcap : in.softmax_scale * kLog2e);
    cap = static_cast<T>(in.softcap * kLog2e);
    natural_cap = static_cast<T>(in.softcap);
    if (in.slopes) {
      alibi = true;
      slope = static_cast<T>(-static_cast<double>(*in.slopes.at<T>(b, h)) * kLog2e);
    }
    offset = in.Nk - in.N;
    plain = !softcap && !alibi && !bias;
  }

  // The logits of `raw` scaled products; `distance` is |position - key|, `added` the bias,
  // `tanh_out` for the derivatives.
  TW_MEMBER Vec<T> operator()(Vec<T> raw, Vec<T> distance, Vec<T> added,
                              TanhAndSlope<T>* tanh_out) const {
    Vec<T> s = raw;
    if (softcap) {
      if (tanh_out) *tanh_out = tanh_and_slope<T>(s);
      s = (tanh_out ? tanh_out->value : tanh<T>(s)) * set1(cap);
    }
    if (alibi) s = fma(set1(slope), distance, s);
    if (bias) {
      // a finite bias as low as lowest() must not become -inf by the change of base: it would count
      // as masked
      const Vec<T> x = fma(added, splat<T>(kLog2e), s);
      s = select(equal(added, minus_infinity<T>()), x,
                 max(set1(std::numeric_limits<T>::lowest()), x));
    }
    return s;
  }
};

// What products of pairs are multiplied by; other products have the scale in their queries.
template <class E>
TW_INLINE Acc<E> product_scale(const Logits<Acc<E>>& logits) {
  return kPairs<E> ? logits.q_scale : Acc<E>{1};
}

// The lanes' positions among the keys, relative to key k0.
template <class T>
TW_INLINE void positions(int64_t first, int count, T* out) {
  for (int i = 0; i < count; i++) out[i] = static_cast<T>(first + i);
}

// Final values of 16 rows. `o_scale` multiplies their accumulators.
template <class T>
struct RowEnd {
  alignas(64) T m[kGroup], log_l[kGroup], lse[kGroup], max_logit[kGroup], entropy[kGroup],
      o_scale[kGroup];

  // The sink, a logit without a value, is merged last as the state (z, 1, 0). Where m is a whole
  // number, `tops` are the row maxima, and the sink's m is the next whole number.
  RowEnd(const T* m_in, const T* l_in, const T* e_in, bool has_sink, const T* sink, const T* tops) {
    for (int i = 0; i < kGroup; i += kWidth<T>) {
      Vec<T> vm = load(m_in + i), l = load(l_in + i), e = load(e_in + i), scale = splat<T>(1);
      const Vec<T> top = tops ? load(tops + i) : vm;
      if (has_sink) {
        const Vec<T> z = load(sink + i) * splat<T>(kLog2e);
        Vec<T> above = z, one = splat<T>(1), entropy_of_one = zero<T>();
        if (tops) {
          above = whole_above(z);
          one = exp2<T>(z - above);
          entropy_of_one = one * (z - above);
        }
        const auto none = equal(z, minus_infinity<T>());  // a sink of -inf is none
        one = select(none, zero<T>(), one);
        entropy_of_one = select(none, zero<T>(), entropy_of_one);
        const Merge<T> merge(vm, above);
        e = merge.entropy(e, l, vm, entropy_of_one, one, above);
        l = merge(l, one);
        vm = merge.m;
        scale = merge.a;
      }
      const Finished<T> end(vm, l, e);
      store(m + i, end.m);
      store(log_l + i, end.log_l);
      store(lse + i, end.lse);
      store(entropy + i, end.entropy);
      store(max_logit + i, select(unordered(l), l, natural<T>(top) + zero<T>()));
      store(o_scale + i, scale * end.inverse);
    }
  }

  static void put(void* to, int64_t at, const T* from, int rows) {
    if (to) std::memcpy(static_cast<T*>(to) + at, from, sizeof(T) * static_cast<size_t>(rows));
  }
  // Rows from `first`, to be written from `at` on.
  void write(const AttentionResults& out, int64_t at, int rows, int first = 0) const {
    put(out.m, at, m + first, rows);
    put(out.log_l, at, log_l + first, rows);
    put(out.lse, at, lse + first, rows);
    put(out.max_logit, at, max_logit + first, rows);
    put(out.entropy, at, entropy + first, rows);
  }
};

#include "simd/end.hpp"
