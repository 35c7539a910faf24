// The walk over a block's weights: segments of K, spans of segments, and how far ahead memory is asked for them.
#pragma once
#include "codes.h"

#ifndef QPASS_PREFETCH_BYTES
#define QPASS_PREFETCH_BYTES 8192  // how far ahead of its use a weight is asked for
#endif
#ifndef QPASS_PREFETCH_PAGES
#define QPASS_PREFETCH_PAGES 0  // so many pages are asked for in turns, a line of each; 0: one line after the other
#endif

namespace qpass {

// How a tile gets its weights: packed codes on their way from memory, in the order they lie in or with vectors abreast;
// packed codes that its siblings read too; a panel of unpacked ones.
enum Source { kLinear, kStream, kCached, kPanel };

// Into the L2 cache: aimed at L1, the few line fill buffers of a core would hold a thread to half of the memory's
// bandwidth.
QPASS_INLINE void prefetch(const uint8_t* p) { _mm_prefetch((const char*)p, _MM_HINT_T1); }
QPASS_INLINE void prefetch_l1(const uint8_t* p) { _mm_prefetch((const char*)p, _MM_HINT_T0); }

template <class F>
QPASS_INLINE void prefetch_row(const uint8_t* chunk, int row) {
  for (int line = F::lines(row); line < F::lines(row + 1); line++) prefetch(chunk + line * kRow);
}

// Asks for as much as lies from `from` to `to`, ahead of it. A line after the other waits in one of a core's few line fill
// buffers, which what is used now needs too. With pages in turns the hardware's prefetcher, which has no such limit, runs
// ahead in each: lines lie in so many pages at the same place, and where some lines share an address, it is computed once.
// Who calls it piece by piece, and for scales and zeros too, asks for each line once.
// `Rows`: of a tile of vectors, some of which leave no time for addresses; 0 of AMX's.
template <class F, int Rows = 0>
QPASS_INLINE void prefetch_ahead_of(const uint8_t* from, const uint8_t* to) {
  constexpr bool busy = Rows > 0 && (F::a16 || (F::bits == 8 && Rows == 1)), turns = QPASS_PREFETCH_PAGES > 0 && !busy;
  constexpr uint64_t kPage = 4096, kPages = turns ? QPASS_PREFETCH_PAGES : 1, lines = turns ? kVectors : 1, bytes = lines * kRow;
  static_assert((kPages & (kPages - 1)) == 0 && kPages % lines == 0, "addresses are cut by bits");
  for (uint64_t at = (uint64_t)from & -bytes; at < ((uint64_t)to & -bytes); at += bytes) {
    const uint64_t line = at / kRow, region = at & ~(kPages * kPage - 1);
    const uint64_t place = region + kPages * kPage + line % kPages * kPage + line / kPages % (kPage / kRow) * kRow;
    const uint8_t* ahead = turns ? (const uint8_t*)place : (const uint8_t*)at + QPASS_PREFETCH_BYTES;
    for (uint64_t i = 0; i < lines; i++) prefetch(ahead + i * kPage);
  }
}

// One segment of one group.
struct Segment {
  const uint8_t* codes;
  const uint8_t* scales;
  const uint8_t* zeros;
  int chunks;
  bool first, last;  // of its group
  int64_t group;
};

template <class F>
QPASS_INLINE Segment segment_of(const uint8_t* block, int64_t k, int64_t segments, int64_t i) {
  const int64_t group = F::grouped ? i : 0;
  const uint8_t* record = block + group * F::group_bytes(k);
  const uint8_t* codes = record + (F::grouped ? 0 : i * F::segment_chunks * F::chunk_bytes);
  const uint8_t* scales = record + F::group_codes(k);
  const int64_t left = F::padded_k(k) / F::chunk - i * F::segment_chunks;
  const int chunks = int(left < F::segment_chunks ? left : F::segment_chunks);
  return {codes, scales, scales + kBlock * F::scale_bytes, chunks, i == 0, i == segments - 1, group};
}

// Segments that all tiles of a task walk before the next ones: the L1 cache keeps the activations of six rows (12 KB), the
// L2 cache the codes or the panel (128 KB at most).
template <class F>
constexpr int64_t kSpanSegments = (F::a16 ? 1024 : 2048) / F::segment;
template <class F>
constexpr int64_t kPanelSegmentBytes = F::segment_chunks* F::panel_chunk_bytes;

// Segments [begin, end) of a block; with a panel, that of `begin` comes first in it. Tile `turn` of `turns` asks for
// its share of the chunks that lie `ahead` bytes behind.
struct Span {
  const uint8_t* block;
  int64_t k, segments, begin, end;
  const uint8_t* panel;
  int64_t ahead;
  int turn, turns;
};

// The lines of scales and zeros ask for what lies ahead of them, as those of codes do: one in twenty left out costs a
// stall each, and half of the speed of a single row.
template <class F>
QPASS_INLINE void prefetch_tail(const Segment& s, int64_t ahead) {
  for (const uint8_t* line = s.scales; line < s.zeros + kBlock * F::zero_bytes; line += kRow) prefetch(line + ahead);
}
template <class F, int Rows = 0>
QPASS_INLINE void prefetch_ahead_of_tail(const Segment& s) {
  prefetch_ahead_of<F, Rows>(s.scales, s.zeros + kBlock * F::zero_bytes);
}

}  // namespace qpass
