// AMX's eight tiles of 16 rows of 64 bytes; where a unit test compiles this for other processors, a
// stand-in in plain C++.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace {

struct TileShapes {
  uint8_t palette, start_row, reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};
static_assert(sizeof(TileShapes) == 64);

#ifdef __AMX_BF16__

// The compiler is told of the memory: its intrinsics' declarations are silent about it.
#define GRADDOT_TILE_LOAD(tile, from, stride)     \
  do {                                            \
    __asm__ volatile("" ::: "memory");            \
    _tile_loadd(tile, from, static_cast<int64_t>(stride)); \
  } while (false)
#define GRADDOT_TILE_STORE(tile, to, stride)     \
  do {                                           \
    _tile_stored(tile, to, static_cast<int64_t>(stride)); \
    __asm__ volatile("" ::: "memory");           \
  } while (false)
#define GRADDOT_TILE_ZERO(tile) _tile_zero(tile)
#define GRADDOT_TILE_MULTIPLY(sum, left, right) _tile_dpbf16ps(sum, left, right)

inline void set_tiles(const TileShapes& shapes) { _tile_loadconfig(&shapes); }
inline void get_tiles(TileShapes& shapes) { _tile_storeconfig(&shapes); }

#else

thread_local float stand_in[8][16][16];

inline float half_of(float pair, int64_t half) {
  uint32_t bits;
  __builtin_memcpy(&bits, &pair, sizeof(bits));
  bits = half == 0 ? bits << 16 : bits & 0xffff0000U;
  __builtin_memcpy(&pair, &bits, sizeof(bits));
  return pair;
}

inline void tile_load(int tile, const void* from, int64_t stride) {
  for (int64_t row = 0; row < 16; ++row) {
    __builtin_memcpy(stand_in[tile][row], static_cast<const char*>(from) + row * stride, 64);
  }
}

inline void tile_store(int tile, void* to, int64_t stride) {
  for (int64_t row = 0; row < 16; ++row) {
    __builtin_memcpy(static_cast<char*>(to) + row * stride, stand_in[tile][row], 64);
  }
}

inline void tile_multiply(int sum, int left, int right) {
  for (int row = 0; row < 16; ++row) {
    for (int pair = 0; pair < 16; ++pair) {
      for (int half = 0; half < 2; ++half) {
        const float x = half_of(stand_in[left][row][pair], half);
        for (int column = 0; column < 16; ++column) {
          stand_in[sum][row][column] += x * half_of(stand_in[right][pair][column], half);
        }
      }
    }
  }
}

#define GRADDOT_TILE_LOAD(tile, from, stride) tile_load(tile, from, static_cast<int64_t>(stride))
#define GRADDOT_TILE_STORE(tile, to, stride) tile_store(tile, to, static_cast<int64_t>(stride))
#define GRADDOT_TILE_ZERO(tile) __builtin_memset(stand_in[tile], 0, sizeof(stand_in[tile]))
#define GRADDOT_TILE_MULTIPLY(sum, left, right) tile_multiply(sum, left, right)

inline void set_tiles(const TileShapes&) {}
inline void get_tiles(TileShapes&) {}

#endif

// While it lives, this thread's tiles are whole; then of the shapes that they had.
class MatrixUnit {
 public:
  MatrixUnit() {
    get_tiles(before_);
    TileShapes shapes{};
    shapes.palette = 1;
    for (int tile = 0; tile < 8; ++tile) {
      shapes.row_bytes[tile] = 64;
      shapes.rows[tile] = 16;
    }
    set_tiles(shapes);
  }
  ~MatrixUnit() { set_tiles(before_); }
  MatrixUnit(const MatrixUnit&) = delete;
  MatrixUnit& operator=(const MatrixUnit&) = delete;

 private:
  alignas(64) TileShapes before_{};
};

}  // namespace
