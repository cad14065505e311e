#include "linear_wgrad.h"

#include <algorithm>
#include <vector>

#include "huge_pages.h"
#include "parallel.h"

namespace graddot {
namespace {

// A tile of the sum, of every direction and the packed activations of a sample share the last
// level of cache; smaller tiles pack more often. Where samples have few tokens, what a tile sums up is
// read and written the more for what is packed: fewer rows then, which a nearer cache holds (a third
// less time with 16 tokens in fp32, and with 64 by AMX).
constexpr int64_t kTileRows = 768, kFewRows = 192, kTileCols = 1024, kPackedAct = 1024 * 1024;
// Activations of all rows that are packed once for all tiles: those of a language model's head,
// whose many tiles would each pack them again, 7 to 12 % of the time. More of them would not stay near.
constexpr int64_t kPackedOnce = 1536 * 1024;
// Rows below which another thread rather takes columns.
constexpr int64_t kMinRows = 96;

// Of a long sample without dots so many tokens at a time are as good as samples of their own, and tiles
// of more columns fit.
constexpr int64_t kTogether = 1024;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Equal tiles, as many as there are threads or a multiple.
std::vector<LinearTile> make_tiles(const LinearKernel& kernel, const LinearProblem& p, int64_t threads) {
  const int64_t max_cols = std::clamp<int64_t>(kPackedAct / std::max<int64_t>(p.tokens, 1), 128, kTileCols);
  const bool by_rows = p.d_out >= kMinRows * threads;
  const int64_t col_tiles = std::max(ceil_div(p.d_in, max_cols), by_rows ? 1 : threads);
  const int64_t cols = ceil_div(ceil_div(p.d_in, col_tiles), 32) * 32;
  const int64_t one_direction = std::clamp(p.tokens * kernel.rows_per_token, kFewRows, kTileRows);
  const int64_t max_rows = one_direction / std::max<int64_t>(1, std::min<int64_t>(p.num_directions, 4));
  const int64_t share = by_rows ? threads : 1;
  const int64_t row_tiles = share * std::max<int64_t>(1, ceil_div(ceil_div(p.d_out, share), max_rows));
  const int64_t rows = ceil_div(ceil_div(p.d_out, row_tiles), kernel.row_multiple) * kernel.row_multiple;
  std::vector<LinearTile> tiles;
  for (int64_t out = 0; out < p.d_out; out += rows) {
    for (int64_t in = 0; in < p.d_in; in += cols) {
      tiles.push_back({out, std::min(out + rows, p.d_out), in, std::min(in + cols, p.d_in)});
    }
  }
  return tiles;
}

LinearTile largest(const std::vector<LinearTile>& tiles) {
  LinearTile size{0, 0, 0, 0};
  for (const LinearTile& tile : tiles) {
    size.out_end = std::max(size.out_end, tile.out_end - tile.out_begin);
    size.in_end = std::max(size.in_end, tile.in_end - tile.in_begin);
  }
  return size;
}

}  // namespace

void linear_wgrad_dot(const LinearKernel& kernel, const LinearProblem& p, int64_t threads) {
  const int64_t dots = p.dot_rows() * p.dot_columns();
  std::fill(p.dots, p.dots + dots, 0.0F);
  if (p.rows == 0 && !p.accumulate) {
    for (int64_t i = 0; i < p.d_out; ++i) std::fill_n(p.weight_grad + i * p.weight_grad_stride, p.d_in, 0.0F);
  }
  if (p.dot_columns() == 0 || p.d_out == 0 || p.d_in == 0) {
    return;
  }
  if (p.rows == 1 && p.dot_rows() == 0 && p.tokens > kTogether) {
    LinearProblem part = p;
    for (Activations* x : {&part.act, &part.grad}) x->row_stride = kTogether * x->token_stride;
    part.rows = p.tokens / kTogether;
    part.tokens = kTogether;
    linear_wgrad_dot(kernel, part, threads);
    for (Activations* x : {&part.act, &part.grad}) {
      x->data = static_cast<const char*>(x->data) + part.rows * x->row_stride * size_of(p.element);
    }
    part.tokens = p.tokens - part.rows * kTogether;
    part.rows = 1;
    part.accumulate = true;
    if (part.tokens > 0) linear_wgrad_dot(kernel, part, threads);
    return;
  }
  const auto tiles = make_tiles(kernel, p, std::max<int64_t>(threads, 1));
  const auto count = static_cast<int64_t>(tiles.size());
  const LinearScratch need = kernel.scratch(p, largest(tiles));
  thread_local Scratch packed;
  const int64_t rows = p.all_rows(), size = kernel.packed_size(p);
  const bool once = tiles.front().out_end < p.d_out && rows * size <= kPackedOnce;
  float* packed_act = nullptr;
  if (once) {
    packed_act = packed.get(rows * size);
    parallel_for(rows, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) kernel.pack_act(p, i, packed_act + i * size);
    });
  }
  std::vector<double> parts(static_cast<size_t>(count * dots));
  parallel_for(count, 1, [&](int64_t begin, int64_t end) {
    thread_local Scratch scratch;
    float* memory = scratch.get(need.total());
    for (int64_t i = begin; i < end; ++i) {
      kernel.run(p, tiles[static_cast<size_t>(i)], packed_act, memory, parts.data() + i * dots);
    }
  });
  for (int64_t i = 0; i < dots; ++i) {  // in the tiles' order, in double: they may cancel
    double sum = 0;
    for (int64_t tile = 0; tile < count; ++tile) {
      sum += parts[static_cast<size_t>(tile * dots + i)];
    }
    p.dots[i] = static_cast<float>(sum);
  }
}

}  // namespace graddot
