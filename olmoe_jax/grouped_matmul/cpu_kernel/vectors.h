// Vectors of 32-bit words for product.cc: 16 of AVX-512 or 8 of AVX2, by the compiler's flags.
// A word holds a float, or (`Pairs`) two bfloat16 that follow each other along k.
// No header of the standard library but C's: a function compiled here with wide instructions must
// never be the one the linker keeps for the rest of the library.
#ifndef OLMOE_JAX_VECTORS_H_
#define OLMOE_JAX_VECTORS_H_

#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#define INLINE inline __attribute__((always_inline))

namespace {

#ifdef __AVX512F__

constexpr int kLanes = 16;
constexpr int kTileRows = 14;  // 28 of 32 registers hold sums
using Vector = __m512;
using Integers = __m512i;

INLINE Vector zero() { return _mm512_setzero_ps(); }
INLINE Vector load(const float* p) { return _mm512_loadu_ps(p); }
INLINE void store(float* p, Vector v) { _mm512_storeu_ps(p, v); }
INLINE Vector broadcast(const float* p) { return _mm512_set1_ps(*p); }
INLINE Vector plus(Vector a, Vector b) { return _mm512_add_ps(a, b); }
INLINE Vector as_floats(Integers v) { return _mm512_castsi512_ps(v); }
INLINE Integers as_integers(Vector v) { return _mm512_castps_si512(v); }
INLINE Integers high_half(Integers v) { return _mm512_slli_epi32(v, 16); }
INLINE Integers either(Integers a, Integers b) { return _mm512_or_si512(a, b); }
INLINE Integers widened(const uint16_t* p) {
  return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
INLINE Vector multiply_add(Vector a, Vector b, Vector sum) { return _mm512_fmadd_ps(a, b, sum); }

#ifdef __AVX512BF16__
INLINE void store_bf16(uint16_t* p, Vector v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), (__m256i)_mm512_cvtneps_pbh(v));
}
INLINE Vector multiply_add_pairs(Vector a, Vector b, Vector sum) {
  return _mm512_dpbf16_ps(sum, (__m512bh)as_integers(a), (__m512bh)as_integers(b));
}
#else
INLINE void store_bf16(uint16_t* p, Vector v) {
  const Integers bits = as_integers(v);
  const Integers odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const Integers up = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
  const Integers quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
  const Integers rounded = _mm512_mask_mov_epi32(up, nan, quiet);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16)));
}
#endif

// v[i] word j becomes v[j] word i.
INLINE void transpose(Vector (&v)[kLanes]) {
  Vector t[kLanes];
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    const Vector a = _mm512_unpacklo_ps(v[i], v[i + 1]), b = _mm512_unpackhi_ps(v[i], v[i + 1]);
    const Vector c = _mm512_unpacklo_ps(v[i + 2], v[i + 3]);
    const Vector d = _mm512_unpackhi_ps(v[i + 2], v[i + 3]);
    t[i] = _mm512_shuffle_ps(a, c, 0x44);
    t[i + 1] = _mm512_shuffle_ps(a, c, 0xee);
    t[i + 2] = _mm512_shuffle_ps(b, d, 0x44);
    t[i + 3] = _mm512_shuffle_ps(b, d, 0xee);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const Vector a = _mm512_shuffle_f32x4(t[i], t[i + 4], 0x88);
    const Vector b = _mm512_shuffle_f32x4(t[i], t[i + 4], 0xdd);
    const Vector c = _mm512_shuffle_f32x4(t[i + 8], t[i + 12], 0x88);
    const Vector d = _mm512_shuffle_f32x4(t[i + 8], t[i + 12], 0xdd);
    v[i] = _mm512_shuffle_f32x4(a, c, 0x88);
    v[i + 8] = _mm512_shuffle_f32x4(a, c, 0xdd);
    v[i + 4] = _mm512_shuffle_f32x4(b, d, 0x88);
    v[i + 12] = _mm512_shuffle_f32x4(b, d, 0xdd);
  }
}

#ifdef __AMX_BF16__
// For processors with matrix registers, which must be fed: these shuffle once per cycle, and load
// twice, so lines are cut into lanes while they are loaded.

