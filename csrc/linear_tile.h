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
constexpr int64_t kBlock = kBlockOut * kBlockIn;
constexpr int64_t kCacheLine = 64 / sizeof(float);
// Floats of packed grad that stay in the second-level cache while the act panels pass by.
constexpr int64_t kGradPanel = 64 * 1024;
// A long sample goes by parts of so many tokens, whose act panel stays in the first-level cache, and
// its sums to memory between them: with 1024 tokens at once a quarter more time on AVX-512. A part is
// summed by itself: one fp32 sum of 4096 tokens was off by ten times as much.
constexpr int64_t kPartTokens = 256;

using Sums = Vector[kBlockOut][2];

int64_t blocks_out(const LinearTile& tile) {
  return round_up(tile.out_end - tile.out_begin, kBlockOut) / kBlockOut;
}

int64_t blocks_in(const LinearTile& tile) {
  return round_up(tile.in_end - tile.in_begin, kBlockIn) / kBlockIn;
}

// A tile of `count` matrices, zeros beyond the last row and column, block by block in the order of
// their use: rows of the matrix itself lie pages apart and compete for the same sets of the cache.
// The matrices' same blocks lie one after the other.
struct Blocks {
  float* data;
  int64_t count, out;

  float* at(int64_t i, int64_t j) const { return data + (j * out + i) * count * kBlock; }
};

