// The walk over tiles: which keys a block of queries visits, in which order, and which pairs are
// masked. Everything that fixes bits is here: tiles of kTileKeys keys in chunks of kChunkKeys,
// counted from key 0 (docs/decisions/0002).
#pragma once
#include <algorithm>
#include <cstdint>

#include "ops/attention.hpp"
#include "tile/products-inl.hpp"

#include "simd/begin.hpp"

constexpr int kTileKeys = 256;
constexpr int kChunkKeys = 2048;
constexpr int kStep = 8;  // keys whose masking is decided together with one group of queries
constexpr int kMaxBlock = 384;
constexpr int kMaxGroups = kMaxBlock / kGroup;
constexpr int kMaxSegments = kTileKeys / kStep;
#if defined(TW_HAS_TILES)
static_assert(kTileKeys == tiled::kMostSteps * tiled::kTerms);
#endif

enum class Seen : uint8_t { kNone, kSome, kAll };

// Masking of a block of queries [q0, q0 + count). Lanes beyond the last query repeat it.
class MaskBlock {
 public:
  int count = 0, groups = 0;
  int64_t key_begin = 0, key_end = 0;  // hull of the visible keys

  void load(const MaskView& mask, int64_t b, int64_t h, int64_t q0, int rows, int64_t N,
            int64_t Nk) {
    count = rows;
    groups = (rows + kGroup - 1) / kGroup;
    keys_ = Nk;
    all_ = !mask.rows && !mask.bits;
    bits_ = mask.bits ? mask.bits + b * mask.batch + h * mask.head : nullptr;
    key_begin = 0;
    key_end = Nk;
    if (bits_) {
      words_ = (N + kGroup - 1) / kGroup;
      tile_columns_ = (Nk + 63) / 64;
      first_ = q0 / kGroup;
      tiles_ = mask.tiles + b * mask.tile_batch + h * mask.tile_head;
    } else if (mask.rows) {
      load_rows(mask.rows + b * mask.batch + h * mask.head + q0 * 4);
    }
  }

  // Group g and keys [x, y): exact for kNone of intervals' hulls and for bits; kSome may turn out
  // none or all of them.
  Seen look(int g, int64_t x, int64_t y) const {
    if (all_) return Seen::kAll;
    if (bits_) return look_bits(g, x, y);
    const Hull& u = hulls_[g];
    bool some = false;
    for (int t = 0; t < 2; t++) {
      if (u.full_lo[t] <= x && y <= u.full_hi[t]) return Seen::kAll;
      some |= std::max<int64_t>(u.lo[t], x) < std::min<int64_t>(u.hi[t], y);
    }
    return some ? Seen::kSome : Seen::kNone;
  }

  // Words of 16 lanes for keys [x, y) of group g, `stride` apart; says how many pairs are seen.
  Seen words(int g, int64_t x, int64_t y, uint16_t* out, int stride) const {
    uint16_t any = 0, all = 0xffff;
    for (int64_t j = x; j < y; j++, out += stride) {
      *out = bits_ ? bits_[j * words_ + first_ + g] : interval_word(g, static_cast<int32_t>(j));
      any |= *out;
      all &= *out;
    }
    return all == 0xffff ? Seen::kAll : any ? Seen::kSome : Seen::kNone;
  }

  bool sees(int row, int64_t j) const {
    if (all_) return true;
    if (bits_) return bits_[j * words_ + first_ + row / kGroup] >> (row % kGroup) & 1;
    return (lo_[0][row] <= j && j < hi_[0][row]) || (lo_[1][row] <= j && j < hi_[1][row]);
  }

  // The segments of a panel (groups from g0) in the tile of keys [k0, k0 + keys), each [ja, jb)
  // relative to k0. Fills the words of edge segments. Returns their number; 0 where no pair is
  // seen.
  int segments(int g0, int64_t k0, int keys, Segment* out, uint16_t* edge) const {
    const int n = std::min(kPanelGroups, groups - g0);
    bool full = n == kPanelGroups, some = false;
    for (int g = 0; g < n; g++) {
      const Seen s = look(g0 + g, k0, k0 + keys);
      full &= s == Seen::kAll;
      some |= s != Seen::kNone;
    }
    if (!some) return 0;
    if (full) {
      out[0] = {0, keys, 0, kPanelGroups, false};
      return 1;
    }
    int count = 0;
    for (int j = 0; j < keys; j += kStep) {
      const Segment s = step(g0, n, k0, j, std::min(j + kStep, keys), edge);
      if (s.na >= s.nb) continue;
      Segment* last = count ? &out[count - 1] : nullptr;
      if (last && last->jb == j && last->na == s.na && last->nb == s.nb && last->edge == s.edge)
        last->jb = s.jb;
      else
        out[count++] = s;
    }
    return count;
  }