// Lane i holds the four words at p[i].
INLINE Integers lanes(const void* p0, const void* p1, const void* p2, const void* p3) {
  const auto part = [](const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); };
  Integers v = _mm512_broadcast_i32x4(part(p0));
  v = _mm512_mask_broadcast_i32x4(v, 0x00f0, part(p1));
  v = _mm512_mask_broadcast_i32x4(v, 0x0f00, part(p2));
  return _mm512_mask_broadcast_i32x4(v, 0xf000, part(p3));
}

// 16 lines of words, `stride` bytes apart → word j of line i at to[j · to_stride + i].
INLINE void transpose_words(const void* from, int64_t stride, float* to, int64_t to_stride) {
#pragma GCC unroll 4
  for (int word = 0; word < 16; word += 4, to += 4 * to_stride) {
    Vector z[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const char* p = static_cast<const char*>(from) + i * stride + word * sizeof(float);
      z[i] = as_floats(lanes(p, p + 4 * stride, p + 8 * stride, p + 12 * stride));
    }
    const Vector a = _mm512_unpacklo_ps(z[0], z[1]), b = _mm512_unpackhi_ps(z[0], z[1]);
    const Vector c = _mm512_unpacklo_ps(z[2], z[3]), d = _mm512_unpackhi_ps(z[2], z[3]);
    store(to, _mm512_shuffle_ps(a, c, 0x44));
    store(to + to_stride, _mm512_shuffle_ps(a, c, 0xee));
    store(to + 2 * to_stride, _mm512_shuffle_ps(b, d, 0x44));
    store(to + 3 * to_stride, _mm512_shuffle_ps(b, d, 0xee));
  }
}

// 8 columns of 32 lines of bfloat16 → column j's 32 at to[j · to_stride].
template <class Lines>
INLINE void transpose_halves(const Lines& from, int64_t line, int64_t column, float* to,
                             int64_t to_stride) {
  Integers z[8], y[8];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    z[i] = lanes(from[line + i] + column, from[line + 8 + i] + column, from[line + 16 + i] + column,
                 from[line + 24 + i] + column);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    y[i] = _mm512_unpacklo_epi16(z[2 * i], z[2 * i + 1]);
    y[4 + i] = _mm512_unpackhi_epi16(z[2 * i], z[2 * i + 1]);
  }
#pragma GCC unroll 2
  for (int half = 0; half < 2; ++half, to += 4 * to_stride) {
    const Integers* w = y + 4 * half;
    const Integers a = _mm512_unpacklo_epi32(w[0], w[1]), b = _mm512_unpackhi_epi32(w[0], w[1]);
    const Integers c = _mm512_unpacklo_epi32(w[2], w[3]), d = _mm512_unpackhi_epi32(w[2], w[3]);
    store(to, as_floats(_mm512_unpacklo_epi64(a, c)));
    store(to + to_stride, as_floats(_mm512_unpackhi_epi64(a, c)));
    store(to + 2 * to_stride, as_floats(_mm512_unpacklo_epi64(b, d)));
    store(to + 3 * to_stride, as_floats(_mm512_unpackhi_epi64(b, d)));
  }
}

// 32 columns of two lines of bfloat16, in turn.
INLINE void interleave(const uint16_t* first, const uint16_t* second, float* to) {
  const Integers a = _mm512_loadu_si512(first), b = _mm512_loadu_si512(second);
  // 0, 32, 1, 33, …: an index of 32 and above is of b.
  const Integers low = _mm512_add_epi32(
      _mm512_set1_epi32(32 << 16),
      _mm512_mullo_epi32(_mm512_set1_epi32(0x10001), _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8,
                                                                     7, 6, 5, 4, 3, 2, 1, 0)));
  const Integers high = _mm512_add_epi32(low, _mm512_set1_epi32(16 << 16 | 16));
  store(to, as_floats(_mm512_permutex2var_epi16(a, low, b)));
  store(to + 16, as_floats(_mm512_permutex2var_epi16(a, high, b)));
}
#endif

#else

constexpr int kLanes = 8;
constexpr int kTileRows = 6;  // 12 of 16 registers hold sums
using Vector = __m256;
using Integers = __m256i;

