// Linear weight gradients of bf16 by AMX, the matrix unit of Intel's processors from Sapphire Rapids
// on: fp32 sums of 16 x 16 blocks, 32 tokens an instruction.
#pragma once

#include "linear_tile.h"
#include "matrix_unit.h"

namespace {

constexpr int kSide = 16;  // of a tile
static_assert(kLanes == kSide);

// Lane by lane x[i], or y[i - kSide].
inline UnsignedVector choose(const UnsignedVector& x, const UnsignedVector& y, const UnsignedVector& i) {
  UnsignedVector result;
#ifdef __AVX512F__
  __m512i left, right, index;
  __builtin_memcpy(&left, &x, sizeof(x));
  __builtin_memcpy(&right, &y, sizeof(y));
  __builtin_memcpy(&index, &i, sizeof(i));
  const __m512i chosen = _mm512_permutex2var_epi32(left, index, right);
  __builtin_memcpy(&result, &chosen, sizeof(result));
#else
  for (int lane = 0; lane < kSide; ++lane) {
    result[lane] = i[lane] < kSide ? x[i[lane]] : y[i[lane] - kSide];
  }
#endif
  return result;
}

// Rows to columns: two rows 1, 2, 4 and 8 apart exchange what lies so many lanes apart.
inline void transpose(UnsignedVector (&rows)[kSide]) {
#pragma GCC unroll 4
  for (uint32_t apart = 1; apart < kSide; apart *= 2) {
    UnsignedVector low, high;
    for (uint32_t lane = 0; lane < kSide; ++lane) {
      const bool other = (lane & apart) != 0;
      low[lane] = other ? kSide + lane - apart : lane;
      high[lane] = other ? kSide + lane : lane + apart;
    }
#pragma GCC unroll 16
    for (uint32_t i = 0; i < kSide; ++i) {
      if ((i & apart) != 0) continue;
      const UnsignedVector first = rows[i], second = rows[i + apart];
      rows[i] = choose(first, second, low);
      rows[i + apart] = choose(first, second, high);
    }
  }
}

struct Amx {
  using Element = Bf16;
  using Packed = uint16_t;
  // 2 x 2 blocks of sums and two of each side fill the eight tiles.
  static constexpr int kBlockOut = 32;
  static constexpr int kTokens = 32, kRowsPerToken = 1;
  static_assert(kTokens == 2 * kSide);
  using Sums = Vector[kBlockOut][2];

  // Columns [0, kSide) of two tokens, side by side; zeros where there is no column or no token.
  static UnsignedVector pair(const Bf16* rows, int64_t stride, int64_t tokens, int64_t cols) {
    if (tokens <= 0 || cols <= 0) return UnsignedVector{};
    const UnsignedVector first = widened(&rows->bits, cols);
    return tokens == 1 ? first : first | widened(&rows[stride].bits, cols) << 16;
  }

  static void keep(Packed* to, const UnsignedVector& x) { __builtin_memcpy(to, &x, sizeof(x)); }

  // A panel's tokens in pairs: the columns of one pair after another, as the unit wants its right side.
  static void pack_act(const Bf16* rows, int64_t token_stride, int64_t tokens, int64_t cols,
                       Packed* panels, int64_t stride) {
    for (int64_t first = 0; first < tokens; first += kTokens) {
      for (int64_t begin = 0; begin < cols; begin += kBlockIn) {
        Packed* to = panels + begin / kBlockIn * stride + first * kBlockIn;
        for (int64_t t = first; t < first + kTokens; t += 2) {
          const Bf16* from = rows + t * token_stride + begin;
          for (int64_t c = 0; c < kBlockIn; c += kSide, to += 2 * kSide) {
            keep(to, pair(from + c, token_stride, tokens - t, cols - begin - c));
          }
        }
      }
    }
  }

  // kTokens tokens of kSide columns after another, each column's tokens together: the left side.
  static void pack_grad(const Bf16* rows, int64_t token_stride, int64_t tokens, int64_t cols,
                        Packed* panels, int64_t stride) {
    for (int64_t first = 0; first < tokens; first += kTokens) {
      for (int64_t begin = 0; begin < cols; begin += kBlockOut) {
        Packed* to = panels + begin / kBlockOut * stride + first * kBlockOut;
        for (int64_t c = begin; c < begin + kBlockOut; c += kSide, to += kSide * kTokens) {
          UnsignedVector pairs[kSide];
          for (int64_t t = 0; t < kSide; ++t) {
            const int64_t token = first + 2 * t;
            pairs[t] = pair(rows + token * token_stride + c, token_stride, tokens - token, cols - c);
          }
          transpose(pairs);
          __builtin_memcpy(to, pairs, sizeof(pairs));
        }
      }
    }
  }

  static void multiply(const Packed* grad, const Packed* act, int64_t tokens, const Target&, int64_t,
                       int64_t, Sums& sums) {
    constexpr int64_t kTile = kSide * kTokens, kActStride = 2 * kBlockIn * sizeof(Packed);
    GRADDOT_TILE_ZERO(0);
    GRADDOT_TILE_ZERO(1);
    GRADDOT_TILE_ZERO(2);
    GRADDOT_TILE_ZERO(3);
    for (int64_t t = 0; t < tokens; t += kTokens, grad += 2 * kTile, act += 2 * kTile) {
      GRADDOT_TILE_LOAD(4, grad, kTokens * sizeof(Packed));
      GRADDOT_TILE_LOAD(6, act, kActStride);
      GRADDOT_TILE_MULTIPLY(0, 4, 6);
      GRADDOT_TILE_LOAD(7, act + kTokens, kActStride);
      GRADDOT_TILE_MULTIPLY(1, 4, 7);
      GRADDOT_TILE_LOAD(5, grad + kTile, kTokens * sizeof(Packed));
      GRADDOT_TILE_MULTIPLY(2, 5, 6);
      GRADDOT_TILE_MULTIPLY(3, 5, 7);
    }
    GRADDOT_TILE_STORE(0, &sums[0][0], sizeof(sums[0]));
    GRADDOT_TILE_STORE(1, &sums[0][1], sizeof(sums[0]));
    GRADDOT_TILE_STORE(2, &sums[kSide][0], sizeof(sums[0]));
    GRADDOT_TILE_STORE(3, &sums[kSide][1], sizeof(sums[0]));
  }
};

// The tiles' shapes are a state of the thread, which PyTorch's own products set, too, and remember.
void run_with_tiles(const LinearProblem& p, const LinearTile& tile, const float* packed_act,
                    float* memory, double* dots) {
  const MatrixUnit unit;
  LinearKernelOf<Amx>::run(p, tile, packed_act, memory, dots);
}

constexpr graddot::LinearKernel amx_kernel() {
  graddot::LinearKernel kernel = LinearKernelOf<Amx>::kernel();
  kernel.run = run_with_tiles;
  return kernel;
}

}  // namespace
