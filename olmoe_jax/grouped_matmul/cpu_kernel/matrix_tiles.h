// Tiles of C whose sums are kept in matrix registers (AMX): bfloat16 only.
#ifndef OLMOE_JAX_MATRIX_TILES_H_
#define OLMOE_JAX_MATRIX_TILES_H_

#include "vector_tiles.h"

namespace {

// As VectorTiles: two registers of A and two of B, each 16 lines of 16 words, give four of sums. The
// compiler does not know that they read and write memory, hence the barriers.
template <bool by_k>
struct MatrixTiles {
  static constexpr int kRows = 32;

  static void begin() {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } config;
    barrier();
    _tile_loadconfig(&config);
  }
  static void end() { _tile_release(); }
  static void barrier() { asm volatile("" ::: "memory"); }
  static int64_t depth(int64_t words) { return (words + kLanes - 1) / kLanes * kLanes; }

  static int64_t pack(const Lines<uint16_t>& a, int64_t start, int64_t k, int64_t m, float* to) {
    if (by_k) {
      pack_rows_by_k(a.at(start, 0), k, m, to);
    } else {
      pack_rows<Pairs>(a.at(0, start), k, m, to);
    }
    return kRows * kRowStride;
  }

  // Rows that are not there are computed from whatever lies behind A, and not stored.
  static void run(int64_t rows, const float* a, const float* b, int64_t depth, int64_t columns,
                  const Place& place) {
    constexpr int64_t kAStride = kRowStride * sizeof(float), kBStride = kTileColumns * sizeof(float);
    alignas(64) float sums[kRows * kTileColumns];
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    barrier();
    const bool both = rows > kLanes;  // registers of A
    for (int64_t k = 0; k < depth; k += kLanes, a += kLanes, b += kLanes * kTileColumns) {
      _tile_loadd(6, b, kBStride);
      _tile_loadd(4, a, kAStride);
      _tile_loadd(7, b + kLanes, kBStride);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      if (both) {
        _tile_loadd(5, a + kLanes * kRowStride, kAStride);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
      }
    }
    if (both) {
      _tile_stored(2, sums + kLanes * kTileColumns, kBStride);
      _tile_stored(3, sums + kLanes * kTileColumns + kLanes, kBStride);
    }
    _tile_stored(0, sums, kBStride);
    _tile_stored(1, sums + kLanes, kBStride);
    barrier();
    const int some = rows < kRows ? rows : kRows;
    if (columns < kTileColumns) {
      place.write_bf16 ? finish_columns<uint16_t>(sums, some, columns, place)
                       : finish_columns<float>(sums, some, columns, place);
      return;
    }
    if (place.write_bf16) {
      place.read_bf16 ? finish_rows<uint16_t, uint16_t>(sums, some, place)
                      : finish_rows<float, uint16_t>(sums, some, place);
    } else {
      place.read_bf16 ? finish_rows<uint16_t, float>(sums, some, place)
                      : finish_rows<float, float>(sums, some, place);
    }
  }

 private:
  // `finish` of whole rows, which would take as long as the products if it asked for each vector.
  template <class In, class Out>
  static void finish_rows(const float* sums, int rows, const Place& place) {
    const In* read = static_cast<const In*>(place.read);
    Out* write = static_cast<Out*>(place.write);
    const int64_t read_stride = read ? place.read_stride : 0, write_stride = place.write_stride;
    for (int r = 0; r < rows; ++r, read += read_stride, write += write_stride) {
#pragma GCC unroll 2
      for (int j = 0; j < kTileColumns; j += kLanes, sums += kLanes) {
        Vector sum = load(sums);
        if (read) sum = plus(sum, load(read + j));
        if constexpr (sizeof(Out) == sizeof(float)) {
          store(write + j, sum);
        } else {
          store_bf16(write + j, sum);
        }
      }
    }
  }

  // [k][rows] → [rows][words], as `pack_rows` of its transpose.
  static void pack_rows_by_k(const Lines<uint16_t>& from, int64_t k, int64_t rows, float* to) {
    for (int64_t i = 0; i < k; i += 2 * kLanes, to += kLanes) {
      for (int64_t row = 0; row < rows; row += kLanes) {
        if (i + 2 * kLanes <= k && row + kLanes <= rows) {
          transpose_halves(from, i, row, to + row * kRowStride, kRowStride);
          transpose_halves(from, i, row + 8, to + (row + 8) * kRowStride, kRowStride);
          continue;
        }
        Vector v[kLanes];
#pragma GCC unroll 16
        for (int j = 0; j < kLanes; ++j) {
          const int64_t at = i + 2 * j;
          const uint16_t* second = at + 1 < k ? from[at + 1] + row : nullptr;
          v[j] = at < k ? Pairs::across_k(from[at] + row, second, rows - row) : zero();
        }
        transpose(v);
#pragma GCC unroll 16
        for (int j = 0; j < kLanes; ++j) store(to + (row + j) * kRowStride, v[j]);
      }
    }
  }
};

}  // namespace

#endif