INLINE Vector zero() { return _mm256_setzero_ps(); }
INLINE Vector load(const float* p) { return _mm256_loadu_ps(p); }
INLINE void store(float* p, Vector v) { _mm256_storeu_ps(p, v); }
INLINE Vector broadcast(const float* p) { return _mm256_broadcast_ss(p); }
INLINE Vector plus(Vector a, Vector b) { return _mm256_add_ps(a, b); }
INLINE Vector as_floats(Integers v) { return _mm256_castsi256_ps(v); }
INLINE Integers as_integers(Vector v) { return _mm256_castps_si256(v); }
INLINE Integers high_half(Integers v) { return _mm256_slli_epi32(v, 16); }
INLINE Integers either(Integers a, Integers b) { return _mm256_or_si256(a, b); }
INLINE Integers widened(const uint16_t* p) {
  return _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
INLINE Vector multiply_add(Vector a, Vector b, Vector sum) { return _mm256_fmadd_ps(a, b, sum); }

INLINE void store_bf16(uint16_t* p, Vector v) {
  const Integers bits = as_integers(v);
  const Integers odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const Integers up = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const Integers nan = as_integers(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
  const Integers quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
  const Integers rounded = _mm256_srli_epi32(_mm256_blendv_epi8(up, quiet, nan), 16);
  const __m128i low = _mm256_castsi256_si128(rounded), high = _mm256_extracti128_si256(rounded, 1);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm_packus_epi32(low, high));
}

// v[i] word j becomes v[j] word i.
INLINE void transpose(Vector (&v)[kLanes]) {
  Vector t[kLanes];
#pragma GCC unroll 2
  for (int i = 0; i < 8; i += 4) {
    const Vector a = _mm256_unpacklo_ps(v[i], v[i + 1]), b = _mm256_unpackhi_ps(v[i], v[i + 1]);
    const Vector c = _mm256_unpacklo_ps(v[i + 2], v[i + 3]);
    const Vector d = _mm256_unpackhi_ps(v[i + 2], v[i + 3]);
    t[i] = _mm256_shuffle_ps(a, c, 0x44);
    t[i + 1] = _mm256_shuffle_ps(a, c, 0xee);
    t[i + 2] = _mm256_shuffle_ps(b, d, 0x44);
    t[i + 3] = _mm256_shuffle_ps(b, d, 0xee);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    v[i] = _mm256_permute2f128_ps(t[i], t[i + 4], 0x20);
    v[i + 4] = _mm256_permute2f128_ps(t[i], t[i + 4], 0x31);
  }
}

#endif

INLINE Vector load(const uint16_t* p) { return as_floats(high_half(widened(p))); }

// The kinds of input. `along_k`: words that follow each other along k in memory, of which
// `elements` exist. `across_k`: one word of each of `columns` columns; `second` is the next k, or
// null. What does not exist is zero.
template <class T>
struct OnePerWord {
  using Element = T;
  static constexpr int kPerWord = 1;

  static INLINE Vector along_k(const T* p, int64_t elements) {
    if (elements >= kLanes) return load(p);
    T part[kLanes] = {};
    memcpy(part, p, elements * sizeof(T));
    return load(part);
  }
  static INLINE Vector across_k(const T* first, const T*, int64_t columns) {
    return along_k(first, columns);
  }
};

struct Pairs {
  using Element = uint16_t;
  static constexpr int kPerWord = 2;

  static INLINE Vector along_k(const uint16_t* p, int64_t elements) {
    if (elements >= 2 * kLanes) return load(reinterpret_cast<const float*>(p));
    float part[kLanes] = {};
    memcpy(part, p, elements * sizeof(uint16_t));
    return load(part);
  }
  static INLINE Vector across_k(const uint16_t* first, const uint16_t* second, int64_t columns) {
    uint16_t part[2][kLanes];
    if (columns < kLanes) {
      memset(part, 0, sizeof(part));
      memcpy(part[0], first, columns * sizeof(uint16_t));
      if (second) memcpy(part[1], second, columns * sizeof(uint16_t));
      return as_floats(either(widened(part[0]), high_half(widened(part[1]))));
    }
    if (!second) return as_floats(widened(first));
    return as_floats(either(widened(first), high_half(widened(second))));
  }
};

}  // namespace

#endif
