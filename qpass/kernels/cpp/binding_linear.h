// torch's view of the linear kernels: checks all it is given, lends memory and threads, calls through the C table.
#pragma once
#include <string.h>

#include <cmath>

#include "binding.h"

namespace {

namespace linear {

constexpr const char* op = "packed_linear";
constexpr const char* kDtypes[] = {"float32", "bfloat16", "float16"};  // by QpassDtype

// An operand of the output's shape; keeps the contiguous copy alive in `copy` where one is needed.
const void* operand(const char* name, const std::optional<Tensor>& given, int32_t dtype, const Tensor& y,
                    std::optional<Tensor>& copy, int64_t& stride) {
  if (!given) return nullptr;
  const Tensor& t = *given;
  CHECK(t.is_cpu(), name, " must be on the CPU");
  CHECK(dtype_of(t) == dtype, name, " must have ", kDtypes[dtype], " elements, as the call has");
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
  const int64_t prepared = kernel.prepared_bytes(&call), kept = call.outliers ? (call.k + 15) / 16 * 64 : 0;
  uint8_t* memory = static_cast<uint8_t*>(activations.get(kept + prepared));
  CHECK(memory != nullptr, "out of memory for ", kept + prepared, " bytes of activations");
  call.prepared = memory + kept;
  if (kept) {
    memset(memory, 0xff, size_t(kept));
    int32_t* inliers = reinterpret_cast<int32_t*>(memory);
    for (int64_t j = 0; j < call.outliers; j++) inliers[call.outlier_index[j]] = 0;
    call.kept = inliers;
  }
  if (call.m * call.k < 32768 || call.m == 1) kernel.prepare(&call, 0, call.m);
  else spread(call.m, [&](int64_t begin, int64_t end) { kernel.prepare(&call, begin, end); });

  const int64_t tasks = kernel.partition(&call), bytes = kernel.scratch_bytes(&call);
  std::atomic<bool> failed{false};
  if (team) team->begins();
  auto work = [&](int64_t begin, int64_t end) {
    void* scratch = worker.get(bytes);
    if (scratch) kernel.run(&call, scratch, begin, end);
    else failed = true;
  };
  if (call.m * call.n * call.k < 1 << 18) work(0, tasks);  // shorter than waking a thread
  else spread(tasks, work);
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

float checked_scale(const char* name, double given) {
  const float scale = float(given);
  CHECK(std::isfinite(scale) && std::isfinite(1 / scale) && scale > 0, name, " must be positive and finite, not ", given);
  return scale;
}

// The one scale of statically quantized activations, and what is taken off them before; and those of y, where the linear
// behind this one reads int8.
void set_quantizers(QpassCall& call, const QpassKernel& kernel, std::optional<double> x, std::optional<double> y,
                    double x_shift, double y_shift) {
  const bool is_static = kernel.rule == QPASS_A8_STATIC;
  CHECK(is_static == x.has_value(), "format ", kernel.format, is_static ? " needs an x_scale" : " takes no x_scale");
  CHECK(is_static || !call.x_int8, "format ", kernel.format, " takes no int8 x");
  CHECK(!call.x_int8 || call.norm == QPASS_NO_NORM, "an int8 x is not normalized");
  if (x) call.x_scale = checked_scale("x_scale", *x);
  if (y) call.y_scale = checked_scale("y_scale", *y);
  CHECK(std::isfinite(float(x_shift)) && std::isfinite(float(y_shift)), "x_shift and y_shift must be finite");
  CHECK(x || x_shift == 0, "x_shift goes with an x_scale");
  CHECK(y || y_shift == 0, "y_shift goes with a y_scale");
  call.x_shift = float(x_shift);
  call.y_shift = float(y_shift);
}

// Rotation of x, and of y for the linear behind this one: whole blocks of 64.
void set_rotation(QpassCall& call, const QpassKernel& kernel, bool x, bool y) {
  const int64_t outputs = call.glu ? call.n / 2 : call.n;
  CHECK(!x || kernel.rule != QPASS_A16, "format ", kernel.format, " has 16-bit activations, which are not rotated");
  CHECK(!x || (call.k % 64 == 0 && call.k <= 32768), "rotated inputs come in 64s, at most 32768, not ", call.k);
  CHECK(!y || call.y_scale != 0, "y is rotated where it is int8 only: y_rotate needs a y_scale");
  CHECK(!y || outputs % 64 == 0, "rotated outputs come in 64s, not ", outputs);
  call.rotate = x;
  call.y_rotate = y;
}

// Inputs that are kept from int8, and the columns of the weight that they meet, a row each.
void set_outliers(QpassCall& call, const QpassKernel& kernel, const std::optional<Tensor>& index,
                  const std::optional<Tensor>& weight) {
  CHECK(index.has_value() == weight.has_value(), "outliers and outlier_weight come together");
  if (!index) return;
  CHECK(kernel.rule != QPASS_A16, "format ", kernel.format, " has 16-bit activations, and no outliers");
  CHECK(!call.x_int8 && !call.rotate, "an int8 x has no outliers, nor has one that is rotated");
  CHECK(index->is_cpu() && index->scalar_type() == ScalarType::Long && index->dim() == 1 && index->is_contiguous(),
        "outliers must be a contiguous one-dimensional int64 tensor");
  CHECK(weight->is_cpu() && dtype_of(*weight) == call.dtype && weight->dim() == 2 && weight->is_contiguous(),
        "outlier_weight must be a contiguous two-dimensional tensor of x's dtype");
  CHECK(weight->size(0) == index->numel() && weight->size(1) == call.n, "outlier_weight has shape ", shape_of(*weight),
        "; ", index->numel(), " outliers and ", call.n, " outputs need a row for each outlier");
  call.outliers = index->numel();
  call.outlier_index = static_cast<const int64_t*>(index->const_data_ptr());
  call.outlier_weight = weight->const_data_ptr();
  for (int64_t j = 0; j < call.outliers; j++)
    CHECK(call.outlier_index[j] >= 0 && call.outlier_index[j] < call.k && (j == 0 || call.outlier_index[j] > call.outlier_index[j - 1]),
          "outliers must ascend within 0 to ", call.k - 1, "; number ", j, " is ", call.outlier_index[j]);
}

constexpr int64_t kManyRows = 256;

Tensor packed_linear(Tensor x, Tensor packed, std::optional<Tensor> bias, std::optional<Tensor> mul,
                     std::optional<Tensor> residual, int64_t n, int64_t k, int64_t format, int64_t activation, bool glu,
                     int64_t norm, std::optional<Tensor> norm_weight, std::optional<Tensor> norm_bias, double norm_eps,
                     std::optional<double> x_scale, std::optional<Tensor> outliers,
                     std::optional<Tensor> outlier_weight, std::optional<double> y_scale, std::optional<int64_t> dtype,
                     bool rotate, bool y_rotate, double x_shift, double y_shift) {
  CHECK(x.is_cpu(), "x must be on the CPU");
  const bool x_int8 = x.scalar_type() == ScalarType::Char;
  CHECK(x_int8 == dtype.has_value(), x_int8 ? "an int8 x needs a dtype" : "dtype is for an int8 x; it is x's otherwise");
  CHECK(x_int8 || dtype_of(x) >= 0, "x must be float32, bfloat16 or float16, or int8 codes");
  CHECK(!dtype || (*dtype >= QPASS_F32 && *dtype <= QPASS_F16), "unknown dtype ", *dtype, "; accepted: 0, 1, 2");
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

  QpassCall call{};
  call.m = m;
  call.n = n;
  call.k = k;
  call.dtype = x_int8 ? int32_t(*dtype) : dtype_of(x);
  call.x_int8 = x_int8;
  call.activation = int32_t(activation);
  call.glu = glu;
  call.packed = static_cast<const uint8_t*>(packed.const_data_ptr());
  call.bias = vector_of(op, "bias", bias, n, "outputs");
  set_norm(call, norm, norm_weight, norm_bias, norm_eps);
  set_quantizers(call, kernel, x_scale, y_scale, x_shift, y_shift);
  set_rotation(call, kernel, rotate, y_rotate);
  set_outliers(call, kernel, outliers, outlier_weight);
  Tensor y = empty(shape, y_scale ? QPASS_I8 : call.dtype);
  std::optional<Tensor> x_copy, mul_copy, residual_copy;
  call.mul = operand("mul", mul, call.dtype, y, mul_copy, call.mul_stride);
  call.residual = operand("residual", residual, call.dtype, y, residual_copy, call.residual_stride);
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
  if (m >= kManyRows) advise_large_pages(call.y, m * outputs * (y_scale ? 1 : call.dtype == QPASS_F32 ? 4 : 2));
  run(call, kernel);
  return y;
}

}  // namespace linear

}  // namespace
