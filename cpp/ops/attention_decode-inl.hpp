// The forward body for few queries: keys in lanes for the scores, columns in lanes for o. The
// additions of every element come in the order of the other body, so a row's bits are the same. All
// query rows of a KV head share the reads of its keys and values.
#pragma once
#include "ops/attention_forward-inl.hpp"

#include "simd/begin.hpp"

constexpr int kDecodeRows = 4;  // rows worked on at once
constexpr int kSubKeys = 32;    // keys whose values are read in one go, the next ones prefetched

// Touches rows ahead line by line in the order of memory, which keeps the hardware's own prefetcher
// on the track.
template <class T>
struct RowsAhead {
  static constexpr int kLine = 64 / sizeof(T);
  const T* row;
  int64_t ld;
  int columns, column = 0;
  template <int LINES>
  TW_MEMBER void touch() {
    TW_UNROLL for (int i = 0; i < LINES; i++) {
      prefetch(row + column);
      column += kLine;
      if (column >= columns) column = 0, row += ld;
    }
  }
};

// s[g * kTileKeys + key] for 2 registers of keys; `rows` of them exist.
template <class T, int G, bool TAIL>
TW_INLINE void decode_scores_block(const T* k, int64_t ld, const T* q, int depth, T* s, int rows,
                                   RowsAhead<T> ahead) {
  constexpr int W = kWidth<T>, U = 2;
  Vec<T> acc[U][G];
  TW_UNROLL for (int u = 0; u < U; u++) TW_UNROLL for (int g = 0; g < G; g++) acc[u][g] = zero<T>();
  int d = 0;
  for (; d + 4 <= depth; d += 4) {
    if (!TAIL) ahead.template touch<U * W * 4 / RowsAhead<T>::kLine>();
    TW_UNROLL for (int u = 0; u < U; u++) {
      const int have = rows - u * W;
      const int last = !TAIL || have > W ? W - 1 : have > 0 ? have - 1 : 0;
      Vec<T> x[4];
      load_columns4(k + (!TAIL || have > 0 ? u * W : 0) * ld + d, ld, last, x);
      TW_UNROLL for (int e = 0; e < 4; e++) TW_UNROLL for (int g = 0; g < G; g++) acc[u][g] =
          fma(x[e], set1(q[g * depth + d + e]), acc[u][g]);
    }
  }
  for (; d < depth; d++) TW_UNROLL for (int u = 0; u < U; u++) {
      Vec<T> x;
      for (int i = 0; i < W; i++) x[i] = k[std::min(u * W + i, rows - 1) * ld + d];
      TW_UNROLL for (int g = 0; g < G; g++) acc[u][g] = fma(x, set1(q[g * depth + d]), acc[u][g]);
    }
  TW_UNROLL for (int u = 0; u < U; u++) TW_UNROLL for (int g = 0; g < G; g++)
      store(s + g * kTileKeys + u * W, acc[u][g]);
}

// o = o alpha + sum over keys, for NV registers of columns. A chain is parked in `part` between
// calls.
template <class T, int G, int NV, bool EDGE>
TW_INLINE void decode_values_block(const T* v, int64_t ld, const T* w, const uint8_t* allow, int ja,
                                   int jb, T* o, T* part, int64_t ldo, bool first, bool last,
                                   const T* alpha, RowsAhead<T>& ahead) {
  constexpr int W = kWidth<T>;
  Vec<T> acc[G][NV];
  TW_UNROLL for (int g = 0; g < G; g++) TW_UNROLL for (int i = 0; i < NV; i++) acc[g][i] =
      first ? zero<T>() : load(part + g * ldo + i * W);
  for (int j = ja; j < jb; j++) {
    Vec<T> x[NV];
    TW_UNROLL for (int i = 0; i < NV; i++) x[i] = load(v + j * ld + i * W);
    ahead.template touch<(NV * W + RowsAhead<T>::kLine - 1) / RowsAhead<T>::kLine>();
    TW_UNROLL for (int g = 0; g < G; g++) {
      if (EDGE && !allow[g * kTileKeys + j]) continue;
      const Vec<T> y = set1(w[g * kTileKeys + j]);
      TW_UNROLL for (int i = 0; i < NV; i++) acc[g][i] = fma(x[i], y, acc[g][i]);
    }
  }
  TW_UNROLL for (int g = 0; g < G; g++) TW_UNROLL for (int i = 0; i < NV; i++) {
    T* to = o + g * ldo + i * W;
    if (last)
      store(to, fma(load(to), set1(alpha[g]), acc[g][i]));
    else
      store(part + g * ldo + i * W, acc[g][i]);
  }
}

