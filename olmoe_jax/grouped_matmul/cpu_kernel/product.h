// What the two halves of the kernel share: product.cc multiplies one block and is compiled once per
// instruction set; binding.cc cuts the grouped products into blocks and is compiled for any x86-64.
#ifndef OLMOE_JAX_PRODUCT_H_
#define OLMOE_JAX_PRODUCT_H_

#include <stddef.h>
#include <stdint.h>

// C[m, n] = A[m, k] · B[k, n], or added to what C holds. k = 0 fills with zeros (or leaves C).
// Sums are float32. Strides are in elements, between what the comment names first.
struct Product {
  int64_t m, n, k;
  const void* a;  // [m][k], or [k][m] if a_by_k
  const void* b;  // [k][n], or [n][k] if b_by_n
  void* c;        // [m][n]
  int64_t a_stride, b_stride, c_stride;
  // Where the lines of A (its m, or its k if a_by_k) and of B (its k, never with b_by_n) lie: line i
  // at a + a_ids[i] · a_stride. Null: in order.
  const int32_t *a_ids, *b_ids;
  bool a_by_k, b_by_n;
  bool bf16;      // A and B; else float32
  bool c_bf16;
  bool add;
};

// A block's largest m and n: its A stays in the second-level cache while B passes by. Both are
// multiples of every register tile (14 x 32, 6 x 16).
constexpr int64_t kMaxRows = 336;
constexpr int64_t kMaxColumns = 256;
// k is cut into pieces of at most so many 32-bit words (a float32, or two bfloat16).
constexpr int64_t kMaxDepth = 512;
// Words of A packed. By k, the rows of a tile are padded to whole vectors: 14 to 16, or 6 to 8,
// which is more than what packing by rows puts behind each row.
constexpr int64_t kPackedA = kMaxRows * kMaxDepth * 8 / 6;
// Memory that a call needs, aligned to 64 bytes: A packed, 32 columns of B packed, sums.
constexpr size_t kScratchBytes = 4 * (kPackedA + 32 * kMaxDepth + kMaxRows * kMaxColumns);

using Multiply = void (*)(const Product&, char* scratch);
void multiply_amx_bf16(const Product&, char* scratch);
void multiply_avx512_bf16(const Product&, char* scratch);
void multiply_avx512(const Product&, char* scratch);
void multiply_avx2(const Product&, char* scratch);

#endif
