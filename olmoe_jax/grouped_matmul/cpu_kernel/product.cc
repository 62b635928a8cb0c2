// One block of a matrix product, A and B packed for the register tile; compiled once per
// instruction set (build.py), the function's name given by MULTIPLY.
#include "product.h"

#include "vectors.h"

namespace {

constexpr int kTileColumns = 2 * kLanes;
constexpr int kRowStride = kMaxDepth + 16;  // of A packed by rows; not a power of two: cache sets
constexpr int kDepthStride = kLanes;        // of A packed by k
static_assert(kPackedA >= kMaxRows * kRowStride, "packed by rows");
static_assert(kPackedA >= (kMaxRows + 31) / 32 * 32 * kRowStride, "in matrix registers of 32 rows");
static_assert(kPackedA >= kMaxRows / kTileRows * kMaxDepth * kDepthStride, "packed by k");

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

// The lines of a matrix: in order, or where `ids` says.
template <class Element>
struct Lines {
  const Element* from;
  int64_t stride;
  const int32_t* ids;

  const Element* operator[](int64_t i) const { return from + (ids ? ids[i] : i) * stride; }
  Lines at(int64_t line, int64_t element) const {
    if (ids) return {from + element, stride, ids + line};
    return {from + line * stride + element, stride, nullptr};
  }
};

// [k][width] → panels of `panel` columns, each [words][stride]; k counts elements.
template <class In>
void pack_by_k(const Lines<typename In::Element>& from, int64_t k, int64_t width, int panel,
               int stride, float* to) {
  const int64_t words = (k + In::kPerWord - 1) / In::kPerWord;
  for (int64_t word = 0; word < words; ++word) {
    const int64_t i = word * In::kPerWord;
    const auto* first = from[i];
    const auto* second = i + 1 < k ? from[i + 1] : nullptr;
    float* line = to + word * stride;
    for (int64_t start = 0; start < width; start += panel, line += words * stride) {
      for (int64_t j = 0; j < panel; j += kLanes) {
        const int64_t columns = width - start - j;
        const auto* below = second ? second + start + j : nullptr;
        store(line + j, columns > 0 ? In::across_k(first + start + j, below, columns) : zero());
      }
    }
  }
}

// [rows][k] → the same with a fixed distance between rows and zeros behind.
template <class In>
void pack_rows(const Lines<typename In::Element>& from, int64_t k, int64_t rows, float* to) {
  for (int64_t row = 0; row < rows; ++row, to += kRowStride) {
    const auto* source = from[row];
    float* line = to;
    for (int64_t i = 0; i < k; i += kLanes * In::kPerWord, line += kLanes) {
      store(line, In::along_k(source + i, k - i));
    }
  }
}

// [n][k] → one panel [words][kTileColumns].
template <class In>
void pack_transposed(const typename In::Element* from, int64_t from_stride, int64_t k, int64_t n,
                     float* to) {
  const int64_t words = (k + In::kPerWord - 1) / In::kPerWord;
  for (int64_t word = 0; word < words; word += kLanes) {
    const int64_t i = word * In::kPerWord;
    const int lines = words - word < kLanes ? words - word : kLanes;
    for (int64_t j = 0; j < kTileColumns; j += kLanes) {
      Vector v[kLanes];
#pragma GCC unroll 16
      for (int r = 0; r < kLanes; ++r) {
        v[r] = j + r < n ? In::along_k(from + (j + r) * from_stride + i, k - i) : zero();
      }
      transpose(v);
      float* line = to + word * kTileColumns + j;
      if (lines == kLanes) {
#pragma GCC unroll 16
        for (int r = 0; r < kLanes; ++r) store(line + r * kTileColumns, v[r]);
      } else {
        float part[kLanes * kLanes];
        for (int r = 0; r < kLanes; ++r) store(part + r * kLanes, v[r]);
        for (int r = 0; r < lines; ++r) store(line + r * kTileColumns, load(part + r * kLanes));
      }
    }
  }
}

// Part `part` of `parts` of the first `elements` of each line into the second-level cache.
template <class Element>
void prefetch(const Lines<Element>& from, int64_t lines, int64_t elements, int64_t part,
              int64_t parts) {
  for (int64_t line = lines * part / parts; line < lines * (part + 1) / parts; ++line) {
    const char* start = reinterpret_cast<const char*>(from[line]);
    const int64_t bytes = elements * sizeof(Element);
    for (int64_t i = 0; i < bytes; i += 64) _mm_prefetch(start + i, _MM_HINT_T1);
  }
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

#ifdef __AMX_BF16__

// The same in the processor's matrix registers: two of A and two of B, of 16 lines of 16 words,
// give four of sums. The compiler does not know that they read and write memory.
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
    if (rows > kLanes) {
      for (int64_t k = 0; k < depth; k += kLanes, a += kLanes, b += kLanes * kTileColumns) {
        _tile_loadd(6, b, kBStride);
        _tile_loadd(4, a, kAStride);
        _tile_loadd(7, b + kLanes, kBStride);
        _tile_loadd(5, a + kLanes * kRowStride, kAStride);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
      }
      _tile_stored(2, sums + kLanes * kTileColumns, kBStride);
      _tile_stored(3, sums + kLanes * kTileColumns + kLanes, kBStride);
    } else {
      for (int64_t k = 0; k < depth; k += kLanes, a += kLanes, b += kLanes * kTileColumns) {
        _tile_loadd(6, b, kBStride);
        _tile_loadd(4, a, kAStride);
        _tile_loadd(7, b + kLanes, kBStride);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
      }
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
    for (int r = 0; r < some; ++r) {
      finish(load(sums + r * kTileColumns), place, r, 0);
      finish(load(sums + r * kTileColumns + kLanes), place, r, kLanes);
    }
  }

 private:
  // [k][rows] → [rows][words], as `pack_rows` of its transpose.
  static void pack_rows_by_k(const Lines<uint16_t>& from, int64_t k, int64_t rows, float* to) {
    for (int64_t i = 0; i < k; i += 2 * kLanes, to += kLanes) {
      for (int64_t row = 0; row < rows; row += kLanes) {
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

#endif

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
