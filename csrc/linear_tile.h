// One tile of a linear weight gradient: panels of both sides are packed, and a block of
// kBlockOut x kBlockIn sums stays in registers over all tokens of a sample. What leaves the
// registers is the sum over samples and the products with the directions and with itself, never G_i.
// The scheme is the usual one of packed matrix products (Goto and van de Geijn, "Anatomy of
// High-Performance Matrix Multiplication", 2008) with this other end.
#pragma once

#include "linear_wgrad.h"
#include "vector.h"

namespace {

using graddot::Activations;
using graddot::LinearProblem;
using graddot::LinearScratch;
using graddot::LinearTile;

// 6 x 2 sums fill 12 of AVX2's 16 registers, 12 x 2 fill 24 of AVX-512's 32.
constexpr int kBlockOut = kLanes == 8 ? 6 : 12;
constexpr int kBlockIn = 2 * kLanes;
// Floats of packed grad that stay in the second-level cache while the act panels pass by.
constexpr int64_t kGradPanel = 48 * 1024;

using Block = Vector[kBlockOut][2];

// A block of the weight gradient, or of a direction being made, and where its dots go.
struct Target {
  float* sum;
  int64_t stride;
  float scale;
  bool add;
  const float* direction;  // null: no dots
  int64_t direction_stride, next_direction;
  int64_t num_directions, dots_stride;
  double* dots;
  bool norms;  // one more dot, with itself
};

// Columns [0, cols) of every token's row, as panels of `panel` columns, zeros beyond the last.
// A few tokens at a time: rows lie far apart, often on the same few sets of the cache.
template <int panel>
void pack(const float* rows, int64_t token_stride, int64_t tokens, int64_t cols, float* panels) {
  constexpr int64_t kTokens = 16;
  for (int64_t first = 0; first < tokens; first += kTokens) {
    const int64_t last = smaller(first + kTokens, tokens);
    for (int64_t begin = 0; begin < cols; begin += panel) {
      const float* from = rows + first * token_stride + begin;
      float* to = panels + begin * tokens + first * panel;
      const int64_t width = smaller(panel, cols - begin);
      for (int64_t t = first; t < last; ++t, from += token_stride, to += panel) {
        if (width == panel) {
          for (int c = 0; c < panel; ++c) to[c] = from[c];
        } else {
          for (int c = 0; c < panel; ++c) to[c] = c < width ? from[c] : 0.0F;
        }
      }
    }
  }
}

inline void multiply(const float* grad, const float* act, int64_t tokens, Block& sums) {
  for (int i = 0; i < kBlockOut; ++i) {
    sums[i][0] = sums[i][1] = Vector{};
  }
#pragma GCC unroll 4
  for (int64_t t = 0; t < tokens; ++t, grad += kBlockOut, act += kBlockIn) {
    __builtin_prefetch(act + 16 * kBlockIn);
    const Vector left = load(act), right = load(act + kLanes);
#pragma GCC unroll 12
    for (int i = 0; i < kBlockOut; ++i) {
      const Vector g = all(grad[i]);
      sums[i][0] += g * left;
      sums[i][1] += g * right;
    }
  }
}

inline double lane_sum(const Vector& x) {
  float sum = 0;
  for (int lane = 0; lane < kLanes; ++lane) {
    sum += x[lane];
  }
  return sum;
}

inline double square(const Block& sums) {
  Vector left{}, right{};
#pragma GCC unroll 12
  for (int i = 0; i < kBlockOut; ++i) {
    left += sums[i][0] * sums[i][0];
    right += sums[i][1] * sums[i][1];
  }
  return lane_sum(left + right);
}

inline void write_whole(const Block& sums, const Target& to) {
  for (int64_t k = 0; k < to.num_directions; ++k) {
    const float* direction = to.direction + k * to.next_direction;
    Vector left{}, right{};
#pragma GCC unroll 12
    for (int i = 0; i < kBlockOut; ++i, direction += to.direction_stride) {
      left += sums[i][0] * load(direction);
      right += sums[i][1] * load(direction + kLanes);
    }
    to.dots[k * to.dots_stride] += lane_sum(left + right);
  }
  if (to.norms) to.dots[to.num_directions * to.dots_stride] += square(sums);
  const Vector scale = all(to.scale);
  float* row = to.sum;
#pragma GCC unroll 12
  for (int i = 0; i < kBlockOut; ++i, row += to.stride) {
    const Vector left = scale * sums[i][0], right = scale * sums[i][1];
    store(row, to.add ? load(row) + left : left);
    store(row + kLanes, to.add ? load(row + kLanes) + right : right);
  }
}

// At the matrix's last rows and columns, [0, out) x [0, in) of a block.
void write_part(const Block& sums, int64_t out, int64_t in, const Target& to) {
  for (int64_t k = 0; k < to.num_directions; ++k) {
    const float* direction = to.direction + k * to.next_direction;
    float dot = 0;
    for (int64_t i = 0; i < out; ++i) {
      for (int64_t j = 0; j < in; ++j) {
        dot += sums[i][j / kLanes][j % kLanes] * direction[i * to.direction_stride + j];
      }
    }
    to.dots[k * to.dots_stride] += dot;
  }
  // Beyond the matrix the panels, and so the sums, are zero.
  if (to.norms) to.dots[to.num_directions * to.dots_stride] += square(sums);
  for (int64_t i = 0; i < out; ++i) {
    for (int64_t j = 0; j < in; ++j) {
      float& sum = to.sum[i * to.stride + j];
      const float more = to.scale * sums[i][j / kLanes][j % kLanes];
      sum = to.add ? sum + more : more;
    }
  }
}

inline void prefetch(const Target& to) {
  for (int i = 0; i < kBlockOut; ++i) {
    __builtin_prefetch(to.sum + i * to.stride);
    if (to.direction != nullptr) __builtin_prefetch(to.direction + i * to.direction_stride);
  }
}

int64_t grad_panel_rows(int64_t tokens) {
  return larger(kBlockOut, kGradPanel / larger(1, tokens) / kBlockOut * kBlockOut);
}

// Row i's gradient on the tile, into or onto `to`.
void add_row(const LinearProblem& p, int64_t row, const LinearTile& tile, const Target& to,
             float* act_panels, float* grad_panels) {
  const int64_t in = tile.in_end - tile.in_begin, step = grad_panel_rows(p.tokens);
  pack<kBlockIn>(p.act.row(row) + tile.in_begin, p.act.token_stride, p.tokens, in, act_panels);
  for (int64_t begin = tile.out_begin; begin < tile.out_end; begin += step) {
    const int64_t out = smaller(step, tile.out_end - begin);
    pack<kBlockOut>(p.grad.row(row) + begin, p.grad.token_stride, p.tokens, out, grad_panels);
    for (int64_t j = 0; j < in; j += kBlockIn) {
      for (int64_t i = 0; i < out; i += kBlockOut) {
        const int64_t i_tile = begin - tile.out_begin + i;
        Target block = to;
        block.sum += i_tile * to.stride + j;
        if (to.direction != nullptr) block.direction += i_tile * to.direction_stride + j;
        prefetch(block);
        Block sums;
        multiply(grad_panels + i * p.tokens, act_panels + j * p.tokens, p.tokens, sums);
        if (i + kBlockOut <= out && j + kBlockIn <= in) {
          write_whole(sums, block);
        } else {
          write_part(sums, smaller(kBlockOut, out - i), smaller(kBlockIn, in - j), block);
        }
      }
    }
  }
}

LinearScratch scratch(const LinearProblem& p, const LinearTile& size) {
  const int64_t in = round_up(size.in_end, kBlockIn);
  const int64_t grad_rows = smaller(grad_panel_rows(p.tokens), round_up(size.out_end, kBlockOut));
  const int64_t made = p.direction == nullptr ? p.num_directions * size.out_end * size.in_end : 0;
  return {in * p.tokens, grad_rows * p.tokens, made};
}

// Direction k's tile from its val rows, (out, in), contiguous.
void make_direction(const LinearProblem& p, int64_t first, int64_t count, const LinearTile& tile,
                    float* act_panels, float* grad_panels, float* direction) {
  const int64_t in = tile.in_end - tile.in_begin;
  const Target to{direction, in, 1.0F, true, nullptr, 0, 0, 0, 0, nullptr, false};
  for (int64_t i = 0; i < (tile.out_end - tile.out_begin) * in; ++i) direction[i] = 0;
  for (int64_t v = first; v < first + count; ++v) {
    add_row(p, v, tile, to, act_panels, grad_panels);
  }
}

// ‖D‖² of a tile (out, in): by rows in float, then in double, as the dots are.
double square(const float* direction, int64_t out, int64_t in) {
  double total = 0;
  for (int64_t i = 0; i < out; ++i, direction += in) {
    float row = 0;
#pragma omp simd reduction(+ : row)
    for (int64_t j = 0; j < in; ++j) row += direction[j] * direction[j];
    total += row;
  }
  return total;
}

void run(const LinearProblem& p, const LinearTile& tile, float* memory, double* dots) {
  const LinearTile size{0, tile.out_end - tile.out_begin, 0, tile.in_end - tile.in_begin};
  const LinearScratch need = scratch(p, size);
  float* act_panels = memory;
  float* grad_panels = act_panels + need.act;
  Target to{p.weight_grad + tile.out_begin * p.d_in + tile.in_begin,
            p.d_in,
            p.scale,
            p.accumulate,
            p.direction,
            p.d_in,
            p.d_out * p.d_in,
            p.num_directions,
            p.dot_columns(),
            dots,
            p.norms};
  if (p.direction != nullptr) {
    to.direction += tile.out_begin * p.d_in + tile.in_begin;
  } else if (p.num_directions > 0) {
    float* direction = grad_panels + need.grad;
    int64_t first = p.rows;
    for (int64_t k = 0; k < p.num_directions; first += p.val_rows[k++]) {
      float* made = direction + k * size.out_end * size.in_end;
      make_direction(p, first, p.val_rows[k], tile, act_panels, grad_panels, made);
      if (p.norms) dots[k * p.dot_columns() + p.rows] += square(made, size.out_end, size.in_end);
    }
    to.direction = direction;
    to.direction_stride = size.in_end;
    to.next_direction = size.out_end * size.in_end;
  }
  for (int64_t i = 0; i < p.rows; ++i, ++to.dots, to.add = true) {
    add_row(p, i, tile, to, act_panels, grad_panels);
  }
}

}  // namespace
