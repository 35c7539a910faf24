// What the torch ops of binding_*.h share: the loaded kernels, checks, scratch memory.
#pragma once
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

#include "scratch.h"
#include "team.h"
#include "tensors.h"

namespace {

constexpr int kFormats = 1024;
std::atomic<const QpassKernel*> kernels[kFormats];
std::atomic<const QpassTuning*> tunings[kFormats];  // replaced ones are kept: a call may be reading them

// Raises RuntimeError with the op's name in front: `op` is an argument or a constant where it is used.
#define CHECK(condition, ...) STD_TORCH_CHECK(condition, op, ": ", __VA_ARGS__)

thread_local Scratch activations;  // of the calling thread, read by the workers
thread_local Scratch worker;       // of each thread that runs tasks

thread_local Team* team = nullptr;  // of the thread that runs a chain's calls, while it does

// f(begin, end) for pieces of [0, count), on several threads.
template <class F>
void spread(int64_t count, const F& f) {
  if (team) team->each(count, f);
  else torch::stable::parallel_for(0, count, 1, f);
}

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

// A contiguous float32 vector of `length` elements; null where none is given. `whose` completes the sentence.
const float* vector_of(const char* op, const char* name, const std::optional<Tensor>& given, int64_t length,
                       const char* whose) {
  if (!given) return nullptr;
  CHECK(given->is_cpu() && given->scalar_type() == ScalarType::Float && given->dim() == 1 && given->is_contiguous(), name,
        " must be a contiguous one-dimensional float32 tensor");
  CHECK(given->numel() == length, name, " has ", given->numel(), " elements, the weight ", length, " ", whose);
  return static_cast<const float*>(given->const_data_ptr());
}

// The kernel of a format, for a packed weight [n, k] that it can really read.
const QpassKernel& kernel_for(const char* op, const Tensor& packed, int64_t n, int64_t k, int64_t format, bool glu) {
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
  CHECK(packed.is_cpu(), "packed must be on the CPU");
  CHECK(n >= 1 && k >= 1 && n < kMost && k < kMost, "n and k must be positive, not ", n, " and ", k);
  CHECK(!glu || n % 2 == 0, "a gated weight stacks two halves, so n = ", n, " must be even");
  const QpassKernel* kernel =
      format >= 0 && format < kFormats ? kernels[format].load(std::memory_order_acquire) : nullptr;
  CHECK(kernel != nullptr, "no kernel is loaded for format ", format, " (qpass.kernels.load.ensure loads one)");
  CHECK(packed.scalar_type() == ScalarType::Byte && packed.dim() == 1 && packed.is_contiguous(),
        "packed must be a contiguous one-dimensional uint8 tensor");
  const int64_t needed = kernel->packed_bytes(n, k, glu);
  CHECK(packed.numel() == needed, "packed holds ", packed.numel(), " bytes; n = ", n, ", k = ", k, " need ", needed);
  return *kernel;
}

}  // namespace
