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

constexpr int kBlockIn = 2 * kLanes;
constexpr int64_t kCacheLine = 64;

// A long sample goes by parts of so many tokens, whose act panel stays in the first-level cache, and
// its sums to memory between them: with 1024 tokens at once a quarter more time on AVX-512. A part is
// summed by itself: one fp32 sum of 4096 tokens was off by ten times as much.
constexpr int64_t kPartTokens = 256;

// A tile of `count` matrices of blocks of `size` floats, zeros beyond the last row and column, block
// by block in the order of their use: rows of the matrix itself lie pages apart and compete for the
// same sets of the cache. The matrices' same blocks lie one after the other.
struct Blocks {
  float* data;
  int64_t size, count, out;

  float* at(int64_t i, int64_t j) const { return data + (j * out + i) * count * size; }
};

// Where a row's gradient goes: its sum, and its dots.
struct Target {
  Blocks sum;
  bool add;
  Blocks directions;
  double* dots;  // kLanes of each
  bool norms;    // one dot more, with itself
};

// Dots are summed over the blocks in double, lane by lane: they may cancel.
typedef double Lanes __attribute__((vector_size(8 * kLanes), aligned(8), may_alias));

inline void add_lanes(double* dot, const Vector& x) {
  *reinterpret_cast<Lanes*>(dot) += __builtin_convertvector(x, Lanes);
}

// What all kernels do; `Form` says how panels are packed and multiplied:
//   Element                     of act and grad, and Packed, that of their panels
//   kBlockOut, kTokens          a block's rows, and the multiple that its tokens are filled up to by zeros
//   kRowsPerToken               see LinearKernel
//   pack_act, pack_grad         columns [0, cols) of `tokens` tokens as panels of kBlockIn or kBlockOut,
//                               kTokens-padded, `stride` elements from panel to panel
//   multiply                    a block's sums over the (padded) tokens of a panel each. In registers, it
//                               may fetch what `target` holds of block (i, j); with kWritesLater in
//                               memory, and it tells how many rows of another to write meanwhile
template <class Form>
struct LinearKernelOf {
  static constexpr int kBlockOut = Form::kBlockOut;
  static constexpr int64_t kBlock = kBlockOut * kBlockIn;
  // Elements of packed grad that stay in the second-level cache while the act panels pass by.
  static constexpr int64_t kGradPanel = 64 * 1024;
  using Element = typename Form::Element;
  using Packed = typename Form::Packed;
  using Sums = Vector[kBlockOut][2];

  static int64_t blocks_out(const LinearTile& tile) {
    return round_up(tile.out_end - tile.out_begin, kBlockOut) / kBlockOut;
  }

  static int64_t blocks_in(const LinearTile& tile) {
    return round_up(tile.in_end - tile.in_begin, kBlockIn) / kBlockIn;
  }

  static int64_t padded(int64_t tokens) { return round_up(tokens, Form::kTokens); }

  // Floats that hold so many packed elements, to the end of a cache line.
  static int64_t floats(int64_t packed) {
    return round_up(packed * int64_t{sizeof(Packed)}, kCacheLine) / int64_t{sizeof(float)};
  }

  static void add(const float* block, Sums& sums, int begin, int end) {
    block += begin * kBlockIn;
#pragma GCC unroll 12
    for (int o = begin; o < end; ++o, block += kBlockIn) {
      sums[o][0] += load(block);
      sums[o][1] += load(block + kLanes);
    }
  }

  static Vector square(const Sums& sums, int begin, int end) {
    Vector left{}, right{};
#pragma GCC unroll 12
    for (int o = begin; o < end; ++o) {
      left += sums[o][0] * sums[o][0];
      right += sums[o][1] * sums[o][1];
    }
    return left + right;
  }

