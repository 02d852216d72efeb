// The forward body for few queries: keys in lanes for the scores, columns in lanes for o. The
// additions of every element come in the order of the other body, so a row's bits are the same. All
// query rows of a KV head share the reads of its keys and values.
#pragma once
#include "ops/attention_forward-inl.hpp"
#include "simd/transpose-inl.hpp"

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

// Four columns of the product's elements: rows in lanes.
template <class E>
TW_INLINE void columns4(const E* p, int64_t ld, int last, Vec<E>* out) {
  if constexpr (kPairs<E>) {
    Vec<float> x[4];
    load_columns4(reinterpret_cast<const float*>(p), ld, last, x);
    TW_UNROLL for (int e = 0; e < 4; e++) std::memcpy(&out[e], &x[e], sizeof x[e]);
  } else {
    load_columns4(p, ld, last, out);
  }
}

// s[g * kTileKeys + key] for 2 registers of keys; `rows` of them exist.
template <class E, int G, bool TAIL>
TW_INLINE void decode_scores_block(const E* k, int64_t ld, const E* q, int depth, Acc<E> scale,
                                   Acc<E>* s, int rows, RowsAhead<E> ahead) {
  using T = Acc<E>;
  constexpr int W = kWidth<T>, U = 2;
  Vec<T> acc[U][G];
  TW_UNROLL for (int u = 0; u < U; u++) TW_UNROLL for (int g = 0; g < G; g++) acc[u][g] = zero<T>();
  int d = 0;
  for (; d + 4 <= depth; d += 4) {
    if (!TAIL) ahead.template touch<U * W * 4 / RowsAhead<E>::kLine>();
    TW_UNROLL for (int u = 0; u < U; u++) {
      const int have = rows - u * W;
      const int last = !TAIL || have > W ? W - 1 : have > 0 ? have - 1 : 0;
      Vec<E> x[4];
      columns4<E>(k + (!TAIL || have > 0 ? u * W : 0) * ld + d, ld, last, x);
      TW_UNROLL for (int e = 0; e < 4; e++) TW_UNROLL for (int g = 0; g < G; g++) acc[u][g] =
          multiply_add(x[e], set1(q[g * depth + d + e]), acc[u][g]);
    }
  }
  for (; d < depth; d++) TW_UNROLL for (int u = 0; u < U; u++) {
      E lanes[W];
      for (int i = 0; i < W; i++) lanes[i] = k[std::min(u * W + i, rows - 1) * ld + d];
      const Vec<E> x = load(lanes);
      TW_UNROLL for (int g = 0; g < G; g++) acc[u][g] =
          multiply_add(x, set1(q[g * depth + d]), acc[u][g]);
    }
  TW_UNROLL for (int u = 0; u < U; u++) TW_UNROLL for (int g = 0; g < G; g++)
      store(s + g * kTileKeys + u * W, kPairs<E> ? acc[u][g] * set1(scale) : acc[u][g]);
}

// o = o alpha + sum over keys, for NV registers of columns. A chain is parked in `part` between
// calls.
template <class T, int G, int NV, bool EDGE>
TW_INLINE void decode_values_block(const T* v, int64_t ld, const T* w, const uint8_t* allow,
                                   int keys, T* o, T* part, int64_t ldo, bool first, bool last,
                                   const T* alpha, RowsAhead<T>& ahead) {
  constexpr int W = kWidth<T>;
  Vec<T> acc[G][NV];
  TW_UNROLL for (int g = 0; g < G; g++) TW_UNROLL for (int i = 0; i < NV; i++) acc[g][i] =
      first ? zero<T>() : load(part + g * ldo + i * W);
  for (int j = 0; j < keys; j++) {
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

#if defined(TW_HAS_PAIRS)
// Pairs of neighbouring keys from their two rows.
TW_INLINE Vec<Bf16x2> join(const Bf16* first, const Bf16* second) {
  auto wide = [](const Bf16* x) __attribute__((always_inline)) {
    return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)));
  };
  return (Vec<Bf16x2>)_mm512_or_si512(wide(first), _mm512_slli_epi32(wide(second), 16));
}
TW_INLINE Vec<Bf16x2> halves(Vec<Bf16x2> x, bool first, bool second) {
  return x & static_cast<int>((first ? 0xffffu : 0) | (second ? 0xffff0000u : 0));
}

