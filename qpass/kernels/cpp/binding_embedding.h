// Rows of a packed weight as an embedding's.
#pragma once
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "binding.h"

namespace {

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
