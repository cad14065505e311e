// The embedding ops in LibTorch's stable ABI, for the CPU and, where it is built, CUDA. Schemas and
// fakes are in graddot_kernels/ops.py; the arithmetic is in embedding.cpp and cuda/.

#include "binding.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "huge_pages.h"
#include "parallel.h"

#if defined(__linux__) && defined(_LIBCPP_VERSION)
#error "PyTorch on Linux is built with libstdc++ and crashes on an exception of libc++: leave out -stdlib=libc++"
#endif

namespace graddot {

void parallel_for(int64_t size, int64_t grain, const std::function<void(int64_t, int64_t)>& body) {
  torch::stable::parallel_for(0, size, grain, body);
}

namespace {

// The public functions have checked their arguments; this guards the memory against a direct call
// of an op. std::out_of_range arrives in Python as IndexError, std::invalid_argument as ValueError
// (up to torch 2.14; then as RuntimeError).
void check(bool ok, const char* expected) {
  if (!ok) {
    throw std::invalid_argument(std::string("expected ") + expected);
  }
}

void check_shapes(const Tensor& ids, const Tensor& grad) {
  check(ids.dim() == 2 && grad.dim() == 3 && ids.size(0) == grad.size(0) &&
            ids.size(1) == grad.size(1),
        "ids (N, T) and grad (N, T, d)");
  check(ids.scalar_type() == ScalarType::Long || ids.scalar_type() == ScalarType::Int,
        "ids in int32 or int64");
}

void check_alike(const Tensor& x, const Tensor& grad) {
  check(x.scalar_type() == grad.scalar_type() && x.dim() == 3 && x.size(2) == grad.size(2),
        "directions and gradients of one dtype and width");
}

// On a GPU the check would wait for the device; there a kernel traps instead, as in torch.
void check_ids(const Tensor& ids, int64_t num_embeddings, const char* name) {
  if (ids.is_cpu()) {
    check_ids(id_matrix(ids), num_embeddings, name);
  }
}

// x itself, or a copy whose last dimension has stride 1.
Tensor unit_stride(const Tensor& x) {
  return x.size(2) <= 1 || x.stride(2) == 1 ? x : torch::stable::contiguous(x);
}

// Results are fp64 for fp64 and else fp32.
Tensor empty_result(const Tensor& like, const std::vector<int64_t>& shape) {
  const auto dtype =
      like.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  try {
    return torch::stable::empty(shape, dtype, std::nullopt, like.device());
  } catch (const std::exception&) {  // the stable ABI keeps the reason to itself
    std::string sizes;
    for (const int64_t size : shape) sizes += (sizes.empty() ? "" : ", ") + std::to_string(size);
    throw std::runtime_error("no result of shape (" + sizes + ") could be made: out of memory?");
  }
}

struct WeightGrad {
  Tensor table;
  std::optional<Tensor> scale;  // fp64, on the table's device

  WeightGrad(const Tensor& grad, int64_t num_embeddings, const std::optional<Tensor>& given_scale)
      : table(empty_result(grad, {num_embeddings, grad.size(2)})) {
    if (table.is_cpu()) {
      const auto size = static_cast<int64_t>(table.element_size()) * table.numel();
      advise_huge_pages(table.mutable_data_ptr(), size);
    }
    if (given_scale) {
      scale = torch::stable::to(*given_scale, ScalarType::Double, std::nullopt, table.device());
    }
  }

