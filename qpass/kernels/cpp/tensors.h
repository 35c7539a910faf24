// What every torch binding asks of a tensor.
#pragma once
#include <sys/mman.h>
#include <torch/csrc/stable/tensor.h>

#include <string>
#include <vector>

#include "abi.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

std::string shape_of(const Tensor& t) {
  std::string s = "[";
  for (int64_t d = 0; d < t.dim(); d++) s += (d ? ", " : "") + std::to_string(t.size(d));
  return s + "]";
}

// As QpassDtype; -1 for one that no model has.
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

// Large pages for what the allocator may just have got from the system: 2048 rows of 8960 bf16 outputs are 9000 faults of
// 4 KB, which took 8 ms where all products take 15. Best effort.
void advise_large_pages(void* data, int64_t bytes) {
  constexpr uintptr_t page = 2 << 20;
  const uintptr_t begin = (uintptr_t(data) + page - 1) / page * page, end = (uintptr_t(data) + uintptr_t(bytes)) / page * page;
  if (end > begin) madvise((void*)begin, end - begin, MADV_HUGEPAGE);
}

// A new dense CPU tensor of a QpassDtype. Not through the dispatcher, which would cost a microsecond.
Tensor empty(const std::vector<int64_t>& sizes, int32_t dtype) {
  std::vector<int64_t> strides(sizes.size());
  int64_t stride = 1;
  for (size_t d = sizes.size(); d-- > 0; stride *= sizes[d] > 1 ? sizes[d] : 1) strides[d] = stride;
  const int32_t torch_dtype = dtype == QPASS_F32    ? aoti_torch_dtype_float32()
                              : dtype == QPASS_BF16 ? aoti_torch_dtype_bfloat16()
                              : dtype == QPASS_F16  ? aoti_torch_dtype_float16()
                                                    : aoti_torch_dtype_int8();
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(int64_t(sizes.size()), sizes.data(), strides.data(), torch_dtype,
                                                         aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

}  // namespace