// Sum of pairs [ja, jb), multiples of 4, in the order of sum_rounded.
TW_INLINE float sum_by_pair(const Bf16x2* w, int ja, int jb) {
  const __m128bh one = (__m128bh)_mm_set1_epi32(0x3f803f80);
  __m128 sum = _mm_setzero_ps();
  for (int j = ja; j < jb; j += 4) {
    const __m128i x = _mm_loadu_si128(reinterpret_cast<const __m128i*>(w + j));
    sum = _mm_dpbf16_ps(sum, (__m128bh)x, one);
  }
  alignas(16) float s[4];
  _mm_store_ps(s, sum);
  return (s[0] + s[2]) + (s[1] + s[3]);
}

// The same with pairs of neighbouring keys, `keys` of which exist; columns from v are `columns`
// wide, and those of o and `part` rounded up.
template <int G, int NV, bool EDGE>
TW_INLINE void decode_values_block(const Bf16x2* v, int64_t ld, const Bf16x2* w,
                                   const uint8_t* allow, int keys, int columns, float* o,
                                   float* part, int64_t ldo, bool first, bool last,
                                   const float* alpha, RowsAhead<Bf16x2>& ahead) {
  constexpr int W = kWidth<float>;
  static constexpr Bf16 kNothing[NV * W] = {};
  Vec<float> acc[G][NV];
  TW_UNROLL for (int g = 0; g < G; g++) TW_UNROLL for (int i = 0; i < NV; i++) acc[g][i] =
      first ? zero<float>() : load(part + g * ldo + i * W);
  for (int j = 0; j < keys; j += 2) {
    const Bf16* a = reinterpret_cast<const Bf16*>(v + j * ld);
    const Bf16* b = j + 1 < keys ? a + 2 * ld : kNothing;
    Bf16 copy[2][NV * W] = {};
    if (columns < NV * W) {
      std::memcpy(copy[0], a, sizeof(Bf16) * static_cast<size_t>(columns));
      std::memcpy(copy[1], b, sizeof(Bf16) * static_cast<size_t>(columns));
      a = copy[0], b = copy[1];
    }
    Vec<Bf16x2> x[NV];
    TW_UNROLL for (int i = 0; i < NV; i++) x[i] = join(a + i * W, b + i * W);
    ahead.template touch<(NV * W + RowsAhead<Bf16x2>::kLine - 1) / RowsAhead<Bf16x2>::kLine>();
    TW_UNROLL for (int g = 0; g < G; g++) {
      const uint8_t* see = allow + g * kTileKeys + j;
      const bool second = j + 1 < keys && see[1];
      if (EDGE && !see[0] && !second) continue;
      const Vec<Bf16x2> y = set1(w[(g * kTileKeys + j) / 2]);
      TW_UNROLL for (int i = 0; i < NV; i++) acc[g][i] =
          multiply_add(EDGE ? halves(x[i], see[0], second) : x[i], y, acc[g][i]);
    }
  }
  TW_UNROLL for (int g = 0; g < G; g++) TW_UNROLL for (int i = 0; i < NV; i++) {
    float* to = o + g * ldo + i * W;
    if (last)
      store(to, fma(load(to), set1(alpha[g]), acc[g][i]));
    else
      store(part + g * ldo + i * W, acc[g][i]);
  }
}
#endif

// Sum of s over keys [ja, jb), both multiples of 4, in the order of weights_panel.
template <class T>
TW_INLINE T sum_by_key(const T* s, int ja, int jb) {
  T sum[4] = {0, 0, 0, 0};
  for (int j = ja; j < jb; j += 4) TW_UNROLL for (int i = 0; i < 4; i++) sum[i] += s[j + i];
  return (sum[0] + sum[2]) + (sum[1] + sum[3]);
}

template <class E>
class DecodeBody {
  using T = Acc<E>;
  static constexpr int kP = kFold<E>;

