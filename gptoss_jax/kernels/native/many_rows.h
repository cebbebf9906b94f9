// The way for many rows: a panel of weights is decoded once, and multiplied by all rows. Knows panels, tiles of rows
// and the order of loops; the `Core` of a form knows instructions.
//
//     panel    kPanel outputs of all inputs, decoded    [kPanel / 16][inputs / 32][16][32]
//     tile     kLanes rows of all inputs                [inputs / 32][32 / kPairs][kLanes][kPairs]
//
// so that a vector holds one input (or a pair, where products come in pairs) of kLanes rows. Missing rows and inputs
// are zeros. A Core has besides:
//
//     Value                            of panels and tiles, float or the bits of a bfloat16
//     decode(packing, row, block, to)  32 weights
//     pack(from, stride, to)           a whole block of a whole tile; false if it has no quick way
//     multiply<N>(...)                 N <= kTilesTogether tiles with the panel
//
// Part of a form's translation unit: see target.h.
#pragma once

#include "ending.h"
#include "form.h"
#include "scalar.h"

namespace gptoss {
namespace {

constexpr int64_t kSide = 16;  // outputs that lie side by side in a panel: a tile of AMX

template <class Core>
struct ManyRows {
  using Value = typename Core::Value;

  static constexpr int64_t kLanes = Core::kLanes, kPairs = Core::kPairs, kPanel = Core::kPanel;
  static constexpr int64_t kTileBlock = kBlock * kLanes;
  static constexpr int kTogether = Core::kTilesTogether;

  static int64_t blocks(const Group& group) { return (group.matrix.inputs + kBlock - 1) / kBlock; }
  static int64_t tiles(const Group& group) { return (group.rows + kLanes - 1) / kLanes; }

  static int64_t packed_bytes(const Group& group) { return tiles(group) * blocks(group) * kTileBlock * sizeof(Value); }
  static int64_t scratch_bytes(const Group& group) {
    return kPanel * blocks(group) * kBlock * sizeof(Value) + kTogether * kLanes * kPanel * sizeof(float);
  }

  // ---- rows ----

  static void pack(const Group& group, int64_t tile, uint8_t* packed) {
    Value* to = reinterpret_cast<Value*>(packed) + tile * blocks(group) * kTileBlock;
    if (group.x_type == Type::kFloat32) {
      pack_tile(reinterpret_cast<const float*>(group.x), group, tile, to);
    } else {
      pack_tile(reinterpret_cast<const uint16_t*>(group.x), group, tile, to);
    }
  }

  static GPTOSS_INLINE void convert(float from, float& to) { to = from; }
  static GPTOSS_INLINE void convert(uint16_t from, float& to) { to = float_of_bfloat16(from); }
  static GPTOSS_INLINE void convert(uint16_t from, uint16_t& to) { to = from; }
  static GPTOSS_INLINE void convert(float from, uint16_t& to) { to = bfloat16_of_float(from); }  // is not asked for

  template <class From>
  static void pack_tile(const From* x, const Group& group, int64_t tile, Value* to) {
    const int64_t inputs = group.matrix.inputs, first = tile * kLanes;
    const int64_t rows = group.rows - first < kLanes ? group.rows - first : kLanes;
    x += first * inputs;
    for (int64_t start = 0; start < inputs; start += kBlock, to += kTileBlock) {
      const int64_t count = inputs - start < kBlock ? inputs - start : kBlock;
      if (count == kBlock && pack_block(x + start, inputs, rows, to)) continue;
      for (int64_t i = 0; i < kTileBlock; ++i) to[i] = 0;
      for (int64_t row = 0; row < rows; ++row) {
        for (int64_t k = 0; k < count; ++k) {
          convert(x[row * inputs + start + k], to[k / kPairs * kLanes * kPairs + row * kPairs + k % kPairs]);
        }
      }
    }
  }

  // A whole block of a tile, whose last rows may be missing.
  template <class From>
  static bool pack_block(const From* x, int64_t stride, int64_t rows, Value* to) {
    if (rows == kLanes) return Core::pack(x, stride, to);
    alignas(64) From filled[kLanes][kBlock] = {};
    for (int64_t row = 0; row < rows; ++row) memcpy(filled[row], x + row * stride, sizeof(filled[row]));
    return Core::pack(filled[0], kBlock, to);
  }

  // ---- weights ----

  static void decode_panel(const Matrix& matrix, int64_t first, int64_t count, Value* panel) {
    const int64_t blocks = (matrix.inputs + kBlock - 1) / kBlock;
    for (int64_t from = 0; from < count; from += kSide, panel += kSide * blocks * kBlock) {
      decode_side(matrix, first + from, count - from < kSide ? count - from : kSide, blocks, panel);
    }
  }

  // Sixteen outputs side by side, so that what is written lies in one piece. What is read are sixteen short rows, too
  // short for processors to see what comes next: so the bytes of the next sixteen, which lie in one piece, are asked
  // for.
  static void decode_side(const Matrix& matrix, int64_t first, int64_t count, int64_t blocks, Value* to) {
    ScalarRow rows[kSide];
    for (int64_t i = 0; i < count; ++i) rows[i] = {matrix.row(first + i), matrix.scale_row(first + i)};
    const int64_t whole = matrix.inputs / kBlock, rest = matrix.inputs % kBlock;
    const uint8_t* next_side = matrix.row(first + kSide);
    const int64_t fetched = kSide * matrix.row_bytes() / blocks;
    for (int64_t block = 0; block < whole; ++block, to += kSide * kBlock) {
      for (int64_t at = 0; at < fetched; at += 64) __builtin_prefetch(next_side + block * fetched + at, 0, 2);
      for (int64_t i = 0; i < count; ++i) Core::decode(matrix.packing, rows[i], block, to + i * kBlock);
    }
    if (rest == 0) return;
    for (int64_t i = 0; i < count; ++i) decode_rest(matrix, first + i, rest, to + i * kBlock);
  }

