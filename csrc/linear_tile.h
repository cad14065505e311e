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

// Where blocks lie: the rows of one, and one block and the next in both directions of the matrix.
template <typename T>
struct Blocks {
  T* data;
  int64_t stride, next_out, next_in;

  T* at(int64_t i, int64_t j) const {  // of the block that begins at (i, j)
    return data + i / kBlockOut * next_out + j / kBlockIn * next_in;
  }
};

template <typename T>
Blocks<T> of_matrix(T* data, int64_t stride) {
  return {data, stride, kBlockOut * stride, kBlockIn};
}

// Where a row's gradient goes: its sum, and its dots.
struct Target {
  Blocks<float> sum;
  float scale;
  bool add;
  Blocks<const float> direction;  // no data: no dots
  int64_t next_direction;
  int64_t num_directions, dots_stride;
  double* dots;
  bool norms;  // one dot more, with itself
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

inline void write_whole(const Block& sums, const Target& to, int64_t at_out, int64_t at_in) {
  const float* directions = to.direction.at(at_out, at_in);
  for (int64_t k = 0; k < to.num_directions; ++k, directions += to.next_direction) {
    const float* direction = directions;
    Vector left{}, right{};
#pragma GCC unroll 12
    for (int i = 0; i < kBlockOut; ++i, direction += to.direction.stride) {
      left += sums[i][0] * load(direction);
      right += sums[i][1] * load(direction + kLanes);
    }
    to.dots[k * to.dots_stride] += lane_sum(left + right);
  }
  if (to.norms) to.dots[to.num_directions * to.dots_stride] += square(sums);
  const Vector scale = all(to.scale);
  float* row = to.sum.at(at_out, at_in);
#pragma GCC unroll 12
  for (int i = 0; i < kBlockOut; ++i, row += to.sum.stride) {
    const Vector left = scale * sums[i][0], right = scale * sums[i][1];
    store(row, to.add ? load(row) + left : left);
    store(row + kLanes, to.add ? load(row + kLanes) + right : right);
  }
}

// At the matrix's last rows and columns, [0, out) x [0, in) of a block.
void write_part(const Block& sums, int64_t out, int64_t in, const Target& to, int64_t at_out,
                int64_t at_in) {
  const float* direction = to.direction.at(at_out, at_in);
  for (int64_t k = 0; k < to.num_directions; ++k, direction += to.next_direction) {
    float dot = 0;
    for (int64_t i = 0; i < out; ++i) {
      for (int64_t j = 0; j < in; ++j) {
        dot += sums[i][j / kLanes][j % kLanes] * direction[i * to.direction.stride + j];
      }
    }
    to.dots[k * to.dots_stride] += dot;
  }
  // Beyond the matrix the panels, and so the sums, are zero.
  if (to.norms) to.dots[to.num_directions * to.dots_stride] += square(sums);
  float* block = to.sum.at(at_out, at_in);
  for (int64_t i = 0; i < out; ++i) {
    for (int64_t j = 0; j < in; ++j) {
      float& sum = block[i * to.sum.stride + j];
      const float more = to.scale * sums[i][j / kLanes][j % kLanes];
      sum = to.add ? sum + more : more;
    }
  }
}

inline void prefetch(const Target& to, int64_t at_out, int64_t at_in) {
  const float* sum = to.sum.at(at_out, at_in);
  const float* direction = to.direction.at(at_out, at_in);
  for (int i = 0; i < kBlockOut; ++i) {
    __builtin_prefetch(sum + i * to.sum.stride);
    if (to.num_directions > 0) __builtin_prefetch(direction + i * to.direction.stride);
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
        prefetch(to, i_tile, j);
        Block sums;
        multiply(grad_panels + i * p.tokens, act_panels + j * p.tokens, p.tokens, sums);
        if (i + kBlockOut <= out && j + kBlockIn <= in) {
          write_whole(sums, to, i_tile, j);
        } else {
          write_part(sums, smaller(kBlockOut, out - i), smaller(kBlockIn, in - j), to, i_tile, j);
        }
      }
    }
  }
}

LinearScratch scratch(const LinearProblem& p, const LinearTile& size) {
  const int64_t in = round_up(size.in_end, kBlockIn), out = round_up(size.out_end, kBlockOut);
  const int64_t grad_rows = smaller(grad_panel_rows(p.tokens), out);
  const int64_t made = p.direction == nullptr ? p.num_directions * out * in : 0;
  return {in * p.tokens, grad_rows * p.tokens, made};
}

// All directions' tile from their val rows. The directions' same blocks lie one after the other, as
// they are read: rows far apart, of many directions, would come from memory one by one.
Blocks<float> make_directions(const LinearProblem& p, const LinearTile& tile, float* act_panels,
                              float* grad_panels, float* memory, double* dots) {
  constexpr int64_t kSize = kBlockOut * kBlockIn;
  const int64_t out = round_up(tile.out_end - tile.out_begin, kBlockOut) / kBlockOut;
  const int64_t in = round_up(tile.in_end - tile.in_begin, kBlockIn) / kBlockIn;
  const int64_t k = p.num_directions;
  for (int64_t i = 0; i < k * out * in * kSize; ++i) memory[i] = 0;
  Target to{{memory, kBlockIn, k * kSize, out * k * kSize}, 1.0F, true, {}, 0, 0, 0, nullptr, false};
  int64_t row = p.rows;
  for (int64_t one = 0; one < k; ++one, to.sum.data += kSize) {
    for (const int64_t end = row + p.val_rows[one]; row < end; ++row) {
      add_row(p, row, tile, to, act_panels, grad_panels);
    }
    for (int64_t block = 0; p.norms && block < out * in; ++block) {  // in double, as the dots are
      const float* values = to.sum.data + block * k * kSize;
      float square = 0;
#pragma omp simd reduction(+ : square)
      for (int64_t i = 0; i < kSize; ++i) square += values[i] * values[i];
      dots[one * p.dot_columns() + p.rows] += square;
    }
  }
  return {memory, kBlockIn, k * kSize, out * k * kSize};
}

void run(const LinearProblem& p, const LinearTile& tile, float* memory, double* dots) {
  const LinearTile size{0, tile.out_end - tile.out_begin, 0, tile.in_end - tile.in_begin};
  const LinearScratch need = scratch(p, size);
  float* act_panels = memory;
  float* grad_panels = act_panels + need.act;
  const int64_t at = tile.out_begin * p.d_in + tile.in_begin;
  Target to{of_matrix(p.weight_grad + at, p.d_in),
            p.scale,
            p.accumulate,
            {},
            p.d_out * p.d_in,
            p.num_directions,
            p.dot_columns(),
            dots,
            p.norms};
  if (p.direction != nullptr) {
    to.direction = of_matrix(p.direction + at, p.d_in);
  } else if (p.num_directions > 0) {
    const auto made =
        make_directions(p, tile, act_panels, grad_panels, grad_panels + need.grad, dots);
    to.direction = {made.data, made.stride, made.next_out, made.next_in};
    to.next_direction = kBlockOut * kBlockIn;
  }
  for (int64_t i = 0; i < p.rows; ++i, ++to.dots, to.add = true) {
    add_row(p, i, tile, to, act_panels, grad_panels);
  }
}

}  // namespace
