// Without groups nothing happens between the first input and the last: sums stay integers, which tiles fetch and leave.
#pragma once
#include "tile_amx.h"

namespace qpass::amx {

// What the memory is asked for while products run: the lines of a region, page after page and back. In each page the
// hardware's prefetcher then runs ahead; line after line, all would wait in the few line fill buffers, which the
// activations need too.
struct Asking {
  static constexpr int64_t kPage = 4096;
  const uint8_t *at, *end;
  int64_t back;
  int lines;  // a product

  Asking(const uint8_t* from, int64_t bytes, int64_t products)
      : at(from), end(from + round_up(bytes, kPage)), back(end - from - kRow), lines(int(ceil_div(bytes, kRow * products))) {}
  QPASS_INLINE void some() {
    for (int i = 0; i < lines; i++) {
      prefetch(at);
      at += kPage;
      if (at >= end) at -= back;
    }
  }
};

// Integer sums wait where the totals will be, and tiles fetch and leave them. Codes that are no operands yet become some
// in a panel, before all rows multiply them.
template <class F>
struct Accumulator {
  static constexpr int64_t kBytes = kBlock * 4;
  static constexpr int64_t kBelow = kTileRows * kBlock, kBeside = 2 * kLanes;  // from two tiles of sums to the other two
  static constexpr int kInputs = 64, kTileBytes = kTileRows * kRow;  // of a product
  static constexpr int kInputsBytes = kInputs / F::chunk * F::chunk_bytes, kInputsTiles = kVectors * kTileBytes;
  static constexpr int64_t kOfSegment = F::segment / kInputs;  // products
  static constexpr int kAsked = 36;  // products of a vector whose codes are asked for together: 74 KB of 4-bit ones
  // They lie in strips, of each of which a product asks for one line.
  static constexpr int kInputsLines = kInputsBytes / kRow, kStrips = kInputsLines / kVectors;
  static constexpr int kTurn = F::unpacks ? 1 : 2;  // segments whose codes (32 KB) stay in L1 for all rows

  // Four tiles of sums side by side; zeros for the first segments.
  static QPASS_INLINE void fetch(const float* sums, bool first) {
    if (first) return zero<0>(), zero<1>(), zero<2>(), zero<3>();
    load<0>(sums, kBytes), load<1>(sums + kLanes, kBytes);
    load<2>(sums + kBeside, kBytes), load<3>(sums + kBeside + kLanes, kBytes);
  }
  // Two tiles of sums side by side and two more, `others` floats behind.
  static QPASS_INLINE void leave(float* sums, int64_t others) {
    store<0>(sums, kBytes), store<1>(sums + kLanes, kBytes);
    store<2>(sums + others, kBytes), store<3>(sums + others + kLanes, kBytes);
  }

  // A tile of operands: 64 inputs of vector v, whose codes begin at w.
  static QPASS_INLINE void fill(const uint8_t* w, int v, uint8_t* to) {
    const Codes<F> codes;
    for (int c = 0; c < kInputs; c += F::chunk, w += F::chunk_bytes) {
      Steps<F> steps;
      steps.read(w, v);
#pragma GCC unroll 8
      for (int r = 0; r < F::code_rows; r++) {
        const int at = v * F::code_rows + r, half = F::bits == 3 ? at % 2 : 0;
#pragma GCC unroll 4
        for (int p = 0; p < F::planes; p++)
          store_operand(to + (c / 4 + Codes<F>::step(r, p)) * kRow, steps.operand(codes, row_of<F>(w, at, half), half, p));
      }
    }
  }
  // A segment's operands, [64 inputs][vector][step][64 bytes].
  static void fill(const Segment& s, uint8_t* panel, Asking& asking) {
    const uint8_t* w = s.codes;
    for (int c = 0; c < s.chunks * F::chunk; c += kInputs, w += kInputsBytes)
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; v++, panel += kTileBytes) fill(w, v, panel), asking.some();
  }

  // Up to 16 rows: operands are made between the products of those before them, and the sums stay in their tiles.
  // `between` runs once for each 64 inputs.
  template <class Between>
  static void few(const uint8_t* weights, int64_t k, const Prepared<F>& p, int64_t row, int64_t begin, int64_t end,
                  float* sums, uint8_t* panel, Between&& between) {
    const int64_t first = begin * kOfSegment, last = min_of(end * kOfSegment, F::padded_k(k) / kInputs);
    const int64_t length = ceil_div(last - first, ceil_div(last - first, kAsked));
    auto codes = [&](int64_t i) { return weights + i * kInputsBytes; };
    auto place = [&](int64_t i) { return panel + i % 2 * kInputsTiles; };
    fetch(sums, begin == 0);
    if constexpr (F::unpacks)
      for (int v = 0; v < kVectors; v++) fill(codes(first), v, place(first) + v * kTileBytes);
    for (int64_t i = first; i < last;) {
      const int64_t stop = min_of(i + length, last), strip = (stop - i) * kVectors * kRow;
      const uint8_t *ask = codes(stop), *rest = ask + kStrips * strip;
      for (; i < stop; i++) {
        const uint8_t* operands = F::unpacks ? place(i) : codes(i);
        load<4>(p.tile(i, row), kRow);
        auto one = [&]<int V, int B>() __attribute__((always_inline)) {
          load<B>(operands + V * kTileBytes, kRow);
          product<F, V, 4, B>(), done<B>();
          if constexpr (F::unpacks) fill(codes(min_of(i + 1, last - 1)), V, place(i + 1) + V * kTileBytes);
#pragma GCC unroll 16
          for (int s = 0; s < kStrips; s++) prefetch(ask + s * strip);
          ask += kRow;
        };
        one.template operator()<0, 5>();
        one.template operator()<1, 6>();
        one.template operator()<2, 7>();
        one.template operator()<3, 5>();
        done<4>();
        for (int l = kStrips * kVectors; l < kInputsLines; l++, rest += kRow) prefetch(rest);
        between();
      }
      if (stop == last)  // as far in the next block, behind this one's scales
        for (int64_t at = 0; at < F::group_bytes(k) - F::group_codes(k); at += kRow) prefetch(rest + at);
    }
    leave(sums, kBeside);
  }

