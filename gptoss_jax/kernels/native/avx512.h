// What the forms with 512-bit vectors share: loads, a transpose, float32 weights. Knows AVX-512; knows no loops over
// rows.
//
// Part of a form's translation unit: see target.h.
#pragma once

#include <immintrin.h>

#include "few_rows.h"
#include "float32_form.h"
#include "many_rows.h"
#include "mxfp4_table.h"
#include "scalar.h"

namespace gptoss {
namespace {

// Bytes that are asked for before their turn, past where the hardware looks: into the second cache first, since a core
// can wait for more of what goes there.
constexpr int64_t kAhead = 2048, kFarAhead = 12288;

GPTOSS_INLINE __mmask64 first_bytes(int64_t count) { return count >= 64 ? ~0ull : (1ull << count) - 1; }

// Rows and columns of 16 x 16 words of 32 bits exchanged; strides in words.
GPTOSS_INLINE void transpose(const uint32_t* from, int64_t from_stride, uint32_t* to, int64_t to_stride) {
  __m512i a[16], b[16];
  for (int i = 0; i < 16; ++i) a[i] = _mm512_loadu_si512(from + i * from_stride);
  for (int i = 0; i < 16; i += 2) {
    b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]);
    a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
    a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]);
    a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
  }
  for (int i = 0; i < 4; ++i) {  // a[4 j + i] holds, in quarter q, column 4 q + i of rows 4 j to 4 j + 3
    b[i] = _mm512_shuffle_i32x4(a[i], a[i + 4], 0x88);
    b[i + 4] = _mm512_shuffle_i32x4(a[i], a[i + 4], 0xDD);
    b[i + 8] = _mm512_shuffle_i32x4(a[i + 8], a[i + 12], 0x88);
    b[i + 12] = _mm512_shuffle_i32x4(a[i + 8], a[i + 12], 0xDD);
  }
  for (int i = 0; i < 4; ++i) {
    _mm512_storeu_si512(to + i * to_stride, _mm512_shuffle_i32x4(b[i], b[i + 8], 0x88));
    _mm512_storeu_si512(to + (i + 4) * to_stride, _mm512_shuffle_i32x4(b[i + 4], b[i + 12], 0x88));
    _mm512_storeu_si512(to + (i + 8) * to_stride, _mm512_shuffle_i32x4(b[i], b[i + 8], 0xDD));
    _mm512_storeu_si512(to + (i + 12) * to_stride, _mm512_shuffle_i32x4(b[i + 4], b[i + 12], 0xDD));
  }
}

GPTOSS_INLINE __m512 widen(__m256i bfloat16) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bfloat16), 16));
}

// The scales of four blocks, each in four neighbouring lanes. Byte 0 stands for a denormal; byte 255 is not looked at.
GPTOSS_INLINE __m512 four_scales(uint32_t bytes) {
  const __m512i turn = _mm512_set_epi32(31, 31, 31, 31, 7, 7, 7, 7, 15, 15, 15, 15, 23, 23, 23, 23);
  const __m512i there = _mm512_rolv_epi32(_mm512_set1_epi32(static_cast<int>(bytes)), turn);
  const __m512i exponent = _mm512_and_si512(there, _mm512_set1_epi32(0x7F800000));
  return _mm512_castsi512_ps(_mm512_max_epu32(exponent, _mm512_set1_epi32(0x00400000)));
}

// The scales of the last blocks of a row, of which there are less than four.
GPTOSS_INLINE uint32_t last_scales(const uint8_t* scales, int64_t count) {
  const __m128i bytes = _mm_maskz_loadu_epi8(static_cast<__mmask16>((1u << count) - 1), scales);
  return static_cast<uint32_t>(_mm_cvtsi128_si32(bytes));
}

GPTOSS_INLINE void fetch(const uint8_t* now) {
  const uintptr_t at = reinterpret_cast<uintptr_t>(now);
  _mm_prefetch(reinterpret_cast<const char*>(at + kAhead), _MM_HINT_T0);
  _mm_prefetch(reinterpret_cast<const char*>(at + kFarAhead), _MM_HINT_T1);
}

GPTOSS_INLINE bool has_nan_scale(const uint8_t* scales, int64_t count) {
  __mmask64 found = 0;
  for (int64_t i = 0; i < count; i += 64) {
    const __m512i bytes = _mm512_maskz_loadu_epi8(first_bytes(count - i), scales + i);
    found |= _mm512_cmpeq_epi8_mask(bytes, _mm512_set1_epi8(-1));
  }
  return found != 0;
}