  // Rows [begin, end) of block (i, j).
  __attribute__((always_inline)) static void write(const Sums& sums, const Target& to, int64_t i,
                                                   int64_t j, int begin, int end) {
    double* dot = to.dots;
    for (int64_t k = 0; k < to.directions.count; ++k, dot += kLanes) {
      const float* direction = to.directions.at(i, j) + k * kBlock + begin * kBlockIn;
      Vector left{}, right{};
#pragma GCC unroll 12
      for (int o = begin; o < end; ++o, direction += kBlockIn) {
        left += sums[o][0] * load(direction);
        right += sums[o][1] * load(direction + kLanes);
      }
      add_lanes(dot, left + right);
    }
    if (to.norms) add_lanes(dot, square(sums, begin, end));
    float* row = to.sum.at(i, j) + begin * kBlockIn;
#pragma GCC unroll 12
    for (int o = begin; o < end; ++o, row += kBlockIn) {
      store(row, to.add ? load(row) + sums[o][0] : sums[o][0]);
      store(row + kLanes, to.add ? load(row + kLanes) + sums[o][1] : sums[o][1]);
    }
  }

  // A block whose sums are in memory; its rows are written bit by bit while the next is multiplied,
  // which the processor does elsewhere: a quarter less time than one after the other.
  struct Later {
    Sums sums;
    const float* before = nullptr;  // of the block's earlier parts, to be added
    const Target* to = nullptr;
    int64_t i = 0, j = 0;
    int row = kBlockOut;

    void write_rows(int count) {
      const int end = row + count < kBlockOut ? row + count : kBlockOut;
      if (row == end) return;
      if (before != nullptr) add(before, sums, row, end);
      write(sums, *to, i, j, row, end);
      row = end;
    }
  };

  // Tokens of a sample's parts, as equal as they can be.
  static int64_t part_of(int64_t tokens) {
    const int64_t parts = (tokens + kPartTokens - 1) / kPartTokens;
    return tokens > kPartTokens ? padded((tokens + parts - 1) / parts) : tokens;
  }

  static int64_t grad_panel_rows(int64_t tokens) {
    return larger(kBlockOut, kGradPanel / larger(1, tokens) / kBlockOut * kBlockOut);
  }

  static int64_t packed_size(const LinearProblem& p) {
    return floats(round_up(p.d_in, kBlockIn) * padded(p.tokens));
  }

  static void pack_act(const LinearProblem& p, int64_t row, float* packed) {
    pack_act_of(p, row, 0, p.d_in, packed);
  }

  static void pack_act_of(const LinearProblem& p, int64_t row, int64_t in_begin, int64_t in, float* packed) {
    const auto* act = p.act.at<Element>(row, 0, in_begin);
    auto* panels = reinterpret_cast<Packed*>(packed);
    Form::pack_act(act, p.act, p.tokens, in, panels, padded(p.tokens) * kBlockIn);
  }

  // Packed operands: all rows' activations, or null; and memory for what is packed row by row, and
  // for a row's sums between its parts.
  struct Panels {
    const float* all_act;
    float *act, *grad, *sums;
  };

