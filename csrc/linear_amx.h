// Linear weight gradients of bf16 by AMX, the matrix unit of Intel's processors from Sapphire Rapids
// on: fp32 sums of 16 x 16 blocks, 32 tokens an instruction.
#pragma once

#include "linear_tile.h"
#include "matrix_unit.h"

namespace {

#ifdef __AVX512F__
// 16 x 16 numbers of 32 bits, rows to columns.
inline void transpose(__m512i (&r)[16]) {
  __m512i t[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {  // r[i + c] has columns c, 4 + c, 8 + c and 12 + c of rows i to i + 3
    const __m512i low = _mm512_shuffle_i32x4(r[c], r[4 + c], 0x88);
    const __m512i high = _mm512_shuffle_i32x4(r[8 + c], r[12 + c], 0x88);
    const __m512i odd_low = _mm512_shuffle_i32x4(r[c], r[4 + c], 0xdd);
    const __m512i odd_high = _mm512_shuffle_i32x4(r[8 + c], r[12 + c], 0xdd);
    t[c] = _mm512_shuffle_i32x4(low, high, 0x88);
    t[4 + c] = _mm512_shuffle_i32x4(odd_low, odd_high, 0x88);
    t[8 + c] = _mm512_shuffle_i32x4(low, high, 0xdd);
    t[12 + c] = _mm512_shuffle_i32x4(odd_low, odd_high, 0xdd);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) r[i] = t[i];
}
#endif

struct Amx {
  using Element = Bf16;
  using Packed = uint16_t;
  // 2 x 2 blocks of sums and two of each side fill the eight tiles.
  static constexpr int kBlockOut = 32;
  static constexpr int kTokens = 32, kRowsPerToken = 1;
  static constexpr int64_t kPairs = kTokens / 2, kSide = 16;
  using Sums = Vector[kBlockOut][2];
  static_assert(kLanes == kSide);

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
          UnsignedVector pairs[kPairs];
          for (int64_t t = 0; t < kPairs; ++t) {
            const int64_t token = first + 2 * t;
            pairs[t] = pair(rows + token * token_stride + c, token_stride, tokens - token, cols - c);
          }
          keep_columns(to, pairs);
        }
      }
    }
  }

  static void keep_columns(Packed* to, const UnsignedVector (&pairs)[kPairs]) {
#ifdef __AVX512F__
    __m512i columns[kPairs];
    __builtin_memcpy(columns, pairs, sizeof(pairs));
    transpose(columns);
    __builtin_memcpy(to, columns, sizeof(columns));
#else
    UnsignedVector columns[kSide];
    for (int c = 0; c < kSide; ++c) {
      for (int t = 0; t < kPairs; ++t) columns[c][t] = pairs[t][c];
    }
    __builtin_memcpy(to, columns, sizeof(columns));
#endif
  }

  static void multiply(const Packed* grad, const Packed* act, int64_t tokens, const Target& to,
                       int64_t i, int64_t j, Sums& sums) {
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
