// One block of a matrix product, A and B packed for the tile; compiled once per instruction set
// (build.py), the function's name given by MULTIPLY.
#include "product.h"

#include "vector_tiles.h"
#ifdef __AMX_BF16__
#include "matrix_tiles.h"
#endif

namespace {

template <class In, class Tiles>
void multiply_with(const Product& p, char* scratch) {
  using Element = typename In::Element;
  float* packed_a = reinterpret_cast<float*>(scratch);
  float* packed_b = packed_a + kPackedA;
  float* sums = packed_b + 32 * kMaxDepth;
  const Lines<Element> a = {static_cast<const Element*>(p.a), p.a_stride, p.a_ids};
  const Lines<Element> b = {static_cast<const Element*>(p.b), p.b_stride, p.b_ids};

  Tiles::begin();
  // Pieces of k of about one size, in whole vectors.
  const int64_t most = kMaxDepth * In::kPerWord, vector = kLanes * In::kPerWord;
  const int64_t pieces = (p.k + most - 1) / most;
  const int64_t piece = (p.k + pieces * vector - 1) / (pieces * vector) * vector;

  for (int64_t start = 0; start < p.k; start += piece) {
    const int64_t k = p.k - start < piece ? p.k - start : piece;
    const int64_t words = (k + In::kPerWord - 1) / In::kPerWord;
    const bool first = start == 0, last = start + k == p.k;
    // Sums between pieces are float32: in C itself, or beside a bfloat16 C.
    const Place c = {p.c, p.c_stride, p.c_bf16, p.c, p.c_stride, p.c_bf16};
    const Place between = {sums, kMaxColumns, false, sums, kMaxColumns, false};
    Place place = p.c_bf16 && !last ? between : c;
    const Place& read = p.c_bf16 && !first ? between : c;
    place.read = first && !p.add ? nullptr : read.read;
    place.read_stride = read.read_stride;
    place.read_bf16 = read.read_bf16;

    const int64_t a_step = Tiles::pack(a, start, k, p.m, packed_a);
    const int64_t depth = Tiles::depth(words);
    for (int64_t column = 0; column < p.n; column += kTileColumns) {
      const int64_t columns = p.n - column;
      const auto from = p.b_by_n ? b.at(column, start) : b.at(start, column);
      if (p.b_by_n) {
        pack_transposed<In>(from[0], p.b_stride, k, columns, packed_b);
      } else {
        pack_by_k<In>(from, k, columns < kTileColumns ? columns : kTileColumns, kTileColumns,
                      kTileColumns, packed_b);
      }
      for (int64_t word = words * kTileColumns; word < depth * kTileColumns; word += kLanes) {
        store(packed_b + word, zero());
      }
      const bool more = columns > kTileColumns;
      const int64_t tiles = (p.m + Tiles::kRows - 1) / Tiles::kRows;
      for (int64_t t = 0; t < tiles; ++t) {
        if (more) {  // the next columns of B arrive while these are used
          const int64_t ahead = columns - kTileColumns;
          const int64_t next = ahead < kTileColumns ? ahead : kTileColumns;
          const auto then = p.b_by_n ? from.at(kTileColumns, 0) : from.at(0, kTileColumns);
          prefetch(then, p.b_by_n ? next : k, p.b_by_n ? k : next, t, tiles);
        }
        const int64_t row = t * Tiles::kRows;
        Tiles::run(p.m - row, packed_a + t * a_step, packed_b, depth, columns,
                   place.at(row, column));
      }
    }
  }
  Tiles::end();
}

template <class In>
void multiply(const Product& p, char* scratch) {
  p.a_by_k ? multiply_with<In, VectorTiles<In, true>>(p, scratch)
           : multiply_with<In, VectorTiles<In, false>>(p, scratch);
}

}  // namespace

void MULTIPLY(const Product& p, char* scratch) {
  if (p.k == 0) {
    const int64_t bytes = p.c_bf16 ? 2 : 4;
    for (int64_t row = 0; row < p.m && !p.add; ++row) {
      memset(static_cast<char*>(p.c) + row * p.c_stride * bytes, 0, p.n * bytes);
    }
  } else if (p.bf16) {
#ifdef __AMX_BF16__
    p.a_by_k ? multiply_with<Pairs, MatrixTiles<true>>(p, scratch)
             : multiply_with<Pairs, MatrixTiles<false>>(p, scratch);
#elif defined(__AVX512BF16__)
    multiply<Pairs>(p, scratch);
#else
    multiply<OnePerWord<uint16_t>>(p, scratch);
#endif
  } else {
    multiply<OnePerWord<float>>(p, scratch);
  }
}
