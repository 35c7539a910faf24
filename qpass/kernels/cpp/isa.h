// The dot products of this unit's instruction set: one vocabulary, two widths.
//   Codes<F>            how a row of packed codes becomes operands, `plane(row, half, p)`; `center` is what they lack
//   Operand, Sum<F>     of a dot product: 16 outputs times 2 or 4 inputs; its accumulator
//   dot, dot_at         sum += operand x activations of one row, broadcast before or while they are loaded
//   Tuning<F>, abreast  the register tile, and how many rows may be walked in stored order
#pragma once
#include "codes.h"

namespace qpass {

template <bool A16>
struct SumOf {
  using type = I32;
};
template <>
struct SumOf<true> {
  using type = F32;
};
template <class F>
using Sum = typename SumOf<F::a16>::type;

}  // namespace qpass

#ifdef __AVX512F__
#include "isa_avx512.h"
#else
#include "isa_avx2.h"
#endif

namespace qpass {

// 16 scales of vector v; 16 zeros as int32.
template <class F>
QPASS_INLINE F32 load_scales(const uint8_t* scales, int v) {
  if constexpr (F::scale_bytes == 2) return load_f16((const uint16_t*)scales + v * kLanes);
  else return load_f32((const float*)scales + v * kLanes);
}
QPASS_INLINE I32 load_zeros(const uint8_t* zeros, int v) { return load_u8(zeros + v * kLanes); }

}  // namespace qpass
