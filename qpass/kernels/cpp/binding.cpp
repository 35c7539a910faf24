// torch's only view of the kernels: checks everything it is given, lends memory and threads, calls through the C table.
// Stable ABI: one build serves every Python and every torch from 2.13 on.
#include "binding.h"
#include "binding_attention.h"

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cmath>

namespace {

namespace linear {

constexpr const char* op = "packed_linear";

// An operand of the output's shape; keeps the contiguous copy alive in `copy` where one is needed.
const void* operand(const char* name, const std::optional<Tensor>& given, const Tensor& y, std::optional<Tensor>& copy,
                    int64_t& stride) {
  if (!given) return nullptr;
  const Tensor& t = *given;
  CHECK(t.is_cpu(), name, " must be on the CPU");
  CHECK(t.scalar_type() == y.scalar_type(), name, " must have x's dtype");
  bool same = t.dim() == y.dim();
  for (int64_t d = 0; same && d < y.dim(); d++) same = t.size(d) == y.size(d);
  CHECK(same, name, " has shape ", shape_of(t), ", the output ", shape_of(y));
  auto rows = row_stride(t);
  if (!rows) {
    copy = torch::stable::contiguous(t);
    rows = y.size(y.dim() - 1);
  }
  stride = *rows;
  return (copy ? *copy : t).const_data_ptr();
}

void run(QpassCall& call, const QpassKernel& kernel) {
  call.threads = int32_t(torch::stable::get_num_threads());
  call.tuning = *tunings[kernel.format].load(std::memory_order_acquire);
  const int64_t prepared = kernel.prepared_bytes(&call);
  call.prepared = static_cast<uint8_t*>(activations.get(prepared));
  CHECK(call.prepared != nullptr, "out of memory for ", prepared, " bytes of activations");
  if (call.m * call.k < 32768 || call.m == 1) kernel.prepare(&call, 0, call.m);
  else
    torch::stable::parallel_for(0, call.m, 1, [&](int64_t begin, int64_t end) { kernel.prepare(&call, begin, end); });

  const int64_t tasks = kernel.partition(&call), bytes = kernel.scratch_bytes(&call);
  std::atomic<bool> failed{false};
  auto work = [&](int64_t begin, int64_t end) {
    void* scratch = worker.get(bytes);
    if (scratch) kernel.run(&call, scratch, begin, end);
    else failed = true;
  };
  if (call.m * call.n * call.k < 1 << 18) work(0, tasks);  // shorter than waking a thread
  else torch::stable::parallel_for(0, tasks, 1, work);
  activations.trim();
  CHECK(!failed, "out of memory for ", bytes, " bytes of scratch");
}

// RMSNorm or LayerNorm of each row of x before it is multiplied.
void set_norm(QpassCall& call, int64_t norm, const std::optional<Tensor>& weight, const std::optional<Tensor>& bias,
              double eps) {
  CHECK(norm >= QPASS_NO_NORM && norm <= QPASS_LAYER_NORM, "unknown norm ", norm, "; accepted: 0, 1, 2");
  CHECK(norm != QPASS_NO_NORM || (!weight && !bias), "norm_weight and norm_bias are those of a norm, and norm is 0");
  CHECK(std::isfinite(float(eps)) && eps >= 0, "norm_eps must be finite and not negative, not ", eps);
  call.norm = int32_t(norm);
  call.norm_weight = vector_of(op, "norm_weight", weight, call.k, "inputs");
  call.norm_bias = vector_of(op, "norm_bias", bias, call.k, "inputs");
  call.norm_eps = float(eps);
}

// The one scale of statically quantized activations.
void set_x_scale(QpassCall& call, const QpassKernel& kernel, std::optional<double> scale) {
  const bool is_static = kernel.rule == QPASS_A8_STATIC;
  CHECK(is_static == scale.has_value(), "format ", kernel.format, is_static ? " needs an x_scale" : " takes no x_scale");
  if (!scale) return;
  call.x_scale = float(*scale);
  CHECK(std::isfinite(call.x_scale) && std::isfinite(1 / call.x_scale) && call.x_scale > 0,
        "x_scale must be positive and finite, not ", *scale);
}

Tensor packed_linear(Tensor x, Tensor packed, std::optional<Tensor> bias, std::optional<Tensor> mul,
                     std::optional<Tensor> residual, int64_t n, int64_t k, int64_t format, int64_t activation, bool glu,
                     int64_t norm, std::optional<Tensor> norm_weight, std::optional<Tensor> norm_bias, double norm_eps,
                     std::optional<double> x_scale) {
  CHECK(x.is_cpu(), "x must be on the CPU");
  const int32_t dtype = dtype_of(x);
  CHECK(dtype >= 0, "x must be float32, bfloat16 or float16");
  CHECK(x.dim() >= 1 && x.size(x.dim() - 1) == k, "x has shape ", shape_of(x), ", the weight ", k, " inputs");
  CHECK(activation >= QPASS_NONE && activation <= QPASS_SILU, "unknown activation ", activation);
  const QpassKernel& kernel = kernel_for(op, packed, n, k, format, glu);

  std::vector<int64_t> shape;
  int64_t m = 1;
  for (int64_t d = 0; d + 1 < x.dim(); d++) {
    shape.push_back(x.size(d));
    m *= x.size(d);
  }
  const int64_t outputs = glu ? n / 2 : n;
  shape.push_back(outputs);
  Tensor y = empty_like(x, shape);

  QpassCall call{};
  call.m = m;
  call.n = n;
  call.k = k;
  call.dtype = dtype;
  call.activation = int32_t(activation);
  call.glu = glu;
  call.packed = static_cast<const uint8_t*>(packed.const_data_ptr());
  call.bias = vector_of(op, "bias", bias, n, "outputs");
  set_norm(call, norm, norm_weight, norm_bias, norm_eps);
  set_x_scale(call, kernel, x_scale);
  std::optional<Tensor> x_copy, mul_copy, residual_copy;
  call.mul = operand("mul", mul, y, mul_copy, call.mul_stride);
  call.residual = operand("residual", residual, y, residual_copy, call.residual_stride);
  if (m == 0) return y;
  auto stride = row_stride(x);
  if (!stride) {
    x_copy = torch::stable::contiguous(x);
    stride = k;
  }
  call.x = (x_copy ? *x_copy : x).const_data_ptr();
  call.x_stride = *stride;
  call.y = y.mutable_data_ptr();
  call.y_stride = outputs;
  run(call, kernel);
  return y;
}

}  // namespace linear

namespace embedding {

constexpr const char* op = "packed_embedding";

template <class Value>
void round_to(void* rows, int64_t begin, const float* values, int64_t k) {
  Value* out = static_cast<Value*>(rows) + begin;
  for (int64_t i = 0; i < k; i++) out[i] = Value(values[i]);
}

Tensor packed_embedding(Tensor ids, Tensor packed, int64_t n, int64_t k, int64_t format, ScalarType dtype) {
  const QpassKernel& kernel = kernel_for(op, packed, n, k, format, false);
  CHECK(ids.is_cpu(), "ids must be on the CPU");
  const bool wide = ids.scalar_type() == ScalarType::Long;
  CHECK(wide || ids.scalar_type() == ScalarType::Int, "ids must be int64 or int32");
  CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half,
        "dtype must be float32, bfloat16 or float16");
  if (!ids.is_contiguous()) ids = torch::stable::contiguous(ids);
  const void* data = ids.const_data_ptr();
  auto id = [&](int64_t i) {
    return wide ? static_cast<const int64_t*>(data)[i] : int64_t(static_cast<const int32_t*>(data)[i]);
  };
  const int64_t count = ids.numel();
  for (int64_t i = 0; i < count; i++)
    CHECK(id(i) >= 0 && id(i) < n, "index out of range: id ", id(i), ", the table has ", n, " rows");

