// What happens to the totals before they are rounded: activation scale, bias, activation, gate, multiply, residual; all
// in fp32.
#pragma once
#include "prologue.h"

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

// The linear's own value: the terms' totals added up, times the token's scale where it is not part of the fold yet,
// plus bias.
template <class F>
QPASS_INLINE F32 finish(const float* total, int terms, float token_scale, const float* bias, int n) {
  F32 v = load_f32(total);
  for (int t = 1; t < terms; t++) v = add(v, load_f32(total + t * kBlock));
  if constexpr (F::rule == QPASS_A8_TOKEN || F::rule == QPASS_A8_STATIC) v = mul(v, set(token_scale));
  return bias ? add(v, load_float<QPASS_F32>(bias, 0, n)) : v;
}

// Rows [row, row + rows) of outputs [64 * block, ...): `total` and, when glu, `total_up` are [rows * terms][64].
template <class F, int Dtype>
void store_block(const QpassCall& c, const Prepared<F>& p, int64_t block, int64_t row, int64_t rows, const float* total,
                 const float* total_up) {
  const int terms = F::a16 ? terms_of(Dtype) : 1;
  const int64_t outputs = c.glu ? c.n / 2 : c.n;
  for (int64_t m = row; m < row + rows; m++, total += terms * kBlock, total_up += terms * kBlock) {
    const float token_scale = F::rule == QPASS_A8_TOKEN ? p.scale(0)[m] : c.x_scale;
    for (int i = 0; i < kVectors; i++) {
      const int64_t n = block * kBlock + i * kLanes;
      if (n >= outputs) break;
      const int lanes = outputs - n >= kLanes ? kLanes : int(outputs - n);
      F32 v = finish<F>(total + i * kLanes, terms, token_scale, c.bias ? c.bias + n : nullptr, lanes);
      v = activate(v, c.activation);
      if (c.glu)
        v = mul(v,
                finish<F>(total_up + i * kLanes, terms, token_scale, c.bias ? c.bias + outputs + n : nullptr, lanes));
      if (c.mul) v = mul(v, load_float<Dtype>(c.mul, m * c.mul_stride + n, lanes));
      if (c.residual) v = add(v, load_float<Dtype>(c.residual, m * c.residual_stride + n, lanes));
      store_float<Dtype>(c.y, m * c.y_stride + n, v, lanes);
    }
  }
}

template <class F>
void store_block(const QpassCall& c, const Prepared<F>& p, int64_t block, int64_t row, int64_t rows, const float* total,
                 const float* total_up) {
  if (c.dtype == QPASS_F32) store_block<F, QPASS_F32>(c, p, block, row, rows, total, total_up);
  else if (c.dtype == QPASS_BF16) store_block<F, QPASS_BF16>(c, p, block, row, rows, total, total_up);
  else store_block<F, QPASS_F16>(c, p, block, row, rows, total, total_up);
}

}  // namespace qpass
