// One block of 64 outputs times some rows: register tiles of up to 6 rows x 4 vectors, group after group.
// The order of operations on one output never depends on how many rows are computed with it, so neither do its bits.
#pragma once
#include "prologue.h"

#ifndef QPASS_PREFETCH_BYTES
#define QPASS_PREFETCH_BYTES 8192  // how far ahead of its use a weight is asked for
#endif

namespace qpass {

constexpr int kTileRows = 6;  // 24 accumulators leave 8 of the 32 registers for operands and lookup tables

// Where a tile's weights come from: packed codes on their way from memory, read in the order they lie in or four
// vectors abreast; packed codes in the cache; an unpacked panel.
enum Source { kLinear, kStream, kCached, kPanel };

template <class F>
struct AccumulatorOf {
  using type = __m512i;
};
template <class F>
  requires F::a16
struct AccumulatorOf<F> {
  using type = __m512;
};
template <class F>
using Accumulator = typename AccumulatorOf<F>::type;

// Into the L2 cache: aimed at L1, the few line fill buffers of a core would hold a thread to half of the memory's
// bandwidth.
QPASS_INLINE void prefetch(const uint8_t* p) { _mm_prefetch((const char*)p + QPASS_PREFETCH_BYTES, _MM_HINT_T1); }

// One segment of one group as a tile sees it; `total` and `x` belong to row 0 of the task.
struct Segment {
  const uint8_t* weights;  // packed codes or the panel
  const uint8_t* scales;
  const uint8_t* zeros;
  int chunks;
  bool first, last;  // of its group
  int64_t index, group;
};

template <class F, int Rows, Source From>
QPASS_INLINE void multiply(Accumulator<F> (&acc)[Rows][kVectors], const uint8_t* w, const uint8_t* x, int chunks) {
  constexpr int stride = F::segment * F::element;
  const Codes<F> codes;
  for (int c = 0; c < chunks; c++) {
    if constexpr (From == kPanel) {
      for (int s = 0; s < F::steps; s++) {
        __m512i v[kVectors];
#pragma GCC unroll 4
        for (int i = 0; i < kVectors; i++) v[i] = load(w + (i * F::steps + s) * kRow);
#pragma GCC unroll 6
        for (int m = 0; m < Rows; m++) {
          const __m512i b = broadcast(x + m * stride + s * 4);
#pragma GCC unroll 4
          for (int i = 0; i < kVectors; i++) acc[m][i] = dot(acc[m][i], v[i], b);
        }
      }
      w += F::panel_chunk_bytes;
    } else if constexpr (From == kLinear) {
#pragma GCC unroll 4
      for (int i = 0; i < kVectors; i++) {
        for (int r = 0; r < F::code_rows; r++) {
#pragma GCC unroll 4
          for (int p = 0; p < F::planes; p++) {
            const __m512i v = codes.plane(w + (i * F::code_rows + r) * kRow, p);
#pragma GCC unroll 6
            for (int m = 0; m < Rows; m++) acc[m][i] = dot_at(acc[m][i], v, x + m * stride + Codes<F>::step(r, p) * 4);
          }
        }
      }
      w += F::chunk_bytes;
    } else {
      for (int r = 0; r < F::code_rows; r++) {
#pragma GCC unroll 4
        for (int i = 0; i < kVectors; i++) {
          const uint8_t* row = w + (i * F::code_rows + r) * kRow;
          if (From == kStream) prefetch(row);
#pragma GCC unroll 4
          for (int p = 0; p < F::planes; p++) {
            const __m512i v = codes.plane(row, p);
#pragma GCC unroll 6
            for (int m = 0; m < Rows; m++) acc[m][i] = dot_at(acc[m][i], v, x + m * stride + Codes<F>::step(r, p) * 4);
          }
        }
      }
      w += F::chunk_bytes;
    }
    x += F::chunk * F::element;
  }
}

// A finished group into the fp32 totals: scale x (dot - zero * sum of the activations).
template <class F>
QPASS_INLINE __m512 fold(__m512i acc, __m512 total, __m512 scale, __m512i zero, const Prepared<F>& p, int64_t g,
                         int64_t row) {
  const __m512i minus_sum = _mm512_set1_epi32(p.sum_i32(g)[row]);
  if constexpr (F::grouped) {  // a group's sum fits 16 bits: one instruction, and the zeros' upper words are zero
    const __m512 dots = _mm512_cvtepi32_ps(_mm512_dpwssd_epi32(acc, zero, minus_sum));
    if constexpr (F::rule == QPASS_A8_TOKEN_GROUP) scale = _mm512_mul_ps(scale, _mm512_set1_ps(p.scale(g)[row]));
    return _mm512_fmadd_ps(dots, scale, total);
  } else {
    return _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_add_epi32(acc, _mm512_mullo_epi32(zero, minus_sum))), scale);
  }
}

template <class F>
QPASS_INLINE __m512 fold(__m512 acc, __m512 total, __m512 scale, __m512 zero, const Prepared<F>& p, int64_t g,
                         int64_t row) {
  const __m512 centered = _mm512_fnmadd_ps(zero, _mm512_set1_ps(p.sum_f32(g)[row]), acc);
  return F::grouped ? _mm512_fmadd_ps(scale, centered, total) : _mm512_mul_ps(scale, centered);
}