struct Float32Sums {
  using Sum = __m512;
  static Sum zero() { return _mm512_setzero_ps(); }
  static GPTOSS_INLINE float total(Sum sum) { return _mm512_reduce_add_ps(sum); }
};

template <Packing kPacking>
struct Float32Dot;

// 64 bytes are 16 words of 8 codes: vpermps takes the low four bits of a word, and shifts bring the others there. Lane
// i of plane j so is input 8 i + j, and a block is four lanes of each plane.
template <>
struct Float32Dot<Packing::kMxfp4> : Float32Sums {
  using Value = float;
  using Row = ScalarRow;
  struct Weights {
    __m512 planes[8];
    __m512 scale;
  };

  static constexpr int64_t kInputs = 128;
  static constexpr int outputs_together(int) { return 1; }
  static constexpr int64_t input_of(int64_t i) { return i % 16 * 8 + i / 16; }

  static Row row(const Matrix& matrix, int64_t output) { return {matrix.row(output), matrix.scale_row(output)}; }
  static bool poisoned(const Row& row, const Matrix& matrix) { return has_nan_scale(row.scales, matrix.blocks()); }

  static GPTOSS_INLINE Weights decode(__m512i codes, uint32_t scales) {
    const __m512 table = _mm512_loadu_ps(kMxfp4Values);
    Weights weights;
    for (int j = 0; j < 8; ++j) {
      weights.planes[j] = _mm512_permutexvar_ps(_mm512_srli_epi32(codes, 4 * j), table);
    }
    weights.scale = four_scales(scales);
    return weights;
  }
  static GPTOSS_INLINE Weights load(const Row& row, int64_t step) {
    const uint8_t* codes = row.values + step * 64;
    fetch(codes);
    uint32_t scales;
    memcpy(&scales, row.scales + step * 4, 4);
    return decode(_mm512_loadu_si512(codes), scales);
  }
  static GPTOSS_INLINE Weights load_tail(const Row& row, int64_t step, int64_t inputs) {
    const uint32_t scales = last_scales(row.scales + step * 4, inputs / kBlock);
    return decode(_mm512_maskz_loadu_epi8(first_bytes(inputs / 2), row.values + step * 64), scales);
  }
  static GPTOSS_INLINE Sum add(Sum sum, const Weights& weights, const float* x) {
    __m512 product = _mm512_mul_ps(weights.planes[0], _mm512_loadu_ps(x));
    for (int j = 1; j < 8; ++j) product = _mm512_fmadd_ps(weights.planes[j], _mm512_loadu_ps(x + 16 * j), product);
    return _mm512_fmadd_ps(weights.scale, product, sum);
  }
};

template <>
struct Float32Dot<Packing::kInt8> : Float32Sums {
  using Value = float;
  using Row = ScalarRow;
  struct Weights {
    __m512 first, second;
    __m512 scale;
  };

  static constexpr int64_t kInputs = 32;
  static constexpr int outputs_together(int rows) { return rows <= 4 ? 2 : 1; }
  static constexpr int64_t input_of(int64_t i) { return i; }

  static Row row(const Matrix& matrix, int64_t output) { return {matrix.row(output), matrix.scale_row(output)}; }
  static bool poisoned(const Row&, const Matrix&) { return false; }  // a NaN scale makes NaN by itself

  static GPTOSS_INLINE Weights load(const Row& row, int64_t step) {
    const __m128i* codes = reinterpret_cast<const __m128i*>(row.values + step * 32);
    fetch(row.values + step * 32);
    float scale;
    memcpy(&scale, row.scales + step * 4, 4);
    return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(codes))),
            _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(codes + 1))), _mm512_set1_ps(scale)};
  }
  static Weights load_tail(const Row& row, int64_t step, int64_t) { return load(row, step); }  // blocks are whole
  static GPTOSS_INLINE Sum add(Sum sum, const Weights& weights, const float* x) {
    const __m512 product = _mm512_mul_ps(weights.first, _mm512_loadu_ps(x));
    return _mm512_fmadd_ps(weights.scale, _mm512_fmadd_ps(weights.second, _mm512_loadu_ps(x + 16), product), sum);
  }
};

struct PlainFloat32Dot : Float32Sums {
  using Value = float;
  using Row = ScalarRow;
  using Weights = __m512;

