// What happens to the totals before they are rounded: activation scale, outliers, bias, activation, gate, multiply,
// residual; all in fp32.
#pragma once
#include "fold.h"
#include "segment.h"

namespace qpass {

// x * (1 + erf(x / sqrt 2)) / 2 with Abramowitz & Stegun 7.1.26, |error of erf| <= 1.5e-7.
QPASS_INLINE F32 gelu(F32 x) {
  const F32 one = set(1.0f), half = set(0.5f);
  const F32 z = mul(from_bits(and_(bits(x), set(0x7fffffff))), set(0.70710678f));
  const F32 t = div(one, fma(z, set(0.3275911f), one));
  F32 p = set(1.061405429f);
  p = fma(p, t, set(-1.453152027f));
  p = fma(p, t, set(1.421413741f));
  p = fma(p, t, set(-0.284496736f));
  p = fma(p, t, set(0.254829592f));
  p = mul(p, t);
  // tail = erfc(|x| / sqrt 2) / 2, the probability beyond |x|
  const F32 tail = mul(mul(half, p), exp(sub(set(0.0f), mul(z, z))));
  return mul(x, select(less(x, set(0.0f)), tail, sub(one, tail)));
}

QPASS_INLINE F32 activate(F32 x, int activation) {
  switch (activation) {
    case QPASS_RELU:
      return max(set(0.0f), x);  // this order keeps NaN
    case QPASS_GELU:
      return gelu(x);
    case QPASS_GELU_TANH: {  // (1 + tanh u) / 2 = sigmoid(2u)
      const F32 cubic = fma(mul(set(0.044715f), mul(x, x)), x, x);
      return mul(x, sigmoid(mul(set(1.5957691216f), cubic)));
    }
    case QPASS_SILU:
      return mul(x, sigmoid(x));
    default:
      return x;
  }
}

template <class F>
QPASS_INLINE F32 next_term(F32 v, F32 next) {
  return F::wide ? fma(v, set(float(kBase)), next) : add(v, next);
}

// A token's terms added up, or read as digits.
template <class F>
QPASS_INLINE F32 joined(const float* total, int terms) {
  F32 v = load_f32(total);
  for (int t = 1; t < terms; t++) v = next_term<F>(v, load_f32(total + t * kBlock));
  return v;
}

// What tiles leave where sums run from the first input to the last: integers, not scaled yet.
template <class F>
struct Sums {
  F32 scale[kVectors];
  decltype(fold_zeros<F>(nullptr, 0)) zero[kVectors];
  const int32_t* minus_sums;

  Sums(const uint8_t* block, int64_t k, const Prepared<F>& p) : minus_sums(p.sum_i32(0)) {
    const Segment s = segment_of<F>(block, k, p.segments, p.segments - 1);
    for (int v = 0; v < kVectors; v++) scale[v] = load_scales<F>(s.scales, v), zero[v] = fold_zeros<F>(s.zeros, v);
  }
  // Of row m and vector v, from its sums.
  QPASS_INLINE F32 operator()(const float* total, int v, int64_t m) const {
    I32 sum;
    load_sum(total, sum);
    if constexpr (kIntegerZeros<F>) sum = add(sum, start<F>(zero[v], minus_sums, int(m)));
    return fold<F>(sum, F32{}, scale[v], zero[v], minus_sums, nullptr, int(m));
  }
  // All rows in place.
  void finish(float* total, int64_t row, int64_t rows) const {
    for (int64_t m = row; m < row + rows; m++, total += kBlock)
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; v++) store_f32(total + v * kLanes, (*this)(total + v * kLanes, v, m));
  }
};

// The linear's own value: times the token's scale where it is not part of the fold yet, plus what the outliers give (null:
// none), plus bias.
template <class F>
QPASS_INLINE F32 finish(F32 v, float token_scale, const float* outliers, const float* bias, int n) {
  if constexpr (F::rule == QPASS_A8_TOKEN || F::rule == QPASS_A8_STATIC || F::wide) v = mul(v, set(token_scale));
  if (outliers) v = add(v, load_f32(outliers));
  return bias ? add(v, load_float<QPASS_F32>(bias, 0, n)) : v;
}