 public:
  // The state of a (batch, KV head, chunk): o[rows][Dv], m, l, e and of pairs the sums of rounded
  // weights and the maxima [rows rounded up to 16].
  static constexpr int kNumbers = kPairs<E> ? 5 : 3;
  static int64_t padded_rows(const AttentionInputs& in) {
    return (in.H / in.Hk * in.N + kGroup - 1) / kGroup * kGroup;
  }
  static int64_t columns(const AttentionInputs& in) {
    return (in.Dv + kGroup - 1) / kGroup * kGroup;
  }
  static int64_t state_size(const AttentionInputs& in) {
    return padded_rows(in) * (columns(in) + kNumbers);
  }

  explicit DecodeBody(const AttentionProblem& problem)
      : in_(problem.in), out_(problem.out), ldo_(columns(in_)), padded_(padded_rows(in_)) {}

  void place(Arena& arena) {
    q_ = arena.take<E>(kDecodeRows * in_.D);
    s_ = arena.take<T>(kDecodeRows * kTileKeys);
    x_ = arena.take<T>(kDecodeRows * kTileKeys);
    part_ = arena.take<T>(kDecodeRows * ldo_);
    allow_ = arena.take<uint8_t>(kDecodeRows * kTileKeys);
    mask_ = arena.take<MaskBlock>(1);
    weights_ = arena.take<E>(kPairs<E> ? kDecodeRows * kTileKeys / 2 : 0);
    k_rows_ = arena.take<E>(in_place<E>(in_.k) ? 0 : kSubKeys * in_.D);
    v_rows_ = arena.take<E>(in_place<E>(in_.v) ? 0 : kSubKeys * in_.Dv);
    o_row_ = arena.take<T>(in_.Dv);
  }

  void chunk(int64_t b, int64_t hk, int64_t c, T* state) {
    b_ = b;
    hk_ = hk;
    const int64_t rows = in_.H / in_.Hk * in_.N;
    std::memset(state, 0, sizeof(T) * static_cast<size_t>(padded_ * (ldo_ + kNumbers)));
    for (int64_t r = 0; r < padded_; r++) {
      m_of(state)[r] = -std::numeric_limits<T>::infinity();
      if (kPairs<E>) top_of(state)[r] = m_of(state)[r];
    }
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
    for (int64_t c = 1; c < chunks; c++)
      merge(states, states + c * padded_ * (ldo_ + kNumbers), rows);
    for (int64_t r = 0; r < rows; r += kGroup) {
      const int n = static_cast<int>(std::min<int64_t>(kGroup, rows - r));
      alignas(64) T sink[kGroup] = {};
      if (in_.sinks)
        for (int i = 0; i < n; i++) sink[i] = *in_.sinks.at<T>(0, hk * group + (r + i) / in_.N);
      RowEnd<T> end(m_of(states) + r, l_of(states) + r, e_of(states) + r, bool(in_.sinks), sink,
                    kPairs<E> ? top_of(states) + r : nullptr);
      if constexpr (kPairs<E>)
        if (!in_.dropout.on) divide_by_rounded(&end, l_of(states) + r, rounded_of(states) + r);
      for (int i = 0; i < n; i++) {
        const int64_t h = hk * group + (r + i) / in_.N, row = (r + i) % in_.N;
        end.write(out_, in_.row_at(b, h, row), 1, i);
        const T* from = states + (r + i) * ldo_;
        for (int64_t d = 0; d < in_.Dv; d++)
          o_row_[d] = end.o_scale[i] == 0 ? T{0} : from[d] * end.o_scale[i] + T{0};
        put_row<T>(out_.o, b, h, row, o_row_, in_.Dv);
        if (out_.o_full) put_row<T>(out_.o_full, b, h, row, o_row_, in_.Dv);
      }
    }
  }

 private:
  T* m_of(T* state) const { return state + padded_ * ldo_; }
  T* l_of(T* state) const { return m_of(state) + padded_; }
  T* e_of(T* state) const { return l_of(state) + padded_; }
  T* rounded_of(T* state) const { return e_of(state) + padded_; }
  T* top_of(T* state) const { return rounded_of(state) + padded_; }

