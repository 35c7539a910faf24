// What one thread of this machine can do at most: dot products, vector instructions, reads. kernels/rates.py runs these
// on all cores at once. Twelve independent accumulators hide the latency of every instruction that is timed.
#include <time.h>
#include "gemm.h"
#ifdef QPASS_AMX
#include "isa_amx.h"
#endif

using namespace qpass;

#define EXPORT extern "C" __attribute__((visibility("default")))

// Zeros, which the compiler must not know.
extern "C" {
__attribute__((visibility("default"))) alignas(64) uint8_t qpass_rate_operands[2][64];
}

namespace {

using Int8 = Format<4, 128, QPASS_A8_TOKEN, 2>;
using Bf16 = Format<4, 128, QPASS_A16, 2>;

double now() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return double(t.tv_sec) + 1e-9 * double(t.tv_nsec);
}

volatile int32_t sink;

// The value changes here, as far as the compiler knows: equal chains are not computed once.
#ifdef __AVX512F__
template <class V>
QPASS_INLINE void touch(V& v) {
  __asm__ volatile("" : "+v"(v));
}
#else
template <class V>
QPASS_INLINE void touch(V& v) {
  __asm__ volatile("" : "+x"(v.a), "+x"(v.b));
}
#endif

}  // namespace

// Named variables, not an array: GCC 12 keeps an array that assembly touches in memory.
#define EACH(DO) DO(0) DO(1) DO(2) DO(3) DO(4) DO(5) DO(6) DO(7) DO(8) DO(9) DO(10) DO(11)
#define DECLARE(c) auto acc##c = zero;
#define STEP(c) acc##c = step(acc##c), touch(acc##c);
#define ADD_UP(c) result = add(result, acc##c);

template <class V, class Step>
QPASS_INLINE double chains(V zero, int64_t repeats, Step step) {
  EACH(DECLARE)
  const double start = now();
  for (int64_t i = 0; i < repeats; i++) {
    EACH(STEP)
  }
  const double seconds = now() - start;
  V result = zero;
  EACH(ADD_UP)
  sink = sink + int(sum(result));
  return seconds;
}

// Twelve int8 dot products of 64 bytes a repeat: 64 multiply-accumulates each.
EXPORT double qpass_rate_int8(int64_t repeats) {
  auto x = load_operand<Int8>(qpass_rate_operands[0]);
  const auto y = broadcast<Int8>(qpass_rate_operands[1]);
  return chains(set(0), repeats, [=](I32 acc) mutable {
    touch(x);  // without VNNI most of a dot product could be computed once
    return dot<Int8>(acc, x, y);
  });
}

// The same of bf16 pairs: 32 multiply-accumulates each.
EXPORT double qpass_rate_bf16(int64_t repeats) {
  const auto x = load_operand<Bf16>(qpass_rate_operands[0]);
  const auto y = broadcast<Bf16>(qpass_rate_operands[1]);
  return chains(set(0.0f), repeats, [=](F32 acc) { return dot<Bf16>(acc, x, y); });
}

// Twelve integer additions on 64 bytes a repeat: what unpacking and folding are made of.
EXPORT double qpass_rate_vector(int64_t repeats) {
  I32 x = load(qpass_rate_operands[0]);
  touch(x);  // or additions of zeros would be none
  return chains(set(0), repeats, [=](I32 acc) { return add(acc, x); });
}

// Reads `bytes` (a multiple of 256) once, in order.
EXPORT double qpass_rate_read(const uint8_t* data, int64_t bytes) {
  I32 a = set(0), b = a, c = a, d = a;
  const double start = now();
  for (int64_t i = 0; i < bytes; i += 256) {
    _mm_prefetch((const char*)data + i + 8192, _MM_HINT_T1);
    _mm_prefetch((const char*)data + i + 8256, _MM_HINT_T1);
    _mm_prefetch((const char*)data + i + 8320, _MM_HINT_T1);
    _mm_prefetch((const char*)data + i + 8384, _MM_HINT_T1);
    a = or_(a, load(data + i)), b = or_(b, load(data + i + 64));
    c = or_(c, load(data + i + 128)), d = or_(d, load(data + i + 192));
  }
  const double seconds = now() - start;
  sink = sink + sum(or_(or_(a, b), or_(c, d)));
  return seconds;
}

#ifdef QPASS_AMX
// Four tile products a repeat: 16 x 16 x 64 multiply-accumulates each. Of numbers, not of zeros: a core multiplies zeros
// at a higher clock, and two threads of a core then don't wait for each other.
EXPORT double qpass_rate_tiles(int64_t repeats, int32_t is_bf16) {
  amx::Config config;
  for (int t = 0; t < amx::kTiles; t++) config.row_bytes[t] = amx::kRowBytes, config.rows[t] = amx::kTileRows;
  amx::load_config(config);
  alignas(64) uint16_t numbers[amx::kTileRows * amx::kRowBytes / 2];
  uint32_t state = 1;
  for (uint16_t& n : numbers) {
    state = state * 1664525 + 1013904223;
    n = uint16_t(is_bf16 ? 0x3f00 | (state >> 16 & 0x80ff) : state >> 16);  // bf16: 0.5 to 2 of either sign
  }
  amx::zero<0>(), amx::zero<1>(), amx::zero<2>(), amx::zero<3>();
  amx::load<4>(numbers, amx::kRowBytes), amx::load<5>(numbers, amx::kRowBytes);
  const double start = now();
  for (int64_t i = 0; i < repeats; i++) {
    if (is_bf16)
      amx::dot_bf16<0, 4, 5>(), amx::dot_bf16<1, 4, 5>(), amx::dot_bf16<2, 4, 5>(), amx::dot_bf16<3, 4, 5>();
    else amx::dot_s8u8<0, 4, 5>(), amx::dot_s8u8<1, 4, 5>(), amx::dot_s8u8<2, 4, 5>(), amx::dot_s8u8<3, 4, 5>();
  }
  const double seconds = now() - start;
  amx::release();
  return seconds;
}
#endif
