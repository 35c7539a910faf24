// One block of 64 outputs times some rows: register tiles of rows x vectors abreast, group after group.
// The order of operations on one output never depends on how many rows are computed with it, so neither do its bits.
#pragma once
#include "fold.h"
#include "segment.h"

namespace qpass {

// Products of `Rows` rows with segment s, vectors [first, first + Vectors); `next`: the activations that come after x.
template <class F, int Rows, int Vectors, Source From>
QPASS_INLINE void multiply(Sum<F> (&sums)[Rows][Vectors], const Span& span, int64_t index, const Segment& s, int first,
                           const uint8_t* x, const uint8_t* next) {
  constexpr int stride = F::segment * F::element, x_chunk = F::chunk * F::element;
  constexpr int together = F::bits == 3 && F::code_rows > 1 ? 2 : 1;  // rows of one vector that share third bits
  const Codes<F> codes;
  Steps<F> steps[Vectors];
  const uint8_t* w = From == kPanel ? span.panel + (index - span.begin) * kPanelSegmentBytes<F> : s.codes;
  const int chunks = F::grouped && (From == kCached || From == kPanel) ? F::segment_chunks : s.chunks;
  int64_t ahead = span.ahead;
  auto row = [&](int i, int r, int half) __attribute__((always_inline)) {
    const int at = (first + i) * F::code_rows + r;
    if (From == kCached) prefetch_row<F>(w + ahead, at);
#pragma GCC unroll 8
    for (int p = 0; p < F::planes; p++) {
      const auto v = steps[i](codes.plane(row_of<F>(w, at, half), half, p));
#pragma GCC unroll 6
      for (int m = 0; m < Rows; m++)
        sums[m][i] = dot_at<F>(sums[m][i], v, x + m * stride + Codes<F>::step(r, p) * 4);
    }
  };
  auto rows = [&](int i, int r) __attribute__((always_inline)) {
    if constexpr (together == 2) row(i, r, 0), row(i, r + 1, 1);
    else row(i, r, F::bits == 3 ? (first + i) % 2 : 0);
  };
  // These vectors' codes are asked for in equal shares.
  auto share = [&](int r) __attribute__((always_inline)) {
    return w + (first * F::code_rows + r * Vectors) * (F::steps_at / (kVectors * F::code_rows));
  };
  for (int c = 0; c < chunks; c++, x += x_chunk) {
    if (From == kCached || From == kPanel) {
#pragma GCC unroll 6
      for (int m = 0; m < Rows; m++)
        for (int line = 0; line < x_chunk; line += kRow) prefetch_l1(next + c * x_chunk + m * stride + line);
    }
    if (From == kCached || From == kPanel)
      ahead = (int(index) * F::segment_chunks + c) % span.turns == span.turn ? span.ahead : 0;
    if constexpr (From == kPanel) {
      constexpr int lines = F::chunk_bytes / kRow * Vectors / kVectors, at_once = lines < F::steps ? 1 : lines / F::steps;
      const uint8_t* later = s.codes + ahead + c * F::chunk_bytes + first * (F::chunk_bytes / kVectors);
      for (int t = 0; t < F::steps; t++) {
        for (int i = 0; i < at_once; i++) prefetch(later + (t * lines / F::steps + i) * kRow);
        decltype(load_operand<F>(w)) v[Vectors];
#pragma GCC unroll 4
        for (int i = 0; i < Vectors; i++) v[i] = load_operand<F>(w + ((first + i) * F::steps + t) * kRow);
#pragma GCC unroll 6
        for (int m = 0; m < Rows; m++) {
          const auto b = broadcast<F>(x + m * stride + t * 4);
#pragma GCC unroll 4
          for (int i = 0; i < Vectors; i++) sums[m][i] = dot<F>(sums[m][i], v[i], b);
        }
      }
      w += F::panel_chunk_bytes;
    } else if constexpr (From == kLinear) {
#pragma GCC unroll 4
      for (int i = 0; i < Vectors; i++) {
        steps[i].read(w, first + i);
        for (int r = 0; r < F::code_rows; r += together) rows(i, r);
      }
      w += F::chunk_bytes;
    } else {
#pragma GCC unroll 4
      for (int i = 0; i < Vectors; i++) steps[i].read(w, first + i);
      if (From == kStream && first == 0) prefetch_ahead_of<F, Rows>(w + F::steps_at, w + F::chunk_bytes);
      for (int r = 0; r < F::code_rows; r += together) {
        if (From == kStream) prefetch_ahead_of<F, Rows>(share(r), share(r + together));
#pragma GCC unroll 4
        for (int i = 0; i < Vectors; i++) rows(i, r);
      }
      w += F::chunk_bytes;
    }
  }
}

// Rows [row, row + Rows) of vectors [first, first + Vectors) over segments [begin, end): `part` is where their totals
// begin. Totals that all of a span goes through wait in registers.
template <class F, int Rows, int Vectors, Source From>
QPASS_INLINE void column(const Span& span, int64_t begin, int64_t end, const Prepared<F>& p, int64_t row, int first,
                         float* part) {
  constexpr bool cached = From == kCached || From == kPanel, held = F::grouped && cached && Tuning<F>::holds_totals;
  Sum<F> sums[Rows][Vectors];
  F32 totals[Rows][Vectors];
  auto each = [&](auto&& act) __attribute__((always_inline)) {
#pragma GCC unroll 4
    for (int i = 0; i < Vectors; i++)
#pragma GCC unroll 6
      for (int m = 0; m < Rows; m++) act(m, i, part + m * kBlock + i * kLanes);
  };
  // Zero points come first where a cache has them: a product instead of a zero to start at. Else last, as they arrive.
  auto begin_sums = [&](const Segment& s) __attribute__((always_inline)) {
    if constexpr (!kIntegerZeros<F> || !cached) {
      each([&](int m, int i, float*) { sums[m][i] = Sum<F>{}; });
    } else {
      const auto* x_sums = p.sum(s.group) + row;
#pragma GCC unroll 4
      for (int i = 0; i < Vectors; i++) {
        const auto zero = fold_zeros<F>(s.zeros, first + i);
#pragma GCC unroll 6
        for (int m = 0; m < Rows; m++) sums[m][i] = start<F>(zero, x_sums, m);
      }
    }
  };
  auto fold_sums = [&](Segment s) __attribute__((always_inline)) {
    // Not before the products: loads that jump ahead of the stream of codes would end the hardware's prefetching of it.
    if constexpr (!cached) __asm__ volatile("" : "+r"(s.scales), "+r"(s.zeros));
    const auto* x_sums = p.sum(s.group) + row;
    const float* x_scales = p.scale(s.group) + row;
#pragma GCC unroll 4
    for (int i = 0; i < Vectors; i++) {
      const F32 scale = load_scales<F>(s.scales, first + i);
      const auto zero = fold_zeros<F>(s.zeros, first + i);
#pragma GCC unroll 6
      for (int m = 0; m < Rows; m++) {
        float* at = part + m * kBlock + i * kLanes;
        if constexpr (kIntegerZeros<F> && !cached) sums[m][i] = add(sums[m][i], start<F>(zero, x_sums, m));
        const F32 total = fold<F>(sums[m][i], held ? totals[m][i] : load_f32(at), scale, zero, x_sums, x_scales, m);
        if constexpr (held) totals[m][i] = total;
        else store_f32(at, total);
      }
    }
  };
  auto segment = [&](int64_t index) __attribute__((always_inline)) {
    return segment_of<F>(span.block, span.k, span.segments, index);
  };
  if constexpr (held) each([&](int m, int i, float* at) { totals[m][i] = load_f32(at); });
  if (!F::grouped) {
    if (begin == 0) begin_sums(segment(0));
    else each([&](int m, int i, float* at) { load_sum(at, sums[m][i]); });
  }
  for (int64_t index = begin; index < end; index++) {
    const Segment s = segment(index);
    if (F::grouped) begin_sums(s);
    const uint8_t* next = index + 1 < end ? p.element(index + 1, row) : p.element(begin, row + Rows);
    multiply<F, Rows, Vectors, From>(sums, span, index, s, first, p.element(index, row), next);
    if (F::grouped) fold_sums(s);
  }
  if (!F::grouped) {
    if (end == span.segments) fold_sums(segment(end - 1));
    else each([&](int m, int i, float* at) { store_sum(at, sums[m][i]); });
  }
  if constexpr (held) each([&](int m, int i, float* at) { store_f32(at, totals[m][i]); });
}

// `total` and the activations are those of the tile's row 0, row `row` of the call. What comes from memory is read group
// by group, what a cache holds vector by vector.
template <class F, int Rows, Source From>
__attribute__((noinline)) void tile(const Span& span, const Prepared<F>& p, int64_t row, float* total) {
  constexpr bool cached = (From == kCached || From == kPanel) && Tuning<F>::holds_totals;
  constexpr int vectors = abreast<F>(Rows, cached && F::grouped);
  if (!cached) {
    for (int64_t index = span.begin; index < span.end; index++) {
      const Segment s = segment_of<F>(span.block, span.k, span.segments, index);
      if (From == kStream) prefetch_ahead_of_tail<F, Rows>(s);
      if (From == kCached && span.turn == 0) prefetch_tail<F>(s, span.ahead);
      for (int v = 0; v < kVectors; v += vectors)
        column<F, Rows, vectors, From>(span, index, index + 1, p, row, v, total + v * kLanes);
    }
  } else {
    for (int64_t index = span.begin; span.turn == 0 && index < span.end; index++)
      prefetch_tail<F>(segment_of<F>(span.block, span.k, span.segments, index), span.ahead);
    for (int v = 0; v < kVectors; v += vectors)
      column<F, Rows, vectors, From>(span, span.begin, span.end, p, row, v, total + v * kLanes);
  }
}

template <class F, Source From, int Most>
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
  prefetch_tail<F>(s, QPASS_PREFETCH_BYTES);
  for (int c = 0; c < s.chunks; c++, w += F::chunk_bytes)
    for (int v = 0; v < kVectors; v++, panel += F::steps * kRow) {
      Steps<F> steps;
      steps.read(w, v);
      for (int r = 0; r < F::code_rows; r++) {
        const int at = v * F::code_rows + r, half = F::bits == 3 ? at % 2 : 0;
        prefetch_row<F>(w + QPASS_PREFETCH_BYTES, at);
#pragma GCC unroll 8
        for (int p = 0; p < F::planes; p++)
          store_operand(panel + Codes<F>::step(r, p) * kRow, steps.operand(codes, row_of<F>(w, at, half), half, p));
      }
    }
}