// What the outliers of `Rows` tokens add to the 64 outputs from column n of their weight on; `apart` [Rows][outliers].
template <int Dtype, int Rows>
void multiply_outliers(const QpassCall& c, const float* apart, int64_t n, int64_t lanes, float* out) {
  F32 total[Rows][kVectors];
  for (auto& row : total)
    for (auto& v : row) v = set(0.0f);
  for (int64_t j = 0; j < c.outliers; j++) {
    F32 w[kVectors];
    for (int i = 0; i < kVectors; i++) {
      const int64_t rest = lanes - i * kLanes, at = j * c.n + n + i * kLanes;
      w[i] = rest > 0 ? load_float<Dtype>(c.outlier_weight, at, int(rest < kLanes ? rest : kLanes)) : set(0.0f);
    }
    for (int r = 0; r < Rows; r++)
      for (int i = 0; i < kVectors; i++) total[r][i] = fma(set(apart[r * c.outliers + j]), w[i], total[r][i]);
  }
  for (int r = 0; r < Rows; r++)
    for (int i = 0; i < kVectors; i++) store_f32(out + r * kBlock + i * kLanes, total[r][i]);
}

constexpr int kOutlierRows = 4;  // tokens that share a read of the outliers' weight

// The same for up to kOutlierRows tokens.
template <int Dtype>
void multiply_outliers(const QpassCall& c, const float* apart, int64_t rows, int64_t n, int64_t lanes, float* out) {
  if (rows >= kOutlierRows) return multiply_outliers<Dtype, kOutlierRows>(c, apart, n, lanes, out);
  for (int64_t r = 0; r < rows; r++)
    multiply_outliers<Dtype, 1>(c, apart + r * c.outliers, n, lanes, out + r * kBlock);
}

// One block of outputs: what its epilogue reads, at the block's first output. Values, not the call itself, which the
// compiler would read again behind each store.
struct Block {
  const float* bias[2];  // of each half, or null
  const void *mul, *residual;
  void* y;
  int64_t mul_stride, residual_stride, y_stride, n;
  int activation;

  Block(const QpassCall& c, int64_t block)
      : mul(c.mul), residual(c.residual), y(c.y), mul_stride(c.mul_stride), residual_stride(c.residual_stride),
        y_stride(c.y_stride), n(block * kBlock), activation(c.activation) {
    const int64_t outputs = c.glu ? c.n / 2 : c.n;
    for (int half = 0; half < 2; half++) bias[half] = c.bias ? c.bias + half * outputs + n : nullptr;
  }
  // What is stored of row m's outputs behind i * kLanes, from their values and, when `Glu`, those of the other half.
  template <int Dtype, bool Glu>
  QPASS_INLINE F32 value(F32 v, F32 up, int64_t m, int i, int lanes) const {
    v = activate(v, activation);
    if (Glu) v = mul_(v, up);
    if (mul) v = mul_(v, load_float<Dtype>(mul, m * mul_stride + n + i * kLanes, lanes));
    if (residual) v = add(v, load_float<Dtype>(residual, m * residual_stride + n + i * kLanes, lanes));
    return v;
  }
  static F32 mul_(F32 a, F32 b) { return qpass::mul(a, b); }
};

// Rows [row, row + rows) of whole blocks of outputs without outliers, as they are: `total` and `total_up` are
// [rows * terms][64]. `read(total, half, i, m)` is what row m's vector i of a half is worth.
template <class F, int Dtype, bool Glu, class Read>
void store_whole(const QpassCall& c, const Prepared<F>& p, int64_t block, int64_t row, int64_t rows, const float* total,
                 const float* total_up, Read&& read) {
  constexpr int terms = terms_of<F>(Dtype);
  const Block b(c, block);
  const float* token_scales = F::rule == QPASS_A8_TOKEN || F::wide ? p.scale(0) : nullptr;
  const float x_scale = c.x_scale;
  for (int64_t m = row; m < row + rows; m++, total += terms * kBlock, total_up += terms * kBlock) {
    const float token_scale = token_scales ? token_scales[m] : x_scale;
#pragma GCC unroll 4
    for (int i = 0; i < kVectors; i++) {
      auto own = [&](const float* totals, int half) __attribute__((always_inline)) {
        return finish<F>(read(totals + i * kLanes, half, i, m), token_scale, nullptr,
                         b.bias[half] ? b.bias[half] + i * kLanes : nullptr, kLanes);
      };
      const F32 v = b.value<Dtype, Glu>(own(total, 0), Glu ? own(total_up, 1) : F32{}, m, i, kLanes);
      store_float<Dtype>(b.y, m * b.y_stride + b.n + i * kLanes, v);
    }
  }
}

