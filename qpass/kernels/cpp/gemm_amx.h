// Blocks of 64 outputs times some rows with AMX: 16 rows x 4 vectors a step, the panel's rows being the B tiles.
// Integer products are exact, so with int8 activations the result is the AVX-512 one to the bit. A bf16 tile product
// rounds in its own way: all calls with bf16 products take tiles, so that decoding, verification and prompts share one
// rounding.
//
// Tile products run beside the vector unit, but only as far as a core looks ahead in its instructions, and stores of
// tiles keep later loads of the same lines waiting. So whatever the vector unit has to do (fold the last segment's sums
// into the totals, unpack the next segment's codes) is dealt out between the products of a segment.
#pragma once
#include <utility>
#include "accumulate_amx.h"

namespace qpass::amx {

// Rows that go through a segment before the next one: their totals (64 KB) come from the L2 cache, the segment's weights
// from L1. Fewer would unpack more often, and gain nothing (64, 128, 512 tried on a Xeon with 2 MB of L2).
constexpr int64_t kTogether = 256;

// A zero is a near part, which a code's signed byte can lack, and a far one, a multiple of 128 that only hostile or
// odd weights have.
constexpr int32_t kNear = 0x7f, kFar = 0x80;

// The B tiles of a segment, [chunk][vector][step][64 bytes], made one vector of a chunk at a time.
template <class F>
struct Filling {
  static constexpr int kVectorBytes = F::chunk_bytes / kVectors;
  const Codes<F> codes{};
  const Segment segment;
  uint8_t* panel;
  I32 zeros[kVectors];

  Filling(const Segment& s, uint8_t* to) : segment(s), panel(to) {
    if constexpr (Tile<F>::centered)
      for (int v = 0; v < kVectors; v++) zeros[v] = mul(and_(load_zeros(s.zeros, v), set(kNear)), set(0x01010101));
    prefetch_ahead_of_tail<F>(s);
  }
  QPASS_INLINE void vector(int chunk, int v) const {
    const uint8_t* w = segment.codes + chunk * F::chunk_bytes;
    uint8_t* to = panel + (chunk * kVectors + v) * F::steps * kRow;
    prefetch_ahead_of<F>(w + v * kVectorBytes, w + (v + 1) * kVectorBytes);
#pragma GCC unroll 2
    for (int r = 0; r < F::code_rows; r++) {
      const int at = v * F::code_rows + r, half = F::bits == 3 ? at % 2 : 0;
#pragma GCC unroll 8
      for (int p = 0; p < F::planes; p++) {
        auto operand = codes.plane(row_of<F>(w, at, half), half, p);
        if constexpr (Tile<F>::centered) operand = _mm512_sub_epi8(operand, zeros[v]);
        store_operand(to + Codes<F>::step(r, p) * kRow, operand);
      }
    }
  }
  void all() const {
    for (int c = 0; c < segment.chunks; c++)
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; v++) vector(c, v);
  }
};

// Sums [16][64] of a segment on their way into the totals of `height` rows, some rows at a time. Without groups the totals
// are unfinished sums up to the last segment.
template <class F>
struct Folding {
  const float* sums;
  float* total;
  int height = 0;
  bool closes, far;
  __mmask16 begun;  // lanes of totals that hold something: none before the first group
  F32 scale[kVectors];
  decltype(fold_zeros<F>(nullptr, 0)) zero_point[kVectors];
  decltype(((const Prepared<F>*)nullptr)->sum(0)) x_sums;
  const float* x_scales;

