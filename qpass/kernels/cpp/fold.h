// How a group's dot products begin and end: zero points and scales.
#pragma once
#include "prologue.h"

namespace qpass {

// What sums of int8 products start at: -zero * sum of the activations. Exact, so it may come first.
template <class F>
QPASS_INLINE I32 start(I32 zero, const int32_t* minus_sums, int m) {
  const I32 minus_sum = set(minus_sums[m]);
  return F::grouped ? product16(zero, minus_sum) : mul(zero, minus_sum);  // a group's sum fits 16 bits
}

// A finished group into the fp32 totals: scale x (dot - zero * sum of the activations).
template <class F>
QPASS_INLINE F32 fold(I32 centered, F32 total, F32 scale, I32, const int32_t*, const float* scales, int m) {
  if constexpr (!F::grouped) return mul(to_float(centered), scale);
  if constexpr (F::rule == QPASS_A8_TOKEN_GROUP) scale = mul(scale, set(scales[m]));
  return fma(to_float(centered), scale, total);
}

template <class F>
QPASS_INLINE F32 fold(F32 dots, F32 total, F32 scale, F32 zero, const float* sums, const float*, int m) {
  const F32 centered = fnma(zero, set(sums[m]), dots);
  return F::grouped ? fma(scale, centered, total) : mul(scale, centered);
}

// Zeros that are no codes meet integer sums after these became fp32.
template <class F>
QPASS_INLINE F32 fold(I32 dots, F32 total, F32 scale, F32 zero, const int32_t* minus_sums, const float* scales, int m) {
  const F32 centered = fma(zero, set(float(minus_sums[m])), to_float(dots));
  if constexpr (!F::grouped) return mul(centered, scale);
  if constexpr (F::rule == QPASS_A8_TOKEN_GROUP) scale = mul(scale, set(scales[m]));
  return fma(centered, scale, total);
}

// Zeros that are codes.
template <class F, class C>
QPASS_INLINE Sum<F> code_zeros(const uint8_t* zeros, int v) {
  const I32 z = load_zeros(zeros, v);
  if constexpr (F::a16) return sub(to_float(z), set(float(C::center)));
  else if constexpr (C::center == 0) return z;
  else if constexpr (F::grouped) return and_(sub(z, set(C::center)), set(0xffff));
  else return sub(z, set(C::center));
}

// The zeros of vector v as fold() wants them: relative to the center that the operands already lack.
template <class F, class C = Codes<F>>
QPASS_INLINE auto fold_zeros(const uint8_t* zeros, int v) {
  if constexpr (F::float_zeros) return sub(load_f32((const float*)zeros + v * kLanes), set(float(C::center)));
  else return code_zeros<F, C>(zeros, v);
}

// Whether the sums of a group are to begin, or to end, with the zero's part: else fold() brings it in.
template <class F>
constexpr bool kIntegerZeros = !F::a16 && !F::float_zeros;

// Unfinished sums wait where the totals will be.
QPASS_INLINE void load_sum(const float* p, F32& v) { v = load_f32(p); }
QPASS_INLINE void load_sum(const float* p, I32& v) { v = load(p); }
QPASS_INLINE void store_sum(float* p, F32 v) { store_f32(p, v); }
QPASS_INLINE void store_sum(float* p, I32 v) { store(p, v); }

}  // namespace qpass