  // Only plain weights have inputs that fill no block.
  static void decode_rest(const Matrix& matrix, int64_t output, int64_t rest, Value* to) {
    uint8_t padded[kBlock * sizeof(float)] = {};
    const int64_t size = matrix.packing == Packing::kFloat32 ? 4 : 2;
    memcpy(padded, matrix.row(output) + (matrix.inputs - rest) * size, rest * size);
    Core::decode(matrix.packing, ScalarRow{padded, nullptr}, 0, to);
  }

  // ---- products ----

  static void multiply(const Group& group, const uint8_t* packed, int64_t first, int64_t end, uint8_t* scratch) {
    float* sums = reinterpret_cast<float*>(scratch);
    Value* panel = reinterpret_cast<Value*>(sums + kTogether * kLanes * kPanel);
    Core::begin();
    for (int64_t from = first; from < end; from += kPanel) {
      const int64_t count = end - from < kPanel ? end - from : kPanel;
      decode_panel(group.matrix, from, count, panel);
      for (int64_t tile = 0; tile < tiles(group); tile += kTogether) {
        const int64_t together = tiles(group) - tile < kTogether ? tiles(group) - tile : kTogether;
        const Value* x = reinterpret_cast<const Value*>(packed) + tile * blocks(group) * kTileBlock;
        some_tiles(together, panel, count, blocks(group), x, sums);
        const int64_t end_row = (tile + together) * kLanes < group.rows ? (tile + together) * kLanes : group.rows;
        for (int64_t row = tile * kLanes; row < end_row; ++row) {
          finish(group.ending, row, from, count, sums + (row - tile * kLanes) * kPanel);
        }
      }
    }
    Core::end();
  }

  static void some_tiles(int64_t together, const Value* panel, int64_t count, int64_t blocks, const Value* x,
                         float* sums) {
    static_assert(kTogether <= 3);
    if (together == 1) return Core::template multiply<1>(panel, count, blocks, x, sums);
    if constexpr (kTogether >= 2) {
      if (together == 2) return Core::template multiply<2>(panel, count, blocks, x, sums);
    }
    if constexpr (kTogether >= 3) return Core::template multiply<3>(panel, count, blocks, x, sums);
  }

  static constexpr Way way() { return {packed_bytes, pack, kLanes, kPanel, scratch_bytes, multiply}; }
};

// The products with vectors: kOutputs outputs of N tiles stay in registers while all inputs go by.
//
// Vectors has Vector, Value, zero(), load(x), spread(w) (one weight, or a pair, to all lanes), add(sum, w, x), store.
template <class Vectors, int Lanes, int Pairs, int Panel, int Outputs, int TilesTogether>
struct VectorCore {
  using Value = typename Vectors::Value;
  using Vector = typename Vectors::Vector;

  static constexpr int64_t kLanes = Lanes, kPairs = Pairs, kPanel = Panel;
  static constexpr int kTilesTogether = TilesTogether;
  static_assert(Panel % kSide == 0 && kSide % Outputs == 0);

  static void begin() {}
  static void end() {}

  template <int N>
  static void multiply(const Value* panel, int64_t count, int64_t blocks, const Value* x, float* sums) {
    for (int64_t output = 0; output < count; output += Outputs) {
      const Value* side = panel + output / kSide * kSide * blocks * kBlock;
      few_outputs<N>(side + output % kSide * kBlock, blocks, x, sums + output);
    }
  }

  // Rows of sums are kPanel apart; outputs past the panel's last are made of whatever lies there, and nobody reads
  // them.
  template <int N>
  static GPTOSS_INLINE void few_outputs(const Value* panel, int64_t blocks, const Value* x, float* sums) {
    constexpr int64_t kTileBlock = kBlock * kLanes;
    Vector sum[Outputs][N];
    for (int o = 0; o < Outputs; ++o) {
      for (int n = 0; n < N; ++n) sum[o][n] = Vectors::zero();
    }
    for (int64_t block = 0; block < blocks; ++block) {
      const Value* w = panel + block * kSide * kBlock;
      const Value* at = x + block * kTileBlock;
      for (int k = 0; k < kBlock; k += kPairs) {
        Vector rows[N];
        for (int n = 0; n < N; ++n) rows[n] = Vectors::load(at + n * blocks * kTileBlock + k * kLanes);
        for (int o = 0; o < Outputs; ++o) {
          const Vector weight = Vectors::spread(w + o * kBlock + k);
          for (int n = 0; n < N; ++n) sum[o][n] = Vectors::add(sum[o][n], weight, rows[n]);
        }
      }
    }
    for (int o = 0; o < Outputs; ++o) {
      for (int n = 0; n < N; ++n) {
        float lanes[kLanes];
        Vectors::store(sum[o][n], lanes);
        for (int lane = 0; lane < kLanes; ++lane) sums[(n * kLanes + lane) * kPanel + o] = lanes[lane];
      }
    }
  }
};

}  // namespace
}  // namespace gptoss