  QPASS_INLINE void begin(const Segment& s, const Prepared<F>& p, int64_t row, int rows, const float* from, float* to) {
    sums = from, total = to, height = rows;
    closes = F::grouped || s.last, begun = s.first ? 0 : 0xffff;
    if (!closes) return;
    far = !Tile<F>::centered || _mm512_movepi8_mask(qpass::load(s.zeros)) != 0;
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; v++) {
      scale[v] = load_scales<F>(s.scales, v);
      if constexpr (Tile<F>::centered) zero_point[v] = and_(load_zeros(s.zeros, v), set(kFar));
      else zero_point[v] = fold_zeros<F>(s.zeros, v);
    }
    x_sums = p.sum(s.group) + row, x_scales = p.scale(s.group) + row;
  }
  QPASS_INLINE void row(int m) const {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; v++) {
      float* to = total + m * kBlock + v * kLanes;
      Sum<F> sum;
      load_sum(sums + m * kBlock + v * kLanes, sum);
      if constexpr (!F::grouped) {
        if constexpr (F::a16) sum = add(sum, _mm512_maskz_load_ps(begun, to));
        else sum = add(sum, _mm512_maskz_load_epi32(begun, to));
        if (!closes) {
          store_sum(to, sum);
          continue;
        }
      }
      if constexpr (kIntegerZeros<F>) {
        if (far) sum = add(sum, start<F>(zero_point[v], x_sums, m));
      }
      const F32 before = F::grouped ? _mm512_maskz_load_ps(begun, to) : F32{};
      store_f32(to, fold<F>(sum, before, scale[v], zero_point[v], x_sums, x_scales, m));
    }
  }
  // The rows that are due behind product J: none as long as the sums are still being stored, then equal shares.
  template <int J>
  QPASS_INLINE void behind() const {
    constexpr int products = Tile<F>::products, shares = products > kVectors ? products - kVectors : 1, turn = J + shares - products;
    if constexpr (turn >= 0) {
#pragma GCC unroll 16
      for (int m = turn * kTileRows / shares; m < (turn + 1) * kTileRows / shares; m++)
        if (m < height) row(m);
    }
  }
  void all() const {
    for (int m = 0; m < height; m++) row(m);
  }
};

template <int V>
QPASS_INLINE void store_sums(float* sums) {
  store<V>(sums + V * kLanes, kBlock * 4);
}

// Tiles 0..3 = 16 rows of activations x a segment; what they held goes to `before` under the first products. `behind` runs
// behind each product J, whether a short segment has it or not.
template <class F, bool Streams, class Behind>
QPASS_INLINE void multiply(const uint8_t* w, const uint8_t* x, int chunks, float* before, Behind&& behind) {
  using T = Tile<F>;
  auto each = [&]<int J>() __attribute__((always_inline)) {
    constexpr int V = J % kVectors, t = J / kVectors % T::of_chunk, c = J / kVectors / T::of_chunk, B = V == 3 ? 5 : 5 + V;
    if (F::grouped || c < chunks) {
      const uint8_t* b = w + c * F::panel_chunk_bytes + (V * F::steps + t * T::steps) * kRow;
      if constexpr (Streams) prefetch_ahead_of<F>(b, b + T::steps * kRow);
      if constexpr (V == 0) stream<4>(x + (c * T::of_chunk + t) * T::steps * 4, F::segment * F::element);
      load<B>(b, kRow);
      if constexpr (J < kVectors) store_sums<V>(before), zero<V>();
      product<F, V, 4, B>(), done<B>();
      if constexpr (V == 3) done<4>();
    }
    behind.template operator()<J>();
  };
  [&]<int... J>(std::integer_sequence<int, J...>) __attribute__((always_inline)) {
    (each.template operator()<J>(), ...);
  }(std::make_integer_sequence<int, T::products>());
}

