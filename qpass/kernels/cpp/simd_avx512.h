// The sixteen lanes as one AVX-512 register.
#pragma once

namespace qpass {

using F32 = __m512;
using I32 = __m512i;
using Mask = __mmask16;

QPASS_INLINE F32 set(float v) { return _mm512_set1_ps(v); }
QPASS_INLINE I32 set(int32_t v) { return _mm512_set1_epi32(v); }

QPASS_INLINE F32 add(F32 a, F32 b) { return _mm512_add_ps(a, b); }
QPASS_INLINE F32 sub(F32 a, F32 b) { return _mm512_sub_ps(a, b); }
QPASS_INLINE F32 mul(F32 a, F32 b) { return _mm512_mul_ps(a, b); }
QPASS_INLINE F32 div(F32 a, F32 b) { return _mm512_div_ps(a, b); }
QPASS_INLINE F32 sqrt(F32 a) { return _mm512_sqrt_ps(a); }
QPASS_INLINE F32 fma(F32 a, F32 b, F32 c) { return _mm512_fmadd_ps(a, b, c); }    // a * b + c
QPASS_INLINE F32 fnma(F32 a, F32 b, F32 c) { return _mm512_fnmadd_ps(a, b, c); }  // c - a * b
QPASS_INLINE F32 max(F32 a, F32 b) { return _mm512_max_ps(a, b); }                // b where either is NaN
QPASS_INLINE F32 min(F32 a, F32 b) { return _mm512_min_ps(a, b); }
QPASS_INLINE F32 round(F32 a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
QPASS_INLINE F32 times_power_of_two(F32 a, F32 n) { return _mm512_scalef_ps(a, n); }  // n whole, |n| <= 160
QPASS_INLINE Mask less(F32 a, F32 b) { return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ); }
QPASS_INLINE Mask less(I32 a, I32 b) { return _mm512_cmp_epi32_mask(a, b, _MM_CMPINT_LT); }
QPASS_INLINE F32 select(Mask m, F32 yes, F32 no) { return _mm512_mask_mov_ps(no, m, yes); }
QPASS_INLINE I32 select(Mask m, I32 yes, I32 no) { return _mm512_mask_mov_epi32(no, m, yes); }

QPASS_INLINE I32 add(I32 a, I32 b) { return _mm512_add_epi32(a, b); }
QPASS_INLINE I32 sub(I32 a, I32 b) { return _mm512_sub_epi32(a, b); }
QPASS_INLINE I32 mul(I32 a, I32 b) { return _mm512_mullo_epi32(a, b); }
QPASS_INLINE I32 and_(I32 a, I32 b) { return _mm512_and_si512(a, b); }
QPASS_INLINE I32 or_(I32 a, I32 b) { return _mm512_or_si512(a, b); }
QPASS_INLINE I32 xor_(I32 a, I32 b) { return _mm512_xor_si512(a, b); }
QPASS_INLINE I32 mul16(I32 a, I32 b) { return _mm512_mullo_epi16(a, b); }
QPASS_INLINE I32 mulhi16(I32 a, I32 b) { return _mm512_mulhi_epu16(a, b); }  // unsigned
QPASS_INLINE I32 sub8(I32 a, I32 b) { return _mm512_sub_epi8(a, b); }
QPASS_INLINE I32 times4(I32 a) { return _mm512_shuffle_epi8(a, _mm512_set4_epi32(0x0c0c0c0c, 0x08080808, 0x04040404, 0)); }  // the lowest byte of each lane, in all four
QPASS_INLINE I32 max(I32 a, I32 b) { return _mm512_max_epi32(a, b); }
QPASS_INLINE I32 min(I32 a, I32 b) { return _mm512_min_epi32(a, b); }
QPASS_INLINE I32 max_u(I32 a, I32 b) { return _mm512_max_epu32(a, b); }
template <int Bits>
QPASS_INLINE I32 shl(I32 a) { return _mm512_slli_epi32(a, Bits); }
template <int Bits>
QPASS_INLINE I32 shr(I32 a) { return _mm512_srli_epi32(a, Bits); }  // zeros come in

QPASS_INLINE I32 to_int(F32 a) { return _mm512_cvtps_epi32(a); }  // to nearest, ties to even
QPASS_INLINE F32 to_float(I32 a) { return _mm512_cvtepi32_ps(a); }
QPASS_INLINE I32 bits(F32 a) { return _mm512_castps_si512(a); }
QPASS_INLINE F32 from_bits(I32 a) { return _mm512_castsi512_ps(a); }

QPASS_INLINE I32 load(const void* p) { return _mm512_loadu_si512(p); }
QPASS_INLINE void store(void* p, I32 v) { _mm512_storeu_si512(p, v); }
QPASS_INLINE F32 load_f32(const float* p) { return _mm512_loadu_ps(p); }
QPASS_INLINE void store_f32(float* p, F32 v) { _mm512_storeu_ps(p, v); }
QPASS_INLINE F32 load_bf16(const uint16_t* p) {
  return from_bits(shl<16>(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p))));
}
QPASS_INLINE F32 load_f16(const uint16_t* p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
QPASS_INLINE I32 load_u8(const uint8_t* p) { return _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p)); }
QPASS_INLINE I32 load_i8(const int8_t* p) { return _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)); }
QPASS_INLINE void store_i8(int8_t* p, I32 v) { _mm_storeu_si128((__m128i*)p, _mm512_cvtepi32_epi8(v)); }
QPASS_INLINE void store_u16(uint16_t* p, I32 v) { _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16(v)); }
QPASS_INLINE void store_f16(uint16_t* p, F32 v) {
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}
// Rounds to nearest even; a NaN stays one.
QPASS_INLINE void store_bf16(uint16_t* p, F32 v) {
  const I32 odd = and_(shr<16>(bits(v)), set(1));
  I32 r = shr<16>(add(add(bits(v), set(0x7fff)), odd));
  r = _mm512_mask_mov_epi32(r, _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), set(0x7fc0));
  store_u16(p, r);
}

// Lane i gets lane i ^ Stride.
template <int Stride>
QPASS_INLINE F32 swapped(F32 v) {
  if constexpr (Stride == 1) return _mm512_permute_ps(v, 0xb1);
  else if constexpr (Stride == 2) return _mm512_permute_ps(v, 0x4e);
  else if constexpr (Stride == 4) return _mm512_shuffle_f32x4(v, v, 0xb1);
  else return _mm512_shuffle_f32x4(v, v, 0x4e);
}

QPASS_INLINE __m256 lower(F32 v) { return _mm512_castps512_ps256(v); }
QPASS_INLINE __m256 upper(F32 v) { return _mm512_extractf32x8_ps(v, 1); }
QPASS_INLINE __m256i lower(I32 v) { return _mm512_castsi512_si256(v); }
QPASS_INLINE __m256i upper(I32 v) { return _mm512_extracti64x4_epi64(v, 1); }

}  // namespace qpass