  void merge(T* a, T* b, int64_t rows) const {
    for (int64_t r = 0; r < rows; r += kWidth<T>) {
      const Vec<T> ma = load(m_of(a) + r), mb = load(m_of(b) + r), la = load(l_of(a) + r),
                   lb = load(l_of(b) + r);
      const Merge<T> merge(ma, mb);
      store(m_of(a) + r, merge.m);
      store(l_of(a) + r, merge(la, lb));
      if constexpr (kPairs<E>)
        store(rounded_of(a) + r, merge(load(rounded_of(a) + r), load(rounded_of(b) + r))),
            store(top_of(a) + r, max(load(top_of(a) + r), load(top_of(b) + r)));
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
    const int depth = static_cast<int>(in_.D) / kP;
    for (int g = 0; g < G; g++) {
      E* to = q_ + g * depth;
      const Rows<E> q =
          read_rows<E>(in_.q, b_, hk_ * group + (r + g) / in_.N, (r + g) % in_.N, 1, depth, to);
      for (int d = 0; d < depth; d++) {
        if constexpr (kPairs<E>)
          to[d] = q.at[d];
        else
          to[d] = q.at[d] * logits[g].q_scale;
      }
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
    const int depth = static_cast<int>(in_.D) / kP;
    for (int j = begin; j < end; j += kKeys) {
      const int rows = std::min(kKeys, keys - j);
      const Rows<E> k = read_rows<E>(in_.k, b_, hk_, k0 + j, rows, depth, k_rows_);
      const RowsAhead<E> next = j + kKeys < end ? ahead(in_.k, k0 + j + kKeys, in_.D, k)
                                                : ahead(in_.v, k0 + ja, in_.Dv, k);
      const T scale = product_scale<E>(logits[0]);
      if (rows == kKeys)
        decode_scores_block<E, G, false>(k.at, k.ld, q_, depth, scale, s_ + j, rows, next);
      else
        decode_scores_block<E, G, true>(k.at, k.ld, q_, depth, scale, s_ + j, rows, next);
    }
    alignas(64) T alpha[kDecodeRows];
    for (int g = 0; g < G; g++) {
      T* s = s_ + g * kTileKeys;
      if (!logits[g].plain) apply_options(logits[g], (r + g) % in_.N, k0, begin, end, keys, s);
      for (int j = begin; j < end; j++)
        if (j < ja || j >= jb || (edge && !allow_[g * kTileKeys + j]))
          s[j] = -std::numeric_limits<T>::infinity();
      alpha[g] =
          weights(s, x_ + g * kTileKeys, begin, end, m_of(state) + r + g, l_of(state) + r + g,
                  e_of(state) + r + g, kPairs<E> ? top_of(state) + r + g : nullptr);
      if (in_.dropout.on) drop(h + (r + g) / in_.N, (r + g) % in_.N, k0, begin, end, s);
    }
    if constexpr (kPairs<E>) {
      edge |= ja % 2 != 0 || jb % 2 != 0;
      ja -= ja % 2;
      jb = std::min(jb + jb % 2, keys);
      for (int g = 0; g < G; g++) {
        for (int j = begin; j < end; j += kGroup * 2)
          store_row_pairs(weights_ + (g * kTileKeys + j) / 2, load(s_ + g * kTileKeys + j),
                          load(s_ + g * kTileKeys + j + kGroup));
        T* sum = rounded_of(state) + r + g;
        *sum = fused(*sum, alpha[g], sum_by_pair(weights_ + g * kTileKeys / 2, begin / 2, end / 2));
      }
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
    for (int js = a; js < b; js = (js / kSubKeys + 1) * kSubKeys) {
      const int je = std::min((js / kSubKeys + 1) * kSubKeys, b);
      const int columns = static_cast<int>(in_.Dv) / kP;
      const Rows<E> v = read_rows<E>(in_.v, b_, hk_, k0 + js, je - js, columns, v_rows_);
      RowsAhead<E> next =
          je < jb ? ahead(in_.v, k0 + je, in_.Dv, v) : ahead(in_.k, k0 + kTileKeys, in_.D, v);
      if (edge)
        values<G, true>(v, js, je - js, o, js == a, je == b, factor, next);
      else
        values<G, false>(v, js, je - js, o, js == a, je == b, factor, next);
    }
  }

  // The rows to ask for next: from `key` where they are read in place, else `here` once more.
  RowsAhead<E> ahead(const View4& x, int64_t key, int64_t columns, const Rows<E>& here) const {
    const int n = static_cast<int>(columns) / kP;
    if (!in_place<E>(x)) return {here.at, 0, n};
    return {x.at<E>(0, 0) + (b_ * x.batch + hk_ * x.head + key * x.row) / kP, x.row / kP, n};
  }

  // The first key is key j of the tile.
  template <int G, bool EDGE>
  void values(const Rows<E>& v, int j, int keys, T* o, bool first, bool last, const T* alpha,
              RowsAhead<E>& next) {
    constexpr int NV = kVectorBytes == 64 ? 4 : 2, W = kWidth<T>;
    const int n = static_cast<int>(in_.Dv);
    const uint8_t* allow = allow_ + j;
    int d = 0;
    if constexpr (kPairs<E>) {
      const E* w = weights_ + j / 2;
      for (; d + NV * W <= n; d += NV * W)
        decode_values_block<G, NV, EDGE>(v.at + d / 2, v.ld, w, allow, keys, NV * W, o + d,
                                         part_ + d, ldo_, first, last, alpha, next);
      for (; d < n; d += W)
        decode_values_block<G, 1, EDGE>(v.at + d / 2, v.ld, w, allow, keys, std::min(W, n - d),
                                        o + d, part_ + d, ldo_, first, last, alpha, next);
    } else {
      const T* w = s_ + j;
      for (; d + NV * W <= n; d += NV * W)
        decode_values_block<T, G, NV, EDGE>(v.at + d, v.ld, w, allow, keys, o + d, part_ + d, ldo_,
                                            first, last, alpha, next);
      for (; d + W <= n; d += W)
        decode_values_block<T, G, 1, EDGE>(v.at + d, v.ld, w, allow, keys, o + d, part_ + d, ldo_,
                                           first, last, alpha, next);
      for (; d < n; d++) last_column<G, EDGE>(v, j, keys, d, o, first, last, alpha);
    }
  }

  template <int G, bool EDGE>
  void last_column(const Rows<T>& v, int j, int keys, int d, T* o, bool first, bool last,
                   const T* alpha) {
    for (int g = 0; g < G; g++) {
      T acc = first ? T{0} : part_[g * ldo_ + d];
      for (int i = 0; i < keys; i++)
        if (!EDGE || allow_[g * kTileKeys + j + i])
          acc = fused(v.at[i * v.ld + d], s_[g * kTileKeys + j + i], acc);
      T& to = o[g * ldo_ + d];
      if (last)
        to = fused(to, alpha[g], acc);
      else
        part_[g * ldo_ + d] = acc;
    }
  }

  static TW_MEMBER float fused(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
  static TW_MEMBER double fused(double a, double b, double c) { return __builtin_fma(a, b, c); }

  void apply_options(const Logits<T>& logits, int64_t row, int64_t k0, int begin, int end, int keys,
                     T* s) const {
    alignas(64) T added[kTileKeys], iota[kTileKeys];
    positions<T>(0, kTileKeys, iota);
    if (logits.bias)
      for (int j = begin; j < end; j++) added[j] = j < keys ? logits.bias(row, k0 + j) : T{0};
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
  T weights(T* s, T* x, int begin, int end, T* m, T* l, T* e, T* highest) const {
    constexpr T kLowest = std::numeric_limits<T>::lowest();
    T fresh = *m;
    Vec<T> top = minus_infinity<T>();
    for (int j = begin; j < end; j += kWidth<T>) top = max(top, load(s + j));
    T here = -std::numeric_limits<T>::infinity();
    for (int i = 0; i < kWidth<T>; i++) here = here > top[i] ? here : top[i];
    if (highest) {
      *highest = *highest > here ? *highest : here;
      here = whole_above(set1(here))[0];
    }
    fresh = fresh > here ? fresh : here;
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
  E *q_ = nullptr, *weights_ = nullptr, *k_rows_ = nullptr, *v_rows_ = nullptr;
  T *s_ = nullptr, *x_ = nullptr, *part_ = nullptr, *o_row_ = nullptr;
  uint8_t* allow_ = nullptr;
  MaskBlock* mask_ = nullptr;
};

#include "simd/end.hpp"
