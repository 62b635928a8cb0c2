// How A and B are copied before they are multiplied: in the order in which tiles read them.
#ifndef OLMOE_JAX_PACKING_H_
#define OLMOE_JAX_PACKING_H_

#include "product.h"
#include "vectors.h"

namespace {

constexpr int kTileColumns = 2 * kLanes;
constexpr int kRowStride = kMaxDepth + 16;  // of A packed by rows; not a power of two: cache sets
constexpr int kDepthStride = kLanes;        // of A packed by k
static_assert(kPackedA >= kMaxRows * kRowStride, "packed by rows");
static_assert(kPackedA >= (kMaxRows + 31) / 32 * 32 * kRowStride, "in matrix registers of 32 rows");
static_assert(kPackedA >= kMaxRows / kTileRows * kMaxDepth * kDepthStride, "packed by k");

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
#ifdef __AMX_BF16__
      if constexpr (In::kPerWord == 2) {
        if (second && panel == 2 * kLanes && width - start >= panel) {
          interleave(first + start, second + start, line);
          continue;
        }
      }
#endif
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
#ifdef __AMX_BF16__
      if (j + kLanes <= n && i + kLanes * In::kPerWord <= k) {
        transpose_words(from + j * from_stride + i, from_stride * sizeof(*from),
                        to + word * kTileColumns + j, kTileColumns);
        continue;
      }
#endif
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

}  // namespace

#endif
