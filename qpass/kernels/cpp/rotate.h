// Rotation by the Hadamard matrix of 64, over its root: what is large in one of 64 values becomes a little in all of them,
// and their length stays (QuaRot, arXiv 2404.00456). It is its own inverse.
#pragma once
#include "simd.h"

namespace qpass {

constexpr int kRotated = 64;
constexpr int64_t kMostRotated = 32768;  // inputs of a row, which is held on the stack

// Sums of lanes `Stride` apart in the lower of the two, differences in the upper.
template <int Stride>
QPASS_INLINE F32 butterfly(F32 v) {
  static constexpr auto signs = [] {
    struct { alignas(64) int32_t of[kLanes]; } s{};
    for (int i = 0; i < kLanes; i++) s.of[i] = i & Stride ? int32_t(0x80000000) : 0;
    return s;
  }();
  return add(swapped<Stride>(v), from_bits(xor_(bits(v), load(signs.of))));
}

QPASS_INLINE void rotate(F32 (&v)[kRotated / kLanes]) {
  for (F32& each : v) each = butterfly<8>(butterfly<4>(butterfly<2>(butterfly<1>(each))));
  for (int stride = 1; stride < kRotated / kLanes; stride *= 2)
    for (int i = 0; i < kRotated / kLanes; i++)
      if (!(i & stride)) {
        const F32 low = v[i], high = v[i + stride];
        v[i] = add(low, high);
        v[i + stride] = sub(low, high);
      }
  for (F32& each : v) each = mul(each, set(0.125f));
}

}  // namespace qpass
