// AVX-512 as a small vocabulary: the dot products, how codes become operands, and conversions. One vector is 16 outputs.
#pragma once
#include <immintrin.h>
#include "layout.h"

namespace qpass {

#define QPASS_INLINE inline __attribute__((always_inline))

QPASS_INLINE __m512i load(const void* p) { return _mm512_loadu_si512(p); }
QPASS_INLINE __m512i broadcast(const void* p) { return _mm512_set1_epi32(*static_cast<const int32_t*>(p)); }

// The dot products are assembly because GCC 12 copies the accumulator around its own intrinsics and runs out of registers.

// acc[n] += sum over 4 inputs of unsigned code x signed activation.
QPASS_INLINE __m512i dot(__m512i acc, __m512i codes, __m512i x) {
  __asm__("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(codes), "v"(x));
  return acc;
}

// acc[n] += sum over 2 inputs of bf16 code x bf16 activation.
QPASS_INLINE __m512 dot(__m512 acc, __m512i codes, __m512i x) {
#ifdef __AVX512BF16__
  __asm__("vdpbf16ps %2, %1, %0" : "+v"(acc) : "v"(codes), "v"(x));
  return acc;
#else
  const __m512i high = _mm512_set1_epi32(int(0xffff0000));
  acc = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_and_si512(codes, high)),
                        _mm512_castsi512_ps(_mm512_and_si512(x, high)), acc);
  return _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_slli_epi32(codes, 16)),
                         _mm512_castsi512_ps(_mm512_slli_epi32(x, 16)), acc);
#endif
}

// How a row of packed codes becomes operands. `plane(row, p)` is dot-product operand p of a row; `step(r, p)` is its place
// among the chunk's operands, which is also where the prepared activations keep their inputs.
template <class F, bool A16 = F::a16, int Bits = F::bits>
struct Codes;

// 8-bit codes, int8 activations: a row is an operand.
template <class F>
struct Codes<F, false, 8> {
  static constexpr int step(int r, int) { return r; }
  QPASS_INLINE __m512i plane(const uint8_t* row, int) const { return load(row); }
};

// 4-bit codes, int8 activations: low nibbles, then high nibbles.
template <class F>
struct Codes<F, false, 4> {
  const __m512i mask = _mm512_set1_epi8(0x0f);
  static constexpr int step(int r, int p) { return r + p * F::code_rows; }
  QPASS_INLINE __m512i plane(const uint8_t* row, int p) const {
    const __m512i w = load(row);
    return _mm512_and_si512(p ? _mm512_srli_epi16(w, 4) : w, mask);
  }
};

// 4-bit codes as bf16 pairs, less 8, so that the sums stay small. A word of a row holds 4 codes; vpermw looks the lowest one
// up (it reads 5 bits of the index: the table's two halves are alike). Nibble 0 of the words gives inputs (4r, 4r + 2), nibble
// 2 gives (4r + 1, 4r + 3), nibbles 1 and 3 the same of the k4-step r + code_rows.
template <class F>
struct Codes<F, true, 4> {
  static constexpr int kCenter = 8;
  const __m512i table = [] {
    alignas(64) uint16_t t[32];
    for (int i = 0; i < 32; i++) {
      const float v = float(i % 16 - kCenter);
      uint32_t bits;
      __builtin_memcpy(&bits, &v, 4);
      t[i] = uint16_t(bits >> 16);
    }
    return load(t);
  }();
  static constexpr int step(int r, int p) { return r * 4 + p; }
  QPASS_INLINE __m512i plane(const uint8_t* row, int p) const {
    const __m512i w = load(row);
    return _mm512_permutexvar_epi16(
        p == 0 ? w : p == 1 ? _mm512_srli_epi16(w, 8) : p == 2 ? _mm512_srli_epi16(w, 4) : _mm512_srli_epi16(w, 12), table);
  }
  static constexpr int input(int step, int half) {  // the input of the chunk behind half 0 or 1 of an operand's pair
    const int r = step / 4, p = step % 4;
    return 4 * (r + (p / 2) * F::code_rows) + (p % 2) + 2 * half;
  }
};

// 8-bit codes as bf16 pairs, less 128: a byte at the top of a dword is 2^24 times itself, exactly, as a float whose upper half
// is the bf16; the scale takes the 2^24 back. Plane 0 gives inputs (4r, 4r + 2), plane 1 gives (4r + 1, 4r + 3).
template <class F>
struct Codes<F, true, 8> {
  static constexpr int kCenter = 128;
  const __m512i flip = _mm512_set1_epi8(int8_t(0x80));
  static constexpr int step(int r, int p) { return r * 2 + p; }
  QPASS_INLINE __m512i plane(const uint8_t* row, int p) const {
    const __m512i v = _mm512_xor_si512(load(row), flip);
    const __m512i a = p ? _mm512_slli_epi32(v, 16) : _mm512_slli_epi32(v, 24);
    const __m512i b = p ? v : _mm512_slli_epi32(v, 8);
    const __m512i low = _mm512_castps_si512(_mm512_cvtepi32_ps(_mm512_srai_epi32(a, 24)));
    const __m512i high = _mm512_castps_si512(_mm512_cvtepi32_ps(_mm512_srai_epi32(b, 24)));
    return _mm512_mask_blend_epi16(0xaaaaaaaau, _mm512_srli_epi32(low, 16), high);
  }
  static constexpr int input(int step, int half) { return 4 * (step / 2) + step % 2 + 2 * half; }
};

// 16 scales of vector v; 16 zeros as int32.
template <class F>
QPASS_INLINE __m512 load_scales(const uint8_t* scales, int v) {
  if constexpr (F::scale_bytes == 2)
    return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)(scales + v * kLanes * 2)));
  else
    return _mm512_loadu_ps(scales + v * kLanes * 4);
}

QPASS_INLINE __m512i load_zeros(const uint8_t* zeros, int v) {
  return _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)(zeros + v * kLanes)));
}

// fp32 <-> the model's dtype, 16 at a time.
template <int Dtype>
QPASS_INLINE __m512 load_float(const void* base, int64_t i, __mmask16 mask = 0xffff) {
  if constexpr (Dtype == QPASS_F32) return _mm512_maskz_loadu_ps(mask, (const float*)base + i);
  const __m256i w = _mm256_maskz_loadu_epi16(mask, (const uint16_t*)base + i);
  if constexpr (Dtype == QPASS_F16) return _mm512_cvtph_ps(w);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(w), 16));
}

// Rounds to nearest even; a NaN stays one.
QPASS_INLINE __m256i to_bf16(__m512 v) {
  const __m512i bits = _mm512_castps_si512(v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  __m512i r = _mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd), 16);
  r = _mm512_mask_mov_epi32(r, _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), _mm512_set1_epi32(0x7fc0));
  return _mm512_cvtepi32_epi16(r);
}

template <int Dtype>
QPASS_INLINE void store_float(void* base, int64_t i, __m512 v, __mmask16 mask) {
  if constexpr (Dtype == QPASS_F32) _mm512_mask_storeu_ps((float*)base + i, mask, v);
  else if constexpr (Dtype == QPASS_F16)
    _mm256_mask_storeu_epi16((uint16_t*)base + i, mask, _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
  else _mm256_mask_storeu_epi16((uint16_t*)base + i, mask, to_bf16(v));
}

}  // namespace qpass
