// One output's weights out of the packed form: a row of an embedding table that is also the head's matrix.
#pragma once
#include <string.h>
#include <type_traits>
#include "layout.h"

namespace qpass {

// The code of output 16 * vector + lane and input k of a chunk (layout.h).
template <class F>
inline int code_at(const uint8_t* chunk, int vector, int lane, int k) {
  static_assert(F::bits == 2 || F::bits == 3 || F::bits == 4 || F::bits == 8);
  constexpr int row_steps = F::bits == 8 ? 1 : F::bits == 4 ? 2 : 4, rows = F::chunk / 4 / row_steps;
  const int step = k / 4, byte = lane * 4 + k % 4;
  const int row = vector * rows + (F::bits == 4 ? step % rows : step / row_steps);
  if constexpr (F::bits == 8) return chunk[row * kRow + byte];
  if constexpr (F::bits == 4) return chunk[row * kRow + byte] >> step / rows * 4 & 15;
  if constexpr (F::bits == 2) return chunk[row * kRow + byte] >> step % 4 * 2 & 3;
  const uint8_t* pair = chunk + row / 2 * 3 * kRow + byte;  // two rows of lower bits, one of the third bits of both
  const int third = step % 4 / 2 * 4 + step % 2 + (row % 2 ? 0 : 2);
  return (pair[row % 2 * kRow] >> step % 4 * 2 & 3) | (pair[2 * kRow] >> third & 1) << 2;
}

template <class Stored>
inline float value_at(const uint8_t* values, int output) {
  Stored value;
  memcpy(&value, values + output * sizeof(Stored), sizeof(Stored));
  return float(value);
}

// The code's distance from its zero: times the group's multiple where scales are integers.
template <class F>
inline float distance_at(const uint8_t* chunk, int vector, int lane, int k, float zero) {
  const int code = code_at<F>(chunk, vector, lane, k);
  if constexpr (!F::stepped) return float(code) - zero;
  const int step = chunk[F::steps_at + vector * kLanes + lane];
  return float((code - (step >> 4)) * (step & 15));
}

// (code - zero) * scale of all `k` inputs of output `row` (0 <= row < n), as QWeight.dequantize() has them.
template <class F>
void gather_row(const uint8_t* packed, int64_t n, int64_t k, int32_t glu, int64_t row, float* out) {
  int64_t block = row / kBlock, output = row % kBlock;
  if (glu) {
    const int64_t half = row >= n / 2, within = half ? row - n / 2 : row;
    block = within / kBlock * 2 + half, output = within % kBlock;
  }
  const uint8_t* record = packed + block * F::block_bytes(k);
  const int64_t length = F::grouped ? F::group : F::padded_k(k), codes = F::group_codes(k);
  const int lane = int(output % kLanes), vector = int(output / kLanes);
  for (int64_t begin = 0; begin < k; begin += length, record += F::group_bytes(k)) {
    const float scale = value_at<std::conditional_t<F::scale_bytes == 2, _Float16, float>>(record + codes, int(output));
    const float zero = value_at<std::conditional_t<F::float_zeros, float, uint8_t>>(
        record + codes + kBlock * F::scale_bytes, int(output));
    const int64_t end = begin + length < k ? begin + length : k;
    for (int64_t i = begin; i < end; i++) {
      const uint8_t* chunk = record + (i - begin) / F::chunk * F::chunk_bytes;
      out[i] = distance_at<F>(chunk, vector, lane, int((i - begin) % F::chunk), zero) * scale;
    }
  }
}

}  // namespace qpass
