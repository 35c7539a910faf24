// torch's view of the attention kernel: checks everything it is given, lends memory and threads.
#pragma once
#include <algorithm>

#include "attention_abi.h"
#include "binding.h"

namespace {

namespace attention {

constexpr const char* op = "attention";

using Optional = std::optional<Tensor>;

std::atomic<const QpassAttention*> kernel{nullptr};
thread_local Scratch spans, partials;  // of the calling thread, read by the workers

bool has_shape(const Tensor& t, std::initializer_list<int64_t> shape) {
  if (t.dim() != int64_t(shape.size())) return false;
  int64_t d = 0;
  for (int64_t size : shape)
    if (t.size(d++) != size) return false;
  return true;
}

// [batch][heads][tokens][width] by its strides; a tensor whose last dimension isn't dense is copied.
QpassHeads heads_of(const Tensor& t, Optional& copy) {
  if (t.size(3) > 1 && t.stride(3) != 1) copy = torch::stable::contiguous(t);
  const Tensor& dense = copy ? *copy : t;
  return {dense.const_data_ptr(), dense.stride(0), dense.stride(1), dense.stride(2)};
}

const float* of_heads(const char* name, const Optional& given, int64_t heads, std::vector<float>& copy) {
  if (!given) return nullptr;
  const Tensor& t = *given;
  CHECK(t.is_cpu() && t.scalar_type() == ScalarType::Float && has_shape(t, {heads}), name,
        " must be float32 on the CPU, one a head, not ", shape_of(t));
  const float* data = static_cast<const float*>(t.const_data_ptr());
  for (int64_t i = 0; i < heads; i++) copy.push_back(data[i * t.stride(0)]);
  return copy.data();
}

// Spans within [0, slots], none of negative length.
const int32_t* spans_of(const Tensor& t, const QpassAttentionCall& call) {
  CHECK(t.is_cpu() && t.scalar_type() == ScalarType::Int, "span must be int32 on the CPU");
  CHECK(has_shape(t, {call.batch, 1, call.queries, 2}), "span has shape ", shape_of(t), "; accepted: [", call.batch,
        ", 1, ", call.queries, ", 2]");
  const int64_t count = call.batch * call.queries;
  int32_t* out = static_cast<int32_t*>(spans.get(count * 2 * int64_t(sizeof(int32_t))));
  CHECK(out != nullptr, "out of memory for ", count, " spans");
  const int32_t* data = static_cast<const int32_t*>(t.const_data_ptr());
  const int32_t slots = int32_t(call.slots);
  for (int64_t i = 0; i < count; i++) {
    const int32_t* span = data + i / call.queries * t.stride(0) + i % call.queries * t.stride(2);
    out[2 * i] = std::clamp(span[0], 0, slots);
    out[2 * i + 1] = std::clamp(span[t.stride(3)], out[2 * i], slots);
  }
  return out;
}

void run(QpassAttentionCall& call, const QpassAttention& kernel) {
  call.threads = int32_t(torch::stable::get_num_threads());
  kernel.plan(&call);
  const int64_t bytes = kernel.scratch_bytes(&call), partial = kernel.partial_bytes(&call);
  call.partials = static_cast<float*>(partials.get(partial));
  CHECK(partial == 0 || call.partials != nullptr, "out of memory for ", partial, " bytes of partial sums");
  std::atomic<bool> failed{false};
  // Tasks differ in length, so each thread takes the next one when it is done.
  auto all = [&](int64_t count, void (*run)(const QpassAttentionCall*, void*, int64_t)) {
    std::atomic<int64_t> next{0};
    auto work = [&](int64_t, int64_t) {
      void* scratch = worker.get(bytes);
      if (!scratch) failed = true;
      else
        for (int64_t i; (i = next++) < count;) run(&call, scratch, i);
    };
    if (count == 1) work(0, 1);
    else spread(std::min(count, int64_t(call.threads)), work);
  };
  all(call.tasks * call.blocks, kernel.run);
  if (call.blocks > 1 && !failed) all(call.tasks, kernel.merge);
  partials.trim();
  spans.trim();
  CHECK(!failed, "out of memory for ", bytes, " bytes of scratch");
}

Tensor attention(Tensor q, Tensor k, Tensor v, Tensor span, double scale, double softcap, Optional slopes,
                 Optional sinks) {
  constexpr int64_t kScale = sizeof(float);  // bytes of codes' scale, behind them
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max() / 2;
  CHECK(q.is_cpu() && k.is_cpu() && v.is_cpu(), "q, k and v must be on the CPU");
  CHECK(q.dim() == 4 && k.dim() == 4 && v.dim() == 4, "q, k and v must be [batch, heads, tokens, width]");
  QpassAttentionCall call{};
  call.dtype = dtype_of(q);
  CHECK(call.dtype >= 0, "q must be float32, bfloat16 or float16");
  call.codes = k.scalar_type() == ScalarType::Char;
  CHECK(call.codes || k.scalar_type() == q.scalar_type(), "k must have q's dtype or be int8");
  CHECK(v.scalar_type() == k.scalar_type(), "v must have k's dtype");
  call.batch = q.size(0), call.heads = q.size(1), call.queries = q.size(2), call.width = q.size(3);
  call.shared = k.size(1), call.slots = k.size(2), call.value_width = v.size(3) - (call.codes ? kScale : 0);
  CHECK(k.size(0) == call.batch && k.size(3) == call.width + (call.codes ? kScale : 0), "k has shape ", shape_of(k),
        ", q ", shape_of(q));
  CHECK(v.size(0) == call.batch && v.size(1) == call.shared && v.size(2) == call.slots, "v has shape ", shape_of(v),
        ", k ", shape_of(k));
  CHECK(call.shared >= 1 && call.heads >= 1 && call.heads % call.shared == 0, call.heads,
        " query heads can't share ", call.shared, " key heads");
  CHECK(call.width >= 1 && call.value_width >= 1 && call.width <= 1 << 16 && call.value_width <= 1 << 16,
        "a head's width must be 1 to 65536, not ", call.width, " and ", call.value_width);
  CHECK(call.slots < kMost && call.queries < kMost && call.heads < kMost, "there are too many slots, queries or heads");
  CHECK(softcap >= 0, "softcap must not be negative, but is ", softcap);
  const QpassAttention* table = kernel.load(std::memory_order_acquire);
  CHECK(table != nullptr, "no kernel is loaded (qpass.kernels.attention_unit.ensure loads it)");

  Tensor out = empty({call.batch, call.queries, call.heads, call.value_width}, dtype_of(q));
  if (call.batch == 0 || call.queries == 0) return out;
  Optional q_copy, k_copy, v_copy;
  std::vector<float> slope_copy, sink_copy;
  call.q = heads_of(q, q_copy);
  call.k = heads_of(k, k_copy);
  call.v = heads_of(v, v_copy);
  call.spans = spans_of(span, call);
  call.slopes = of_heads("slopes", slopes, call.heads, slope_copy);
  call.sinks = of_heads("sinks", sinks, call.heads, sink_copy);
  call.scale = float(scale);
  call.softcap = float(softcap);
  call.out = out.mutable_data_ptr();
  run(call, *table);
  return out;
}

}  // namespace attention

}  // namespace

// Called by kernels/attention_unit.py. Returns 0, or 1 for a table of another version.
extern "C" __attribute__((visibility("default"))) int qpass_register_attention(const QpassAttention* table) {
  if (table == nullptr || table->abi != QPASS_ATTENTION_ABI) return 1;
  attention::kernel.store(table, std::memory_order_release);
  return 0;
}
