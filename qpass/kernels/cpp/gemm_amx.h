// One block of 64 outputs times some rows with AMX: 16 rows x 4 vectors a step, the panel's rows being the B tiles.
// Integer products are exact, so with int8 activations the result is the AVX-512 one to the bit. With bf16 the tile
// product rounds differently: it serves wide calls only, so that decoding and verification (few rows) share one
// rounding.
#pragma once
#include "gemm.h"
#include "isa_amx.h"

namespace qpass::amx {

constexpr int64_t kWide = 65;  // bf16 rows of narrower calls must have the bits of AVX-512

inline bool takes(const QpassCall& c, bool a16) { return c.m >= c.tuning.tile_rows && (!a16 || c.m >= kWide); }

template <class F>
struct Tile {
  static constexpr int steps = F::steps < 16 ? F::steps : 16;  // dot-product steps of one tile product
  static constexpr int of_chunk = F::steps / steps;
};

// `rows`: of the narrowest task; fewer than 16 make the products shorter.
template <class F>
void configure(int64_t rows) {
  Config c;
  const uint8_t height = uint8_t(rows < kTileRows ? rows : kTileRows);
  for (int t = 0; t < kTiles; t++) {
    c.row_bytes[t] = kRowBytes;
    c.rows[t] = t < 5 ? height : Tile<F>::steps;
  }
  c.row_bytes[4] = Tile<F>::steps * 4;
  load_config(c);
}

template <class F, int C, int A, int B>
QPASS_INLINE void product() {
  if constexpr (F::a16) dot_bf16<C, A, B>();
  else dot_s8u8<C, A, B>();
}

// Products of 16 rows with a segment; sums start at zero, or where `sums` [16][64] left them, and go back there.
template <class F>
QPASS_INLINE void multiply(const uint8_t* w, const uint8_t* x, int chunks, bool fresh, void* sums) {
  constexpr int64_t row = kBlock * 4, next = F::steps * kRow;  // bytes between rows of sums, between vectors
  uint8_t* s = (uint8_t*)sums;
  if (fresh) {
    zero<0>(), zero<1>(), zero<2>(), zero<3>();
  } else {
    load<0>(s, row), load<1>(s + 64, row), load<2>(s + 128, row), load<3>(s + 192, row);
  }
  for (int c = 0; c < chunks; c++, w += F::panel_chunk_bytes)
    for (int t = 0; t < Tile<F>::of_chunk; t++, x += Tile<F>::steps * 4) {
      const uint8_t* b = w + t * Tile<F>::steps * kRow;
      load<4>(x, F::segment * F::element);
      load<5>(b, kRow);
      product<F, 0, 4, 5>();
      load<6>(b + next, kRow);
      product<F, 1, 4, 6>();
      load<7>(b + 2 * next, kRow);
      product<F, 2, 4, 7>();
      load<5>(b + 3 * next, kRow);
      product<F, 3, 4, 5>();
    }
  store<0>(s, row), store<1>(s + 64, row), store<2>(s + 128, row), store<3>(s + 192, row);
}

// As qpass::multiply_block. Rows behind the last are multiplied too, up to a whole tile: `total` and the activations
// have them.
template <class F>
void multiply_block(const uint8_t* block, int64_t k, const Prepared<F>& p, int64_t row, int64_t rows, float* total,
                    uint8_t* panel) {
  alignas(64) float group_sums[kTileRows * kBlock];
  for (int64_t i = 0; i < p.segments; i++) {
    const Segment s = segment_of<F>(block, k, p.segments, i);
    const uint8_t* weights = s.codes;
    if (F::unpacks) {
      unpack<F>(s, panel);
      weights = panel;
    } else {
      prefetch_tail<F>(s, QPASS_PREFETCH_BYTES);
      for (const uint8_t* w = weights; w < weights + s.chunks * F::chunk_bytes; w += kRow)
        prefetch(w + QPASS_PREFETCH_BYTES);
    }
    for (int64_t at = 0; at < rows; at += kTileRows) {
      const int height = int(rows - at < kTileRows ? rows - at : kTileRows);
      float* out = total + at * kBlock;
      float* sums = F::grouped ? group_sums : out;
      multiply<F>(weights, p.element(i, row + at), s.chunks, F::grouped || s.first, sums);
      if (!(F::grouped || s.last)) continue;
      for (int v = 0; v < kVectors; v++) {
        const F32 scale = load_scales<F>(s.scales, v);
        const auto zero_point = fold_zeros<F>(s.zeros, v);
        const auto* x_sums = p.sum(s.group) + row + at;
        const float* x_scales = p.scale(s.group) + row + at;
        for (int m = 0; m < height; m++) {
          Sum<F> sum;
          load_sum(sums + m * kBlock + v * kLanes, sum);
          float* y = out + m * kBlock + v * kLanes;
          if constexpr (kIntegerZeros<F>) sum = add(sum, start<F>(zero_point, x_sums, m));
          store_f32(y, fold<F>(sum, load_f32(y), scale, zero_point, x_sums, x_scales, m));
        }
      }
    }
  }
}

}  // namespace qpass::amx
