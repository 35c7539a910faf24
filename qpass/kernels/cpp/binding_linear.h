// torch's view of the linear kernels: checks all it is given, lends memory and threads, calls through the C table.
#pragma once
#include <cmath>

#include "binding.h"

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

}  // namespace
