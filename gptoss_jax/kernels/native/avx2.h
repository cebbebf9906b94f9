// Products in float32 with 256-bit vectors. Knows AVX2 and FMA; knows no loops over rows.
//
// Part of a form's translation unit: see target.h.
#pragma once

#include <immintrin.h>

#include "few_rows.h"
#include "many_rows.h"
#include "mxfp4_table.h"
#include "scalar.h"

namespace gptoss {
namespace {

struct Sums {
  using Value = float;
  using Sum = __m256;
  using Row = ScalarRow;

  static Row row(const Matrix& matrix, int64_t output) { return {matrix.row(output), matrix.scale_row(output)}; }
  static bool poisoned(const Row&, const Matrix&) { return false; }  // a NaN scale makes NaN by itself
  static constexpr int outputs_together(int rows) { return rows <= 4 ? 2 : 1; }
  static Sum zero() { return _mm256_setzero_ps(); }
  static GPTOSS_INLINE float total(Sum sum) {
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(sum), _mm256_extractf128_ps(sum, 1));
    four = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
  }
};

// The value of the lowest four bits of each word: the low three pick a magnitude, the fourth is the sign.
GPTOSS_INLINE __m256 values_of(__m256i codes, __m256 magnitudes) {
  const __m256i sign = _mm256_and_si256(_mm256_slli_epi32(codes, 28), _mm256_set1_epi32(INT32_MIN));
  return _mm256_xor_ps(_mm256_permutevar8x32_ps(magnitudes, codes), _mm256_castsi256_ps(sign));
}

GPTOSS_INLINE __m256 widen(__m128i bfloat16) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bfloat16), 16));
}

template <Packing kPacking>
struct Dot;

// The values of 32 codes, each alone in a byte. bfloat16 holds 0, .5, 1, 1.5, 2, 3, 4, 6 and their negatives: the upper
// bytes are looked up, and the lower ones, which makes pairs of words; the first of a pair goes to an even place of
// `to`, the second to the odd one behind it. Codes 0 to 7 of each half of the register are in to[0] and to[1], the
// others in to[2] and to[3].
GPTOSS_INLINE void values_of_bytes(__m256i codes, __m256* to) {
  const __m256i uppers = _mm256_broadcastsi128_si256(_mm_set_epi32(0xC0C0C0C0, 0xBFBFBF80, 0x40404040, 0x3F3F3F00));
  const __m256i lowers = _mm256_broadcastsi128_si256(_mm_set_epi32(0xC0804000, 0xC0800000, 0xC0804000, 0xC0800000));
  const __m256i upper = _mm256_shuffle_epi8(uppers, codes), lower = _mm256_shuffle_epi8(lowers, codes);
  const __m256i words[2] = {_mm256_unpacklo_epi8(lower, upper), _mm256_unpackhi_epi8(lower, upper)};
  for (int i = 0; i < 2; ++i) {
    to[2 * i] = _mm256_castsi256_ps(_mm256_slli_epi32(words[i], 16));
    to[2 * i + 1] = _mm256_castsi256_ps(_mm256_and_si256(words[i], _mm256_set1_epi32(static_cast<int>(0xFFFF0000))));
  }
}

// 32 bytes are two blocks of 32 codes, and a block is a half of each register: four lanes of each of the 8 planes, of
// which the first four are of the codes in the lower halves of bytes.
template <>
struct Dot<Packing::kMxfp4> : Sums {
  struct Weights {
    __m256 planes[8];
    __m256 scale;
  };

  static constexpr int64_t kInputs = 64;
  static constexpr int outputs_together(int) { return 1; }
  static constexpr int64_t input_of(int64_t i) {
    const int64_t plane = i / 8, block = i % 8 / 4, word = i % 4;
    const int64_t byte = plane / 2 % 2 * 8 + 2 * word + plane % 2;
    return 32 * block + 2 * byte + plane / 4;
  }

  static GPTOSS_INLINE Weights decoded(__m256i codes, uint8_t first, uint8_t second) {
    Weights weights;
    const __m256i nibble = _mm256_set1_epi8(15);
    values_of_bytes(_mm256_and_si256(codes, nibble), weights.planes);
    values_of_bytes(_mm256_and_si256(_mm256_srli_epi16(codes, 4), nibble), weights.planes + 4);
    weights.scale = _mm256_set_m128(_mm_set1_ps(mxfp4_scale(second)), _mm_set1_ps(mxfp4_scale(first)));
    return weights;
  }
  static GPTOSS_INLINE Weights load(const Row& row, int64_t step) {
    const uint8_t* scales = row.scales + 2 * step;
    return decoded(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(row.values) + step), scales[0], scales[1]);
  }
  static GPTOSS_INLINE Weights load_tail(const Row& row, int64_t step, int64_t) {  // one block
    const __m128i* codes = reinterpret_cast<const __m128i*>(row.values + step * 32);
    return decoded(_mm256_zextsi128_si256(_mm_loadu_si128(codes)), row.scales[2 * step], 127);
  }
  static GPTOSS_INLINE Sum add(Sum sum, const Weights& weights, const float* x) {
    __m256 product = _mm256_mul_ps(weights.planes[0], _mm256_loadu_ps(x));
    for (int j = 1; j < 8; ++j) product = _mm256_fmadd_ps(weights.planes[j], _mm256_loadu_ps(x + 8 * j), product);
    return _mm256_fmadd_ps(weights.scale, product, sum);
  }
};