// Where a row's gradient goes: its sum, and its dots.
struct Target {
  Blocks sum;
  bool add;
  Blocks directions;
  double* dots;  // kLanes of each
  bool norms;    // one dot more, with itself
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

inline void multiply_token(const float* grad, const float* act, Sums& sums) {
  const Vector left = load(act), right = load(act + kLanes);
#pragma GCC unroll 12
  for (int i = 0; i < kBlockOut; ++i) {
    const Vector g = all(grad[i]);
    sums[i][0] += g * left;
    sums[i][1] += g * right;
  }
}

inline void clear(Sums& sums) {
  for (int o = 0; o < kBlockOut; ++o) {
    sums[o][0] = sums[o][1] = Vector{};
  }
}

inline void add(const float* block, Sums& sums) {
#pragma GCC unroll 12
  for (int o = 0; o < kBlockOut; ++o, block += kBlockIn) {
    sums[o][0] += load(block);
    sums[o][1] += load(block + kLanes);
  }
}

// Block (i, j) of the sum and of the directions, which lie further away than the panels, comes near
// meanwhile, a cache line with every token: 5 to 20 % of the time.
inline void multiply(const float* grad, const float* act, int64_t tokens, const Target& to,
                     int64_t i, int64_t j, Sums& sums) {
  int64_t t = 0;
  const auto multiply_and_fetch = [&](const float* line, int64_t floats) {
    for (const int64_t end = smaller(t + floats / kCacheLine, tokens); t < end; ++t) {
      __builtin_prefetch(line);
      line += kCacheLine;
      multiply_token(grad + t * kBlockOut, act + t * kBlockIn, sums);
    }
  };
  multiply_and_fetch(to.sum.at(i, j), kBlock);
  multiply_and_fetch(to.directions.at(i, j), to.directions.count * kBlock);
#pragma GCC unroll 4
  for (; t < tokens; ++t) multiply_token(grad + t * kBlockOut, act + t * kBlockIn, sums);
}

// Dots are summed over the blocks in double, lane by lane: they may cancel.
typedef double Lanes __attribute__((vector_size(8 * kLanes), aligned(8), may_alias));

inline void add_lanes(double* dot, const Vector& x) {
  *reinterpret_cast<Lanes*>(dot) += __builtin_convertvector(x, Lanes);
}

inline Vector square(const Sums& sums) {
  Vector left{}, right{};
#pragma GCC unroll 12
  for (int i = 0; i < kBlockOut; ++i) {
    left += sums[i][0] * sums[i][0];
    right += sums[i][1] * sums[i][1];
  }
  return left + right;
}

inline void write(const Sums& sums, const Target& to, int64_t i, int64_t j) {
  const float* direction = to.directions.at(i, j);
  double* dot = to.dots;
  for (int64_t k = 0; k < to.directions.count; ++k, dot += kLanes) {
    Vector left{}, right{};
#pragma GCC unroll 12
    for (int o = 0; o < kBlockOut; ++o, direction += kBlockIn) {
      left += sums[o][0] * load(direction);
      right += sums[o][1] * load(direction + kLanes);
    }
    add_lanes(dot, left + right);
  }
  if (to.norms) add_lanes(dot, square(sums));
  float* row = to.sum.at(i, j);
#pragma GCC unroll 12
  for (int o = 0; o < kBlockOut; ++o, row += kBlockIn) {
    store(row, to.add ? load(row) + sums[o][0] : sums[o][0]);
    store(row + kLanes, to.add ? load(row + kLanes) + sums[o][1] : sums[o][1]);
  }
}

// Tokens of a sample's parts, as equal as they can be.
int64_t part_of(int64_t tokens) {
  const int64_t parts = (tokens + kPartTokens - 1) / kPartTokens;
  return tokens > kPartTokens ? (tokens + parts - 1) / parts : tokens;
}

int64_t grad_panel_rows(int64_t tokens) {
  return larger(kBlockOut, kGradPanel / larger(1, tokens) / kBlockOut * kBlockOut);
}

int64_t packed_size(const LinearProblem& p) { return round_up(p.d_in, kBlockIn) * p.tokens; }

void pack_act(const LinearProblem& p, int64_t row, float* packed) {
  pack<kBlockIn>(p.act.row(row), p.act.token_stride, p.tokens, p.d_in, packed);
}

// Packed operands: all rows' activations, or null; and memory for what is packed row by row, and for
// a row's sums between its parts.
struct Panels {
  const float* all_act;
  float *act, *grad, *sums;
};

// A row's gradient on the tile, into or onto `to`.
void add_row(const LinearProblem& p, int64_t row, const LinearTile& tile, const Target& to,
             const Panels& panels) {
  const int64_t in = tile.in_end - tile.in_begin, part = part_of(p.tokens);
  const int64_t step = grad_panel_rows(part);
  const float* act_panels = panels.act;
  if (panels.all_act != nullptr) {
    act_panels = panels.all_act + row * packed_size(p) + tile.in_begin * p.tokens;
  } else if (p.tokens > 0) {  // else there may be no address to count from, here and below
    pack<kBlockIn>(p.act.row(row) + tile.in_begin, p.act.token_stride, p.tokens, in, panels.act);
  }
  const Target between{{panels.sums, 1, to.sum.out}, false, {}, nullptr, false};
  int64_t first = 0;
  do {  // once where there is no token: the sums are zeros
    const int64_t tokens = smaller(part, p.tokens - first);
    const Target& into = first + tokens == p.tokens ? to : between;
    for (int64_t begin = tile.out_begin; begin < tile.out_end; begin += step) {
      const int64_t out = smaller(step, tile.out_end - begin);
      if (tokens > 0) {
        const float* grad = p.grad.row(row) + first * p.grad.token_stride + begin;
        pack<kBlockOut>(grad, p.grad.token_stride, tokens, out, panels.grad);
      }
      for (int64_t j = 0; j < in; j += kBlockIn) {
        const float* act = act_panels + j * p.tokens + first * kBlockIn;
        for (int64_t i = 0; i < out; i += kBlockOut) {
          Sums sums;
          const int64_t block_i = (begin - tile.out_begin + i) / kBlockOut, block_j = j / kBlockIn;
          clear(sums);
          multiply(panels.grad + i * tokens, act, tokens, into, block_i, block_j, sums);
          if (first > 0) add(between.sum.at(block_i, block_j), sums);
          write(sums, into, block_i, block_j);
        }
      }
    }
    first += tokens;
  } while (first < p.tokens);
}

LinearScratch scratch(const LinearProblem& p, const LinearTile& size) {
  const int64_t in = blocks_in(size) * kBlockIn, out = blocks_out(size) * kBlockOut;
  const int64_t part = part_of(p.tokens), grad_rows = smaller(grad_panel_rows(part), out);
  const int64_t sums = part < p.tokens ? out * in : 0;
  const int64_t lanes = 2 * kLanes * p.dot_rows();  // a double is two floats
  return {lanes, in * p.tokens, grad_rows * part, sums, out * in, p.num_directions * out * in};
}

// The given directions' tile.
void pack_directions(const LinearProblem& p, const LinearTile& tile, const Blocks& to) {
  const int64_t cols = tile.in_end - tile.in_begin;
  for (int64_t k = 0; k < to.count; ++k) {
    const float* from = p.direction + (k * p.d_out + tile.out_begin) * p.d_in + tile.in_begin;
    for (int64_t i = 0; i < to.out * kBlockOut; ++i, from += p.d_in) {
      const bool inside = tile.out_begin + i < tile.out_end;
      for (int64_t j = 0; j < cols; j += kBlockIn) {
        float* row = to.at(i / kBlockOut, j / kBlockIn) + k * kBlock + i % kBlockOut * kBlockIn;
        if (inside && j + kBlockIn <= cols) {
          for (int c = 0; c < kBlockIn; ++c) row[c] = from[j + c];
        } else {
          for (int c = 0; c < kBlockIn; ++c) row[c] = inside && j + c < cols ? from[j + c] : 0.0F;
        }
      }
    }
  }
}

// The tile of all directions, from their val rows.
void make_directions(const LinearProblem& p, const LinearTile& tile, const Panels& panels,
                     const Blocks& directions, double* dots) {
  const int64_t blocks = directions.out * blocks_in(tile);
  int64_t row = p.rows;
  for (int64_t k = 0; k < directions.count; ++k) {
    Target to{{directions.data + k * kBlock, directions.count, directions.out}, false, {}, nullptr,
              false};
    for (const int64_t end = row + p.val_rows[k]; row < end; ++row, to.add = true) {
      add_row(p, row, tile, to, panels);
    }
    for (int64_t block = 0; p.norms && block < blocks; ++block) {  // in double, as the dots are
      const float* values = to.sum.data + block * directions.count * kBlock;
      float square = 0;
#pragma omp simd reduction(+ : square)
      for (int64_t i = 0; i < kBlock; ++i) square += values[i] * values[i];
      dots[k * p.dot_columns() + p.rows] += square;
    }
  }
}

// scale times the sum into or onto the weight gradient's tile.
void write_weight_grad(const LinearProblem& p, const LinearTile& tile, const Blocks& sum) {
  const Vector scale = all(p.scale);
  const int64_t cols = tile.in_end - tile.in_begin;
  for (int64_t i = 0; i < tile.out_end - tile.out_begin; ++i) {
    float* row = p.weight_grad + (tile.out_begin + i) * p.d_in + tile.in_begin;
    for (int64_t j = 0; j < cols; j += kBlockIn, row += kBlockIn) {
      const float* from = sum.at(i / kBlockOut, j / kBlockIn) + i % kBlockOut * kBlockIn;
      if (j + kBlockIn <= cols) {
        for (int c = 0; c < kBlockIn; c += kLanes) {
          const Vector scaled = scale * load(from + c);
          store(row + c, p.accumulate ? load(row + c) + scaled : scaled);
        }
      } else {
        for (int64_t c = 0; c < cols - j; ++c) {
          row[c] = p.accumulate ? row[c] + p.scale * from[c] : p.scale * from[c];
        }
      }
    }
  }
}

void run(const LinearProblem& p, const LinearTile& tile, const float* packed_act, float* memory,
         double* dots) {
  const LinearScratch need =
      scratch(p, {0, tile.out_end - tile.out_begin, 0, tile.in_end - tile.in_begin});
  auto* lanes = reinterpret_cast<double*>(memory);
  float* act_panels = memory + need.dots;
  float* grad_panels = act_panels + need.act;
  const Panels panels{packed_act, act_panels, grad_panels, grad_panels + need.grad};
  const Blocks sum{panels.sums + need.sums, 1, blocks_out(tile)};
  const Blocks directions{sum.data + need.sum, p.num_directions, sum.out};
  if (p.direction != nullptr) {
    pack_directions(p, tile, directions);
  } else {
    make_directions(p, tile, panels, directions, dots);
  }
  Target to{sum, false, directions, lanes, p.norms};
  for (int64_t i = 0; i < p.rows; ++i, to.add = true) {
    for (int64_t j = 0; j < p.dot_rows() * kLanes; ++j) lanes[j] = 0;
    add_row(p, i, tile, to, panels);
    for (int64_t j = 0; j < p.dot_rows() * kLanes; ++j) {
      dots[j / kLanes * p.dot_columns() + i] += lanes[j];
    }
  }
  if (p.rows > 0) write_weight_grad(p, tile, sum);
}

}  // namespace