  // 32 rows x 32 outputs: four loads for four products. `enter` runs in front of the first product of each tile of sums.
  template <class Enter>
  static QPASS_INLINE void square(const uint8_t* w, const uint8_t* x, int64_t below, Asking& asking, Enter&& enter) {
    stream<4>(x, kRow), load<6>(w, kRow), enter.template operator()<0>();
    product<F, 0, 4, 6>(), asking.some();
    load<7>(w + kTileBytes, kRow), enter.template operator()<1>();
    product<F, 1, 4, 7>(), done<4>(), asking.some();
    stream<5>(x + below, kRow), enter.template operator()<2>();
    product<F, 2, 5, 6>(), done<6>(), asking.some();
    enter.template operator()<3>();
    product<F, 3, 5, 7>(), done<5, 7>(), asking.some();
  }
  // 16 rows x 64 outputs: the last rows of many.
  static QPASS_INLINE void wide(const uint8_t* w, const uint8_t* x, int products, Asking& asking) {
    for (int c = 0; c < products; c++, w += kInputsTiles, x += kTileBytes) {
      stream<4>(x, kRow), load<5>(w, kRow);
      product<F, 0, 4, 5>(), done<5>(), asking.some();
      load<6>(w + kTileBytes, kRow);
      product<F, 1, 4, 6>(), done<6>(), asking.some();
      load<7>(w + 2 * kTileBytes, kRow);
      product<F, 2, 4, 7>(), done<7>(), asking.some();
      load<5>(w + 3 * kTileBytes, kRow);
      product<F, 3, 4, 5>(), done<4, 5>(), asking.some();
    }
  }

  // sums[rows][64] (+)= block `weights` times rows [row, row + rows), over segments [begin, end). `next`: the codes that
  // are read after the span's. `between` runs among the products of up to 16 rows.
  template <class Between>
  static void span(const uint8_t* weights, int64_t k, const Prepared<F>& p, int64_t row, int64_t rows, int64_t begin,
                   int64_t end, float* sums, const uint8_t* next, uint8_t* panel, Between&& between) {
    if (rows <= kTileRows) return few(weights, k, p, row, begin, end, sums, panel, between);
    constexpr int64_t kSegmentBytes = F::segment_chunks * F::chunk_bytes;
    const int64_t below = p.tile(0, kTileRows) - p.tile(0, 0);  // bytes from 16 rows of activations to the next
    auto segment = [&](int64_t i) { return segment_of<F>(weights, k, p.segments, i); };
    for (int64_t i = begin; i < end; i += kTurn) {
      const int64_t last = min_of(i + kTurn, end), bytes = (last - i) * kSegmentBytes;
      const uint8_t* codes = segment(i).codes;
      const uint8_t* ahead = rows > kFew ? next + (i - begin) * kSegmentBytes : codes + bytes;
      const int64_t tiles = (last - i) * (F::segment / kInputs) * kVectors;
      Asking asking(ahead, bytes, (ceil_div(rows, kTileRows) + F::unpacks) * tiles);
      if constexpr (F::unpacks) {
        for (int64_t j = i; j < last; j++) fill(segment(j), panel + (j - i) * kPanelSegmentBytes<F>, asking);
        codes = panel;
      }
      auto products = [&](int64_t j) { return int(segment(j).chunks * F::chunk / kInputs); };
      int64_t at = 0;
      float* held = nullptr;  // where the sums that the tiles hold belong
      for (; rows - at > kTileRows; at += 2 * kTileRows)
        for (int half = 0; half < 2; half++) {
          float* part = sums + at * kBlock + half * 2 * kLanes;
          // One tile after the other, under the products of the rest.
          auto exchange = [&]<int T>() __attribute__((always_inline)) {
            constexpr int64_t offset = T / 2 * kBelow + T % 2 * kLanes;
            if (held) store<T>(held + offset, kBytes);
            if (i == 0) zero<T>();
            else load<T>(part + offset, kBytes);
          };
          auto nothing = []<int>() __attribute__((always_inline)) {};
          for (int64_t j = i; j < last; j++) {
            const uint8_t* w = codes + (j - i) * kPanelSegmentBytes<F> + half * 2 * kTileBytes;
            const uint8_t* x = p.tile(j * kOfSegment, row + at);
            int c = j == i;
            if (c) square(w, x, below, asking, exchange);
            for (const int all = products(j); c < all; c++)
              square(w + c * kInputsTiles, x + c * kTileBytes, below, asking, nothing);
          }
          held = part;
        }
      if (held) leave(held, kBelow);
      if (at >= rows) continue;
      if (at > 0 || i == begin) fetch(sums + at * kBlock, i == 0);
      for (int64_t j = i; j < last; j++)
        wide(codes + (j - i) * kPanelSegmentBytes<F>, p.tile(j * kOfSegment, row + at), products(j), asking);
      if (at > 0 || last == end) leave(sums + at * kBlock, kBeside);
    }
  }
};

}  // namespace qpass::amx
