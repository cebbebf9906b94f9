// The eight tile registers of AMX, each of 16 rows of 64 bytes: what the two forms that use them have in common. Knows
// no product.
#pragma once

#include <cstdint>

#if defined(__x86_64__) && (__has_include(<amxbf16intrin.h>) || __has_include(<amxintrin.h>))
#define GPTOSS_HAS_AMX 1
#endif

// Every processor with tiles has all of it.
#define GPTOSS_AMX_FEATURES "amx-tile,amx-bf16,avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,fma,avx2"

namespace gptoss {
namespace {

// As LDTILECFG reads it.
struct alignas(64) TileConfig {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t bytes_per_row[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

[[maybe_unused]] constexpr TileConfig kWholeTiles;

}  // namespace
}  // namespace gptoss
