// What happens to the totals before they are rounded: activation scale, bias, activation, gate, multiply, residual; all
// in fp32.
#pragma once
#include "prologue.h"

namespace qpass {

// e^x within 2 ulp; large arguments give infinity or 0, NaN stays NaN.
QPASS_INLINE __m512 exp(__m512 x) {
  x = _mm512_max_ps(_mm512_set1_ps(-104.0f), _mm512_min_ps(_mm512_set1_ps(104.0f), x));
  const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), _MM_FROUND_TO_NEAREST_INT);
  __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
  r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
  __m512 p = _mm512_set1_ps(1.9875691500e-4f);  // Cephes expf
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.3981999507e-3f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(8.3334519073e-3f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(4.1665795894e-2f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.6666665459e-1f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(5.0000001201e-1f));
  p = _mm512_fmadd_ps(p, _mm512_mul_ps(r, r), _mm512_add_ps(r, _mm512_set1_ps(1.0f)));
  return _mm512_scalef_ps(p, n);
}

QPASS_INLINE __m512 sigmoid(__m512 x) {
  const __m512 one = _mm512_set1_ps(1.0f);
  return _mm512_div_ps(one, _mm512_add_ps(one, exp(_mm512_sub_ps(_mm512_setzero_ps(), x))));
}

// x * (1 + erf(x / sqrt 2)) / 2 with Abramowitz & Stegun 7.1.26, |error of erf| <= 1.5e-7.
QPASS_INLINE __m512 gelu(__m512 x) {
  const __m512 one = _mm512_set1_ps(1.0f), half = _mm512_set1_ps(0.5f);
  const __m512 z = _mm512_mul_ps(_mm512_abs_ps(x), _mm512_set1_ps(0.70710678f));
  const __m512 t = _mm512_div_ps(one, _mm512_fmadd_ps(z, _mm512_set1_ps(0.3275911f), one));
  __m512 p = _mm512_set1_ps(1.061405429f);
  p = _mm512_fmadd_ps(p, t, _mm512_set1_ps(-1.453152027f));
  p = _mm512_fmadd_ps(p, t, _mm512_set1_ps(1.421413741f));
  p = _mm512_fmadd_ps(p, t, _mm512_set1_ps(-0.284496736f));
  p = _mm512_fmadd_ps(p, t, _mm512_set1_ps(0.254829592f));
  p = _mm512_mul_ps(p, t);
  // tail = erfc(|x| / sqrt 2) / 2, the probability beyond |x|
  const __m512 tail =
      _mm512_mul_ps(_mm512_mul_ps(half, p), exp(_mm512_sub_ps(_mm512_setzero_ps(), _mm512_mul_ps(z, z))));
  const __mmask16 negative = _mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_LT_OQ);
  return _mm512_mul_ps(x, _mm512_mask_mov_ps(_mm512_sub_ps(one, tail), negative, tail));
}

QPASS_INLINE __m512 activate(__m512 x, int activation) {
  switch (activation) {
    case QPASS_RELU:
      return _mm512_max_ps(_mm512_setzero_ps(), x);  // this order keeps NaN
    case QPASS_GELU:
      return gelu(x);
    case QPASS_GELU_TANH: {  // (1 + tanh u) / 2 = sigmoid(2u)
      const __m512 cubic = _mm512_fmadd_ps(_mm512_mul_ps(_mm512_set1_ps(0.044715f), _mm512_mul_ps(x, x)), x, x);
      return _mm512_mul_ps(x, sigmoid(_mm512_mul_ps(_mm512_set1_ps(1.5957691216f), cubic)));
    }
    case QPASS_SILU:
      return _mm512_mul_ps(x, sigmoid(x));
    default:
      return x;
  }
}

// The linear's own value: the terms' totals added up, times the token's scale where it is not part of the fold yet,
// plus bias.
template <class F>
QPASS_INLINE __m512 finish(const float* total, int terms, float token_scale, const float* bias, __mmask16 mask) {
  __m512 v = _mm512_loadu_ps(total);
  for (int t = 1; t < terms; t++) v = _mm512_add_ps(v, _mm512_loadu_ps(total + t * kBlock));
  if constexpr (F::rule == QPASS_A8_TOKEN) v = _mm512_mul_ps(v, _mm512_set1_ps(token_scale));
  return bias ? _mm512_add_ps(v, _mm512_maskz_loadu_ps(mask, bias)) : v;
}

// Rows [row, row + rows) of outputs [64 * block, ...): `total` and, when glu, `total_up` are [rows * terms][64].
template <class F, int Dtype>
void store_block(const QpassCall& c, const Prepared<F>& p, int64_t block, int64_t row, int64_t rows, const float* total,
                 const float* total_up) {
  const int terms = F::a16 ? terms_of(Dtype) : 1;
  const int64_t outputs = c.glu ? c.n / 2 : c.n;
  for (int64_t m = row; m < row + rows; m++, total += terms * kBlock, total_up += terms * kBlock) {
    const float token_scale = F::rule == QPASS_A8_TOKEN ? p.scale(0)[m] : 1.0f;
    for (int i = 0; i < kVectors; i++) {
      const int64_t n = block * kBlock + i * kLanes;
      if (n >= outputs) break;
      const __mmask16 mask = outputs - n >= kLanes ? 0xffff : __mmask16((1u << (outputs - n)) - 1);
      __m512 v = finish<F>(total + i * kLanes, terms, token_scale, c.bias ? c.bias + n : nullptr, mask);
      v = activate(v, c.activation);
      if (c.glu)
        v = _mm512_mul_ps(
            v, finish<F>(total_up + i * kLanes, terms, token_scale, c.bias ? c.bias + outputs + n : nullptr, mask));
      if (c.mul) v = _mm512_mul_ps(v, load_float<Dtype>(c.mul, m * c.mul_stride + n, mask));
      if (c.residual) v = _mm512_add_ps(v, load_float<Dtype>(c.residual, m * c.residual_stride + n, mask));
      store_float<Dtype>(c.y, m * c.y_stride + n, v, mask);
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