// Tiles of almost equal height, all over one span after the other; spans of almost equal length.
template <class F, Source From, int Most>
void walk(Span s, const Prepared<F>& p, int64_t row, int64_t rows, float* total, uint8_t* panel) {
  const int64_t length = ceil_div(s.segments, ceil_div(s.segments, kSpanSegments<F>));
  s.turns = int(ceil_div(rows, Most));
  s.ahead = F::grouped ? length * F::group_bytes(s.k) : length * F::segment_chunks * F::chunk_bytes;
  for (; s.begin < s.segments; s.begin += length) {
    s.end = s.begin + length < s.segments ? s.begin + length : s.segments;
    if (From == kPanel)
      for (int64_t i = s.begin; i < s.end; i++)
        unpack<F>(segment_of<F>(s.block, s.k, s.segments, i), panel + (i - s.begin) * kPanelSegmentBytes<F>);
    int64_t at = 0;
    for (s.turn = 0; s.turn < s.turns; s.turn++) {
      const int height = int(rows / s.turns + (s.turn < rows % s.turns));
      tile<F, From, Most>(height, s, p, row + at, total + at * kBlock);
      at += height;
    }
  }
}

// total[rows][64] = the block's product with rows [row, row + rows) of the prepared activations; total starts at zero.
template <class F>
void multiply_block(const uint8_t* block, int64_t k, const Prepared<F>& p, int64_t row, int64_t rows, float* total,
                    uint8_t* panel, const QpassTuning& tuning) {
  using T = Tuning<F>;
  const Span s = {block, k, p.segments, 0, p.segments, panel, QPASS_PREFETCH_BYTES, 0, 1};
  if (rows <= T::linear_rows && rows <= tuning.linear_rows)
    return tile<F, kLinear, T::linear_rows>(int(rows), s, p, row, total);
  if (F::unpacks && rows >= tuning.panel_rows) return walk<F, kPanel, T::panel_tile_rows>(s, p, row, rows, total, panel);
  if (rows <= T::tile_rows) return tile<F, kStream, T::tile_rows>(int(rows), s, p, row, total);
  walk<F, kCached, T::tile_rows>(s, p, row, rows, total, panel);
}

}  // namespace qpass
