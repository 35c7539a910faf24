// What every torch binding asks of a tensor.
#pragma once
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

// As QpassDtype; -1 for one that no kernel knows.
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

// A new dense CPU tensor of `like`'s dtype. Not through the dispatcher, which would cost a microsecond.
Tensor empty_like(const Tensor& like, const std::vector<int64_t>& sizes) {
  std::vector<int64_t> strides(sizes.size());
  int64_t stride = 1;
  for (size_t d = sizes.size(); d-- > 0; stride *= sizes[d] > 1 ? sizes[d] : 1) strides[d] = stride;
  int32_t dtype;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &dtype));
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(int64_t(sizes.size()), sizes.data(), strides.data(), dtype,
                                                         aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

}  // namespace
