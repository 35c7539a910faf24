// The sixteen lanes as a pair of AVX registers.
#pragma once

namespace qpass {

struct F32 {
  __m256 a, b;
};
struct I32 {
  __m256i a, b;
};
struct Mask {
  __m256 a, b;  // all ones or all zeros a lane
};

QPASS_INLINE F32 set(float v) { return {_mm256_set1_ps(v), _mm256_set1_ps(v)}; }
QPASS_INLINE I32 set(int32_t v) { return {_mm256_set1_epi32(v), _mm256_set1_epi32(v)}; }

QPASS_INLINE F32 add(F32 x, F32 y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
QPASS_INLINE F32 sub(F32 x, F32 y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
QPASS_INLINE F32 mul(F32 x, F32 y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
QPASS_INLINE F32 div(F32 x, F32 y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
QPASS_INLINE F32 sqrt(F32 x) { return {_mm256_sqrt_ps(x.a), _mm256_sqrt_ps(x.b)}; }
QPASS_INLINE F32 fma(F32 x, F32 y, F32 z) { return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)}; }
QPASS_INLINE F32 fnma(F32 x, F32 y, F32 z) {
  return {_mm256_fnmadd_ps(x.a, y.a, z.a), _mm256_fnmadd_ps(x.b, y.b, z.b)};
}
QPASS_INLINE F32 max(F32 x, F32 y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
QPASS_INLINE F32 min(F32 x, F32 y) { return {_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)}; }
QPASS_INLINE F32 round(F32 x) {
  constexpr int nearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return {_mm256_round_ps(x.a, nearest), _mm256_round_ps(x.b, nearest)};
}
QPASS_INLINE Mask less(F32 x, F32 y) {
  return {_mm256_cmp_ps(x.a, y.a, _CMP_LT_OQ), _mm256_cmp_ps(x.b, y.b, _CMP_LT_OQ)};
}
QPASS_INLINE Mask less(I32 x, I32 y) {
  return {_mm256_castsi256_ps(_mm256_cmpgt_epi32(y.a, x.a)), _mm256_castsi256_ps(_mm256_cmpgt_epi32(y.b, x.b))};
}
QPASS_INLINE F32 select(Mask m, F32 yes, F32 no) {
  return {_mm256_blendv_ps(no.a, yes.a, m.a), _mm256_blendv_ps(no.b, yes.b, m.b)};
}
QPASS_INLINE I32 select(Mask m, I32 yes, I32 no) {
  return {_mm256_blendv_epi8(no.a, yes.a, _mm256_castps_si256(m.a)),
          _mm256_blendv_epi8(no.b, yes.b, _mm256_castps_si256(m.b))};
}

QPASS_INLINE I32 add(I32 x, I32 y) { return {_mm256_add_epi32(x.a, y.a), _mm256_add_epi32(x.b, y.b)}; }
QPASS_INLINE I32 sub(I32 x, I32 y) { return {_mm256_sub_epi32(x.a, y.a), _mm256_sub_epi32(x.b, y.b)}; }
QPASS_INLINE I32 mul(I32 x, I32 y) { return {_mm256_mullo_epi32(x.a, y.a), _mm256_mullo_epi32(x.b, y.b)}; }
QPASS_INLINE I32 and_(I32 x, I32 y) { return {_mm256_and_si256(x.a, y.a), _mm256_and_si256(x.b, y.b)}; }
QPASS_INLINE I32 or_(I32 x, I32 y) { return {_mm256_or_si256(x.a, y.a), _mm256_or_si256(x.b, y.b)}; }
QPASS_INLINE I32 xor_(I32 x, I32 y) { return {_mm256_xor_si256(x.a, y.a), _mm256_xor_si256(x.b, y.b)}; }
QPASS_INLINE I32 mul16(I32 x, I32 y) { return {_mm256_mullo_epi16(x.a, y.a), _mm256_mullo_epi16(x.b, y.b)}; }
QPASS_INLINE I32 mulhi16(I32 x, I32 y) { return {_mm256_mulhi_epu16(x.a, y.a), _mm256_mulhi_epu16(x.b, y.b)}; }  // unsigned
QPASS_INLINE I32 sub8(I32 x, I32 y) { return {_mm256_sub_epi8(x.a, y.a), _mm256_sub_epi8(x.b, y.b)}; }
QPASS_INLINE I32 times4(I32 x) {  // the lowest byte of each lane, in all four
  const __m256i lowest = _mm256_setr_epi32(0, 0x04040404, 0x08080808, 0x0c0c0c0c, 0, 0x04040404, 0x08080808, 0x0c0c0c0c);
  return {_mm256_shuffle_epi8(x.a, lowest), _mm256_shuffle_epi8(x.b, lowest)};
}
QPASS_INLINE I32 max(I32 x, I32 y) { return {_mm256_max_epi32(x.a, y.a), _mm256_max_epi32(x.b, y.b)}; }
QPASS_INLINE I32 min(I32 x, I32 y) { return {_mm256_min_epi32(x.a, y.a), _mm256_min_epi32(x.b, y.b)}; }
QPASS_INLINE I32 max_u(I32 x, I32 y) { return {_mm256_max_epu32(x.a, y.a), _mm256_max_epu32(x.b, y.b)}; }
template <int Bits>
QPASS_INLINE I32 shl(I32 x) { return {_mm256_slli_epi32(x.a, Bits), _mm256_slli_epi32(x.b, Bits)}; }
template <int Bits>
QPASS_INLINE I32 shr(I32 x) { return {_mm256_srli_epi32(x.a, Bits), _mm256_srli_epi32(x.b, Bits)}; }

QPASS_INLINE I32 to_int(F32 x) { return {_mm256_cvtps_epi32(x.a), _mm256_cvtps_epi32(x.b)}; }
QPASS_INLINE F32 to_float(I32 x) { return {_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }
QPASS_INLINE I32 bits(F32 x) { return {_mm256_castps_si256(x.a), _mm256_castps_si256(x.b)}; }
QPASS_INLINE F32 from_bits(I32 x) { return {_mm256_castsi256_ps(x.a), _mm256_castsi256_ps(x.b)}; }

// n is whole, |n| <= 160: two factors, so that results below the normal range are rounded once, as scalef does.
QPASS_INLINE F32 times_power_of_two(F32 x, F32 n) {
  const I32 whole = to_int(n), first = max(min(whole, set(126)), set(-126)), rest = sub(whole, first);
  const F32 one = from_bits(shl<23>(add(first, set(127)))), two = from_bits(shl<23>(add(rest, set(127))));
  return mul(mul(x, one), two);
}

QPASS_INLINE I32 load(const void* p) {
  return {_mm256_loadu_si256((const __m256i*)p), _mm256_loadu_si256((const __m256i*)p + 1)};
}
QPASS_INLINE void store(void* p, I32 v) {
  _mm256_storeu_si256((__m256i*)p, v.a);
  _mm256_storeu_si256((__m256i*)p + 1, v.b);
}
QPASS_INLINE F32 load_f32(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
QPASS_INLINE void store_f32(float* p, F32 v) {
  _mm256_storeu_ps(p, v.a);
  _mm256_storeu_ps(p + 8, v.b);
}
QPASS_INLINE __m128i half_row(const void* p, int i) { return _mm_loadu_si128((const __m128i*)p + i); }
QPASS_INLINE F32 load_bf16(const uint16_t* p) {
  return from_bits(shl<16>(I32{_mm256_cvtepu16_epi32(half_row(p, 0)), _mm256_cvtepu16_epi32(half_row(p, 1))}));
}
QPASS_INLINE F32 load_f16(const uint16_t* p) { return {_mm256_cvtph_ps(half_row(p, 0)), _mm256_cvtph_ps(half_row(p, 1))}; }
QPASS_INLINE I32 load_u8(const uint8_t* p) {
  const __m128i v = half_row(p, 0);
  return {_mm256_cvtepu8_epi32(v), _mm256_cvtepu8_epi32(_mm_srli_si128(v, 8))};
}
QPASS_INLINE I32 load_i8(const int8_t* p) {
  const __m128i v = half_row(p, 0);
  return {_mm256_cvtepi8_epi32(v), _mm256_cvtepi8_epi32(_mm_srli_si128(v, 8))};
}
// The lanes' lower halves, in order.
QPASS_INLINE __m256i narrow(I32 v) {
  const __m256i low = _mm256_set1_epi32(0xffff);
  const __m256i packed = _mm256_packus_epi32(_mm256_and_si256(v.a, low), _mm256_and_si256(v.b, low));
  return _mm256_permute4x64_epi64(packed, 0xd8);
}
QPASS_INLINE void store_u16(uint16_t* p, I32 v) { _mm256_storeu_si256((__m256i*)p, narrow(v)); }
QPASS_INLINE void store_i8(int8_t* p, I32 v) {
  const __m256i words = _mm256_and_si256(narrow(v), _mm256_set1_epi16(0xff));
  _mm_storeu_si128((__m128i*)p, _mm_packus_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1)));
}
QPASS_INLINE void store_f16(uint16_t* p, F32 v) {
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph(v.a, _MM_FROUND_TO_NEAREST_INT));
  _mm_storeu_si128((__m128i*)p + 1, _mm256_cvtps_ph(v.b, _MM_FROUND_TO_NEAREST_INT));
}
// Rounds to nearest even; a NaN stays one.
QPASS_INLINE void store_bf16(uint16_t* p, F32 v) {
  const I32 odd = and_(shr<16>(bits(v)), set(1));
  const I32 r = shr<16>(add(add(bits(v), set(0x7fff)), odd));
  const Mask nan = {_mm256_cmp_ps(v.a, v.a, _CMP_UNORD_Q), _mm256_cmp_ps(v.b, v.b, _CMP_UNORD_Q)};
  store_u16(p, select(nan, set(0x7fc0), r));
}

// Lane i gets lane i ^ Stride.
template <int Stride>
QPASS_INLINE F32 swapped(F32 v) {
  if constexpr (Stride == 1) return {_mm256_permute_ps(v.a, 0xb1), _mm256_permute_ps(v.b, 0xb1)};
  else if constexpr (Stride == 2) return {_mm256_permute_ps(v.a, 0x4e), _mm256_permute_ps(v.b, 0x4e)};
  else if constexpr (Stride == 4) return {_mm256_permute2f128_ps(v.a, v.a, 1), _mm256_permute2f128_ps(v.b, v.b, 1)};
  else return {v.b, v.a};
}

QPASS_INLINE __m256 lower(F32 v) { return v.a; }
QPASS_INLINE __m256 upper(F32 v) { return v.b; }
QPASS_INLINE __m256i lower(I32 v) { return v.a; }
QPASS_INLINE __m256i upper(I32 v) { return v.b; }

}  // namespace qpass
