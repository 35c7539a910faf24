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

// K4-step `step` of the row: a code in each byte.
template <class F>
QPASS_INLINE I32 bytes_of(const uint8_t* row, int half, int step) {
  if constexpr (F::bits == 8) return load(row);
  if constexpr (F::bits == 4) return and_(step ? shr<4>(load(row)) : load(row), set(0x0f0f0f0f));
  if constexpr (F::bits == 3) {
    const I32 n = nibbles<F>(row, half, step % 2);
    return and_(step / 2 ? shr<4>(n) : n, set(0x07070707));
  }
  const I32 w = load(row);
  return and_(step == 0 ? w : step == 1 ? shr<2>(w) : step == 2 ? shr<4>(w) : shr<6>(w), set(0x03030303));
}

// What makes operands of one vector's codes in a chunk: with integer scales (code - zero) * multiple + 128, else nothing.
template <class F, bool Stepped = F::stepped>
struct Steps {
  QPASS_INLINE void read(const uint8_t*, int) {}
  template <class Operand>
  QPASS_INLINE Operand operator()(Operand codes) const {
    return codes;
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
};

}  // namespace qpass
