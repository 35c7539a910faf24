// One block of 64 keys for some rows, a row being one query of one head. A block has its own maximum, sum and product,
// and these are folded into the row's totals in the order of the blocks: what a row gets depends on its query, its span
// and the keys alone, never on the rows beside it, and not on who computed which block.
#pragma once
#include "attention_words.h"

namespace qpass::attention {

constexpr int kTileRows = 6;
#ifdef __AVX512F__
constexpr int kTileVectors = 4;  // 24 of the 32 registers accumulate
#else
constexpr int kTileVectors = 1;  // a vector is two of the 16 registers: 12 accumulate
#endif
constexpr float kLog2e = 1.44269504f;
constexpr float kLowest = -3.40282347e38f;

// 2^x for x <= 0, or NaN: exactly 1 for 0 and exactly 0 below -126. Below that results are no normal numbers, and Intel's
// cores take 200 cycles for a vector that has one.
QPASS_INLINE F32 exp2(F32 x) {
  const Mask none = less(x, set(-126.0f));
  x = max(set(-126.0f), x);
  const F32 n = round(x), r = sub(x, n);
  F32 p = set(1.535336188e-4f);  // Cephes exp2f
  p = fma(p, r, set(1.339887440e-3f));
  p = fma(p, r, set(9.618437357e-3f));
  p = fma(p, r, set(5.550332471e-2f));
  p = fma(p, r, set(2.402264791e-1f));
  p = fma(p, r, set(6.931472029e-1f));
  return select(none, set(0.0f), times_power_of_two(fma(p, r, set(1.0f)), n));
}

// The same for weights that are rounded to bf16: within 3e-6 of it, in half the instructions.
template <bool Pairs>
QPASS_INLINE F32 weight(F32 x) {
#ifdef __AVX512BF16__
  if constexpr (Pairs) {
    const F32 r = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);  // x - floor(x)
    F32 p = set(1.3426685706e-2f);  // least relative error on 0..1 with p(0) = 1
    p = fma(p, r, set(5.2242472768e-2f));
    p = fma(p, r, set(2.4128021300e-1f));
    p = fma(p, r, set(6.9304484129e-1f));
    p = fma(p, r, set(1.0f));
    return _mm512_maskz_scalef_ps(_mm512_cmp_ps_mask(x, set(-126.0f), _CMP_NLT_UQ), p, x);  // by 2^floor(x)
  }
#endif
  return exp2(x);
}

QPASS_INLINE F32 tanh(F32 x) { return sub(set(1.0f), div(set(2.0f), add(exp(add(x, x)), set(1.0f)))); }

struct Row {
  int32_t first, last;  // the slots it sees: first <= slot < last
  float slope;
};

// How dot products become exponents of two: scale * dot, or cap * tanh(scale * dot).
struct Score {
  float scale, cap;  // cap 0: none
  const float* k_scales;          // of the block's 64 keys, or null
  const float* v_scales;
};

// The totals of a task's rows: a row's maximal exponent, its sum in 16 lanes, and its weighted values.
struct Totals {
  float* maxima;
  float* sums;
  float* values;
  static int64_t floats(int64_t rows, int64_t stride) { return ceil_to(rows, kLanes) + rows * (kLanes + stride); }
  Totals(float* memory, int64_t rows)
      : maxima(memory), sums(memory + ceil_to(rows, kLanes)), values(sums + rows * kLanes) {}
  void clear(int64_t rows, int64_t stride) const {
    for (int64_t i = 0; i < rows; i++) maxima[i] = kLowest;
    memset(sums, 0, size_t(rows * kLanes) * sizeof(float));
    memset(values, 0, size_t(rows * stride) * sizeof(float));
  }
};

