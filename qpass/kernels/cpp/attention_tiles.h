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

// 16 rows times the columns of a panel, 16 a vector, a product's depth at a time: other work may stand in between, as long as
// it leaves tiles 0 to 3 alone. `steps` are words, whole products; strides are in words.
template <int Vectors>
struct Product {
  const uint32_t *x, *panel;
  int64_t x_stride, stride, steps, step = 0;
  Product(const uint32_t* x, int64_t x_stride, const uint32_t* panel, int64_t stride, int64_t steps)
      : x(x), panel(panel), x_stride(x_stride), stride(stride), steps(steps) {
    amx::zero<0>(), amx::zero<1>();
    if constexpr (Vectors == 4) amx::zero<2>(), amx::zero<3>();
  }
  QPASS_INLINE void advance() {
    if (step >= steps) return;
    const uint32_t* b = panel + step * stride;
    amx::load<4>(x + step, x_stride * 4);
    amx::load<5>(b, stride * 4), amx::dot_bf16<0, 4, 5>(), amx::done<5>();
    amx::load<6>(b + kLanes, stride * 4), amx::dot_bf16<1, 4, 6>(), amx::done<6>();
    if constexpr (Vectors == 4) {
      amx::load<7>(b + 2 * kLanes, stride * 4), amx::dot_bf16<2, 4, 7>(), amx::done<7>();
      amx::load<5>(b + 3 * kLanes, stride * 4), amx::dot_bf16<3, 4, 5>(), amx::done<5>();
    }
    amx::done<4>();
    step += kSteps;
  }
  // To out[16][64], once all of it is done.
  QPASS_INLINE void finish(float* out) {
    while (step < steps) advance();
    amx::store<0>(out, kKeys * 4), amx::store<1>(out + kLanes, kKeys * 4);
    if constexpr (Vectors == 4) amx::store<2>(out + 2 * kLanes, kKeys * 4), amx::store<3>(out + 3 * kLanes, kKeys * 4);
  }
};

constexpr int kTogether = 4;  // runs that meet a block's keys, and then its values, in the L1 cache

// Memory of runs that are taken together.
struct Tile {
  alignas(64) float scores[2][kRows * kKeys];    // of the run at hand, and of the next one
  alignas(64) float products[2][kRows * kKeys];  // of its columns, and of the next ones
  struct Weighed {
    alignas(64) uint32_t weights[kRows * kKeys / 2];
    alignas(64) float sums[kRows * kLanes];
    alignas(64) float maxima[kLanes], old[kLanes], fresh[kLanes];
  } weighed[kTogether];
};

// totals = totals * old + products * fresh, for 16 * Vectors columns.
template <int Vectors>
QPASS_INLINE void fold_columns(int height, const Tile::Weighed& w, const float* products, int64_t stride, float* totals) {
  for (int m = 0; m < height; m++)
#pragma GCC unroll 4
    for (int i = 0; i < Vectors; i++)
      fold(totals + m * stride + i * kLanes, products + m * kKeys + i * kLanes, w.old[m], w.fresh[m]);
}

// A run's weights times the block's values, into its totals. Products of 64 columns are made before those in front of them
// are added up, which need not wait for the tiles then.
inline void add_values(int height, const Block& b, int64_t steps, const Tile::Weighed& w, float (&products)[2][kRows * kKeys],
                       float* values) {
  const int64_t stride = b.value_stride;
  int64_t c = 0;
  int turn = 0;
  for (; c + 4 * kLanes <= stride; c += 4 * kLanes, turn ^= 1) {
    Product<4>(w.weights, kKeys / 2, b.values + c, stride, steps).finish(products[turn]);
    if (c) fold_columns<4>(height, w, products[turn ^ 1], stride, values + c - 4 * kLanes);
  }
  if (c) fold_columns<4>(height, w, products[turn ^ 1], stride, values + c - 4 * kLanes);
  for (; c < stride; c += 2 * kLanes) {
    Product<2>(w.weights, kKeys / 2, b.values + c, stride, steps).finish(products[0]);
    fold_columns<2>(height, w, products[0], stride, values + c);
  }
}

// As attention::add_block, for up to kTogether runs of 16 rows at most: while one's scores become weights, the tiles make
// those of the next. Queries have 16 rows from q on, whatever lies in those behind a run's height.
template <class T>
void add_together(const Run* runs, int count, const uint32_t* q, int64_t q_stride, const Row* rows, const Block& b,
                  const Score& how, Tile& t, const Totals& totals) {
  const int64_t depth = ceil_to(b.key_words, kSteps), each = (depth / kSteps + 3) / 4;
  auto scores_of = [&](int i) { return Product<4>(q + runs[i].row * q_stride, q_stride, b.keys, kKeys, depth); };
  scores_of(0).finish(t.scores[0]);
  for (int i = 0; i < count; i++) {
    const int64_t row = runs[i].row;
    const int height = runs[i].height;
    Tile::Weighed& w = t.weighed[i];
    auto weigh_rows = [&](int begin, int stop) {
      for (int m = begin; m < height && m < stop; m++)
        w.maxima[m] = weigh<T>(t.scores[i & 1] + m * kKeys, rows[row + m], b.start, how, w.weights + m * kKeys / 2,
                               w.sums + m * kLanes);
    };
    if (i + 1 < count) {
      auto next = scores_of(i + 1);
      for (int part = 0; part < 4; part++) {
        for (int64_t s = 0; s < each; s++) next.advance();
        weigh_rows(part * 4, part * 4 + 4);
      }
      next.finish(t.scores[(i + 1) & 1]);
    } else {
      weigh_rows(0, kRows);
    }
    float* sums = totals.sums + row * kLanes;
    rebase(totals.maxima + row, w.maxima, height, w.old, w.fresh);
    for (int m = 0; m < height; m++) fold(sums + m * kLanes, w.sums + m * kLanes, w.old[m], w.fresh[m]);
  }
  for (int i = 0; i < count; i++) {
    const int64_t end = runs[i].last - b.start;  // of what any row sees of the block
    const int64_t steps = ceil_to(words<T>(end < kKeys ? end : kKeys), kSteps);
    add_values(runs[i].height, b, steps, t.weighed[i], t.products, totals.values + runs[i].row * b.value_stride);
  }
}

template <class T>
void add_block(const Run* runs, int count, const uint32_t* q, int64_t q_stride, const Row* rows, const Block& b,
               const Score& how, Tile& t, const Totals& totals) {
  for (int i = 0; i < count; i += kTogether)
    add_together<T>(runs + i, count - i < kTogether ? count - i : kTogether, q, q_stride, rows, b, how, t, totals);
}

}  // namespace qpass::attention::tiles
