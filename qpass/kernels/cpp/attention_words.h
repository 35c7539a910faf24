// Operands of attention's two products as 32-bit words: a pair of bf16 where this CPU multiplies pairs, else one fp32.
// A block of keys becomes a panel [word of the width][64 keys], a block of values one of [word of the keys][width].
#pragma once
#include "attention_abi.h"
#include "simd.h"

namespace qpass::attention {

constexpr int kKeys = 64;  // of a block; blocks are aligned to slot 0
constexpr int kKeyVectors = kKeys / kLanes;

#ifdef __AVX512BF16__
constexpr bool kMultipliesPairs = true;
#else
constexpr bool kMultipliesPairs = false;
#endif
#ifdef QPASS_AMX
constexpr bool kTakesTiles = kMultipliesPairs;
#else
constexpr bool kTakesTiles = false;
#endif

// Dtype of the queries; Codes: keys and values are int8 codes, whose scales are applied to scores and weights.
template <int Dtype_, bool Codes_>
struct Types {
  static constexpr int dtype = Dtype_;
  static constexpr bool codes = Codes_;
  static constexpr bool pairs = kMultipliesPairs && Dtype_ == QPASS_BF16;
  static constexpr int inputs = pairs ? 2 : 1;  // of a word
  static constexpr bool tiles = kTakesTiles && pairs;  // AMX
  static constexpr int element = codes ? 1 : dtype == QPASS_F32 ? 4 : 2;  // bytes
};

constexpr int64_t ceil_to(int64_t n, int64_t step) { return (n + step - 1) / step * step; }
template <class T>
constexpr int64_t words(int64_t inputs) {
  return (inputs + T::inputs - 1) / T::inputs;
}

// acc + a word of each lane x a word. Assembly, since GCC 12 copies the accumulator around its own intrinsic.
template <bool Pairs>
QPASS_INLINE F32 multiply_add(F32 acc, I32 a, I32 b) {
#ifdef __AVX512BF16__
  if constexpr (Pairs) {
    __asm__("vdpbf16ps %2, %1, %0" : "+v"(acc) : "v"(a), "v"(b));
    return acc;
  }
#endif
  return fma(from_bits(a), from_bits(b), acc);
}

QPASS_INLINE I32 broadcast(const uint32_t* word) {
  int32_t w;
  memcpy(&w, word, 4);
  return set(w);
}

// 16 elements of a key or value as fp32; codes are exact in bf16 too. Of `n` < 16 the others are zero.
template <class T>
QPASS_INLINE F32 load_elements(const void* row, int64_t i, int64_t n) {
  if constexpr (!T::codes) return load_float<T::dtype>(row, i, int(n < kLanes ? n : kLanes));
  const int8_t* p = (const int8_t*)row + i;
  if (n >= kLanes) return to_float(load_i8(p));
  alignas(16) int8_t lanes[kLanes] = {};
  memcpy(lanes, p, size_t(n));
  return to_float(load_i8(lanes));
}

// 16 words from `row`, the first of them word w.
template <class T>
QPASS_INLINE I32 load_words(const void* row, int64_t w, int64_t width) {
  const int64_t i = w * T::inputs, n = width - i;
  if constexpr (!T::pairs) return bits(load_elements<T>(row, i, n));
  const char* p = (const char*)row + i * T::element;
  alignas(64) char lanes[2 * kLanes * T::element];
  if (n < 2 * kLanes) {
    memset(lanes, 0, sizeof lanes);
    memcpy(lanes, p, size_t(n * T::element));
    p = lanes;
  }
  if constexpr (!T::codes) return load(p);
  const I32 two = bits(load_bf16((const uint16_t*)p));  // a pair of codes in the upper half, the first one lower
  const I32 first = xor_(and_(shr<16>(two), set(0xff)), set(0x80)), second = xor_(shr<24>(two), set(0x80));
  const F32 center = set(128.0f);
  return or_(shr<16>(bits(sub(to_float(first), center))), bits(sub(to_float(second), center)));
}

#ifdef __AVX512F__
QPASS_INLINE void transpose(I32 (&r)[kLanes]) {
  I32 t[kLanes];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
#pragma GCC unroll 4
  for (int c = 0; c < 4; c++) {
    t[c] = _mm512_shuffle_i32x4(r[c], r[4 + c], 0x88);
    t[4 + c] = _mm512_shuffle_i32x4(r[c], r[4 + c], 0xdd);
    t[8 + c] = _mm512_shuffle_i32x4(r[8 + c], r[12 + c], 0x88);
    t[12 + c] = _mm512_shuffle_i32x4(r[8 + c], r[12 + c], 0xdd);
  }
#pragma GCC unroll 4
  for (int c = 0; c < 4; c++) {
    r[c] = _mm512_shuffle_i32x4(t[c], t[8 + c], 0x88);
    r[4 + c] = _mm512_shuffle_i32x4(t[4 + c], t[12 + c], 0x88);
    r[8 + c] = _mm512_shuffle_i32x4(t[c], t[8 + c], 0xdd);
    r[12 + c] = _mm512_shuffle_i32x4(t[4 + c], t[12 + c], 0xdd);
  }
}
#else
QPASS_INLINE void transpose(__m256i (&r)[8]) {
  __m256i t[8];
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm256_unpackhi_epi32(r[i], r[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {
    r[i] = _mm256_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm256_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm256_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm256_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  for (int c = 0; c < 4; c++) {
    t[c] = _mm256_permute2x128_si256(r[c], r[4 + c], 0x20);
    t[4 + c] = _mm256_permute2x128_si256(r[c], r[4 + c], 0x31);
  }
  for (int i = 0; i < 8; i++) r[i] = t[i];
}
QPASS_INLINE void transpose(I32 (&r)[kLanes]) {
  __m256i quarter[2][2][8];  // [rows][columns]
  for (int i = 0; i < kLanes; i++) quarter[i / 8][0][i % 8] = r[i].a, quarter[i / 8][1][i % 8] = r[i].b;
  for (auto& rows : quarter)
    for (auto& square : rows) transpose(square);
  for (int i = 0; i < kLanes; i++) r[i] = {quarter[0][i / 8][i % 8], quarter[1][i / 8][i % 8]};
}
#endif

// What a block of keys or values is read from: slots [begin, end) are real, the others count as zeros.
struct Slots {
  const char* first;  // of the block, which may lie outside of the tensor
  int64_t stride;     // bytes
  int64_t begin, end;
  bool more;  // another block follows, and may be asked for ahead
  const void* at(int64_t slot) const { return slot >= begin && slot < end ? first + slot * stride : nullptr; }
};

template <class T>
QPASS_INLINE void prefetch(const Slots& s, int64_t slot, int64_t width) {
  if (!s.more) return;
  const char* next = s.first + (slot + kKeys) * s.stride;
  for (int64_t byte = 0; byte < width * T::element; byte += 64) _mm_prefetch(next + byte, _MM_HINT_T1);
}

// panel[word][64 keys], words rounded up to 16.
template <class T>
void pack_keys(const Slots& slots, int64_t width, uint32_t* panel) {
  for (int v = 0; v < kKeyVectors; v++) {
    const int64_t key = v * kLanes;
    const bool none = key + kLanes <= slots.begin || key >= slots.end;
    for (int64_t w = 0; w < words<T>(width); w += kLanes) {
      I32 r[kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; i++) {
        const void* row = none ? nullptr : slots.at(key + i);
        r[i] = row ? load_words<T>(row, w, width) : set(0);
      }
      if (!none) transpose(r);
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; i++) store(panel + (w + i) * kKeys + key, r[i]);
    }
    for (int i = 0; i < kLanes; i++) prefetch<T>(slots, key + i, width);
  }
}

#ifdef __AVX512BW__
// Half 0 or 1 of two rows of bf16 as pairs.
template <int Half>
QPASS_INLINE I32 interleave(I32 a, I32 b) {
  alignas(64) static constexpr auto kOrder = [] {
    struct {
      uint16_t at[32];
    } order{};
    for (int i = 0; i < 32; i++) order.at[i] = uint16_t(Half * 16 + i / 2 + i % 2 * 32);
    return order;
  }();
  return _mm512_permutex2var_epi16(a, load(&kOrder), b);
}
#endif

// panel[word of the keys][stride], of which `width` rounded up to 16 are written; words behind the last are zeros up to a
// whole tile.
template <class T>
void pack_values(const Slots& slots, int64_t width, int64_t stride, uint32_t* panel) {
  auto load_at = [&](const void* row, int64_t i) { return row ? bits(load_elements<T>(row, i, width - i)) : set(0); };
  constexpr int64_t whole = T::inputs * (T::tiles ? 16 : 1);
  for (int64_t key = 0; key < ceil_to(slots.end, whole); key += T::inputs, panel += stride) {
    const void* row = slots.at(key);
    const void* next = T::pairs ? slots.at(key + 1) : nullptr;
    int64_t i = 0;
#ifdef __AVX512BW__
    if constexpr (T::pairs && !T::codes)
      for (; i + 2 * kLanes <= width; i += 2 * kLanes) {
        const I32 a = row ? load((const uint16_t*)row + i) : set(0), b = next ? load((const uint16_t*)next + i) : set(0);
        store(panel + i, interleave<0>(a, b));
        store(panel + i + kLanes, interleave<1>(a, b));
      }
#endif
    for (; i < width; i += kLanes)
      store(panel + i, T::pairs ? or_(shr<16>(load_at(row, i)), load_at(next, i)) : load_at(row, i));
    for (int i = 0; i < T::inputs; i++) prefetch<T>(slots, key + i, width);
  }
}

}  // namespace qpass::attention