template <class T, int Rows, int Vectors>
QPASS_INLINE void multiply(F32 (&acc)[Rows][Vectors], const uint32_t* panel, int64_t stride, const uint32_t* x,
                           int64_t x_stride, int64_t steps) {
#pragma GCC unroll 6
  for (int m = 0; m < Rows; m++)
#pragma GCC unroll 4
    for (int i = 0; i < Vectors; i++) acc[m][i] = set(0.0f);
  for (int64_t s = 0; s < steps; s++) {
    I32 w[Vectors];
#pragma GCC unroll 4
    for (int i = 0; i < Vectors; i++) w[i] = load(panel + s * stride + i * kLanes);
#pragma GCC unroll 6
    for (int m = 0; m < Rows; m++) {
      const I32 b = broadcast(x + m * x_stride + s);
#pragma GCC unroll 4
      for (int i = 0; i < Vectors; i++) acc[m][i] = multiply_add<T::pairs>(acc[m][i], w[i], b);
    }
  }
}

template <class T, int Rows>
__attribute__((noinline)) void multiply_keys(const uint32_t* q, int64_t q_stride, const uint32_t* panel, int64_t steps,
                                             float* scores) {
  for (int v = 0; v < kKeyVectors; v += kTileVectors) {
    F32 acc[Rows][kTileVectors];
    multiply<T, Rows, kTileVectors>(acc, panel + v * kLanes, kKeys, q, q_stride, steps);
#pragma GCC unroll 6
    for (int m = 0; m < Rows; m++)
#pragma GCC unroll 4
      for (int i = 0; i < kTileVectors; i++) store_f32(scores + m * kKeys + (v + i) * kLanes, acc[m][i]);
  }
}

// totals = totals * old + weights x values * fresh
template <class T, int Rows, int Vectors>
QPASS_INLINE void add_columns(const uint32_t* weights, const uint32_t* panel, int64_t stride, int64_t steps,
                              const float* old, const float* fresh, float* totals) {
  F32 acc[Rows][Vectors];
  multiply<T, Rows, Vectors>(acc, panel, stride, weights, kKeys, steps);
#pragma GCC unroll 6
  for (int m = 0; m < Rows; m++)
#pragma GCC unroll 4
    for (int i = 0; i < Vectors; i++) {
      float* total = totals + m * stride + i * kLanes;
      store_f32(total, fma(acc[m][i], set(fresh[m]), mul(load_f32(total), set(old[m]))));
    }
}

template <class T, int Rows>
__attribute__((noinline)) void add_values(const uint32_t* weights, const uint32_t* panel, int64_t stride, int64_t steps,
                                          const float* old, const float* fresh, float* totals) {
  int64_t c = 0;
  for (; c + kTileVectors * kLanes <= stride; c += kTileVectors * kLanes)
    add_columns<T, Rows, kTileVectors>(weights, panel + c, stride, steps, old, fresh, totals + c);
  if constexpr (kTileVectors > 2)
    for (; c < stride; c += 2 * kLanes)
      add_columns<T, Rows, 2>(weights, panel + c, stride, steps, old, fresh, totals + c);
}

template <class T>
QPASS_INLINE void store_weights(uint32_t* words, int vector, F32 v) {
  if constexpr (!T::pairs) store_f32((float*)words + vector * kLanes, v);
#ifdef __AVX512BF16__
  else _mm256_storeu_si256((__m256i*)words + vector, (__m256i)_mm512_cvtneps_pbh(v));
#endif
}

