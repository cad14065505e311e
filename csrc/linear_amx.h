// Linear weight gradients by AMX, the matrix unit of Intel's processors from Sapphire Rapids on: it
// multiplies bf16 into fp32 sums of 16 x 16 blocks, 32 tokens an instruction.
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

// A group of kTokens tokens of a panel has, for each of its parts, kBlock elements: of act, its tokens
// in pairs, the columns of one pair after another, as the unit wants its right side; of grad, twice
// kSide columns, each column's tokens together, as it wants its left.
constexpr int kTokens = 2 * kSide, kGroup = 2 * kSide * kTokens;
static_assert(kBlockIn == 2 * kSide);

inline void keep(uint16_t* to, const UnsignedVector& x) { __builtin_memcpy(to, &x, sizeof(x)); }

// 2 x 2 blocks of sums and two of each side fill the eight tiles.
inline void load_left(const uint16_t* grad) {
  GRADDOT_TILE_LOAD(4, grad, kTokens * sizeof(uint16_t));
  GRADDOT_TILE_LOAD(5, grad + kSide * kTokens, kTokens * sizeof(uint16_t));
}

inline void load_right(const uint16_t* act) {
  constexpr int64_t kStride = 2 * kBlockIn * sizeof(uint16_t);
  GRADDOT_TILE_LOAD(6, act, kStride);
  GRADDOT_TILE_LOAD(7, act + kTokens, kStride);
}

inline void multiply_loaded() {
  GRADDOT_TILE_MULTIPLY(0, 4, 6);
  GRADDOT_TILE_MULTIPLY(1, 4, 7);
  GRADDOT_TILE_MULTIPLY(2, 5, 6);
  GRADDOT_TILE_MULTIPLY(3, 5, 7);
}

// What the forms of both elements share.
struct Amx {
  static constexpr int kBlockOut = 2 * kSide;
  static constexpr int kTokens = ::kTokens;
  static constexpr bool kWritesLater = true;
  using Sums = Vector[kBlockOut][2];

  // Of a block, so that all are written while that many tokens are multiplied.
  static int rows_at_a_time(int64_t tokens) {
    const int groups = static_cast<int>(tokens / kTokens);
    return (kBlockOut + groups - 1) / groups;
  }

  static void zero_sums() {
    GRADDOT_TILE_ZERO(0);
    GRADDOT_TILE_ZERO(1);
    GRADDOT_TILE_ZERO(2);
    GRADDOT_TILE_ZERO(3);
  }

  static void store_sums(Sums& sums) {
    GRADDOT_TILE_STORE(0, &sums[0][0], sizeof(sums[0]));
    GRADDOT_TILE_STORE(1, &sums[0][1], sizeof(sums[0]));
    GRADDOT_TILE_STORE(2, &sums[kSide][0], sizeof(sums[0]));
    GRADDOT_TILE_STORE(3, &sums[kSide][1], sizeof(sums[0]));
  }
};

struct AmxOfBf16 : Amx {
  using Element = Bf16;
  using Packed = uint16_t;
  static constexpr int kRowsPerToken = 1;

  // Columns [0, kSide) of two tokens, side by side; zeros where there is no column or no token.
  static UnsignedVector pair(const Bf16* rows, int64_t stride, int64_t tokens, int64_t cols) {
    if (tokens <= 0 || cols <= 0) return UnsignedVector{};
    const UnsignedVector first = widened(&rows->bits, cols);
    return tokens == 1 ? first : first | widened(&rows[stride].bits, cols) << 16;
  }