 private:
  struct Hull {
    int32_t lo[2], hi[2], full_lo[2], full_hi[2];
  };

  // The groups of a panel that see keys [j, end) of the tile, and their words where some pair is
  // masked.
  Segment step(int g0, int n, int64_t k0, int j, int end, uint16_t* edge) const {
    Segment s{j, end, kPanelGroups, 0, false};
    Seen seen[kPanelGroups];
    for (int g = 0; g < n; g++) {
      seen[g] = look(g0 + g, k0 + j, k0 + end);
      if (seen[g] == Seen::kSome)
        seen[g] = words(g0 + g, k0 + j, k0 + end, edge + j * kPanelGroups + g, kPanelGroups);
      if (seen[g] == Seen::kNone) continue;
      s.edge |= seen[g] == Seen::kSome;
      s.na = std::min(s.na, g);
      s.nb = g + 1;
    }
    for (int g = s.na; g < s.nb; g++) s.edge |= seen[g] == Seen::kNone;
    if (s.edge)
      for (int g = s.na; g < s.nb; g++)
        if (seen[g] != Seen::kSome)
          for (int i = j; i < end; i++)
            edge[i * kPanelGroups + g] = seen[g] == Seen::kAll ? 0xffff : 0;
    return s;
  }

  void load_rows(const int32_t* rows) {
    constexpr int32_t kNever = std::numeric_limits<int32_t>::max();
    int64_t begin = keys_, end = 0;
    for (int g = 0; g < groups; g++) {
      Hull u{{kNever, kNever}, {0, 0}, {0, 0}, {kNever, kNever}};
      for (int i = g * kGroup; i < (g + 1) * kGroup; i++) {
        const int32_t* r = rows + int64_t{4} * std::min(i, count - 1);
        for (int t = 0; t < 2; t++) {
          const int32_t lo = r[2 * t], hi = r[2 * t + 1];
          lo_[t][i] = lo;
          hi_[t][i] = hi;
          u.full_lo[t] = std::max(u.full_lo[t], lo);
          u.full_hi[t] = std::min(u.full_hi[t], hi);
          if (lo >= hi) continue;
          u.lo[t] = std::min(u.lo[t], lo);
          u.hi[t] = std::max(u.hi[t], hi);
          begin = std::min<int64_t>(begin, lo);
          end = std::max<int64_t>(end, hi);
        }
      }
      hulls_[g] = u;
    }
    key_begin = begin < end ? begin : 0;
    key_end = end;
  }

  Seen look_bits(int g, int64_t x, int64_t y) const {
    if (x % 64 == 0 && (y % 64 == 0 || y == keys_)) {
      const uint8_t* t = tiles_ + (first_ + g) * tile_columns_;
      bool some = false, full = true;
      for (int64_t c = x / 64; c * 64 < y; c++) {
        some |= t[c] != 0;
        full &= t[c] == 2;
      }
      return full ? Seen::kAll : some ? Seen::kSome : Seen::kNone;
    }
    return Seen::kSome;
  }

  uint16_t interval_word(int g, int32_t j) const {
    const int i = g * kGroup;
    uint32_t word = inside(lo_[0] + i, hi_[0] + i, j);
    if (hulls_[g].hi[1] > 0) word |= inside(lo_[1] + i, hi_[1] + i, j);
    return static_cast<uint16_t>(word);
  }

  bool all_ = true;
  const uint16_t* bits_ = nullptr;
  const uint8_t* tiles_ = nullptr;
  int64_t keys_ = 0, words_ = 0, tile_columns_ = 0, first_ = 0;
  Hull hulls_[kMaxGroups];
  alignas(64) int32_t lo_[2][kMaxBlock], hi_[2][kMaxBlock];
};

// Tiles in ascending order, chunk by chunk: body.tile(panel, k0, keys, segments, count, words),
// body.chunk_end(last).
template <class Body>
TW_NOINLINE void walk(const MaskBlock& mask, int64_t Nk, Body& body) {
  Segment segments[kMaxSegments];
  alignas(64) uint16_t words[kTileKeys * kPanelGroups];
  for (int64_t c = mask.key_begin / kChunkKeys * kChunkKeys; c < mask.key_end; c += kChunkKeys) {
    const int64_t end = std::min(c + kChunkKeys, mask.key_end);
    for (int64_t k0 = std::max(c, mask.key_begin / kTileKeys * kTileKeys); k0 < end;
         k0 += kTileKeys) {
      const int keys = static_cast<int>(std::min<int64_t>(kTileKeys, Nk - k0));
      for (int g = 0; g < mask.groups; g += kPanelGroups) {
        const int count = mask.segments(g, k0, keys, segments, words);
        if (count) body.tile(g / kPanelGroups, k0, segments, count, words);
      }
    }
    body.chunk_end(end == mask.key_end);
  }
}

#include "simd/end.hpp"
