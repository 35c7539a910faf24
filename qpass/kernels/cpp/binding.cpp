// torch's only view of the kernels: checks everything it is given, lends memory and threads, calls through the C table.
// Stable ABI: one build serves every Python and every torch from 2.13 on.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <atomic>
#include <cstdlib>
#include <limits>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "abi.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int kFormats = 256;
std::atomic<const QpassKernel*> kernels[kFormats];

#define CHECK(condition, ...) STD_TORCH_CHECK(condition, "packed_linear: ", __VA_ARGS__)

std::string shape_of(const Tensor& t) {
  std::string s = "[";
  for (int64_t d = 0; d < t.dim(); d++) s += (d ? ", " : "") + std::to_string(t.size(d));
  return s + "]";
}

// Grows and is kept: a decode step calls 200 times with the same few sizes. Large requests are given back after the
// call.
class Scratch {
 public:
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() { free(data_); }
  void* get(int64_t bytes) {
    if (bytes > size_) {
      free(data_);
      size_ = 0;
      data_ = aligned_alloc(64, size_t((bytes + 4095) / 4096 * 4096));
      if (data_) size_ = bytes;
    }
    return data_;
  }
  void trim() {
    if (size_ <= kKeep) return;
    free(data_);
    data_ = nullptr;
    size_ = 0;
  }

 private:
  static constexpr int64_t kKeep = 32 << 20;
  void* data_ = nullptr;
  int64_t size_ = 0;
};

thread_local Scratch activations;  // of the calling thread, read by the workers
thread_local Scratch worker;       // of each thread that runs tasks

// A tensor as rows: elements between rows, if its leading dimensions collapse into one and its last is dense.
std::optional<int64_t> row_stride(const Tensor& t) {
  const int64_t last = t.dim() - 1;
  if (t.size(last) > 1 && t.stride(last) != 1) return std::nullopt;
  int64_t stride = -1, expected = -1;
  for (int64_t d = last - 1; d >= 0; d--) {
    if (t.size(d) == 1) continue;
    if (stride < 0) stride = t.stride(d);
    else if (t.stride(d) != expected) return std::nullopt;
    expected = t.stride(d) * t.size(d);
  }
  if (stride < 0) return t.size(last);
  if (stride < t.size(last) && stride != 0) return std::nullopt;
  return stride;
}

int32_t dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return QPASS_F32;
    case ScalarType::BFloat16:
      return QPASS_BF16;
    case ScalarType::Half:
      return QPASS_F16;
    default:
      return -1;
  }
}

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

Tensor packed_linear(Tensor x, Tensor packed, std::optional<Tensor> bias, std::optional<Tensor> mul,
                     std::optional<Tensor> residual, int64_t n, int64_t k, int64_t format, int64_t activation,
                     bool glu) {
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
  CHECK(x.is_cpu() && packed.is_cpu(), "x and packed must be on the CPU");
  const int32_t dtype = dtype_of(x);
  CHECK(dtype >= 0, "x must be float32, bfloat16 or float16");
  CHECK(n >= 1 && k >= 1 && n < kMost && k < kMost, "n and k must be positive, not ", n, " and ", k);
  CHECK(!glu || n % 2 == 0, "a gated weight stacks two halves, so n = ", n, " must be even");
  CHECK(x.dim() >= 1 && x.size(x.dim() - 1) == k, "x has shape ", shape_of(x), ", the weight ", k, " inputs");
  CHECK(activation >= QPASS_NONE && activation <= QPASS_SILU, "unknown activation ", activation);
  const QpassKernel* kernel =
      format >= 0 && format < kFormats ? kernels[format].load(std::memory_order_acquire) : nullptr;
  CHECK(kernel != nullptr, "no kernel is loaded for format ", format, " (qpass.kernels.load.ensure loads one)");
  CHECK(packed.scalar_type() == ScalarType::Byte && packed.dim() == 1 && packed.is_contiguous(),
        "packed must be a contiguous one-dimensional uint8 tensor");
  const int64_t needed = kernel->packed_bytes(n, k, glu);
  CHECK(packed.numel() == needed, "packed holds ", packed.numel(), " bytes; n = ", n, ", k = ", k, " need ", needed);
  if (bias) {
    CHECK(bias->is_cpu() && bias->scalar_type() == ScalarType::Float && bias->dim() == 1 && bias->is_contiguous(),
          "bias must be a contiguous one-dimensional float32 tensor");
    CHECK(bias->numel() == n, "bias has ", bias->numel(), " elements, the weight ", n, " outputs");
  }

  std::vector<int64_t> shape;
  int64_t m = 1;
  for (int64_t d = 0; d + 1 < x.dim(); d++) {
    shape.push_back(x.size(d));
    m *= x.size(d);
  }
  const int64_t outputs = glu ? n / 2 : n;
  shape.push_back(outputs);
  Tensor y = torch::stable::new_empty(x, shape);

  QpassCall call{};
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
  call.m = m;
  call.n = n;
  call.k = k;
  call.dtype = dtype;
  call.activation = int32_t(activation);
  call.glu = glu;
  call.packed = static_cast<const uint8_t*>(packed.const_data_ptr());
  call.bias = bias ? static_cast<const float*>(bias->const_data_ptr()) : nullptr;
  call.y = y.mutable_data_ptr();
  call.y_stride = outputs;
  run(call, *kernel);
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(qpass, CPU, m) { m.impl("packed_linear", TORCH_BOX(&packed_linear)); }

// Called by kernels/load.py. Returns 0, or what is wrong with the table: 1 its format, 2 its version.
extern "C" __attribute__((visibility("default"))) int qpass_register(const QpassKernel* kernel) {
  if (kernel == nullptr || kernel->format < 0 || kernel->format >= kFormats) return 1;
  if (kernel->abi != QPASS_ABI) return 2;
  kernels[kernel->format].store(kernel, std::memory_order_release);
  return 0;
}
