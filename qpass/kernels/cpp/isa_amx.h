// AMX as a small vocabulary over 8 tile registers: 0..3 hold products [16 rows][64 bytes], 4 activations, 5..7 codes.
// Two implementations: the instructions, and a plain C++ emulation for machines without them (-DQPASS_AMX_EMULATED).
#pragma once
#include <stdint.h>
#include <string.h>

namespace qpass::amx {

constexpr int kTiles = 8, kTileRows = 16, kRowBytes = 64;

// The operand of ldtilecfg (Intel SDM, TILECFG).
struct alignas(64) Config {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};
static_assert(sizeof(Config) == 64);

#ifndef QPASS_AMX_EMULATED

// Inline assembly with memory clobbers: GCC before 12.4 drops stores that its own intrinsics should see.
inline void load_config(const Config& c) { __asm__ volatile("ldtilecfg %0" ::"m"(c) : "memory"); }
inline void release() { __asm__ volatile("tilerelease" ::: "memory"); }

template <int T>
inline void zero() {
  __asm__ volatile("tilezero %%tmm%c0" ::"i"(T) : "memory");
}
template <int T>
inline void load(const void* base, int64_t stride) {
  __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(base), "r"(stride), "i"(T) : "memory");
}
template <int T>
inline void store(void* base, int64_t stride) {
  __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(base), "r"(stride), "i"(T) : "memory");
}
// C += A (signed bytes, rows) x B (unsigned bytes, 4 inputs x 16 columns a row).
template <int C, int A, int B>
inline void dot_s8u8() {
  __asm__ volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B) : "memory");
}
// The same with signed B.
template <int C, int A, int B>
inline void dot_s8s8() {
  __asm__ volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B) : "memory");
}
// C += A x B in bf16 pairs.
template <int C, int A, int B>
inline void dot_bf16() {
  __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B) : "memory");
}

#else

struct State {
  Config config;
  alignas(64) uint8_t tile[kTiles][kTileRows][kRowBytes];
};
inline thread_local State state;

inline void load_config(const Config& c) {
  state.config = c;
  memset(state.tile, 0, sizeof state.tile);
}
inline void release() { state.config = Config{0}; }

template <int T>
inline void zero() {
  memset(state.tile[T], 0, sizeof state.tile[T]);
}
template <int T>
inline void load(const void* base, int64_t stride) {
  zero<T>();
  for (int r = 0; r < state.config.rows[T]; r++)
    memcpy(state.tile[T][r], (const char*)base + r * stride, state.config.row_bytes[T]);
}
template <int T>
inline void store(void* base, int64_t stride) {
  for (int r = 0; r < state.config.rows[T]; r++)
    memcpy((char*)base + r * stride, state.tile[T][r], state.config.row_bytes[T]);
}
template <int C, int A, int B, class Byte>
inline void dot_bytes() {
  for (int m = 0; m < state.config.rows[C]; m++)
    for (int k = 0; k < state.config.rows[B]; k++)
      for (int n = 0; n < 16; n++) {
        int32_t c;
        memcpy(&c, state.tile[C][m] + 4 * n, 4);
        for (int i = 0; i < 4; i++) c += int8_t(state.tile[A][m][4 * k + i]) * Byte(state.tile[B][k][4 * n + i]);
        memcpy(state.tile[C][m] + 4 * n, &c, 4);
      }
}
template <int C, int A, int B>
inline void dot_s8u8() {
  dot_bytes<C, A, B, uint8_t>();
}
template <int C, int A, int B>
inline void dot_s8s8() {
  dot_bytes<C, A, B, int8_t>();
}
inline float bf16_at(const uint8_t* p) {
  const uint32_t bits = uint32_t(p[0]) << 16 | uint32_t(p[1]) << 24;
  float v;
  memcpy(&v, &bits, 4);
  return v;
}
template <int C, int A, int B>
inline void dot_bf16() {
  for (int m = 0; m < state.config.rows[C]; m++)
    for (int k = 0; k < state.config.rows[B]; k++)
      for (int n = 0; n < 16; n++) {
        float c;
        memcpy(&c, state.tile[C][m] + 4 * n, 4);
        for (int i = 0; i < 2; i++)
          c += bf16_at(state.tile[A][m] + 4 * k + 2 * i) * bf16_at(state.tile[B][k] + 4 * n + 2 * i);
        memcpy(state.tile[C][m] + 4 * n, &c, 4);
      }
}

#endif

}  // namespace qpass::amx
