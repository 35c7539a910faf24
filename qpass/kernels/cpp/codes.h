// Packed codes to bytes, in any instruction set: one k4-step of 16 outputs, what an int8 dot product takes.
#pragma once
#include "layout.h"

namespace qpass {

// Where row `row` of a chunk begins (of kVectors * code_rows, third bits not counted); `half` is row % 2.
template <class F>
QPASS_INLINE const uint8_t* row_of(const uint8_t* chunk, int row, int half) {
  return chunk + (F::bits == 3 ? (row - half) / 2 * 3 + half : row) * kRow;
}

QPASS_INLINE I32 select_bits(I32 mask, I32 yes, I32 no) {
#ifdef __AVX512F__
  return _mm512_ternarylogic_epi32(mask, yes, no, 0xca);
#else
  return xor_(no, and_(mask, xor_(yes, no)));
#endif
}

// With 3 bits: two k4-steps of a row as nibbles whose top bits are to be ignored. Odd 0: k4-steps 0 and 2, odd 1: 1 and
// 3.
template <class F>
QPASS_INLINE I32 nibbles(const uint8_t* row, int half, int odd) {
  const I32 pairs = load(row), thirds = load(row + (2 - half) * kRow), low = set(0x33333333);
  if (odd) return select_bits(low, shr<2>(pairs), half ? shl<1>(thirds) : shr<1>(thirds));
  return select_bits(low, pairs, half ? shl<2>(thirds) : thirds);
}

// Where in a byte k4-step `step` of a row lies, in bits from below.
template <class F>
constexpr int place_of(int step) {
  return F::bits == 4 ? 4 * step : F::bits == 3 ? step / 2 * 4 : F::bits == 2 ? 2 * step : 0;
}

// K4-step `step` of the row where it lies in each byte, with other bits around it.
template <class F>
QPASS_INLINE I32 codes_of(const uint8_t* row, int half, int step) {
  if constexpr (F::bits == 3) return nibbles<F>(row, half, step % 2);
  else return load(row);
}

QPASS_INLINE I32 shifted(I32 v, int bits) { return bits == 2 ? shr<2>(v) : bits == 4 ? shr<4>(v) : bits == 6 ? shr<6>(v) : v; }

// K4-step `step` of the row: a code in each byte.
template <class F>
QPASS_INLINE I32 bytes_of(const uint8_t* row, int half, int step) {
  const I32 codes = codes_of<F>(row, half, step);
  if constexpr (F::bits == 8) return codes;
  return and_(shifted(codes, place_of<F>(step)), set(int32_t(0x01010101u * ((1u << F::bits) - 1))));
}

// What makes operands of one vector's codes in a chunk: with integer scales (code - zero) * multiple + 128, else nothing.
template <class F, bool Stepped = F::stepped>
struct Steps {
  QPASS_INLINE void read(const uint8_t*, int) {}
  template <class Operand>
  QPASS_INLINE Operand operator()(Operand codes) const {
    return codes;
  }
  template <class Codes>
  QPASS_INLINE auto operand(const Codes& codes, const uint8_t* row, int half, int p) const {
    return codes.plane(row, half, p);
  }
};
template <class F>
struct Steps<F, true> {
  I32 times, less;
  QPASS_INLINE void read(const uint8_t* chunk, int v) {
    const I32 both = times4(load_u8(chunk + F::steps_at + v * kLanes));
    times = and_(both, set(0x000f000f));
    less = sub8(mul16(and_(shr<4>(both), set(0x0f0f0f0f)), times), set(int32_t(0x80808080)));
  }
  // Two bytes a 16-bit product: neither exceeds 15 * 15.
  QPASS_INLINE I32 operator()(I32 codes) const { return sub8(mul16(codes, times), less); }
  // The same of plane p of a row. The upper half of a product with 16 times as much has codes of upper nibbles where they
  // belong, without a shift.
  template <class Codes>
  QPASS_INLINE I32 operand(const Codes& codes, const uint8_t* row, int half, int p) const {
    constexpr int32_t mask = int32_t(0x10101010u * ((1u << F::bits) - 1));
    if (place_of<F>(p) != 4) return (*this)(codes.plane(row, half, p));
    return sub8(mulhi16(and_(codes_of<F>(row, half, p), set(mask)), shl<12>(times)), less);
  }
};

}  // namespace qpass
