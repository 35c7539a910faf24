// A block of keys for up to 16 rows with AMX. The panels of attention_words.h are B tiles as they lie; a tile has 16
// rows whatever a call has, so a row's bits don't depend on the others. Pairs of bf16 only.
#pragma once
#include "attention_block.h"
#include "isa_amx.h"

namespace qpass::attention::tiles {

constexpr int kRows = amx::kTileRows;
constexpr int kSteps = 16;  // words of a product

// The tile registers of this thread as this file wants them, as long as it lives.
struct Registers {
  Registers() {
    amx::Config config;
    for (int t = 0; t < amx::kTiles; t++) config.row_bytes[t] = amx::kRowBytes, config.rows[t] = kRows;
    amx::load_config(config);
  }
  ~Registers() { amx::release(); }
};

// out[16][64] = x[16][steps] times the panel's columns, 16 a vector; steps are whole products. Strides in words.
template <int Vectors>
QPASS_INLINE void multiply(const uint32_t* x, int64_t x_stride, const uint32_t* panel, int64_t stride, int64_t steps,
                           float* out) {
  amx::zero<0>(), amx::zero<1>();
  if constexpr (Vectors == 4) amx::zero<2>(), amx::zero<3>();
  for (int64_t s = 0; s < steps; s += kSteps) {
    const uint32_t* b = panel + s * stride;
    amx::load<4>(x + s, x_stride * 4);
    amx::load<5>(b, stride * 4), amx::dot_bf16<0, 4, 5>();
    amx::load<6>(b + kLanes, stride * 4), amx::dot_bf16<1, 4, 6>();
    if constexpr (Vectors == 4) {
      amx::load<7>(b + 2 * kLanes, stride * 4), amx::dot_bf16<2, 4, 7>();
      amx::load<5>(b + 3 * kLanes, stride * 4), amx::dot_bf16<3, 4, 5>();
    }
  }
  amx::store<0>(out, kKeys * 4), amx::store<1>(out + kLanes, kKeys * 4);
  if constexpr (Vectors == 4) amx::store<2>(out + 2 * kLanes, kKeys * 4), amx::store<3>(out + 3 * kLanes, kKeys * 4);
}

// Memory of one tile.
struct Tile {
  alignas(64) float products[kRows * kKeys];
  alignas(64) uint32_t weights[kRows * kKeys];
  alignas(64) float sums[kRows * kLanes];
  alignas(64) float maxima[kLanes], old[kLanes], fresh[kLanes];
};

// totals = totals * old + weights x values * fresh, for 16 * Vectors columns.
template <int Vectors>
void add_columns(int height, const uint32_t* panel, int64_t stride, int64_t steps, Tile& t, float* totals) {
  multiply<Vectors>(t.weights, kKeys, panel, stride, steps, t.products);
  for (int m = 0; m < height; m++)
#pragma GCC unroll 4
    for (int i = 0; i < Vectors; i++)
      fold(totals + m * stride + i * kLanes, t.products + m * kKeys + i * kLanes, t.old[m], t.fresh[m]);
}

// As attention::add_block. The queries have 16 rows from q on, whatever lies in those behind `height`.
template <class T>
void add_block(int height, const uint32_t* q, int64_t q_stride, const Row* rows, const Block& b, const Score& how,
               Tile& t, float* maxima, float* sums, float* values) {
  multiply<4>(q, q_stride, b.keys, kKeys, ceil_to(b.key_words, kSteps), t.products);
  int64_t end = 0;  // of what any row sees of the block
  for (int m = 0; m < height; m++) {
    const int64_t last = rows[m].last - b.start;
    end = last > end ? last : end;
    t.maxima[m] = weigh<T>(t.products + m * kKeys, rows[m], b.start, how, t.weights + m * kKeys, t.sums + m * kLanes);
  }
  end = end < kKeys ? end : kKeys;
  rebase(maxima, t.maxima, height, t.old, t.fresh);
  for (int m = 0; m < height; m++) fold(sums + m * kLanes, t.sums + m * kLanes, t.old[m], t.fresh[m]);
  const int64_t steps = ceil_to(words<T>(end), kSteps), stride = b.value_stride;
  int64_t c = 0;
  for (; c + 4 * kLanes <= stride; c += 4 * kLanes) add_columns<4>(height, b.values + c, stride, steps, t, values + c);
  for (; c < stride; c += 2 * kLanes) add_columns<2>(height, b.values + c, stride, steps, t, values + c);
}

}  // namespace qpass::attention::tiles