  static constexpr int64_t kInputs = 16;
  static constexpr int outputs_together(int rows) { return rows <= 4 ? 4 : 2; }
  static constexpr int64_t input_of(int64_t i) { return i; }

  static Row row(const Matrix& matrix, int64_t output) { return {matrix.row(output), nullptr}; }
  static bool poisoned(const Row&, const Matrix&) { return false; }
  static GPTOSS_INLINE Sum add(Sum sum, Weights weights, const float* x) {
    return _mm512_fmadd_ps(weights, _mm512_loadu_ps(x), sum);
  }
};

template <>
struct Float32Dot<Packing::kFloat32> : PlainFloat32Dot {
  static GPTOSS_INLINE Weights load(const Row& row, int64_t step) {
    fetch(row.values + step * 64);
    return _mm512_loadu_ps(row.values + step * 64);
  }
  static GPTOSS_INLINE Weights load_tail(const Row& row, int64_t step, int64_t inputs) {
    return _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << inputs) - 1), row.values + step * 64);
  }
};

template <>
struct Float32Dot<Packing::kBfloat16> : PlainFloat32Dot {
  static GPTOSS_INLINE Weights load(const Row& row, int64_t step) {
    fetch(row.values + step * 32);
    return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(row.values + step * 32)));
  }
  static GPTOSS_INLINE Weights load_tail(const Row& row, int64_t step, int64_t inputs) {
    return widen(_mm256_maskz_loadu_epi16(static_cast<__mmask16>((1u << inputs) - 1), row.values + step * 32));
  }
};

struct Float32Vectors {
  using Value = float;
  using Vector = __m512;

  static GPTOSS_INLINE Vector zero() { return _mm512_setzero_ps(); }
  static GPTOSS_INLINE Vector load(const float* x) { return _mm512_loadu_ps(x); }
  static GPTOSS_INLINE Vector spread(const float* weight) { return _mm512_set1_ps(*weight); }
  static GPTOSS_INLINE Vector add(Vector sum, Vector weight, Vector x) { return _mm512_fmadd_ps(weight, x, sum); }
  static GPTOSS_INLINE void store(Vector vector, float* to) { _mm512_storeu_ps(to, vector); }
};

struct Float32Core : VectorCore<Float32Vectors, 16, 1, 32, 8, 3> {
  static GPTOSS_INLINE void decode(Packing packing, const ScalarRow& row, int64_t block, float* to) {
    if (packing != Packing::kMxfp4) return decode_block(packing, row, block, to);
    const __m512 table = _mm512_loadu_ps(kMxfp4Table.float32[row.scales[block]]);
    const __m128i codes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(row.values + block * kBlock / 2));
    // Words of eight codes, each spread over eight lanes: lane i of them wants code i.
    const __m512i words = _mm512_castsi128_si512(codes);
    const __m512i half = _mm512_set_epi32(1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0);
    const __m512i shift = _mm512_set_epi32(28, 24, 20, 16, 12, 8, 4, 0, 28, 24, 20, 16, 12, 8, 4, 0);
    const __m512i first = _mm512_permutexvar_epi32(half, words);
    const __m512i second = _mm512_permutexvar_epi32(_mm512_add_epi32(half, _mm512_set1_epi32(2)), words);
    _mm512_storeu_ps(to, _mm512_permutexvar_ps(_mm512_srlv_epi32(first, shift), table));
    _mm512_storeu_ps(to + 16, _mm512_permutexvar_ps(_mm512_srlv_epi32(second, shift), table));
  }

  static bool pack(const float* from, int64_t stride, float* to) {
    const uint32_t* bits = reinterpret_cast<const uint32_t*>(from);
    transpose(bits, stride, reinterpret_cast<uint32_t*>(to), 16);
    transpose(bits + 16, stride, reinterpret_cast<uint32_t*>(to) + 16 * 16, 16);
    return true;
  }
  static bool pack(const uint16_t* from, int64_t stride, float* to) {
    float wide[16][kBlock];
    for (int row = 0; row < 16; ++row) {
      const __m256i* at = reinterpret_cast<const __m256i*>(from + row * stride);
      _mm512_storeu_ps(wide[row], widen(_mm256_loadu_si256(at)));
      _mm512_storeu_ps(wide[row] + 16, widen(_mm256_loadu_si256(at + 1)));
    }
    return pack(wide[0], kBlock, to);
  }
};

}  // namespace
}  // namespace gptoss