// The same of any block: partial, with outliers, to int8 codes, rotated. `weights`: of the block whose totals are sums still;
// null where they are finished.
template <class F, int Dtype>
void store_block(const QpassCall& c, const Prepared<F>& p, int64_t block, int64_t row, int64_t rows, float* total,
                 float* total_up, const uint8_t* weights) {
  const int terms = terms_of<F>(Dtype);
  const int64_t outputs = c.glu ? c.n / 2 : c.n, width = min_of(outputs - block * kBlock, kBlock);
  const bool few = !F::a16 && c.outliers;
  if constexpr (Dtype == QPASS_BF16) {  // what models have; for the others too it would be a tenth of a unit's compile time
    if (!few && c.y_scale == 0 && width == kBlock) {
      auto store = [&](auto&& read) {
        if (c.glu) store_whole<F, Dtype, true>(c, p, block, row, rows, total, total_up, read);
        else store_whole<F, Dtype, false>(c, p, block, row, rows, total, total_up, read);
      };
      if constexpr (kAccumulates<F>)
        if (weights) {
          const Sums<F> sums[] = {{weights, c.k, p}, {weights + c.glu * F::block_bytes(c.k), c.k, p}};
          return store([&](const float* at, int half, int i, int64_t m) __attribute__((always_inline)) {
            constexpr int terms = terms_of<F>(Dtype);
            F32 v = sums[half](at, i, m * terms);
            for (int t = 1; t < terms; t++) v = next_term<F>(v, sums[half](at + t * kBlock, i, m * terms + t));
            return v;
          });
        }
      return store([&](const float* at, int, int, int64_t) __attribute__((always_inline)) { return joined<F>(at, terms_of<F>(Dtype)); });
    }
  }
  if constexpr (kAccumulates<F>)
    if (weights) {
      Sums<F>(weights, c.k, p).finish(total, row * terms, rows * terms);
      if (c.glu) Sums<F>(weights + F::block_bytes(c.k), c.k, p).finish(total_up, row * terms, rows * terms);
    }
  const Block b(c, block);
  const F32 inverse = set(c.y_scale != 0 ? 1.0f / c.y_scale : 0.0f), shift = set(c.y_shift);
  alignas(64) float outliers[2][kOutlierRows * kBlock];
  for (int64_t m = row; m < row + rows; m++, total += terms * kBlock, total_up += terms * kBlock) {
    const float token_scale = F::rule == QPASS_A8_TOKEN || F::wide ? p.scale(0)[m] : c.x_scale;
    const int64_t turn = (m - row) % kOutlierRows;
    if (few && turn == 0)
      for (int half = 0; half <= c.glu; half++)
        multiply_outliers<Dtype>(c, p.apart + m * c.outliers, row + rows - m, half * outputs + b.n, width, outliers[half]);
    F32 rotated[kVectors];
    for (int i = 0; i * kLanes < width; i++) {
      const int lanes = int(min_of(width - i * kLanes, kLanes));
      auto own = [&](const float* totals, int half) {
        return finish<F>(joined<F>(totals + i * kLanes, terms), token_scale,
                         few ? outliers[half] + turn * kBlock + i * kLanes : nullptr,
                         b.bias[half] ? b.bias[half] + i * kLanes : nullptr, lanes);
      };
      F32 v = c.glu ? b.value<Dtype, true>(own(total, 0), own(total_up, 1), m, i, lanes)
                    : b.value<Dtype, false>(own(total, 0), F32{}, m, i, lanes);
      if (c.y_scale != 0) v = sub(v, shift);
      if (c.y_rotate) rotated[i] = v;
      else if (c.y_scale != 0) store_float<QPASS_I8>(c.y, m * c.y_stride + b.n + i * kLanes, mul(v, inverse), lanes);
      else store_float<Dtype>(c.y, m * c.y_stride + b.n + i * kLanes, v, lanes);
    }
    if (c.y_rotate) {  // whole blocks only, and to codes only
      rotate(rotated);
      for (int i = 0; i < kVectors; i++)
        store_float<QPASS_I8>(c.y, m * c.y_stride + b.n + i * kLanes, mul(rotated[i], inverse));
    }
  }
}

template <class F>
void store_block(const QpassCall& c, const Prepared<F>& p, int64_t block, int64_t row, int64_t rows, float* total,
                 float* total_up, const uint8_t* weights) {
  if (c.dtype == QPASS_F32) store_block<F, QPASS_F32>(c, p, block, row, rows, total, total_up, weights);
  else if (c.dtype == QPASS_BF16) store_block<F, QPASS_BF16>(c, p, block, row, rows, total, total_up, weights);
  else store_block<F, QPASS_F16>(c, p, block, row, rows, total, total_up, weights);
}

}  // namespace qpass
