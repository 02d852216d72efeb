// Dropout by counter: whether a pair of a query and a key is dropped is a function of the seed, the
// batch, the head, the query's position and the key alone. Philox4x32-10: Salmon et al. 2011,
// Parallel random numbers: as easy as 1, 2, 3 (SC'11), section 3.3 and table 2.
#pragma once
#include "ops/walk-inl.hpp"

#include "simd/begin.hpp"

typedef uint32_t VecU __attribute__((vector_size(kVectorBytes)));
constexpr int kWordsWide = kVectorBytes / 4;

// The high and low halves of the products of 32-bit words.
TW_INLINE void multiply(uint32_t m, VecU x, VecU* high, VecU* low) {
#if defined(TILEWISE_TARGET_AVX512)
  const __m512i f = _mm512_set1_epi32(static_cast<int>(m));
  const __m512i even = _mm512_mul_epu32((__m512i)x, f),
                odd = _mm512_mul_epu32(_mm512_srli_epi64((__m512i)x, 32), f);
  *high = (VecU)_mm512_mask_shuffle_epi32(odd, 0x5555, even, _MM_PERM_CDAB);
  *low = (VecU)_mm512_mullo_epi32((__m512i)x, f);
#elif defined(TILEWISE_TARGET_AVX2)
  const __m256i f = _mm256_set1_epi32(static_cast<int>(m));
  const __m256i even = _mm256_mul_epu32((__m256i)x, f),
                odd = _mm256_mul_epu32(_mm256_srli_epi64((__m256i)x, 32), f);
  *high = (VecU)_mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xaa);
  *low = (VecU)_mm256_mullo_epi32((__m256i)x, f);
#else
  for (int i = 0; i < kWordsWide; i++) {
    const uint64_t product = uint64_t{m} * x[i];
    (*high)[i] = static_cast<uint32_t>(product >> 32);
    (*low)[i] = static_cast<uint32_t>(product);
  }
#endif
}
TW_INLINE void multiply(uint32_t m, uint32_t x, uint32_t* high, uint32_t* low) {
  const uint64_t product = uint64_t{m} * x;
  *high = static_cast<uint32_t>(product >> 32);
  *low = static_cast<uint32_t>(product);
}

// Ten rounds on each of the counters c, in place; Word is one word or a vector of them. Several
// counters hide the latency of a round.
template <class Word, int COUNT>
TW_INLINE void philox(Word (&c)[COUNT][4], uint64_t seed) {
  uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; round++) {
    TW_UNROLL for (int i = 0; i < COUNT; i++) {
      Word high0, low0, high1, low1;
      multiply(0xD2511F53u, c[i][0], &high0, &low0);
      multiply(0xCD9E8D57u, c[i][2], &high1, &low1);
      c[i][0] = high1 ^ c[i][1] ^ key0;
      c[i][1] = low1;
      c[i][2] = high0 ^ c[i][3] ^ key1;
      c[i][3] = low0;
    }
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
}

// The factors of one head's probabilities: 0 where dropped, 1 / (1 - p) elsewhere. A query's
// position counts from the end of the keys, so that a part of the queries is treated like the
// whole.
template <class T>
class Dropout {
 public:
  bool on;

  Dropout(const AttentionInputs& in, int64_t b, int64_t h)
      : on(in.dropout.on),
        seed_(in.dropout.seed),
        threshold_(in.dropout.threshold),
        head_(static_cast<uint32_t>(h)),
        batch_(static_cast<uint32_t>(in.first_batch + b)),
        offset_(in.Nk - in.N),
        kept_(static_cast<T>(in.dropout.kept)) {}

  // out[kStep][kGroup]: the factors of kStep keys from `key`, a multiple of it, and 16 queries from
  // `query`
  __attribute__((noinline)) void step(int64_t query, int64_t key, T* out) const {
    const VecU none = {};
    const uint32_t position = static_cast<uint32_t>(query + offset_);
    for (int at = 0; at < kGroup; at += kWordsWide) {
      VecU lanes = none + position, c[kStep / 4][4];
      for (int i = 0; i < kWordsWide; i++) lanes[i] += static_cast<uint32_t>(at + i);
      for (int k = 0; k < kStep / 4; k++) {
        c[k][0] = none + static_cast<uint32_t>(key / 4 + k);
        c[k][1] = lanes;
        c[k][2] = none + head_;
        c[k][3] = none + batch_;
      }
      philox(c, seed_);
      for (int j = 0; j < kStep; j++) keep(c[j / 4][j % 4], out + j * kGroup + at);
    }
  }

  // The factors of keys [key, key + count) for one query; `key` is a multiple of 4.
  void row(int64_t query, int64_t key, int count, T* out) const {
    for (int j = 0; j < count; j += 4) {
      uint32_t c[1][4] = {{static_cast<uint32_t>((key + j) / 4),
                           static_cast<uint32_t>(query + offset_), head_, batch_}};
      philox(c, seed_);
      for (int i = 0; i < 4 && j + i < count; i++) out[j + i] = c[0][i] < threshold_ ? T{0} : kept_;
    }
  }

  // out[j * kPanel + lane]: the factors of one segment
  void panel(const Segment& s, int64_t query, int64_t k0, T* out) const {
    alignas(64) T factors[kStep * kGroup];
    for (int g = s.na; g < s.nb; g++)
      for (int j = s.ja; j < s.jb; j += kStep) {
        step(query + g * kGroup, k0 + j, factors);
        for (int i = 0; i < std::min(kStep, s.jb - j); i++)
          std::memcpy(out + int64_t{j + i} * kPanel + g * kGroup, factors + i * kGroup,
                      sizeof(T) * kGroup);
      }
  }

  // Multiplies the panels a and, where given, b: [key][kPanel lanes] of queries from `query` and
  // keys from k0.
  void apply(const Segment* segments, int count, int64_t query, int64_t k0, T* a, T* b) const {
    alignas(64) T factors[kStep * kGroup];
    for (int s = 0; s < count; s++)
      for (int g = segments[s].na; g < segments[s].nb; g++)
        for (int j = segments[s].ja; j < segments[s].jb; j += kStep) {
          step(query + g * kGroup, k0 + j, factors);
          const int keys = std::min(kStep, segments[s].jb - j);
          for (int i = 0; i < keys * kGroup; i += kWidth<T>) {
            const int64_t at = int64_t{j + i / kGroup} * kPanel + g * kGroup + i % kGroup;
            const Vec<T> f = load(factors + i);
            store(a + at, load(a + at) * f);
            if (b) store(b + at, load(b + at) * f);
          }
        }
  }

 private:
  TW_MEMBER void keep(VecU words, T* out) const {
    if constexpr (sizeof(T) == 4) {
      const VecU all = {};
      store(out, (Vec<T>)((VecU)(words >= all + threshold_) & (VecU)set1(kept_)));
    } else {
      for (int i = 0; i < kWordsWide; i++) out[i] = words[i] < threshold_ ? T{0} : kept_;
    }
  }

  uint64_t seed_;
  uint32_t threshold_, head_, batch_;
  int64_t offset_;
  T kept_;
};

#include "simd/end.hpp"
