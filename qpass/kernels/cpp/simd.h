// Sixteen lanes: the vocabulary in which everything but the dot products is written. F32 is 16 floats, I32 is 16 int32
// (or 64 bytes). The same order of operations in every instruction set, so the same bits.
#pragma once
#include <immintrin.h>
#include <stddef.h>
#include <string.h>
#include "abi.h"

#define QPASS_INLINE inline __attribute__((always_inline))

#ifdef __AVX512F__
#include "simd_avx512.h"
#else
#include "simd_avx2.h"
#endif

namespace qpass {

constexpr int kLanes = 16;

// A symmetric int8 code: to nearest, ties to even; what lies beyond is clamped, a static scale may be far off.
QPASS_INLINE I32 to_code(F32 v) { return to_int(max(min(v, set(127.0f)), set(-127.0f))); }

constexpr int size_of(int dtype) { return dtype == QPASS_F32 ? 4 : dtype == QPASS_I8 ? 1 : 2; }

// The model's dtypes as fp32, and int8 codes. Of `n` < 16 lanes the others are zero, or are left alone by a store.
template <int Dtype>
QPASS_INLINE F32 load_float(const void* base, int64_t i) {
  if constexpr (Dtype == QPASS_F32) return load_f32((const float*)base + i);
  else if constexpr (Dtype == QPASS_BF16) return load_bf16((const uint16_t*)base + i);
  else if constexpr (Dtype == QPASS_I8) return to_float(load_i8((const int8_t*)base + i));
  else return load_f16((const uint16_t*)base + i);
}

template <int Dtype>
QPASS_INLINE F32 load_float(const void* base, int64_t i, int n) {
  if (n >= kLanes) return load_float<Dtype>(base, i);
  alignas(64) char lanes[64] = {};
  constexpr int size = size_of(Dtype);
  memcpy(lanes, (const char*)base + i * size, size_t(n) * size);
  return load_float<Dtype>(lanes, 0);
}

template <int Dtype>
QPASS_INLINE void store_float(void* base, int64_t i, F32 v) {
  if constexpr (Dtype == QPASS_F32) store_f32((float*)base + i, v);
  else if constexpr (Dtype == QPASS_BF16) store_bf16((uint16_t*)base + i, v);
  else if constexpr (Dtype == QPASS_I8) store_i8((int8_t*)base + i, to_code(v));
  else store_f16((uint16_t*)base + i, v);
}

template <int Dtype>
QPASS_INLINE void store_float(void* base, int64_t i, F32 v, int n) {
  if (n >= kLanes) return store_float<Dtype>(base, i, v);
  alignas(64) char lanes[64];
  constexpr int size = size_of(Dtype);
  store_float<Dtype>(lanes, 0, v);
  memcpy((char*)base + i * size, lanes, size_t(n) * size);
}

// Sums and maxima over the lanes; sixteen halve to eight, four, two, one.
QPASS_INLINE float sum(F32 v) {
  const __m256 eight = _mm256_add_ps(lower(v), upper(v));
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
QPASS_INLINE int32_t sum(I32 v) {
  const __m256i eight = _mm256_add_epi32(lower(v), upper(v));
  const __m128i four = _mm_add_epi32(_mm256_castsi256_si128(eight), _mm256_extracti128_si256(eight, 1));
  const __m128i two = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(two, _mm_shuffle_epi32(two, 0xb1)));
}
QPASS_INLINE uint32_t largest_u(I32 v) {
  const __m256i eight = _mm256_max_epu32(lower(v), upper(v));
  const __m128i four = _mm_max_epu32(_mm256_castsi256_si128(eight), _mm256_extracti128_si256(eight, 1));
  const __m128i two = _mm_max_epu32(four, _mm_shuffle_epi32(four, 0x4e));
  return uint32_t(_mm_cvtsi128_si32(_mm_max_epu32(two, _mm_shuffle_epi32(two, 0xb1))));
}
QPASS_INLINE float largest(F32 v) {
  const __m256 eight = _mm256_max_ps(lower(v), upper(v));
  const __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}

// Largest magnitude of lanes so far, as the bits of floats: integer order keeps NaN and infinity on top.
QPASS_INLINE I32 max_magnitude(I32 top, F32 v) { return max_u(top, and_(bits(v), set(0x7fffffff))); }

// e^x within 2 ulp; above 104 infinity, below -87 0, NaN stays NaN. Results that are no normal numbers cost Intel's cores
// 200 cycles a vector.
QPASS_INLINE F32 exp(F32 x) {
  const Mask none = less(x, set(-87.0f));
  x = max(set(-87.0f), min(set(104.0f), x));
  const F32 n = round(mul(x, set(1.44269504f)));
  F32 r = fnma(n, set(0.693359375f), x);
  r = fnma(n, set(-2.12194440e-4f), r);
  F32 p = set(1.9875691500e-4f);  // Cephes expf
  p = fma(p, r, set(1.3981999507e-3f));
  p = fma(p, r, set(8.3334519073e-3f));
  p = fma(p, r, set(4.1665795894e-2f));
  p = fma(p, r, set(1.6666665459e-1f));
  p = fma(p, r, set(5.0000001201e-1f));
  p = fma(p, mul(r, r), add(r, set(1.0f)));
  return select(none, set(0.0f), times_power_of_two(p, n));
}

QPASS_INLINE F32 sigmoid(F32 x) { return div(set(1.0f), add(set(1.0f), exp(sub(set(0.0f), x)))); }

}  // namespace qpass