// total[rows][64] (+)= block `weights` times rows [row, row + rows), over segments [begin, end). Rows behind the last are
// multiplied too, up to a whole tile: the activations have them.
template <class F>
void multiply_span(const uint8_t* weights, int64_t k, const Prepared<F>& p, int64_t row, int64_t rows, int64_t begin,
                   int64_t end, float* total, uint8_t* panels) {
  using T = Tile<F>;
  alignas(64) float sums[2][kTileRows * kBlock];
  Folding<F> folding;
  int turn = 0, side = 0;  // of the sums, of the panels: one is read while the other is written
  auto panel = [&](int which) { return panels + which * T::panel_bytes; };
  auto segment = [&](int64_t i) { return segment_of<F>(weights, k, p.segments, i); };
  if constexpr (F::unpacks) Filling<F>(segment(begin), panel(0)).all();
  for (int64_t top = 0; top < rows; top += kTogether)
    for (int64_t i = begin; i < end; i++, side ^= 1) {
      const Segment s = segment(i);
      const int64_t bottom = min_of(rows, top + kTogether), next = i + 1 < end ? i + 1 : begin;
      const bool more = i + 1 < end || bottom < rows;
      for (int64_t at = top; at < bottom; at += kTileRows, turn ^= 1) {
        const uint8_t* w = F::unpacks ? panel(side) : s.codes;
        const uint8_t* x = p.element(i, row + at);
        float* before = sums[turn ^ 1];
        if (F::unpacks && at == top && more) {
          if constexpr (F::unpacks) {
            const Filling<F> filling(segment(next), panel(side ^ 1));
            multiply<F, false>(w, x, s.chunks, before, [&]<int J>() __attribute__((always_inline)) {
              constexpr int c = J / kVectors / T::of_chunk;
              folding.template behind<J>();
              if (J / kVectors % T::of_chunk == 0 && c < filling.segment.chunks) filling.vector(c, J % kVectors);
            });
          }
        } else if (!F::unpacks && at == 0) {
          prefetch_tail<F>(s, QPASS_PREFETCH_BYTES);
          multiply<F, true>(w, x, s.chunks, before, [&]<int J>() __attribute__((always_inline)) { folding.template behind<J>(); });
        } else {
          // The next block's codes are asked for under this one's products, so that they are there in time.
          constexpr int asked = int(ceil_div(F::segment_chunks * F::chunk_bytes / kRow, kTogether / kTileRows * T::products));
          const uint8_t* ask = s.codes + F::block_bytes(k) + at / kTileRows * asked * T::products * kRow;
          const bool asks = top == 0 && rows > kFew;
          multiply<F, false>(w, x, s.chunks, before, [&]<int J>() __attribute__((always_inline)) {
            folding.template behind<J>();
            if (asks)
              for (int line = 0; line < asked; line++) prefetch(ask + (J * asked + line) * kRow);
          });
        }
        const int height = int(min_of(rows - at, kTileRows));
        folding.begin(s, p, row + at, height, sums[turn], total + at * kBlock);
      }
    }
  float* last = sums[turn ^ 1];
  store_sums<0>(last), store_sums<1>(last), store_sums<2>(last), store_sums<3>(last);
  folding.all();
}

// The same over all of K, span after span, for `blocks` blocks in turn: they find the span's activations in the L2 cache.
// total: [blocks][total_rows][64]; sums that accumulate stay what they are, for the epilogue to scale.
// `between` runs now and then where they do.
template <class F, class Between>
void multiply_blocks(const uint8_t* weights, int64_t blocks, int64_t k, const Prepared<F>& p, int64_t row, int64_t rows,
                     float* total, int64_t total_rows, uint8_t* panel, Between&& between) {
  const int64_t spans = rows <= kFew ? 1 : ceil_div(p.segments, kSpanSegments<F>), length = ceil_div(p.segments, spans);
  for (int64_t begin = 0; begin < p.segments; begin += length) {
    const int64_t end = begin + length < p.segments ? begin + length : p.segments;
    for (int64_t b = 0; b < blocks; b++) {
      const uint8_t* block = weights + b * F::block_bytes(k);
      float* totals = total + b * total_rows * kBlock;
      if constexpr (kAccumulates<F>) {
        const bool last = b + 1 == blocks, done = end == p.segments;
        const uint8_t* next = last && !done ? weights : block + F::block_bytes(k);
        Accumulator<F>::span(block, k, p, row, rows, begin, end, totals,
                             segment_of<F>(next, k, p.segments, !last ? begin : done ? 0 : end).codes, panel, between);
      } else {
        multiply_span<F>(block, k, p, row, rows, begin, end, totals, panel);
      }
    }
  }
}

}  // namespace qpass::amx
