// The vector kernels as plain C functions, which graddot_kernels/cpu_kernels.py calls with the
// addresses of tensors that it has checked. They return false, and write nothing, on a processor
// that they have no code for.

#include "huge_pages.h"
#include "instruction_sets.h"

#define GRADDOT_EXPORT extern "C" __attribute__((visibility("default")))

// "" if there is none.
GRADDOT_EXPORT const char* graddot_instruction_set() {
  const auto* set = graddot::instruction_set();
  return set == nullptr ? "" : set->name;
}

GRADDOT_EXPORT bool graddot_linear_wgrad_dot(const graddot::LinearProblem* problem,
                                             int64_t threads) {
  return graddot::linear_wgrad_dot(*problem, threads);
}

GRADDOT_EXPORT bool graddot_cross_entropy_grad(const graddot::CrossEntropy* form, int64_t rows,
                                               const int64_t* labels, int64_t ignore_index,
                                               float* logits, float* losses) {
  return graddot::cross_entropy_grad(*form, rows, labels, ignore_index, logits, losses);
}

GRADDOT_EXPORT void graddot_advise_huge_pages(void* data, int64_t size) {
  graddot::advise_huge_pages(data, size);
}
