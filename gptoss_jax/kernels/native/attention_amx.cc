// Attention for AMX with bfloat16: tiles of 16 keys x 32 dims times 32 dims x 16 queries, and of 16 dims x 32 keys
// times 32 keys x 16 queries. Knows which way serves which types; float32 goes the way of AVX-512.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "amx.h"
#include "attention.h"
#include "target.h"

#if defined(GPTOSS_HAS_AMX)
#include <immintrin.h>

GPTOSS_TARGET_BEGIN(GPTOSS_AMX_FEATURES)
#include "attention_avx512_bf16.h"

namespace gptoss {
namespace {

// Sums in tiles 0 to 3, two sides of keys (or dims) times two tiles of queries; keys in 4 and 5, queries in 6 and 7.
struct AmxAttention : Bfloat16Pairs {
  using Value = uint16_t;
  using Vector = __m512;

  static constexpr int64_t kLanes = 16, kPairs = 2, kDims = 32, kSide = 16;
  static constexpr int kTogether = 2;
  static constexpr bool kArranges = true;

  static void begin() { _tile_loadconfig(&kWholeTiles); }
  static void end() { _tile_release(); }

  // [dims / 16][16][32 keys]
  static void arrange(const uint16_t* unit, int64_t dims, uint16_t* to) {
    alignas(64) uint16_t pairs[kUnit * 32];
    for (int64_t d = 0; d < dims; d += 32, to += kUnit * 32) {
      for (int64_t key = 0; key < kUnit; key += 2) {
        const uint16_t* at = unit + key * dims + d;
        interleave(_mm512_loadu_si512(at), _mm512_loadu_si512(at + dims), pairs + key * 32);
      }
      const uint32_t* words = reinterpret_cast<const uint32_t*>(pairs);
      gptoss::transpose(words, 32, reinterpret_cast<uint32_t*>(to), 16);
      gptoss::transpose(words + 16, 32, reinterpret_cast<uint32_t*>(to) + 256, 16);
    }
  }

  template <int N>
  static void scores(const uint16_t* keys, int64_t dims, int64_t first, int64_t count, const uint16_t* queries,
                     float* to) {
    for (int64_t key = first; key < first + count; key += 2 * kSide) {
      const uint16_t* at = keys + key * dims;
      clear<N>();
      for (int64_t d = 0; d < dims; d += 32) {
        products<N>(at + d, at + kSide * dims + d, dims * 2, queries + d * kLanes, dims * kLanes);
      }
      store_sums<N>(to + key * kLanes, kSpan * kLanes);
    }
  }

  template <int N>
  static void mix(const uint16_t* values, int64_t dims, int64_t first, int64_t count, const uint16_t* shares, float* to,
                  int64_t to_tile) {
    for (int64_t d = 0; d < dims; d += 2 * kSide) {
      clear<N>();
      for (int64_t key = first; key < first + count; key += kUnit) {
        const uint16_t* at = values + key * dims + d * kUnit;
        products<N>(at, at + kSide * kUnit, kUnit * 2, shares + key * kLanes, kSpan * kLanes);
      }
      store_sums<N>(to + d * kLanes, to_tile);
    }
  }

  template <int N>
  static GPTOSS_INLINE void clear() {
    _tile_zero(0);
    _tile_zero(1);
    if constexpr (N == 2) {
      _tile_zero(2);
      _tile_zero(3);
    }
  }

  template <int N>
  static GPTOSS_INLINE void products(const uint16_t* side, const uint16_t* second_side, int64_t stride,
                                     const uint16_t* x, int64_t second_x) {
    _tile_loadd(4, side, stride);
    _tile_loadd(6, x, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(5, second_side, stride);
    _tile_dpbf16ps(1, 5, 6);
    if constexpr (N == 2) {
      _tile_loadd(7, x + second_x, 64);
      _tile_dpbf16ps(2, 4, 7);
      _tile_dpbf16ps(3, 5, 7);
    }
  }

  template <int N>
  static GPTOSS_INLINE void store_sums(float* to, int64_t to_tile) {
    _tile_stored(0, to, 64);
    _tile_stored(1, to + kSide * kLanes, 64);
    if constexpr (N == 2) {
      _tile_stored(2, to + to_tile, 64);
      _tile_stored(3, to + to_tile + kSide * kLanes, 64);
    }
  }
};

constexpr AttentionWay kWay = Blocks<AmxAttention>::way();
constexpr AttentionForm kForm = {&kAvx512Way, &kWay};

}  // namespace
const AttentionForm* const kAmxAttention = &kForm;
}  // namespace gptoss
GPTOSS_TARGET_END
#else
namespace gptoss {
const AttentionForm* const kAmxAttention = nullptr;
}
#endif