  // A row's gradient on the tile, into or onto `to`.
  static void add_row(const LinearProblem& p, int64_t row, const LinearTile& tile, const Target& to,
                      const Panels& panels) {
    const int64_t in = tile.in_end - tile.in_begin, part = part_of(p.tokens), all = padded(p.tokens);
    const int64_t step = grad_panel_rows(padded(part));
    const auto* act_panels = reinterpret_cast<const Packed*>(panels.act);
    auto* grad_panels = reinterpret_cast<Packed*>(panels.grad);
    if (panels.all_act != nullptr) {
      const float* packed = panels.all_act + row * packed_size(p);
      act_panels = reinterpret_cast<const Packed*>(packed) + tile.in_begin * all;
    } else if (p.tokens > 0) {  // else there may be no address to count from, here and below
      pack_act_of(p, row, tile.in_begin, in, panels.act);
    }
    const Target between{{panels.sums, kBlock, 1, to.sum.out}, false, {}, nullptr, false};
    Later later[2];
    [[maybe_unused]] int turn = 0;
    int64_t first = 0;
    do {  // once where there is no token: the sums are zeros
      const int64_t tokens = smaller(part, p.tokens - first), filled = padded(tokens);
      const Target& into = first + tokens == p.tokens ? to : between;
      for (int64_t begin = tile.out_begin; begin < tile.out_end; begin += step) {
        const int64_t out = smaller(step, tile.out_end - begin);
        if (tokens > 0) {
          Form::pack_grad(p.grad.at<Element>(row, first, begin), p.grad, tokens, out,
                          grad_panels, filled * kBlockOut);
        }
        for (int64_t j = 0; j < in; j += kBlockIn) {
          const Packed* act = act_panels + j * all + first * kBlockIn;
          for (int64_t i = 0; i < out; i += kBlockOut) {
            const int64_t block_i = (begin - tile.out_begin + i) / kBlockOut, block_j = j / kBlockIn;
            const float* before = first > 0 ? between.sum.at(block_i, block_j) : nullptr;
            if constexpr (Form::kWritesLater) {
              Later &block = later[turn], &last = later[turn = 1 - turn];
              Form::multiply(grad_panels + i * filled, act, filled, block.sums,
                             [&](int rows) { last.write_rows(rows); });
              last.write_rows(kBlockOut);
              block.before = before;
              block.to = &into;
              block.i = block_i;
              block.j = block_j;
              block.row = 0;
            } else {
              Sums sums;
              Form::multiply(grad_panels + i * filled, act, filled, into, block_i, block_j, sums);
              if (before != nullptr) add(before, sums, 0, kBlockOut);
              write(sums, into, block_i, block_j, 0, kBlockOut);
            }
          }
        }
      }
      first += tokens;
    } while (first < p.tokens);
    if constexpr (Form::kWritesLater) later[1 - turn].write_rows(kBlockOut);
  }

  static LinearScratch scratch(const LinearProblem& p, const LinearTile& size) {
    const int64_t in = blocks_in(size) * kBlockIn, out = blocks_out(size) * kBlockOut;
    const int64_t part = part_of(p.tokens), grad_rows = smaller(grad_panel_rows(padded(part)), out);
    const int64_t sums = part < p.tokens ? out * in : 0;
    const int64_t lanes = 2 * kLanes * p.dot_rows();  // a double is two floats
    return {round_up(lanes, kCacheLine / 4), floats(in * padded(p.tokens)),
            floats(grad_rows * padded(part)), sums, out * in, p.num_directions * out * in};
  }

  // The given directions' tile.
  static void pack_directions(const LinearProblem& p, const LinearTile& tile, const Blocks& to) {
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
  static void make_directions(const LinearProblem& p, const LinearTile& tile, const Panels& panels,
                              const Blocks& directions, double* dots) {
    const int64_t blocks = directions.out * blocks_in(tile);
    int64_t row = p.rows;
    for (int64_t k = 0; k < directions.count; ++k) {
      Target to{{directions.data + k * kBlock, kBlock, directions.count, directions.out}, false, {},
                nullptr, false};
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
  static void write_weight_grad(const LinearProblem& p, const LinearTile& tile, const Blocks& sum) {
    const Vector scale = all(p.scale);
    const int64_t cols = tile.in_end - tile.in_begin;
    for (int64_t i = 0; i < tile.out_end - tile.out_begin; ++i) {
      float* row = p.weight_grad + (tile.out_begin + i) * p.weight_grad_stride + tile.in_begin;
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

  static void run(const LinearProblem& p, const LinearTile& tile, const float* packed_act,
                  float* memory, double* dots) {
    const LinearScratch need =
        scratch(p, {0, tile.out_end - tile.out_begin, 0, tile.in_end - tile.in_begin});
    auto* lanes = reinterpret_cast<double*>(memory);
    float* act_panels = memory + need.dots;
    float* grad_panels = act_panels + need.act;
    const Panels panels{packed_act, act_panels, grad_panels, grad_panels + need.grad};
    const Blocks sum{panels.sums + need.sums, kBlock, 1, blocks_out(tile)};
    const Blocks directions{sum.data + need.sum, kBlock, p.num_directions, sum.out};
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

  static constexpr graddot::LinearKernel kernel() {
    return {run, scratch, pack_act, packed_size, kBlockOut, Form::kRowsPerToken};
  }
};

}  // namespace