  static void pack_act(const Bf16* rows, const Activations& act, int64_t tokens, int64_t cols,
                       Packed* panels, int64_t stride) {
    const int64_t token_stride = act.token_stride;
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

  static void pack_grad(const Bf16* rows, const Activations& grad, int64_t tokens, int64_t cols,
                        Packed* panels, int64_t stride) {
    const int64_t token_stride = grad.token_stride;
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

  template <class Write>
  static void multiply(const Packed* grad, const Packed* act, int64_t tokens, Sums& sums, const Write& write) {
    zero_sums();
    for (int64_t t = 0; t < tokens; t += kTokens, grad += kGroup, act += kGroup) {
      load_left(grad);
      load_right(act);
      multiply_loaded();
      write(rows_at_a_time(tokens));
    }
    store_sums(sums);
  }
};

// Three bf16 whose sum is one number of fp32.
struct Parts {
  uint16_t bits[3];
};

// fp32 by six products of bf16. Each number is split into x = x0 + x1 + x2, exactly, for 3 times 8 bits
// are the 24 that it has; |x1| ≤ 2^-8 |x| and |x2| ≤ 2^-17 |x|, so that without x1 y2, x2 y1 and x2 y2 a
// product is off by at most 2^-24 |x y|, as by one rounding of fp32. The sums are rounded less often than
// by multiply-adds: 32 tokens' products by themselves, and then with the rest. Unlike them, numbers
// below 2^-126 count as 0, also as a part of a larger number, and an infinity may become NaN.
// (The idea: Henry, Tang and Heinecke, "Leveraging the bfloat16 Artificial Intelligence Datatype for
// Higher-Precision Computations", 2019.)
struct AmxOfFp32 : Amx {
  using Element = float;
  using Packed = Parts;
  static constexpr int kRowsPerToken = 3;

  static UnsignedVector bits_of(const Vector& x) { return reinterpret_cast<const UnsignedVector&>(x); }

  // x's nearest number of bf16, in the upper half of its bits, and what x is more than that.
  static UnsignedVector part_of(const UnsignedVector& rounded, Vector& x) {
    const UnsignedVector part = rounded & 0xffff0000U;
    x -= reinterpret_cast<const Vector&>(part);
    return part;
  }

  // Both numbers' parts side by side, part after part, kGroup elements apart.
  static void keep_parts(Vector first, Vector second, uint16_t* to) {
    const auto round_first = [](const Vector& x) {  // what would become infinity, is cut; NaNs stay
      const UnsignedVector bits = bits_of(x);
      return (bits & 0x7fffffffU) < 0x7f7f8000U ? bits + 0x8000U : bits;
    };
    const UnsignedVector left = part_of(round_first(first), first);
    keep(to, left >> 16 | part_of(round_first(second), second));
    const UnsignedVector right = part_of(bits_of(first) + 0x8000U, first);
    keep(to + kGroup, right >> 16 | part_of(bits_of(second) + 0x8000U, second));
    keep(to + 2 * kGroup, bits_of(first) >> 16 | (bits_of(second) & 0xffff0000U));
  }

  // kSide numbers from a row on, zeros beyond its `count`.
  static UnsignedVector some(const float* row, int64_t rows_left, int64_t count) {
    if (rows_left <= 0 || count <= 0) return UnsignedVector{};
    return bits_of(load_some(row, smaller(count, kSide)));
  }

  // A group of tokens of kSide columns: its rows, or with `columns` its columns, kStride elements apart,
  // each with all of the other in pairs of kSide tokens apart. `along` is whether a column's tokens,
  // and not a token's columns, lie side by side where they come from.
  template <bool columns, int kStride, bool along>
  static void pack_group(const float* from, const Activations& x, int64_t tokens, int64_t cols, uint16_t* to) {
    UnsignedVector first[kSide], second[kSide];
    for (int64_t i = 0; i < kSide; ++i) {
      if (along) {
        first[i] = some(from + i * x.column_stride, cols - i, tokens);
        second[i] = some(from + i * x.column_stride + kSide, cols - i, tokens - kSide);
      } else {
        first[i] = some(from + i * x.token_stride, tokens - i, cols);
        second[i] = some(from + (i + kSide) * x.token_stride, tokens - i - kSide, cols);
      }
    }
    if (columns != along) {
      transpose(first);
      transpose(second);
    }
    for (int64_t i = 0; i < kSide; ++i) {
      keep_parts(reinterpret_cast<const Vector&>(first[i]), reinterpret_cast<const Vector&>(second[i]),
                 to + i * kStride);
    }
  }

  template <bool columns, int kStride, bool along>
  static void pack(const float* from, const Activations& x, int64_t tokens, int64_t cols, Packed* panels,
                   int64_t stride) {
    constexpr int64_t kStep = columns ? kSide * kTokens : kTokens;  // from kSide columns to the next
    for (int64_t first = 0; first < tokens; first += kTokens) {
      for (int64_t begin = 0; begin < cols; begin += kBlockIn) {
        uint16_t* to = panels[begin / kBlockIn * stride + first * kBlockIn].bits;
        for (int64_t c = begin; c < begin + kBlockIn; c += kSide, to += kStep) {
          const float* group = from + first * x.token_stride + c * x.column_stride;
          pack_group<columns, kStride, along>(group, x, tokens - first, cols - c, to);
        }
      }
    }
  }

  static void pack_act(const float* from, const Activations& act, int64_t tokens, int64_t cols,
                       Packed* panels, int64_t stride) {
    const auto form = act.column_stride == 1 ? pack<false, 2 * kBlockIn, false> : pack<false, 2 * kBlockIn, true>;
    form(from, act, tokens, cols, panels, stride);
  }

  static void pack_grad(const float* from, const Activations& grad, int64_t tokens, int64_t cols,
                        Packed* panels, int64_t stride) {
    const auto form = grad.column_stride == 1 ? pack<true, kTokens, false> : pack<true, kTokens, true>;
    form(from, grad, tokens, cols, panels, stride);
  }

  // The small products first, and as few loads as can be.
  template <class Write>
  static void multiply(const Packed* grad, const Packed* act, int64_t tokens, Sums& sums, const Write& write) {
    const uint16_t *left = grad->bits, *right = act->bits;
    zero_sums();
    for (int64_t t = 0; t < tokens; t += kTokens, left += 3 * kGroup, right += 3 * kGroup) {
      load_left(left + 2 * kGroup);
      load_right(right);
      multiply_loaded();  // (2, 0)
      write(rows_at_a_time(tokens));
      load_left(left + kGroup);
      multiply_loaded();  // (1, 0)
      load_right(right + kGroup);
      multiply_loaded();  // (1, 1)
      load_left(left);
      multiply_loaded();  // (0, 1)
      load_right(right + 2 * kGroup);
      multiply_loaded();  // (0, 2)
      load_right(right);
      multiply_loaded();  // (0, 0)
    }
    store_sums(sums);
  }
};

// The tiles' shapes are a state of the thread, which PyTorch's own products set, too, and remember.
template <class Form>
void run_with_tiles(const LinearProblem& p, const LinearTile& tile, const float* packed_act,
                    float* memory, double* dots) {
  const MatrixUnit unit;
  LinearKernelOf<Form>::run(p, tile, packed_act, memory, dots);
}

template <class Form>
constexpr graddot::LinearKernel amx_kernel() {
  graddot::LinearKernel kernel = LinearKernelOf<Form>::kernel();
  kernel.run = run_with_tiles<Form>;
  return kernel;
}

}  // namespace
