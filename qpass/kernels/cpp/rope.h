// Rotary position embedding and the cache's writes: q|k|v to rotated queries, keys and values in their slots.
#pragma once
#include "attention_abi.h"
#include "simd.h"

namespace qpass::rope {

template <int Dtype>
struct Kernel {
  static constexpr int64_t size = size_of(Dtype);

  // One head. Every product and sum is rounded by itself, as Inductor's own kernel for the formula does.
  static void rotate(const char* x, const QpassRope& c, const char* cos, const char* sin, char* out) {
    const int64_t half = c.rotated / 2;
    for (int64_t i = 0; i < half; i += kLanes) {
      const int n = int(half - i < kLanes ? half - i : kLanes);
      const F32 left = load_float<Dtype>(x, i, n), right = load_float<Dtype>(x, half + i, n);
      const F32 cos_left = load_float<Dtype>(cos, i, n), cos_right = load_float<Dtype>(cos, half + i, n);
      const F32 sin_left = load_float<Dtype>(sin, i, n), sin_right = load_float<Dtype>(sin, half + i, n);
      store_float<Dtype>(out, i, sub(mul(left, cos_left), mul(right, sin_left)), n);
      store_float<Dtype>(out, half + i, add(mul(right, cos_right), mul(left, sin_right)), n);
    }
    memcpy(out + c.rotated * size, x + c.rotated * size, size_t((c.width - c.rotated) * size));
  }

  static void run(const QpassRope& c, int64_t token) {
    const int64_t row = token / c.queries, query = token % c.queries, slot = c.slots[token];
    const char* x = (const char*)c.qkv + (row * c.qkv_row + query * c.qkv_token) * size;
    const int64_t at = c.table_row * row + c.table_token * query;
    const char *cos = (const char*)c.cos + at * size, *sin = (const char*)c.sin + at * size;
    const int64_t head = c.width * size;
    char* q = (char*)c.out + (row * c.heads * c.queries + query) * head;
    for (int64_t h = 0; h < c.heads; h++, x += head) rotate(x, c, cos, sin, q + h * c.queries * head);
    char* k = (char*)c.keys + (slot * c.key_slot + row * c.key_row) * size;
    for (int64_t h = 0; h < c.shared; h++, x += head) rotate(x, c, cos, sin, k + h * c.key_head * size);
    char* v = (char*)c.values + (slot * c.value_slot + row * c.value_row) * size;
    for (int64_t h = 0; h < c.shared; h++, x += c.value_width * size)
      memcpy(v + h * c.value_head * size, x, size_t(c.value_width * size));
  }
};

inline void run(const QpassRope* c, int64_t token) {
  if (c->dtype == QPASS_F32) Kernel<QPASS_F32>::run(*c, token);
  else if (c->dtype == QPASS_F16) Kernel<QPASS_F16>::run(*c, token);
  else Kernel<QPASS_BF16>::run(*c, token);
}

}  // namespace qpass::rope