// Sum of s over keys [ja, jb), both multiples of 4, in the order of weights_panel.
template <class T>
TW_INLINE T sum_by_key(const T* s, int ja, int jb) {
  T sum[4] = {0, 0, 0, 0};
  for (int j = ja; j < jb; j += 4) TW_UNROLL for (int i = 0; i < 4; i++) sum[i] += s[j + i];
  return (sum[0] + sum[2]) + (sum[1] + sum[3]);
}

template <class T>
class DecodeBody {
 public:
  // The state of a (batch, KV head, chunk): o[rows][Dv], m, l, e [rows rounded up to 16].
  static int64_t padded_rows(const AttentionInputs& in) {
    return (in.H / in.Hk * in.N + kGroup - 1) / kGroup * kGroup;
  }
  static int64_t columns(const AttentionInputs& in) {
    return (in.Dv + kGroup - 1) / kGroup * kGroup;
  }
  static int64_t state_size(const AttentionInputs& in) {
    return padded_rows(in) * (columns(in) + 3);
  }

  DecodeBody(const AttentionInputs& in, const AttentionResults& out)
      : in_(in), out_(out), ldo_(columns(in)), padded_(padded_rows(in)) {}

  void place(Arena& arena) {
    q_ = arena.take<T>(kDecodeRows * in_.D);
    s_ = arena.take<T>(kDecodeRows * kTileKeys);
    x_ = arena.take<T>(kDecodeRows * kTileKeys);
    part_ = arena.take<T>(kDecodeRows * ldo_);
    allow_ = arena.take<uint8_t>(kDecodeRows * kTileKeys);
    mask_ = arena.take<MaskBlock>(1);
  }

  void chunk(int64_t b, int64_t hk, int64_t c, T* state) {
    b_ = b;
    hk_ = hk;
    const int64_t rows = in_.H / in_.Hk * in_.N;
    std::memset(state, 0, sizeof(T) * static_cast<size_t>(state_size(in_)));
    for (int64_t r = 0; r < padded_; r++) m_of(state)[r] = -std::numeric_limits<T>::infinity();
    const int64_t end = std::min(in_.Nk, (c + 1) * kChunkKeys);
    for (int64_t k0 = c * kChunkKeys; k0 < end; k0 += kTileKeys) {
      const int keys = static_cast<int>(std::min<int64_t>(kTileKeys, in_.Nk - k0));
      for (int64_t r = 0; r < rows; r += kDecodeRows) {
        switch (std::min<int64_t>(kDecodeRows, rows - r)) {
          case 1:
            tile<1>(r, k0, keys, state);
            break;
          case 2:
            tile<2>(r, k0, keys, state);
            break;
          case 3:
            tile<3>(r, k0, keys, state);
            break;
          default:
            tile<4>(r, k0, keys, state);
        }
      }
    }
  }

  // Merges the chunks' states in ascending order and writes the rows of one KV head.
  void finish(int64_t b, int64_t hk, T* states, int64_t chunks) {
    const int64_t group = in_.H / in_.Hk, rows = group * in_.N;
    for (int64_t c = 1; c < chunks; c++) merge(states, states + c * state_size(in_), rows);
    for (int64_t r = 0; r < rows; r += kGroup) {
      const int n = static_cast<int>(std::min<int64_t>(kGroup, rows - r));
      alignas(64) T sink[kGroup] = {};
      if (in_.sinks)
        for (int i = 0; i < n; i++) sink[i] = *in_.sinks.at<T>(0, hk * group + (r + i) / in_.N);
      const RowEnd<T> end(m_of(states) + r, l_of(states) + r, e_of(states) + r, bool(in_.sinks),
                          sink);
      end.write(out_, (b * in_.H + hk * group) * in_.N + r, n);
      for (int i = 0; i < n; i++) {
        const T* from = states + (r + i) * ldo_;
        T* to = out_.o.at_mut<T>(b, hk * group + (r + i) / in_.N, (r + i) % in_.N);
        for (int64_t d = 0; d < in_.Dv; d++)
          to[d] = end.o_scale[i] == 0 ? T{0} : from[d] * end.o_scale[i] + T{0};
      }
    }
  }

