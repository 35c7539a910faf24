// AVX-512: a vector of 16 outputs is one register. With or without VNNI, BF16, VBMI and GFNI.
#pragma once
#include "codes.h"

namespace qpass {

using Operand = I32;

// Vectors of a tile whose 24 sums, or 12 sums and their totals, are in registers: that leaves 8 of 32 for operands and
// lookup tables. Steps take registers too.
template <class F>
constexpr int abreast(int rows, bool held) { return held || (F::stepped && rows > 3) ? 2 : 4; }

// Measured on Zen 4.
template <class F>
struct Tuning {
  static constexpr bool holds_totals = true;
  // Making bytes of 3 bits takes registers.
  static constexpr int panel_tile_rows = 6, tile_rows = F::bits == 3 && !F::a16 ? 4 : 6;
  // Up to here the weights are read in the order they lie in, which the hardware prefetches best by itself (31 GB/s a
  // thread against 22). More rows, and bf16 with its longer latency, need several sums in flight: four vectors abreast.
  static constexpr int linear_rows = F::a16 ? 0 : F::bits == 8 ? 6 : 2;
};

// a * b where the lanes of a and b fit 16 bits and a's upper halves are zero.
QPASS_INLINE I32 product16(I32 a, I32 b) { return _mm512_madd_epi16(a, b); }

template <class F>
QPASS_INLINE I32 broadcast(const void* p) { return set(*static_cast<const int32_t*>(p)); }
template <class F>
QPASS_INLINE Operand load_operand(const uint8_t* p) { return load(p); }
QPASS_INLINE void store_operand(uint8_t* p, Operand v) { store(p, v); }

// The dot products are assembly because GCC 12 copies the sum around its own intrinsics and runs out of registers.

// sum[n] += over 4 inputs, unsigned code x signed activation.
template <class F>
QPASS_INLINE I32 dot(I32 sum, Operand codes, I32 x) {
#ifdef __AVX512VNNI__
  __asm__("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(codes), "v"(x));
  return sum;
#else
  // vpmaddubsw saturates at 16 bits. Codes below 16 can't reach that; 8-bit ones, less 128, as magnitude x signed
  // activation: 2 * 128 * 127 fits.
  if constexpr (F::operand_bits == 8) {
    codes = xor_(codes, set(int32_t(0x80808080)));
    x = _mm512_mask_sub_epi8(x, _mm512_movepi8_mask(codes), set(0), x);
    codes = _mm512_abs_epi8(codes);
  }
  return add(sum, _mm512_madd_epi16(_mm512_maddubs_epi16(codes, x), set(0x00010001)));
#endif
}

// sum[n] += over 2 inputs, bf16 code x bf16 activation.
template <class F>
QPASS_INLINE F32 dot(F32 sum, Operand codes, I32 x) {
#ifdef __AVX512BF16__
  __asm__("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(codes), "v"(x));
  return sum;
#else
  const I32 high = set(int32_t(0xffff0000));
  sum = fma(from_bits(and_(codes, high)), from_bits(and_(x, high)), sum);
  return fma(from_bits(shl<16>(codes)), from_bits(shl<16>(x)), sum);
#endif
}

// The same with the activations broadcast by the instruction's own load: no register, no instruction for it.
template <class F>
QPASS_INLINE I32 dot_at(I32 sum, Operand codes, const void* x) {
#ifdef __AVX512VNNI__
  __asm__("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(codes), "m"(*static_cast<const int32_t*>(x)));
  return sum;
#else
  return dot<F>(sum, codes, broadcast<F>(x));
#endif
}
template <class F>
QPASS_INLINE F32 dot_at(F32 sum, Operand codes, const void* x) {
#ifdef __AVX512BF16__
  __asm__("vdpbf16ps %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(codes), "m"(*static_cast<const int32_t*>(x)));
  return sum;
#else
  return dot<F>(sum, codes, broadcast<F>(x));
#endif
}

// With int8 activations operands are the codes themselves.
template <class F, bool A16 = F::a16, int Bits = F::bits>
struct Codes : Operands<F> {
#ifdef __AVX512VNNI__
  static constexpr int center = 0;
#else
  static constexpr int center = F::operand_bits == 8 ? 128 : 0;
#endif
  QPASS_INLINE Operand plane(const uint8_t* row, int half, int p) const { return bytes_of<F>(row, half, p); }
};

// The bf16 of (i >> shift) % codes, less the center so that the sums stay small.
template <class Codes, int Shift>
struct Bf16Table {
  alignas(64) uint16_t entry[32];
  constexpr Bf16Table() : entry() {
    for (int i = 0; i < 32; i++)
      entry[i] = uint16_t(__builtin_bit_cast(uint32_t, float((i >> Shift) % Codes::count) - Codes::center) >> 16);
  }
};
template <class Codes, int Shift = 0>
QPASS_INLINE I32 bf16_table() {
  static constexpr Bf16Table<Codes, Shift> table;
  return load(table.entry);
}

template <int Bits>
QPASS_INLINE I32 shr16(I32 v) {
  if constexpr (Bits == 0) return v;
  else return _mm512_srli_epi16(v, Bits);
}

// Codes below 16 as bf16 pairs: vpermw looks the lowest bits of each word up (it reads 5 of them: the table repeats).
// Byte 0 of the words gives inputs (0, 2) of a k4-step, byte 1 inputs (1, 3).
template <class F>
struct Codes<F, true, 4> : Operands<F> {
  static constexpr int count = 16;
  static constexpr float center = 8;
  const I32 table = bf16_table<Codes>();
  QPASS_INLINE Operand plane(const uint8_t* row, int, int p) const {
    const I32 w = load(row);
    return _mm512_permutexvar_epi16(p == 0 ? w : p == 1 ? shr16<8>(w) : p == 2 ? shr16<4>(w) : shr16<12>(w), table);
  }
};

template <class F>
struct Codes<F, true, 3> : Operands<F> {
  static constexpr int count = 8;
  static constexpr float center = 3.5f;
  const I32 table = bf16_table<Codes>();
  QPASS_INLINE Operand plane(const uint8_t* row, int half, int p) const {
    const I32 n = nibbles<F>(row, half, p / 2 % 2);
    const int shift = p / 4 * 4 + p % 2 * 8;
    return _mm512_permutexvar_epi16(
        shift == 0 ? n : shift == 8 ? shr16<8>(n) : shift == 4 ? shr16<4>(n) : shr16<12>(n), table);
  }
};

// Two codes are within vpermw's reach: a second table looks up the upper one and saves its shift.
template <class F>
struct Codes<F, true, 2> : Operands<F> {
  static constexpr int count = 4;
  static constexpr float center = 1.5f;
  const I32 lower = bf16_table<Codes>(), upper = bf16_table<Codes, 2>();
  QPASS_INLINE Operand plane(const uint8_t* row, int, int p) const {
    const I32 w = load(row);
    const int shift = p / 4 * 4 + p % 2 * 8;
    return _mm512_permutexvar_epi16(
        shift == 0 ? w : shift == 8 ? shr16<8>(w) : shift == 4 ? shr16<4>(w) : shr16<12>(w), p / 2 % 2 ? upper : lower);
  }
};

// 8-bit codes as bf16 pairs, less 127.5: that center leaves 128 magnitudes (j + 1/2, exact in bf16) and a sign, so with
// VBMI each half of a bf16 is one lookup of 128 bytes. Plane 0 gives inputs (4r, 4r + 2), plane 1 gives (4r + 1, 4r +
// 3).
template <class F>
struct Codes<F, true, 8> : Operands<F> {
  static constexpr float center = 127.5f;
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
  QPASS_INLINE I32 plane(const uint8_t* row, int, int p) const {
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
  const __m512 middle = set(center);
  const __m512i byte = _mm512_set1_epi32(255);
  QPASS_INLINE I32 plane(const uint8_t* row, int, int p) const {
    const __m512i v = p ? _mm512_srli_epi32(load(row), 8) : load(row);
    const __m512i a = _mm512_and_si512(v, byte), b = _mm512_and_si512(_mm512_srli_epi32(v, 16), byte);
    const __m512i low = _mm512_castps_si512(_mm512_sub_ps(_mm512_cvtepi32_ps(a), middle));
    const __m512i high = _mm512_castps_si512(_mm512_sub_ps(_mm512_cvtepi32_ps(b), middle));
    return _mm512_mask_blend_epi16(0xaaaaaaaau, _mm512_srli_epi32(low, 16), high);
  }
#endif
};

}  // namespace qpass