  void fill_in(EmbeddingProblem& problem) const {
    problem.weight_grad = table.mutable_data_ptr();
    problem.scale = scale ? static_cast<const double*>(scale->const_data_ptr()) : nullptr;
  }
};

// grad has unit stride along its width, here and below.
EmbeddingProblem problem_of(const Tensor& ids, const Tensor& grad, int64_t num_embeddings,
                            int64_t padding_idx) {
  EmbeddingProblem problem{};
  problem.dtype = dtype_of(grad);
  problem.width = grad.size(2);
  problem.num_embeddings = num_embeddings;
  problem.padding_idx = padding_idx;
  problem.ids = id_matrix(ids);
  problem.grad = row_matrix(grad);
  return problem;
}

// Solves the problem, of which only `dots` is still missing, where `grad` is.
Tensor solve(EmbeddingProblem& problem, const Tensor& grad) {
  std::vector<int64_t> shape{problem.num_directions, problem.ids.rows};
  if (problem.per_token) {
    shape.push_back(problem.ids.cols);
  }
  Tensor dots = empty_result(grad, shape);
  problem.dots = dots.mutable_data_ptr();
#ifdef USE_CUDA
  if (grad.is_cuda()) {
    embedding_dots_cuda(problem, grad);
    return dots;
  }
#endif
  embedding_dots(problem);
  return dots;
}

Tensor embedding_ghost_dot(const Tensor val_ids, const Tensor val_grad, const Tensor train_ids,
                           const Tensor train_grad, int64_t num_embeddings, int64_t padding_idx) {
  check_shapes(val_ids, val_grad);
  check_shapes(train_ids, train_grad);
  check_alike(val_grad, train_grad);
  check_ids(val_ids, num_embeddings, "val_ids");
  check_ids(train_ids, num_embeddings, "train_ids");
  const Tensor val_rows = unit_stride(val_grad), rows = unit_stride(train_grad);
  EmbeddingProblem problem = problem_of(train_ids, rows, num_embeddings, padding_idx);
  problem.num_directions = 1;
  problem.val_ids = id_matrix(val_ids);
  problem.val_grad = row_matrix(val_rows);
  problem.val_rows = {val_ids.size(0)};
  Tensor dots = solve(problem, rows);
  return torch::stable::select(dots, 0, 0);
}

Tensor embedding_direction_dot(const Tensor direction, const Tensor ids, const Tensor grad,
                               int64_t padding_idx, bool per_token) {
  check_shapes(ids, grad);
  check_alike(direction, grad);
  check_ids(ids, direction.size(1), "ids");
  const Tensor directions = unit_stride(direction), rows = unit_stride(grad);
  EmbeddingProblem problem = problem_of(ids, rows, directions.size(1), padding_idx);
  problem.num_directions = directions.size(0);
  problem.direction = row_matrix(directions);
  problem.per_token = per_token;
  return solve(problem, rows);
}

std::tuple<Tensor, Tensor> embedding_wgrad_dot(const Tensor direction, const Tensor ids,
                                               const Tensor grad, int64_t padding_idx,
                                               const std::optional<Tensor> scale) {
  check_shapes(ids, grad);
  check_alike(direction, grad);
  check_ids(ids, direction.size(1), "ids");
  const Tensor directions = unit_stride(direction), rows = unit_stride(grad);
  EmbeddingProblem problem = problem_of(ids, rows, directions.size(1), padding_idx);
  problem.num_directions = directions.size(0);
  problem.direction = row_matrix(directions);
  const WeightGrad weight_grad(rows, problem.num_embeddings, scale);
  weight_grad.fill_in(problem);
  return {weight_grad.table, solve(problem, rows)};
}

std::tuple<Tensor, Tensor> embedding_joint_wgrad_dot(const Tensor ids, const Tensor grad,
                                                     const std::vector<int64_t> val_rows,
                                                     int64_t num_embeddings, int64_t padding_idx,
                                                     const std::optional<Tensor> scale) {
  check_shapes(ids, grad);
  check_ids(ids, num_embeddings, "ids");
  const int64_t n = ids.size(0) - std::accumulate(val_rows.begin(), val_rows.end(), int64_t{0});
  const auto negative = [](int64_t rows) { return rows < 0; };
  check(n >= 0 && std::none_of(val_rows.begin(), val_rows.end(), negative), "val_rows that sum to at most the number of rows");
  const Tensor rows = unit_stride(grad);
  EmbeddingProblem problem = problem_of(ids, rows, num_embeddings, padding_idx);
  problem.ids = id_matrix(ids, 0, n);
  problem.num_directions = static_cast<int64_t>(val_rows.size());
  problem.val_ids = id_matrix(ids, n, ids.size(0));
  problem.val_grad = row_matrix(rows, n);
  problem.val_rows = val_rows;
  const WeightGrad weight_grad(rows, num_embeddings, scale);
  weight_grad.fill_in(problem);
  return {weight_grad.table, solve(problem, rows)};
}

void register_ops(torch::stable::detail::StableLibrary& m) {
  m.impl("embedding_ghost_dot", TORCH_BOX(&embedding_ghost_dot));
  m.impl("embedding_direction_dot", TORCH_BOX(&embedding_direction_dot));
  m.impl("embedding_wgrad_dot", TORCH_BOX(&embedding_wgrad_dot));
  m.impl("embedding_joint_wgrad_dot", TORCH_BOX(&embedding_joint_wgrad_dot));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(graddot, CPU, m) { register_ops(m); }
#ifdef USE_CUDA
STABLE_TORCH_LIBRARY_IMPL(graddot, CUDA, m) { register_ops(m); }
#endif

}  // namespace graddot

// What was built, for graddot_kernels.build_info(). The macros are set by CMakeLists.txt.
extern "C" __attribute__((visibility("default"))) const char* graddot_build() {
  return "{\"compiler\": \"" GRADDOT_COMPILER "\", \"cuda_compiler\": \"" GRADDOT_CUDA_COMPILER
         "\", \"cuda_architectures\": \"" GRADDOT_CUDA_ARCHITECTURES
         "\", \"torch\": \"" GRADDOT_TORCH "\"}";
}