template <>
struct Dot<Packing::kInt8> : Sums {
  struct Weights {
    __m256 values[4];
    __m256 scale;
  };

  static constexpr int64_t kInputs = 32;
  static constexpr int64_t input_of(int64_t i) { return i; }

  static GPTOSS_INLINE Weights load(const Row& row, int64_t step) {
    Weights weights;
    for (int j = 0; j < 4; ++j) {
      const __m128i codes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(row.values + step * 32 + 8 * j));
      weights.values[j] = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(codes));
    }
    float scale;
    memcpy(&scale, row.scales + step * 4, 4);
    weights.scale = _mm256_set1_ps(scale);
    return weights;
  }
  static Weights load_tail(const Row& row, int64_t step, int64_t) { return load(row, step); }  // blocks are whole
  static GPTOSS_INLINE Sum add(Sum sum, const Weights& weights, const float* x) {
    __m256 product = _mm256_mul_ps(weights.values[0], _mm256_loadu_ps(x));
    for (int j = 1; j < 4; ++j) product = _mm256_fmadd_ps(weights.values[j], _mm256_loadu_ps(x + 8 * j), product);
    return _mm256_fmadd_ps(weights.scale, product, sum);
  }
};

struct PlainDot : Sums {
  struct Weights {
    __m256 values[4];
  };

  static constexpr int64_t kInputs = 32;
  static constexpr int64_t input_of(int64_t i) { return i; }

  static GPTOSS_INLINE Sum add(Sum sum, const Weights& weights, const float* x) {
    for (int j = 0; j < 4; ++j) sum = _mm256_fmadd_ps(weights.values[j], _mm256_loadu_ps(x + 8 * j), sum);
    return sum;
  }
};

template <>
struct Dot<Packing::kFloat32> : PlainDot {
  static GPTOSS_INLINE Weights load(const Row& row, int64_t step) {
    const float* values = reinterpret_cast<const float*>(row.values) + step * 32;
    return {{_mm256_loadu_ps(values), _mm256_loadu_ps(values + 8), _mm256_loadu_ps(values + 16),
             _mm256_loadu_ps(values + 24)}};
  }
  static Weights load_tail(const Row& row, int64_t step, int64_t inputs) {
    float padded[32];
    unscaled_tail<Packing::kFloat32>(row, step, inputs, padded);
    return load(ScalarRow{reinterpret_cast<const uint8_t*>(padded), nullptr}, 0);
  }
};

template <>
struct Dot<Packing::kBfloat16> : PlainDot {
  static GPTOSS_INLINE Weights load(const Row& row, int64_t step) {
    const __m128i* values = reinterpret_cast<const __m128i*>(row.values) + step * 4;
    return {{widen(_mm_loadu_si128(values)), widen(_mm_loadu_si128(values + 1)), widen(_mm_loadu_si128(values + 2)),
             widen(_mm_loadu_si128(values + 3))}};
  }
  static Weights load_tail(const Row& row, int64_t step, int64_t inputs) {
    float padded[32];
    unscaled_tail<Packing::kBfloat16>(row, step, inputs, padded);
    return Dot<Packing::kFloat32>::load(ScalarRow{reinterpret_cast<const uint8_t*>(padded), nullptr}, 0);
  }
};

struct Vectors {
  using Value = float;
  using Vector = __m256;

  static GPTOSS_INLINE Vector zero() { return _mm256_setzero_ps(); }
  static GPTOSS_INLINE Vector load(const float* x) { return _mm256_loadu_ps(x); }
  static GPTOSS_INLINE Vector spread(const float* weight) { return _mm256_set1_ps(*weight); }
  static GPTOSS_INLINE Vector add(Vector sum, Vector weight, Vector x) { return _mm256_fmadd_ps(weight, x, sum); }
  static GPTOSS_INLINE void store(Vector vector, float* to) { _mm256_storeu_ps(to, vector); }
};

struct Core : VectorCore<Vectors, 8, 1, 32, 4, 3> {
  static GPTOSS_INLINE void decode(Packing packing, const ScalarRow& row, int64_t block, float* to) {
    if (packing != Packing::kMxfp4) return decode_block(packing, row, block, to);
    const uint32_t* table = kMxfp4Table.float32[row.scales[block]];
    const __m256 magnitudes = _mm256_loadu_ps(reinterpret_cast<const float*>(table));
    const uint8_t* codes = row.values + block * kBlock / 2;
    const __m256i shift = _mm256_set_epi32(28, 24, 20, 16, 12, 8, 4, 0);
    for (int j = 0; j < 4; ++j) {
      int32_t word;
      memcpy(&word, codes + 4 * j, 4);
      _mm256_storeu_ps(to + 8 * j, values_of(_mm256_srlv_epi32(_mm256_set1_epi32(word), shift), magnitudes));
    }
  }
  template <class From>
  static bool pack(const From*, int64_t, float*) {
    return false;
  }
};

}  // namespace
}  // namespace gptoss
