// A linear layer's weight gradient on the CPU, sample by sample, and every sample's dots with K
// directions while its part of the gradient is still in registers. Free of torch.
#pragma once

#include <cstdint>

#include "element.h"

namespace graddot {

// (rows, tokens, width); strides count elements. That along the width is 1, or that along the tokens
// where `InstructionSet::products` says so.
struct Activations {
  const void* data;
  int64_t row_stride, token_stride, column_stride;

  template <class T>
  const T* at(int64_t row, int64_t token, int64_t column) const {
    return static_cast<const T*>(data) + row * row_stride + token * token_stride + column * column_stride;
  }
};

// G_i = Σ_t grad_it act_itᵀ, (d_out, d_in).
struct LinearProblem {
  Element element;                    // of act and grad; all else is fp32
  int64_t rows, tokens, d_in, d_out;  // N training rows
  Activations act;                    // (N, T, d_in); with val rows, they follow
  Activations grad;                   // (N, T, d_out), likewise

  // The K directions: given, (K, d_out, d_in), contiguous; or, if null, the gradients of the val
  // rows behind the training rows, val_rows[k] ≥ 1 of them for direction k, made tile by tile.
  int64_t num_directions;
  const float* direction;
  const int64_t* val_rows;

  // Results. weight_grad (d_out, d_in), with unit stride along d_in, is scale · Σ_i G_i, or that much more.
  float* weight_grad;
  int64_t weight_grad_stride;
  float scale;
  bool accumulate;
  // With `norms` one more row, ‖G_i‖²; and where the directions are made, one more column, ‖D_k‖².
  bool norms;
  float* dots;  // (K, N)

  int64_t all_rows() const {
    int64_t count = rows;
    for (int64_t k = 0; direction == nullptr && k < num_directions; ++k) count += val_rows[k];
    return count;
  }
  int64_t dot_rows() const { return num_directions + norms; }
  int64_t dot_columns() const { return rows + (norms && direction == nullptr); }
};

// A tile [out_begin, out_end) x [in_begin, in_end) of the weight gradient: one thread's work.
struct LinearTile {
  int64_t out_begin, out_end, in_begin, in_end;
};

// What a thread needs to hold for any tile of `size`, in floats.
struct LinearScratch {
  int64_t dots, act, grad, sums, sum, directions;

  int64_t total() const { return dots + act + grad + sums + sum + directions; }
};

// The tile's part of the weight gradient, and its part of the dots added to `dots`, of their shape.
// One function for each instruction set and element; `scratch` says how much memory they need, from a
// cache line's beginning. packed_act has every row's activations as `pack_act` lays them out,
// packed_size floats each; where it is null, each tile packs its own.
struct LinearKernel {
  void (*run)(const LinearProblem& problem, const LinearTile& tile, const float* packed_act,
              float* memory, double* dots);
  LinearScratch (*scratch)(const LinearProblem& problem, const LinearTile& size);
  void (*pack_act)(const LinearProblem& problem, int64_t row, float* packed);
  int64_t (*packed_size)(const LinearProblem& problem);
  int64_t row_multiple;    // tiles start at multiples of this
  int64_t rows_per_token;  // of a tile, up to as many as any should have: what the arithmetic allows
};

// With `threads` threads. A weight gradient element is bitwise the same for any number of them.
void linear_wgrad_dot(const LinearKernel& kernel, const LinearProblem& problem, int64_t threads);

}  // namespace graddot