 private:
  T* m_of(T* state) const { return state + padded_ * ldo_; }
  T* l_of(T* state) const { return m_of(state) + padded_; }
  T* e_of(T* state) const { return l_of(state) + padded_; }

  void merge(T* a, T* b, int64_t rows) const {
    for (int64_t r = 0; r < rows; r += kWidth<T>) {
      const Vec<T> ma = load(m_of(a) + r), mb = load(m_of(b) + r), la = load(l_of(a) + r),
                   lb = load(l_of(b) + r);
      const Merge<T> merge(ma, mb);
      store(m_of(a) + r, merge.m);
      store(l_of(a) + r, merge(la, lb));
      store(e_of(a) + r, merge.entropy(load(e_of(a) + r), la, ma, load(e_of(b) + r), lb, mb));
      for (int i = 0; i < kWidth<T> && r + i < rows; i++) {
        T *x = a + (r + i) * ldo_, *y = b + (r + i) * ldo_;
        for (int64_t d = 0; d < ldo_; d += kWidth<T>)
          store(x + d, fma(load(x + d), set1(merge.a[i]), load(y + d) * set1(merge.b[i])));
      }
    }
  }

  // Which keys the rows see: their hull [ja, jb), and allow[] where some pair inside it is masked.
  template <int G>
  bool look(int64_t r, int64_t k0, int keys, int* ja, int* jb, bool* edge) {
    const int64_t group = in_.H / in_.Hk;
    *ja = keys;
    *jb = 0;
    *edge = false;
    for (int g = 0; g < G; g++) {
      const int64_t h = hk_ * group + (r + g) / in_.N;
      const int row = static_cast<int>((r + g) % in_.N);
      if (g == 0 || row == 0)
        mask_->load(in_.mask, b_, h, 0, static_cast<int>(in_.N), in_.N, in_.Nk);
      const Seen seen = mask_->look(0, k0, k0 + keys);
      uint8_t* allow = allow_ + g * kTileKeys;
      if (seen != Seen::kSome) {
        std::memset(allow, seen == Seen::kAll, static_cast<size_t>(keys));
      } else {
        for (int j = 0; j < keys; j++) allow[j] = mask_->sees(row, k0 + j);
      }
      int a = 0, b = keys;
      while (a < keys && !allow[a]) a++;
      while (b > a && !allow[b - 1]) b--;
      if (a < b) {
        *edge |= std::memchr(allow + a, 0, static_cast<size_t>(b - a)) != nullptr ||
                 (*ja < keys && (a != *ja || b != *jb));
        *ja = std::min(*ja, a);
        *jb = std::max(*jb, b);
      } else {
        *edge = true;
      }
    }
    return *ja < *jb;
  }

  template <int G>
  void load_queries(int64_t r, const Logits<T>* logits) {
    const int64_t group = in_.H / in_.Hk;
    for (int g = 0; g < G; g++) {
      const T* q = in_.q.at<T>(b_, hk_ * group + (r + g) / in_.N, (r + g) % in_.N);
      for (int64_t d = 0; d < in_.D; d++) q_[g * in_.D + d] = q[d] * logits[g].q_scale;
    }
  }

