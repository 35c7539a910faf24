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
// The same for what is read once: it needn't push anything out of the L1 cache.
template <int T>
inline void stream(const void* base, int64_t stride) {
  __asm__ volatile("tileloaddt1 (%0,%1,1), %%tmm%c2" ::"r"(base), "r"(stride), "i"(T) : "memory");
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
inline void stream(const void* base, int64_t stride) {
  load<T>(base, stride);
}
template <int T>
inline void store(void* base, int64_t stride) {
  for (int r = 0; r < state.config.rows[T]; r++)
    memcpy((char*)base + r * stride, state.tile[T][r], state.config.row_bytes[T]);
}
// Rows of 16 columns as local arrays, which the compiler makes vectors of: tests spend minutes here otherwise.
template <int C, int A, int B, class Byte>
inline void dot_bytes() {
  State& s = state;
  for (int m = 0; m < s.config.rows[C]; m++) {
    int32_t c[16];
    memcpy(c, s.tile[C][m], sizeof c);
    for (int k = 0; k < s.config.rows[B]; k++) {
      const int8_t* a = (const int8_t*)s.tile[A][m] + 4 * k;
      const Byte* b = (const Byte*)s.tile[B][k];
      for (int n = 0; n < 16; n++)
        c[n] += a[0] * b[4 * n] + a[1] * b[4 * n + 1] + a[2] * b[4 * n + 2] + a[3] * b[4 * n + 3];
    }
    memcpy(s.tile[C][m], c, sizeof c);
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
inline float upper_half(uint32_t word) {
  const uint32_t bits = word & 0xffff0000;
  float v;
  memcpy(&v, &bits, 4);
  return v;
}
template <int C, int A, int B>
inline void dot_bf16() {
  State& s = state;
  for (int m = 0; m < s.config.rows[C]; m++) {
    float c[16];
    uint32_t a[16], b[16];
    memcpy(c, s.tile[C][m], sizeof c);
    memcpy(a, s.tile[A][m], sizeof a);
    for (int k = 0; k < s.config.rows[B]; k++) {
      memcpy(b, s.tile[B][k], sizeof b);
      for (int n = 0; n < 16; n++) {
        c[n] += upper_half(a[k] << 16) * upper_half(b[n] << 16);
        c[n] += upper_half(a[k]) * upper_half(b[n]);
      }
    }
    memcpy(s.tile[C][m], c, sizeof c);
  }
}

#endif

// Operands that are done with. While the other thread of a core multiplies tiles too, loading a register that holds one
// already takes as long as the product before; loading one that was cleared does not (docs/decisions.md).
template <int... T>
inline void done() {
  (zero<T>(), ...);
}

}  // namespace qpass::amx
