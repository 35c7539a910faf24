// torch's view of what stands between q|k|v and attention: checks everything it is given, slots first of all.
#pragma once
#include "binding_attention.h"

namespace {

namespace rope {

constexpr const char* op = "rope_append";
using Optional = std::optional<Tensor>;
constexpr int64_t kAlone = 32;  // tokens that one thread does sooner than it wakes another

// cos or sin, dense: [batch or 1][queries][rotated].
Tensor table_of(const char* name, const Tensor& t, const QpassRope& c) {
  CHECK(t.is_cpu() && dtype_of(t) == c.dtype, name, " must have qkv's dtype and device");
  CHECK(t.dim() == 3 && (t.size(0) == c.batch || t.size(0) == 1) && t.size(1) == c.queries, name, " has shape ",
        shape_of(t), "; accepted: [", c.batch, " or 1, ", c.queries, ", rotated columns]");
  CHECK(t.size(2) % 2 == 0 && t.size(2) <= c.width, name, " rotates ", t.size(2), " columns of ", c.width,
        "; accepted: an even number of them");
  return t.is_contiguous() ? t : torch::stable::contiguous(t);
}

void check_cache(const char* name, const Tensor& t, const QpassRope& c) {
  CHECK(t.is_cpu() && dtype_of(t) == c.dtype, name, " must have qkv's dtype and device");
  CHECK(t.dim() == 4 && t.size(1) == c.batch && t.size(3) >= 1, name, " has shape ", shape_of(t), "; accepted: [slots, ",
        c.batch, ", heads, width]");
  CHECK(t.size(3) == 1 || t.stride(3) == 1, name, " must be dense in its last dimension");
}

Tensor rope_append(Tensor qkv, Optional cos, Optional sin, Tensor slots, Tensor keys, Tensor values) {
  CHECK(qkv.is_cpu() && qkv.dim() == 3, "qkv must be [batch, tokens, columns] on the CPU");
  QpassRope c{};
  c.dtype = dtype_of(qkv);
  CHECK(c.dtype >= 0, "qkv must be float32, bfloat16 or float16");
  if (qkv.size(2) > 1 && qkv.stride(2) != 1) qkv = torch::stable::contiguous(qkv);
  c.batch = qkv.size(0), c.queries = qkv.size(1);
  check_cache("keys", keys, c);
  check_cache("values", values, c);
  CHECK(keys.size(0) == values.size(0) && keys.size(2) == values.size(2), "keys ", shape_of(keys), " and values ",
        shape_of(values), " must have the same slots and heads");
  c.shared = keys.size(2), c.width = keys.size(3), c.value_width = values.size(3);
  const int64_t rest = qkv.size(2) - c.shared * (c.width + c.value_width);
  CHECK(rest >= c.width && rest % c.width == 0, "qkv has ", qkv.size(2), " columns, which is no number of query heads beside ",
        c.shared, " keys of ", c.width, " and values of ", c.value_width);
  c.heads = rest / c.width;
  CHECK(cos.has_value() == sin.has_value(), "cos and sin come together");
  if (cos) {
    cos = table_of("cos", *cos, c), sin = table_of("sin", *sin, c);
    CHECK(cos->size(0) == sin->size(0) && cos->size(2) == sin->size(2), "cos has shape ", shape_of(*cos), ", sin ",
          shape_of(*sin));
    c.cos = cos->const_data_ptr(), c.sin = sin->const_data_ptr();
    c.rotated = cos->size(2), c.table_token = c.rotated, c.table_row = cos->size(0) == 1 ? 0 : c.queries * c.rotated;
  }
  CHECK(slots.is_cpu() && slots.scalar_type() == ScalarType::Long && slots.dim() == 2 && slots.size(0) == c.batch &&
            slots.size(1) == c.queries,
        "slots must be int64 [", c.batch, ", ", c.queries, "] on the CPU");
  if (!slots.is_contiguous()) slots = torch::stable::contiguous(slots);
  c.slots = static_cast<const int64_t*>(slots.const_data_ptr());
  const int64_t count = c.batch * c.queries;
  for (int64_t i = 0; i < count; i++)
    CHECK(c.slots[i] >= 0 && c.slots[i] < keys.size(0), "slot ", c.slots[i], " is outside of a cache of ", keys.size(0));
  const QpassAttention* table = attention::kernel.load(std::memory_order_acquire);
  CHECK(table != nullptr, "no kernel is loaded (qpass.kernels.attention_unit.ensure loads it)");

  Tensor out = empty({c.batch, c.heads, c.queries, c.width}, c.dtype);
  if (count == 0) return out;
  c.qkv = qkv.const_data_ptr(), c.qkv_row = qkv.stride(0), c.qkv_token = qkv.stride(1);
  c.keys = keys.mutable_data_ptr(), c.values = values.mutable_data_ptr(), c.out = out.mutable_data_ptr();
  c.key_slot = keys.stride(0), c.key_row = keys.stride(1), c.key_head = keys.stride(2);
  c.value_slot = values.stride(0), c.value_row = values.stride(1), c.value_head = values.stride(2);
  auto work = [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) table->rope(&c, i);
  };
  if (count < kAlone) work(0, count);
  else spread(count, work);
  return out;
}

}  // namespace rope

}  // namespace
