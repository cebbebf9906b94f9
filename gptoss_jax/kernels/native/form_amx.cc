// The form for AMX with bfloat16: tiles of 16 outputs x 32 inputs times 32 inputs x 16 rows. Knows which way serves
// which types; float32 and few rows go the ways of AVX-512.
#include <cstdint>
#include <cstring>

#include "amx.h"
#include "form.h"
#include "target.h"

#if defined(GPTOSS_HAS_AMX)
#include <immintrin.h>

GPTOSS_TARGET_BEGIN(GPTOSS_AMX_FEATURES)
#include "avx512_bf16.h"

namespace gptoss {
namespace {

// Two tiles of outputs times N tiles of rows: sums in tiles 0 to 3, weights in 4 and 5, rows of x in 6 and 7.
struct AmxCore : Bfloat16Blocks {
  using Value = uint16_t;

  static constexpr int64_t kLanes = 16, kPairs = 2, kPanel = 128;
  static constexpr int kTilesTogether = 2;
  static constexpr int64_t kOutputs = 2 * kSide, kTileBlock = kBlock * kLanes;

  static void begin() { _tile_loadconfig(&kWholeTiles); }
  static void end() { _tile_release(); }

  template <int N>
  static void multiply(const uint16_t* panel, int64_t count, int64_t blocks, const uint16_t* x, float* sums) {
    for (int64_t output = 0; output < count; output += kOutputs) {
      products<N>(panel + output * blocks * kBlock, blocks, x);
      store<N>(sums + output);
    }
  }

  template <int N>
  static GPTOSS_INLINE void products(const uint16_t* panel, int64_t blocks, const uint16_t* x) {
    const uint16_t* second_side = panel + blocks * kSide * kBlock;
    const uint16_t* second_rows = x + blocks * kTileBlock;
    _tile_zero(0);
    _tile_zero(1);
    if constexpr (N == 2) {
      _tile_zero(2);
      _tile_zero(3);
    }
    for (int64_t block = 0; block < blocks; ++block) {
      _tile_loadd(4, panel + block * kSide * kBlock, 64);
      _tile_loadd(6, x + block * kTileBlock, 64);
      _tile_dpbf16ps(0, 4, 6);
      _tile_loadd(5, second_side + block * kSide * kBlock, 64);
      _tile_dpbf16ps(1, 5, 6);
      if constexpr (N == 2) {
        _tile_loadd(7, second_rows + block * kTileBlock, 64);
        _tile_dpbf16ps(2, 4, 7);
        _tile_dpbf16ps(3, 5, 7);
      }
    }
  }

  // Tiles have outputs in their rows, sums have them in columns.
  template <int N>
  static GPTOSS_INLINE void store(float* sums) {
    alignas(64) uint32_t tile[4][16 * 16];
    _tile_stored(0, tile[0], 64);
    _tile_stored(1, tile[1], 64);
    if constexpr (N == 2) {
      _tile_stored(2, tile[2], 64);
      _tile_stored(3, tile[3], 64);
    }
    uint32_t* to = reinterpret_cast<uint32_t*>(sums);
    for (int n = 0; n < N; ++n) {
      transpose(tile[2 * n], 16, to + n * kLanes * kPanel, kPanel);
      transpose(tile[2 * n + 1], 16, to + n * kLanes * kPanel + kSide, kPanel);
    }
  }
};

constexpr Way kAmxMany = ManyRows<AmxCore>::way();

// Where there are tiles vdpbf16ps takes as long as four multiplications of float32: a table of float32 is quicker, and
// exact.
const Way* few(Type x_type, Packing packing) {
  return packing == Packing::kMxfp4 ? few_in_float32<Float32Dot>(x_type, packing) : bfloat16_few(x_type, packing);
}

const Way* many(Type x_type, Packing packing) {
  return in_bfloat16(x_type, packing) ? &kAmxMany : many_in_float32<Float32Core>(x_type, packing);
}
// As measured on Sapphire Rapids. Plain weights cost few rows nothing to decode.
int64_t many_from(Type x_type, Packing packing) {
  if (!in_bfloat16(x_type, packing)) return 12;
  return packing == Packing::kBfloat16 ? 8 : 4;
}

constexpr Form kForm = {"amx_bf16", few, many, many_from};

}  // namespace

const Form* const kAmxForm = &kForm;

}  // namespace gptoss
GPTOSS_TARGET_END
#else
namespace gptoss {
const Form* const kAmxForm = nullptr;
}
#endif
