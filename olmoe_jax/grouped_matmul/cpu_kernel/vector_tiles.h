// Tiles of C whose sums are kept in vector registers.
#ifndef OLMOE_JAX_VECTOR_TILES_H_
#define OLMOE_JAX_VECTOR_TILES_H_

#include "packing.h"

namespace {

// Where a tile's sums come from and go to.
struct Place {
  const void* read;  // added to the sums, or null
  int64_t read_stride;
  bool read_bf16;
  void* write;
  int64_t write_stride;
  bool write_bf16;

  Place at(int64_t row, int64_t column) const {
    Place p = *this;
    if (read) p.read = moved(read, row * read_stride + column, read_bf16);
    p.write = const_cast<void*>(moved(write, row * write_stride + column, write_bf16));
    return p;
  }
  static const void* moved(const void* p, int64_t elements, bool bf16) {
    return static_cast<const char*>(p) + elements * (bf16 ? 2 : 4);
  }
};

INLINE void finish(Vector sum, const Place& place, int64_t row, int64_t column) {
  const Place p = place.at(row, column);
  if (p.read) {
    sum = plus(sum, p.read_bf16 ? load(static_cast<const uint16_t*>(p.read))
                                : load(static_cast<const float*>(p.read)));
  }
  if (p.write_bf16) {
    store_bf16(static_cast<uint16_t*>(p.write), sum);
  } else {
    store(static_cast<float*>(p.write), sum);
  }
}

// The last columns of a matrix: through a copy, as whole vectors do not fit.
template <class T>
void finish_columns(const float* sums, int rows, int64_t columns, const Place& place) {
  for (int r = 0; r < rows; ++r) {
    T line[kTileColumns] = {};
    uint16_t read_line[kTileColumns] = {};
    float read_floats[kTileColumns] = {};
    Place p = place.at(r, 0);
    if (p.read) {
      void* copy = p.read_bf16 ? static_cast<void*>(read_line) : static_cast<void*>(read_floats);
      memcpy(copy, p.read, columns * (p.read_bf16 ? 2 : 4));
      p.read = copy;
    }
    void* target = p.write;
    p.write = line;
    const float* row = sums + r * kTileColumns;
    for (int j = 0; j < kTileColumns; j += kLanes) finish(load(row + j), p, 0, j);
    memcpy(target, line, columns * sizeof(T));
  }
}

// Rows x 2 vectors of sums over `depth` words. Row r's word k of A lies at a[r·RS + k·KS].
template <bool pairs, int Rows, int RS, int KS>
void tile(const float* a, const float* b, int64_t depth, int64_t columns, const Place& place) {
  Vector sums[Rows][2];
#pragma GCC unroll 16
  for (int r = 0; r < Rows; ++r) sums[r][0] = sums[r][1] = zero();
  if (place.read) {
    for (int r = 0; r < Rows; ++r) {
      const char* line = static_cast<const char*>(place.at(r, 0).read);
      _mm_prefetch(line, _MM_HINT_T0);
      _mm_prefetch(line + 64, _MM_HINT_T0);
    }
  }
  for (int64_t k = 0; k < depth; ++k, a += KS, b += kTileColumns) {
    const Vector b0 = load(b), b1 = load(b + kLanes);
#pragma GCC unroll 16
    for (int r = 0; r < Rows; ++r) {
      const Vector x = broadcast(a + r * RS);
#ifdef __AVX512BF16__
      if (pairs) {
        sums[r][0] = multiply_add_pairs(x, b0, sums[r][0]);
        sums[r][1] = multiply_add_pairs(x, b1, sums[r][1]);
        continue;
      }
#endif
      sums[r][0] = multiply_add(x, b0, sums[r][0]);
      sums[r][1] = multiply_add(x, b1, sums[r][1]);
    }
  }
  if (columns >= kTileColumns) {
#pragma GCC unroll 16
    for (int r = 0; r < Rows; ++r) {
      finish(sums[r][0], place, r, 0);
      finish(sums[r][1], place, r, kLanes);
    }
    return;
  }
  float copy[Rows * kTileColumns];
#pragma GCC unroll 16
  for (int r = 0; r < Rows; ++r) {
    store(copy + r * kTileColumns, sums[r][0]);
    store(copy + r * kTileColumns + kLanes, sums[r][1]);
  }
  if (place.write_bf16) {
    finish_columns<uint16_t>(copy, Rows, columns, place);
  } else {
    finish_columns<float>(copy, Rows, columns, place);
  }
}

using Tile = void (*)(const float*, const float*, int64_t, int64_t, const Place&);

template <bool pairs, bool by_k, int Rows>
constexpr Tile tile_of =
    by_k ? tile<pairs, Rows, 1, kDepthStride> : tile<pairs, Rows, kRowStride, 1>;

// By the number of rows: the last tile of a block computes no row that is not there.
template <bool pairs, bool by_k>
Tile tile_with(int64_t rows) {
  static constexpr Tile tiles[] = {
      tile_of<pairs, by_k, 1>,  tile_of<pairs, by_k, 2>,  tile_of<pairs, by_k, 3>,
      tile_of<pairs, by_k, 4>,  tile_of<pairs, by_k, 5>,  tile_of<pairs, by_k, 6>,
#ifdef __AVX512F__
      tile_of<pairs, by_k, 7>,  tile_of<pairs, by_k, 8>,  tile_of<pairs, by_k, 9>,
      tile_of<pairs, by_k, 10>, tile_of<pairs, by_k, 11>, tile_of<pairs, by_k, 12>,
      tile_of<pairs, by_k, 13>, tile_of<pairs, by_k, 14>,
#endif
  };
  return tiles[(rows < kTileRows ? rows : kTileRows) - 1];
}

// How a tile of C is computed: `kRows` of it at a time, from A as `pack` leaves it.
template <class In, bool by_k>
struct VectorTiles {
  static constexpr int kRows = kTileRows;
  static constexpr bool pairs = In::kPerWord == 2;

  static void begin() {}
  static void end() {}
  static int64_t depth(int64_t words) { return words; }

  // A from element `start` of k on; returns the words from one tile's rows to the next one's.
  static int64_t pack(const Lines<typename In::Element>& a, int64_t start, int64_t k, int64_t m,
                      float* to) {
    if (!by_k) {
      pack_rows<In>(a.at(0, start), k, m, to);
      return kRows * kRowStride;
    }
    pack_by_k<In>(a.at(start, 0), k, m, kRows, kDepthStride, to);
    return (k + In::kPerWord - 1) / In::kPerWord * kDepthStride;
  }
  static INLINE void run(int64_t rows, const float* a, const float* b, int64_t depth,
                         int64_t columns, const Place& place) {
    tile_with<pairs, by_k>(rows)(a, b, depth, columns, place);
  }
};

}  // namespace

#endif