  std::vector<int64_t> shape;
  for (int64_t d = 0; d < ids.dim(); d++) shape.push_back(ids.size(d));
  shape.push_back(k);
  Tensor rows = torch::stable::new_empty(ids, shape, dtype);
  const uint8_t* table = static_cast<const uint8_t*>(packed.const_data_ptr());
  void* out = rows.mutable_data_ptr();
  auto gather = [&](int64_t begin, int64_t end) {
    std::vector<float> values(dtype == ScalarType::Float ? 0 : k);
    for (int64_t i = begin; i < end; i++) {
      float* row = dtype == ScalarType::Float ? static_cast<float*>(out) + i * k : values.data();
      kernel.gather(table, n, k, false, id(i), row);
      if (dtype == ScalarType::BFloat16) round_to<torch::headeronly::BFloat16>(out, i * k, row, k);
      if (dtype == ScalarType::Half) round_to<torch::headeronly::Half>(out, i * k, row, k);
    }
  };
  if (count < 16) gather(0, count);  // a few microseconds each, about what waking a thread costs
  else torch::stable::parallel_for(0, count, 8, gather);
  return rows;
}

}  // namespace embedding

}  // namespace

#include "binding_chain.h"

STABLE_TORCH_LIBRARY_IMPL(qpass, CPU, m) {
  m.impl("packed_linear", TORCH_BOX(&linear::packed_linear));
  m.impl("packed_embedding", TORCH_BOX(&embedding::packed_embedding));
  m.impl("attention", TORCH_BOX(&attention::attention));
  m.impl("chain", TORCH_BOX(&chain::chain));
}

// Called by kernels/load.py. Returns 0, or what is wrong with the table: 1 its format, 2 its version.
extern "C" __attribute__((visibility("default"))) int qpass_register(const QpassKernel* kernel, int32_t linear_rows,
                                                                     int32_t panel_rows, int32_t tile_rows) {
  if (kernel == nullptr || kernel->format < 0 || kernel->format >= kFormats) return 1;
  if (kernel->abi != QPASS_ABI) return 2;
  tunings[kernel->format].store(new QpassTuning{linear_rows, panel_rows, tile_rows}, std::memory_order_release);
  kernels[kernel->format].store(kernel, std::memory_order_release);
  return 0;
}
