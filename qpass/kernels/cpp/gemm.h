// One block of 64 outputs times some rows: register tiles of rows x vectors abreast, group after group.
// The order of operations on one output never depends on how many rows are computed with it, so neither do its bits.
#pragma once
#include "prologue.h"

#ifndef QPASS_PREFETCH_BYTES
#define QPASS_PREFETCH_BYTES 8192  // how far ahead of its use a weight is asked for
#endif

namespace qpass {

// Where a tile's weights come from: packed codes on their way from memory, read in the order they lie in or with
// vectors abreast; packed codes in the cache; an unpacked panel.
enum Source { kLinear, kStream, kCached, kPanel };

// Into the L2 cache: aimed at L1, the few line fill buffers of a core would hold a thread to half of the memory's
// bandwidth.
QPASS_INLINE void prefetch(const uint8_t* p) { _mm_prefetch((const char*)p + QPASS_PREFETCH_BYTES, _MM_HINT_T1); }

template <class F>
QPASS_INLINE void prefetch_row(const uint8_t* chunk, int row) {
  for (int line = F::lines(row); line < F::lines(row + 1); line++) prefetch(chunk + line * kRow);
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

// What a tile walks in one go: segments [begin, end) of a block; with a panel, that of `begin` comes first in it.
struct Span {
  const uint8_t* block;
  int64_t k, segments, begin, end;
  const uint8_t* panel;
};

// As many segments as an unpacked panel in half of an L1 cache of 32 KB holds.
template <class F>
constexpr int kPanelSegments = F::segment < (F::a16 ? 128 : 256) ? (F::a16 ? 128 : 256) / F::segment : 1;
template <class F>
constexpr int kPanelSegmentBytes = F::segment_chunks* F::panel_chunk_bytes;

// Sums of a tile: `Rows` rows x `Vectors` vectors from `first` on.
template <class F, int Rows, int Vectors, Source From>
QPASS_INLINE void multiply(Sum<F> (&sums)[Rows][Vectors], const uint8_t* w, const uint8_t* x, int chunks, int first) {
  constexpr int stride = F::segment * F::element;
  constexpr int together = F::bits == 3 && F::code_rows > 1 ? 2 : 1;  // rows of one vector that share third bits
  const Codes<F> codes;
  auto row = [&](int i, int r, int half) __attribute__((always_inline)) {
    const int at = (first + i) * F::code_rows + r;
    if (From == kStream) prefetch_row<F>(w, at);
#pragma GCC unroll 8
    for (int p = 0; p < F::planes; p++) {
      const auto v = codes.plane(row_of<F>(w, at, half), half, p);
#pragma GCC unroll 6
      for (int m = 0; m < Rows; m++)
        sums[m][i] = dot_at<F>(sums[m][i], v, x + m * stride + Codes<F>::step(r, p) * 4);
    }
  };
  auto rows = [&](int i, int r) __attribute__((always_inline)) {
    if constexpr (together == 2) row(i, r, 0), row(i, r + 1, 1);
    else row(i, r, F::bits == 3 ? (first + i) % 2 : 0);
  };
  for (int c = 0; c < chunks; c++, x += F::chunk * F::element) {
    if constexpr (From == kPanel) {
      for (int s = 0; s < F::steps; s++) {
        decltype(load_operand<F>(w)) v[Vectors];
#pragma GCC unroll 4
        for (int i = 0; i < Vectors; i++) v[i] = load_operand<F>(w + ((first + i) * F::steps + s) * kRow);
#pragma GCC unroll 6
        for (int m = 0; m < Rows; m++) {
          const auto b = broadcast<F>(x + m * stride + s * 4);
#pragma GCC unroll 4
          for (int i = 0; i < Vectors; i++) sums[m][i] = dot<F>(sums[m][i], v[i], b);
        }
      }
      w += F::panel_chunk_bytes;
    } else if constexpr (From == kLinear) {
#pragma GCC unroll 4
      for (int i = 0; i < Vectors; i++)
        for (int r = 0; r < F::code_rows; r += together) rows(i, r);
      w += F::chunk_bytes;
    } else {
      for (int r = 0; r < F::code_rows; r += together)
#pragma GCC unroll 4
        for (int i = 0; i < Vectors; i++) rows(i, r);
      w += F::chunk_bytes;
    }
  }
}

// A finished group into the fp32 totals: scale x (dot - zero * sum of the activations).
template <class F>
QPASS_INLINE F32 fold(I32 dots, F32 total, F32 scale, I32 zero, const Prepared<F>& p, int64_t g, int64_t row) {
  const I32 minus_sum = set(p.sum_i32(g)[row]);
  if constexpr (F::grouped) {  // a group's sum fits 16 bits
    dots = add_product16(dots, zero, minus_sum);
    if constexpr (F::rule == QPASS_A8_TOKEN_GROUP) scale = mul(scale, set(p.scale(g)[row]));
    return fma(to_float(dots), scale, total);
  } else {
    return mul(to_float(add(dots, mul(zero, minus_sum))), scale);
  }
}

template <class F>
QPASS_INLINE F32 fold(F32 dots, F32 total, F32 scale, F32 zero, const Prepared<F>& p, int64_t g, int64_t row) {
  const F32 centered = fnma(zero, set(p.sum_f32(g)[row]), dots);
  return F::grouped ? fma(scale, centered, total) : mul(scale, centered);
}

// The zeros of vector v as fold() wants them: relative to the center that the operands already lack.
template <class F, class C = Codes<F>>
QPASS_INLINE Sum<F> fold_zeros(const uint8_t* zeros, int v) {
  const I32 z = load_zeros(zeros, v);
  if constexpr (F::a16) return sub(to_float(z), set(float(C::center)));
  else if constexpr (C::center == 0) return z;
  else if constexpr (F::grouped) return and_(sub(z, set(C::center)), set(0xffff));
  else return sub(z, set(C::center));
}

// Unfinished sums wait where the totals will be.
QPASS_INLINE void load_sum(const float* p, F32& v) { v = load_f32(p); }
QPASS_INLINE void load_sum(const float* p, I32& v) { v = load(p); }
QPASS_INLINE void store_sum(float* p, F32 v) { store_f32(p, v); }
QPASS_INLINE void store_sum(float* p, I32 v) { store(p, v); }

// The lines of scales and zeros ask for what lies ahead of them, as those of codes do: one in twenty left out costs a
// stall each, and half of the speed of a single row.
template <class F>
QPASS_INLINE void prefetch_tail(const Segment& s) {
  for (const uint8_t* line = s.scales; line < s.zeros + kBlock; line += kRow) prefetch(line);
}

// `total` and the activations are those of the tile's row 0, row `row` of the call.
template <class F, int Rows, Source From>
__attribute__((noinline)) void tile(const Span& span, const Prepared<F>& p, int64_t row, float* total) {
  constexpr int vectors = abreast(Rows);
  for (int64_t index = span.begin; index < span.end; index++) {
    const Segment s = segment_of<F>(span.block, span.k, span.segments, index);
    const uint8_t* w = From == kPanel ? span.panel + (index - span.begin) * kPanelSegmentBytes<F> : s.codes;
    const bool fresh = F::grouped || s.first;
    if (From == kStream) prefetch_tail<F>(s);
    for (int v = 0; v < kVectors; v += vectors) {
      float* part = total + v * kLanes;
      Sum<F> sums[Rows][vectors];
#pragma GCC unroll 6
      for (int m = 0; m < Rows; m++)
#pragma GCC unroll 4
        for (int i = 0; i < vectors; i++) {
          if (fresh) sums[m][i] = Sum<F>{};
          else load_sum(part + m * kBlock + i * kLanes, sums[m][i]);
        }
      multiply<F, Rows, vectors, From>(sums, w, p.element(index, row), s.chunks, v);
      if (F::grouped || s.last) {
#pragma GCC unroll 4
        for (int i = 0; i < vectors; i++) {
          const F32 scale = load_scales<F>(s.scales, v + i);
          const auto zero = fold_zeros<F>(s.zeros, v + i);
#pragma GCC unroll 6
          for (int m = 0; m < Rows; m++) {
            float* out = part + m * kBlock + i * kLanes;
            store_f32(out, fold<F>(sums[m][i], load_f32(out), scale, zero, p, s.group, row + m));
          }
        }
      } else {
#pragma GCC unroll 6
        for (int m = 0; m < Rows; m++)
#pragma GCC unroll 4
          for (int i = 0; i < vectors; i++) store_sum(part + m * kBlock + i * kLanes, sums[m][i]);
      }
    }
  }
}

template <class F, Source From, int Most = From == kPanel ? Tuning<F>::panel_tile_rows : Tuning<F>::tile_rows>
QPASS_INLINE void tile(int rows, const Span& s, const Prepared<F>& p, int64_t row, float* total) {
  if constexpr (Most > 1) {
    if (rows < Most) return tile<F, From, Most - 1>(rows, s, p, row, total);
  }
  if constexpr (Most > 0) tile<F, Most, From>(s, p, row, total);
}

// The operands of a segment's codes, [chunk][vector][step][64 bytes].
template <class F>
void unpack(const Segment& s, uint8_t* panel) {
  const Codes<F> codes;
  const uint8_t* w = s.codes;
  prefetch_tail<F>(s);
  for (int c = 0; c < s.chunks; c++, w += F::chunk_bytes)
    for (int v = 0; v < kVectors; v++, panel += F::steps * kRow)
      for (int r = 0; r < F::code_rows; r++) {
        const int at = v * F::code_rows + r, half = F::bits == 3 ? at % 2 : 0;
        prefetch_row<F>(w, at);
#pragma GCC unroll 8
        for (int p = 0; p < F::planes; p++)
          store_operand(panel + Codes<F>::step(r, p) * kRow, codes.plane(row_of<F>(w, at, half), half, p));
      }
}

// total[rows][64] = the block's product with rows [row, row + rows) of the prepared activations; total starts at zero.
template <class F>
void multiply_block(const uint8_t* block, int64_t k, const Prepared<F>& p, int64_t row, int64_t rows, float* total,
                    uint8_t* panel, const QpassTuning& tuning) {
  using T = Tuning<F>;
  const bool unpacks = F::unpacks && rows >= tuning.panel_rows;
  const int64_t tiles = ceil_div(rows, unpacks ? T::panel_tile_rows : T::tile_rows);
  Span s = {block, k, p.segments, 0, p.segments, panel};
  if (rows <= T::linear_rows && rows <= tuning.linear_rows)
    return tile<F, kLinear, T::linear_rows>(int(rows), s, p, row, total);
  if (tiles == 1 && !unpacks) return tile<F, kStream>(int(rows), s, p, row, total);
  for (; s.begin < p.segments; s.begin += kPanelSegments<F>) {
    s.end = s.begin + kPanelSegments<F> < p.segments ? s.begin + kPanelSegments<F> : p.segments;
    if (unpacks)
      for (int64_t i = s.begin; i < s.end; i++)
        unpack<F>(segment_of<F>(block, k, p.segments, i), panel + (i - s.begin) * kPanelSegmentBytes<F>);
    for (int64_t t = 0, at = 0; t < tiles; t++) {  // tiles of almost equal height
      const int height = int(rows / tiles + (t < rows % tiles));
      float* out = total + at * kBlock;
      if (unpacks) tile<F, kPanel>(height, s, p, row + at, out);
      else if (t == 0) tile<F, kStream>(height, s, p, row + at, out);
      else tile<F, kCached>(height, s, p, row + at, out);
      at += height;
    }
  }
}

}  // namespace qpass
