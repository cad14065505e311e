// Tensors of LibTorch's stable ABI as the views that the arithmetic works on.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <stdexcept>

#include "embedding.h"

namespace graddot {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline Dtype dtype_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float: return Dtype::kFloat32;
    case ScalarType::Double: return Dtype::kFloat64;
    case ScalarType::BFloat16: return Dtype::kBFloat16;
    case ScalarType::Half: return Dtype::kFloat16;
    default: throw std::invalid_argument("expected a gradient in fp32, fp64, bf16 or fp16");
  }
}

// Rows [begin, end) of ids (N, T).
inline IdMatrix id_matrix(const Tensor& ids, int64_t begin, int64_t end) {
  const auto offset = static_cast<int64_t>(ids.element_size()) * begin * ids.stride(0);
  return {static_cast<const char*>(ids.const_data_ptr()) + offset,
          ids.scalar_type() == ScalarType::Long, end - begin, ids.size(1), ids.stride(0),
          ids.stride(1)};
}

inline IdMatrix id_matrix(const Tensor& ids) { return id_matrix(ids, 0, ids.size(0)); }

// From row `begin` on of a gradient (N, T, d) with unit stride along its width.
inline RowMatrix row_matrix(const Tensor& x, int64_t begin = 0) {
  const auto offset = static_cast<int64_t>(x.element_size()) * begin * x.stride(0);
  return {static_cast<const char*>(x.const_data_ptr()) + offset, x.stride(0), x.stride(1)};
}

// embedding_dots on the GPU that `grad` is on, in its current stream (cuda/binding.cpp).
void embedding_dots_cuda(const EmbeddingProblem& problem, const Tensor& grad);

}  // namespace graddot
