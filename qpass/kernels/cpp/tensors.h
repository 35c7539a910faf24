// What every torch binding asks of a tensor.
#pragma once
#include <torch/csrc/stable/tensor.h>

#include <string>

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

}  // namespace