  template <int G>
  __attribute__((noinline)) void tile(int64_t r, int64_t k0, int keys, T* state) {
    int ja, jb;
    bool edge;
    if (!look<G>(r, k0, keys, &ja, &jb, &edge)) return;
    const int64_t group = in_.H / in_.Hk, h = hk_ * group;
    const Logits<T> logits[] = {Logits<T>(in_, b_, h + r / in_.N),
                                Logits<T>(in_, b_, h + std::min(r + 1, group * in_.N - 1) / in_.N),
                                Logits<T>(in_, b_, h + std::min(r + 2, group * in_.N - 1) / in_.N),
                                Logits<T>(in_, b_, h + std::min(r + 3, group * in_.N - 1) / in_.N)};
    load_queries<G>(r, logits);
    constexpr int kKeys = 2 * kWidth<T>;
    const int begin = ja / kKeys * kKeys, end = (jb + kKeys - 1) / kKeys * kKeys;
    const T* k = in_.k.at<T>(b_, hk_, k0);
    const T* v = in_.v.at<T>(b_, hk_, k0);  // prefetched
    const int depth = static_cast<int>(in_.D), Dv = static_cast<int>(in_.Dv);
    for (int j = begin; j < end; j += kKeys) {
      const int rows = std::min(kKeys, keys - j);
      const bool more = j + kKeys < end;
      if (rows == kKeys)
        decode_scores_block<T, G, false>(k + j * in_.k.row, in_.k.row, q_, depth, s_ + j, rows,
                                         more ? ahead(in_.k, k + (j + kKeys) * in_.k.row, depth)
                                              : ahead(in_.v, v + ja * in_.v.row, Dv));
      else
        decode_scores_block<T, G, true>(k + j * in_.k.row, in_.k.row, q_, depth, s_ + j, rows,
                                        ahead(in_.k, k, depth));
    }
    alignas(64) T alpha[kDecodeRows];
    for (int g = 0; g < G; g++) {
      T* s = s_ + g * kTileKeys;
      if (!logits[g].plain) apply_options(logits[g], (r + g) % in_.N, k0, begin, end, keys, s);
      for (int j = begin; j < end; j++)
        if (j < ja || j >= jb || (edge && !allow_[g * kTileKeys + j]))
          s[j] = -std::numeric_limits<T>::infinity();
      alpha[g] = weights(s, x_ + g * kTileKeys, begin, end, m_of(state) + r + g,
                         l_of(state) + r + g, e_of(state) + r + g);
      if (in_.dropout.on) drop(h + (r + g) / in_.N, (r + g) % in_.N, k0, begin, end, s);
    }
    for (int begin = 0; begin < jb; begin += kChainKeys)
      chain<G>(begin, ja, jb, edge, k0, state + r * ldo_, alpha);
  }

  // Values of the keys of one chain, in runs whose successors are prefetched; the first chain of a
  // tile rescales o.
  template <int G>
  void chain(int begin, int ja, int jb, bool edge, int64_t k0, T* o, const T* alpha) {
    const T ones[kDecodeRows] = {1, 1, 1, 1};
    const T* factor = begin == 0 ? alpha : ones;
    const int a = std::max(ja, begin), b = std::min(jb, begin + kChainKeys);
    if (a >= b) {
      if (begin == 0)
        for (int g = 0; g < G; g++)
          for (int64_t d = 0; d < ldo_; d++) o[g * ldo_ + d] *= alpha[g];
      return;
    }
    const T *k = in_.k.at<T>(b_, hk_, k0), *v = in_.v.at<T>(b_, hk_, k0);
    for (int js = a; js < b; js = (js / kSubKeys + 1) * kSubKeys) {
      const int je = std::min((js / kSubKeys + 1) * kSubKeys, b);
      RowsAhead<T> next = je < jb
                              ? ahead(in_.v, v + je * in_.v.row, static_cast<int>(in_.Dv))
                              : ahead(in_.k, k + kTileKeys * in_.k.row, static_cast<int>(in_.D));
      if (edge)
        values<G, true>(v, js, je, o, js == a, je == b, factor, next);
      else
        values<G, false>(v, js, je, o, js == a, je == b, factor, next);
    }
  }

  static RowsAhead<T> ahead(const View4& x, const T* row, int columns) {
    return {row, x.row, columns};
  }