// A row's scores of a block to weights 2^(exponent - maximum), 0 where it doesn't see. Returns the maximum; adds the
// weights up in `lanes`.
template <class T>
QPASS_INLINE float weigh(const float* scores, const Row& row, int64_t start, const Score& how, uint32_t* weights,
                         float* lanes) {
  alignas(64) static constexpr int32_t kIota[kLanes] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  const bool whole = row.first <= start && row.last >= start + kKeys;
  F32 x[kKeyVectors];
#pragma GCC unroll 4
  for (int i = 0; i < kKeyVectors; i++) {
    F32 v = mul(load_f32(scores + i * kLanes), set(how.scale));
    if constexpr (T::codes) v = mul(v, load_f32(how.k_scales + i * kLanes));
    if (how.cap != 0) v = mul(tanh(v), set(how.cap));
    if (!whole || row.slope != 0) {
      const I32 slot = add(load(kIota), set(int32_t(start + i * kLanes)));
      if (row.slope != 0) v = fma(to_float(sub(slot, set(row.last - 1))), set(row.slope), v);
      v = select(less(slot, set(row.first)), set(-__builtin_inff()), v);
      v = select(less(slot, set(row.last)), v, set(-__builtin_inff()));
    }
    x[i] = v;
  }
  float top = largest(max(max(x[0], x[1]), max(x[2], x[3])));
  top = top > kLowest ? top : kLowest;
  F32 total = set(0.0f);
#pragma GCC unroll 4
  for (int i = 0; i < kKeyVectors; i++) {
    F32 p = weight<T::pairs>(sub(x[i], set(top)));
    total = add(total, p);
    if constexpr (T::codes) p = mul(p, load_f32(how.v_scales + i * kLanes));
    store_weights<T>(weights, i, p);
  }
  store_f32(lanes, total);
  return top;
}

// Maxima of up to 16 rows after another block's; the factors that bring the old sums and the block's own to them.
QPASS_INLINE void rebase(float* maxima, const float* block, int rows, float* old, float* fresh) {
  alignas(64) float before[kLanes] = {}, own[kLanes] = {}, now[kLanes];
  memcpy(before, maxima, sizeof(float) * size_t(rows));
  memcpy(own, block, sizeof(float) * size_t(rows));
  const F32 a = load_f32(before), b = load_f32(own), top = max(a, b);
  store_f32(old, exp2(sub(a, top)));
  store_f32(fresh, exp2(sub(b, top)));
  store_f32(now, top);
  memcpy(maxima, now, sizeof(float) * size_t(rows));
}

QPASS_INLINE void fold(float* total, const float* part, float old, float fresh) {
  store_f32(total, fma(load_f32(part), set(fresh), mul(load_f32(total), set(old))));
}

// Memory of one tile.
struct Tile {
  alignas(64) float scores[kTileRows * kKeys];
  alignas(64) uint32_t weights[kTileRows * kKeys];
  alignas(64) float sums[kTileRows * kLanes];
  alignas(64) float maxima[kLanes], old[kLanes], fresh[kLanes];
};

// The block's panels as a tile of rows meets them.
struct Block {
  int64_t start;  // its first slot
  const uint32_t* keys;
  const uint32_t* values;
  int64_t key_words, value_stride;
};

// Rows of a task that are taken together, and the slots that any of them sees: first <= slot < last.
struct Run {
  int64_t row;
  int height;
  int32_t first, last;
  void take_in(const Row& r) {
    if (r.first >= r.last) return;
    first = r.first < first ? r.first : first;
    last = r.last > last ? r.last : last;
  }
};

template <class T, int Rows>
void add_block(const uint32_t* q, int64_t q_stride, const Row* rows, const Block& b, const Score& how, Tile& t,
               float* maxima, float* sums, float* values) {
  multiply_keys<T, Rows>(q, q_stride, b.keys, b.key_words, t.scores);
  int64_t end = 0;  // of what any row sees of the block
  for (int m = 0; m < Rows; m++) {
    const int64_t last = rows[m].last - b.start;
    end = last > end ? last : end;
    t.maxima[m] = weigh<T>(t.scores + m * kKeys, rows[m], b.start, how, t.weights + m * kKeys, t.sums + m * kLanes);
  }
  end = end < kKeys ? end : kKeys;
  rebase(maxima, t.maxima, Rows, t.old, t.fresh);
  for (int m = 0; m < Rows; m++) fold(sums + m * kLanes, t.sums + m * kLanes, t.old[m], t.fresh[m]);
  add_values<T, Rows>(t.weights, b.values, b.value_stride, words<T>(end), t.old, t.fresh, values);
}

}  // namespace qpass::attention
