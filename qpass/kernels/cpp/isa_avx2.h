// AVX2: a vector of 16 outputs is a pair of registers. With or without the 256-bit VNNI (AVX-VNNI).
#pragma once
#include "codes.h"

namespace qpass {

template <class F>
constexpr int abreast(int rows, bool) {
  const int most = F::stepped ? 2 : 4;  // steps take registers
  return rows == 1 ? most : rows == 2 ? most / 2 : 1;
}

template <class F>
struct Tuning {
  static constexpr bool holds_totals = false;
  static constexpr int panel_tile_rows = 4, tile_rows = 4;  // 8 sums leave 8 of the 16 registers for operands
  static constexpr int linear_rows = 1;
};

// a * b where the lanes of a and b fit 16 bits and a's upper halves are zero.
QPASS_INLINE I32 product16(I32 a, I32 b) { return {_mm256_madd_epi16(a.a, b.a), _mm256_madd_epi16(a.b, b.b)}; }

// Codes of 2 inputs as fp32, and the activations that meet them: bf16 pairs in memory.
struct Pair {
  F32 low, high;
};
struct PairOfRow {
  __m256 low, high;
};
template <bool A16>
struct Types {
  using Operand = I32;
  using Row = __m256i;
};
template <>
struct Types<true> {
  using Operand = Pair;
  using Row = PairOfRow;
};
template <class F>
using OperandOf = typename Types<F::a16>::Operand;

template <class F>
QPASS_INLINE typename Types<F::a16>::Row broadcast(const void* p) {
  const __m256i x = _mm256_set1_epi32(*static_cast<const int32_t*>(p));
  if constexpr (F::a16)
    return {_mm256_castsi256_ps(_mm256_slli_epi32(x, 16)),
            _mm256_castsi256_ps(_mm256_and_si256(x, _mm256_set1_epi32(int32_t(0xffff0000))))};
  else return x;
}

// A panel holds what AVX-512 multiplies: bytes, or pairs of bf16, in which centered codes are exact.
template <class F>
QPASS_INLINE OperandOf<F> load_operand(const uint8_t* p) {
  const I32 v = load(p);
  if constexpr (F::a16) return {from_bits(shl<16>(v)), from_bits(and_(v, set(int32_t(0xffff0000))))};
  else return v;
}
QPASS_INLINE void store_operand(uint8_t* p, I32 v) { store(p, v); }
QPASS_INLINE void store_operand(uint8_t* p, Pair v) { store(p, or_(shr<16>(bits(v.low)), bits(v.high))); }

// sum[n] += over 4 inputs, unsigned code x signed activation.
template <class F>
QPASS_INLINE __m256i dot8(__m256i sum, __m256i codes, __m256i x) {
#ifdef QPASS_AVX_VNNI
#ifdef QPASS_AVX_VNNI_EMULATED
  __asm__("%{evex%} vpdpbusd %2, %1, %0" : "+x"(sum) : "x"(codes), "x"(x));
#else
  __asm__("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sum) : "x"(codes), "x"(x));
#endif
  return sum;
#else
  // vpmaddubsw saturates at 16 bits. Codes below 16 can't reach that; 8-bit ones, less 128, as magnitude x signed
  // activation: 2 * 128 * 127 fits.
  if constexpr (F::operand_bits == 8) {
    codes = _mm256_xor_si256(codes, _mm256_set1_epi8(int8_t(0x80)));
    x = _mm256_sign_epi8(x, codes);
    codes = _mm256_abs_epi8(codes);
  }
  return _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(codes, x), _mm256_set1_epi16(1)));
#endif
}
template <class F>
QPASS_INLINE I32 dot(I32 sum, I32 codes, __m256i x) {
  return {dot8<F>(sum.a, codes.a, x), dot8<F>(sum.b, codes.b, x)};
}

// sum[n] += over 2 inputs, in the order of AVX-512 without BF16.
template <class F>
QPASS_INLINE F32 dot(F32 sum, Pair codes, PairOfRow x) {
  sum = fma(codes.high, F32{x.high, x.high}, sum);
  return fma(codes.low, F32{x.low, x.low}, sum);
}

template <class F>
QPASS_INLINE Sum<F> dot_at(Sum<F> sum, OperandOf<F> codes, const void* x) {
  return dot<F>(sum, codes, broadcast<F>(x));
}

// With int8 activations operands are the codes themselves.
template <class F, bool A16 = F::a16>
struct Codes : Operands<F> {
#ifdef QPASS_AVX_VNNI
  static constexpr int center = 0;
#else
  static constexpr int center = F::operand_bits == 8 ? 128 : 0;
#endif
  QPASS_INLINE I32 plane(const uint8_t* row, int half, int p) const { return bytes_of<F>(row, half, p); }
};

// Codes less the middle one, so that the sums stay small: signed bytes, widened where they are.
template <class F>
struct Codes<F, true> : Operands<F> {
  static constexpr int center = 1 << (F::bits - 1);
  template <int Byte>
  QPASS_INLINE static __m256 widen(__m256i v) {
    if constexpr (Byte < 3) v = _mm256_slli_epi32(v, 24 - 8 * Byte);
    return _mm256_cvtepi32_ps(_mm256_srai_epi32(v, 24));
  }
  QPASS_INLINE Pair plane(const uint8_t* row, int half, int p) const {
    const I32 v = bytes_of<F>(row, half, p / 2);
    const __m256i middle = _mm256_set1_epi8(int8_t(center));
    const I32 c = {_mm256_sub_epi8(v.a, middle), _mm256_sub_epi8(v.b, middle)};
    if (p % 2) return {{widen<1>(c.a), widen<1>(c.b)}, {widen<3>(c.a), widen<3>(c.b)}};
    return {{widen<0>(c.a), widen<0>(c.b)}, {widen<2>(c.a), widen<2>(c.b)}};
  }
};

}  // namespace qpass