  template <int G, bool EDGE>
  void values(const T* v, int js, int je, T* o, bool first, bool last, const T* alpha,
              RowsAhead<T>& next) {
    constexpr int NV = kVectorBytes == 64 ? 4 : 2, W = kWidth<T>;
    const int64_t ld = in_.v.row;
    const int n = static_cast<int>(in_.Dv);
    int d = 0;
    for (; d + NV * W <= n; d += NV * W)
      decode_values_block<T, G, NV, EDGE>(v + d, ld, s_, allow_, js, je, o + d, part_ + d, ldo_,
                                          first, last, alpha, next);
    for (; d + W <= n; d += W)
      decode_values_block<T, G, 1, EDGE>(v + d, ld, s_, allow_, js, je, o + d, part_ + d, ldo_,
                                         first, last, alpha, next);
    for (; d < n; d++) {
      for (int g = 0; g < G; g++) {
        T acc = first ? T{0} : part_[g * ldo_ + d];
        for (int j = js; j < je; j++)
          if (!EDGE || allow_[g * kTileKeys + j])
            acc = fused(v[j * ld + d], s_[g * kTileKeys + j], acc);
        T& to = o[g * ldo_ + d];
        if (last)
          to = fused(to, alpha[g], acc);
        else
          part_[g * ldo_ + d] = acc;
      }
    }
  }

  static TW_MEMBER float fused(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
  static TW_MEMBER double fused(double a, double b, double c) { return __builtin_fma(a, b, c); }

  void apply_options(const Logits<T>& logits, int64_t row, int64_t k0, int begin, int end, int keys,
                     T* s) const {
    alignas(64) T added[kTileKeys], iota[kTileKeys];
    positions<T>(0, kTileKeys, iota);
    if (logits.bias)
      for (int j = begin; j < end; j++)
        added[j] =
            j < keys ? logits.bias.at[row * logits.bias.row + (k0 + j) * logits.bias.column] : T{0};
    const Vec<T> pos = splat<T>(static_cast<double>(row + logits.offset - k0));
    for (int j = begin; j < end; j += kWidth<T>) {
      const Vec<T> x = logits.bias ? load(added + j) : zero<T>();
      store(s + j, logits(load(s + j), abs(pos - load(iota + j)), x, nullptr));
    }
  }

  void drop(int64_t h, int64_t row, int64_t k0, int begin, int end, T* s) const {
    alignas(64) T factors[kTileKeys];
    Dropout<T>(in_, b_, h).row(row, k0 + begin, end - begin, factors);
    for (int j = begin; j < end; j += kWidth<T>)
      store(s + j, load(s + j) * load(factors + j - begin));
  }

  // Weights in place of s; x is scratch. Updates the row's state and returns the rescaling of o.
  T weights(T* s, T* x, int begin, int end, T* m, T* l, T* e) const {
    constexpr T kLowest = std::numeric_limits<T>::lowest();
    T fresh = *m;
    Vec<T> top = minus_infinity<T>();
    for (int j = begin; j < end; j += kWidth<T>) top = max(top, load(s + j));
    for (int i = 0; i < kWidth<T>; i++) fresh = fresh > top[i] ? fresh : top[i];
    const T high = kLowest > fresh ? kLowest : fresh, old = kLowest > *m ? kLowest : *m;
    for (int j = begin; j < end; j += kWidth<T>) {
      const Vec<T> y = load(s + j) - set1(high), w = exp2<T>(y);
      store(s + j, w);
      if (out_.entropy) store(x + j, select(equal(w, zero<T>()), w, w * y));
    }
    const T a = exp2<T>(set1(old - high))[0];
    if (out_.entropy) {
      *e = moved_entropy<T>(set1(*e), set1(*l), set1(*m), set1(fresh), set1(a))[0] +
           sum_by_key(x, begin, end);
    }
    *l = fused(*l, a, sum_by_key(s, begin, end));
    *m = fresh;
    return a;
  }

  const AttentionInputs& in_;
  const AttentionResults& out_;
  int64_t ldo_, padded_, b_ = 0, hk_ = 0;
  T *q_ = nullptr, *s_ = nullptr, *x_ = nullptr, *part_ = nullptr;
  uint8_t* allow_ = nullptr;
  MaskBlock* mask_ = nullptr;
};

#include "simd/end.hpp"
