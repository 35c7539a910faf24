// AVX-512 as a small vocabulary: the dot products, how codes become operands. One vector is
// 16 outputs.
#pragma once
#include "layout.h"
#include "simd.h"

namespace qpass {

QPASS_INLINE __m512i broadcast(const void* p) { return _mm512_set1_epi32(*static_cast<const int32_t*>(p)); }

// The dot products are assembly because GCC 12 copies the accumulator around its own intrinsics and runs out of
// registers.

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

// The same with the activations broadcast by the instruction's own load: no register, no instruction for it.
QPASS_INLINE __m512i dot_at(__m512i acc, __m512i codes, const void* x) {
  __asm__("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(acc) : "v"(codes), "m"(*static_cast<const int32_t*>(x)));
  return acc;
}
QPASS_INLINE __m512 dot_at(__m512 acc, __m512i codes, const void* x) {
#ifdef __AVX512BF16__
  __asm__("vdpbf16ps %2%{1to16%}, %1, %0" : "+v"(acc) : "v"(codes), "m"(*static_cast<const int32_t*>(x)));
  return acc;
#else
  return dot(acc, codes, broadcast(x));
#endif
}

// How a row of packed codes becomes operands. `plane(row, p)` is dot-product operand p of a row; `step(r, p)` is its
// place among the chunk's operands, which is also where the prepared activations keep their inputs.
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

// 4-bit codes as bf16 pairs, less 8, so that the sums stay small. A word of a row holds 4 codes; vpermw looks the
// lowest one up (it reads 5 bits of the index: the table's two halves are alike). Nibble 0 of the words gives inputs
// (4r, 4r + 2), nibble 2 gives (4r + 1, 4r + 3), nibbles 1 and 3 the same of the k4-step r + code_rows.
template <class F>
struct Codes<F, true, 4> {
  static constexpr float kCenter = 8;
  const __m512i table = [] {
    alignas(64) uint16_t t[32];
    for (int i = 0; i < 32; i++) {
      const float v = float(i % 16) - kCenter;
      uint32_t bits;
      __builtin_memcpy(&bits, &v, 4);
      t[i] = uint16_t(bits >> 16);
    }
    return load(t);
  }();
  static constexpr int step(int r, int p) { return r * 4 + p; }
  QPASS_INLINE __m512i plane(const uint8_t* row, int p) const {
    const __m512i w = load(row);
    return _mm512_permutexvar_epi16(p == 0   ? w
                                    : p == 1 ? _mm512_srli_epi16(w, 8)
                                    : p == 2 ? _mm512_srli_epi16(w, 4)
                                             : _mm512_srli_epi16(w, 12),
                                    table);
  }
  static constexpr int input(int step, int half) {  // the input of the chunk behind half 0 or 1 of an operand's pair
    const int r = step / 4, p = step % 4;
    return 4 * (r + (p / 2) * F::code_rows) + (p % 2) + 2 * half;
  }
};

// 8-bit codes as bf16 pairs, less 127.5: that center leaves 128 magnitudes (j + 1/2, exact in bf16) and a sign, so with
// VBMI each half of a bf16 is one lookup of 128 bytes. Plane 0 gives inputs (4r, 4r + 2), plane 1 gives (4r + 1, 4r +
// 3).
template <class F>
struct Codes<F, true, 8> {
  static constexpr float kCenter = 127.5f;
  static constexpr int step(int r, int p) { return r * 2 + p; }
  static constexpr int input(int step, int half) { return 4 * (step / 2) + step % 2 + 2 * half; }
#ifdef __AVX512VBMI__
  struct Table {
    alignas(64) uint8_t upper[128], lower[128];
    constexpr Table() : upper(), lower() {
      for (int j = 0; j < 128; j++) {
        int exponent = 126, top = 1;  // j + 1/2 = (2j + 1) / 2, whose highest bit is `top`
        while (top * 2 <= 2 * j + 1) top *= 2, exponent++;
        const int mantissa = (2 * j + 1 - top) * (128 / top);
        upper[j] = uint8_t(exponent >> 1);
        lower[j] = uint8_t((exponent & 1) << 7 | mantissa);
      }
    }
  };
  static constexpr Table table{};
  const __m512i upper0 = load(table.upper), upper1 = load(table.upper + 64);
  const __m512i lower0 = load(table.lower), lower1 = load(table.lower + 64);
  const __m512i sign = _mm512_set1_epi8(int8_t(0x80));
  QPASS_INLINE __m512i plane(const uint8_t* row, int p) const {
    const __m512i c = load(row);
    // j in the 7 bits that the lookup reads: c - 128 where the top bit is set, else 127 - c. The top bit stays.
#ifdef __GFNI__
    const __m512i j = _mm512_gf2p8affine_epi64_epi8(c, _mm512_set1_epi64(int64_t(0x8182848890a0c080)), 0x7f);
#else
    const __m512i j = _mm512_mask_sub_epi8(c, _mm512_testn_epi8_mask(c, sign), _mm512_set1_epi8(127), c);
#endif
    const __m512i lower = _mm512_permutex2var_epi8(lower0, j, lower1);
    const __m512i magnitude = _mm512_permutex2var_epi8(upper0, j, upper1);
    const __m512i upper = _mm512_ternarylogic_epi32(magnitude, j, sign, 0xf2);  // magnitude | (~j & sign)
    return p ? _mm512_mask_blend_epi8(0xaaaaaaaaaaaaaaaaull, _mm512_srli_epi16(lower, 8), upper)
             : _mm512_mask_blend_epi8(0xaaaaaaaaaaaaaaaaull, lower, _mm512_slli_epi16(upper, 8));
  }
#else
  const __m512 center = _mm512_set1_ps(kCenter);
  const __m512i byte = _mm512_set1_epi32(255);
  QPASS_INLINE __m512i plane(const uint8_t* row, int p) const {
    const __m512i v = p ? _mm512_srli_epi32(load(row), 8) : load(row);
    const __m512i a = _mm512_and_si512(v, byte), b = _mm512_and_si512(_mm512_srli_epi32(v, 16), byte);
    const __m512i low = _mm512_castps_si512(_mm512_sub_ps(_mm512_cvtepi32_ps(a), center));
    const __m512i high = _mm512_castps_si512(_mm512_sub_ps(_mm512_cvtepi32_ps(b), center));
    return _mm512_mask_blend_epi16(0xaaaaaaaau, _mm512_srli_epi32(low, 16), high);
  }
#endif
};

// 16 scales of vector v; 16 zeros as int32.
template <class F>
QPASS_INLINE __m512 load_scales(const uint8_t* scales, int v) {
  if constexpr (F::scale_bytes == 2)
    return load_f16((const uint16_t*)scales + v * kLanes);
  else return load_f32((const float*)scales + v * kLanes);
}

QPASS_INLINE __m512i load_zeros(const uint8_t* zeros, int v) {
  return load_u8(zeros + v * kLanes);
}

}  // namespace qpass