// The zeros of vector v as fold() wants them: int32, or fp32 relative to the center that the operands already lack.
template <class F>
QPASS_INLINE auto fold_zeros(const uint8_t* zeros, int v) {
  const __m512i z = load_zeros(zeros, v);
  if constexpr (F::a16) return _mm512_sub_ps(_mm512_cvtepi32_ps(z), _mm512_set1_ps(Codes<F>::kCenter));
  else return z;
}

template <class F, int Rows, Source From>
__attribute__((noinline)) void tile(const Segment& s, const Prepared<F>& p, int64_t row, float* total) {
  Accumulator<F> acc[Rows][kVectors];
  const bool fresh = F::grouped || s.first;
#pragma GCC unroll 6
  for (int m = 0; m < Rows; m++)
#pragma GCC unroll 4
    for (int i = 0; i < kVectors; i++)
      acc[m][i] = fresh ? Accumulator<F>{} : (Accumulator<F>)_mm512_loadu_ps(total + m * kBlock + i * kLanes);
  multiply<F, Rows, From>(acc, s.weights, p.element(s.index, row), s.chunks);
  if (F::grouped || s.last) {
#pragma GCC unroll 4
    for (int i = 0; i < kVectors; i++) {
      const __m512 scale = load_scales<F>(s.scales, i);
      const auto zero = fold_zeros<F>(s.zeros, i);
#pragma GCC unroll 6
      for (int m = 0; m < Rows; m++) {
        float* out = total + m * kBlock + i * kLanes;
        _mm512_storeu_ps(out, fold<F>(acc[m][i], _mm512_loadu_ps(out), scale, zero, p, s.group, row + m));
      }
    }
  } else {
#pragma GCC unroll 6
    for (int m = 0; m < Rows; m++)
#pragma GCC unroll 4
      for (int i = 0; i < kVectors; i++) _mm512_storeu_ps(total + m * kBlock + i * kLanes, (__m512)acc[m][i]);
  }
}

template <class F, Source From>
QPASS_INLINE void tile(int rows, const Segment& s, const Prepared<F>& p, int64_t row, float* total) {
  if constexpr (From == kLinear && F::linear_rows < kTileRows) {
    if constexpr (F::linear_rows > 0)
      return rows == 1 ? tile<F, 1, From>(s, p, row, total) : tile<F, 2, From>(s, p, row, total);
    return;
  }
  switch (rows) {
    case 1:
      return tile<F, 1, From>(s, p, row, total);
    case 2:
      return tile<F, 2, From>(s, p, row, total);
    case 3:
      return tile<F, 3, From>(s, p, row, total);
    case 4:
      return tile<F, 4, From>(s, p, row, total);
    case 5:
      return tile<F, 5, From>(s, p, row, total);
    default:
      return tile<F, 6, From>(s, p, row, total);
  }
}

template <class F>
void unpack(const uint8_t* w, int chunks, uint8_t* panel) {
  const Codes<F> codes;
  for (int c = 0; c < chunks * kVectors; c++, panel += F::steps * kRow)
    for (int r = 0; r < F::code_rows; r++, w += kRow) {
      prefetch(w);
#pragma GCC unroll 4
      for (int p = 0; p < F::planes; p++) _mm512_storeu_si512(panel + Codes<F>::step(r, p) * kRow, codes.plane(w, p));
    }
}

// Segment i of a block, its weights still packed.
template <class F>
Segment segment_of(const uint8_t* block, int64_t k, int64_t segments, int64_t i) {
  const int64_t group = F::grouped ? i : 0;
  const uint8_t* record = block + group * F::group_bytes(k);
  const uint8_t* codes = record + (F::grouped ? 0 : i * F::segment_chunks * F::chunk_bytes);
  const uint8_t* scales = record + F::group_codes(k);
  const int64_t left = F::padded_k(k) / F::chunk - i * F::segment_chunks;
  const int chunks = int(left < F::segment_chunks ? left : F::segment_chunks);
  return {codes, scales, scales + kBlock * F::scale_bytes, chunks, i == 0, i == segments - 1, i, group};
}

// The lines of scales and zeros ask for what lies ahead of them, as those of codes do: one in twenty left out costs a
// stall each, and half of the speed of a single row.
template <class F>
QPASS_INLINE void prefetch_tail(const Segment& s) {
  for (const uint8_t* line = s.scales; line < s.zeros + kBlock; line += kRow) prefetch(line);
}

// total[rows][64] = the block's product with rows [row, row + rows) of the prepared activations; total starts at zero.
template <class F>
void multiply_block(const uint8_t* block, int64_t k, const Prepared<F>& p, int64_t row, int64_t rows, float* total,
                    uint8_t* panel) {
  const int64_t tiles = ceil_div(rows, kTileRows);
  const bool unpacks = F::unpacks && rows >= F::panel_rows, linear = rows <= F::linear_rows;
  for (int64_t i = 0; i < p.segments; i++) {
    Segment s = segment_of<F>(block, k, p.segments, i);
    if (linear) {
      tile<F, kLinear>(int(rows), s, p, row, total);
      continue;
    }
    prefetch_tail<F>(s);
    if (unpacks) {
      unpack<F>(s.weights, s.chunks, panel);
      s.weights = panel;
    }
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
