// The way for few rows: dot products of packed rows with weights that are decoded on the fly. Knows how rows and
// outputs are walked through; the `Dot` of a form knows instructions.
//
// A Dot takes kInputs inputs in a step and says how x must lie for it:
//
//     Value                    of packed x, float or the bits of a bfloat16
//     input_of(i)              which input of a step stands at place i
//     Weights load(row, step)  the decoded weights; load_tail(row, step, inputs) has fewer and fills up with zeros
//     Sum add(sum, w, x)       sum + w . x, lane by lane
//     float total(sum)         of all lanes
//     poisoned(row)            whether a scale of that row is NaN, which makes its outputs NaN
//
// The sums of one row and output are always added up in the same order, whatever else is computed beside them.
//
// Part of a form's translation unit: see target.h.
#pragma once

#include "ending.h"
#include "form.h"

namespace gptoss {
namespace {

template <class Dot>
struct FewRows {
  using Value = typename Dot::Value;
  using Row = typename Dot::Row;

  static constexpr int64_t kTileRows = 8;  // one tile's sums stay in registers
  static constexpr int64_t kChunkOutputs = 64;  // long enough that the hardware sees what comes next

  static int64_t steps(const Group& group) { return (group.matrix.inputs + Dot::kInputs - 1) / Dot::kInputs; }
  static int64_t packed_row(const Group& group) { return steps(group) * Dot::kInputs; }

  static int64_t packed_bytes(const Group& group) { return group.rows * packed_row(group) * sizeof(Value); }
  static int64_t scratch_bytes(const Group&) { return 0; }

  static void pack(const Group& group, int64_t tile, uint8_t* packed) {
    const int64_t end = (tile + 1) * kTileRows < group.rows ? (tile + 1) * kTileRows : group.rows;
    for (int64_t row = tile * kTileRows; row < end; ++row) {
      Value* to = reinterpret_cast<Value*>(packed) + row * packed_row(group);
      if (group.x_type == Type::kFloat32) {
        pack_row(reinterpret_cast<const float*>(group.x) + row * group.matrix.inputs, group.matrix.inputs, to);
      } else {
        pack_row(reinterpret_cast<const uint16_t*>(group.x) + row * group.matrix.inputs, group.matrix.inputs, to);
      }
    }
  }

  static GPTOSS_INLINE void convert(float from, float& to) { to = from; }
  static GPTOSS_INLINE void convert(uint16_t from, float& to) { to = float_of_bfloat16(from); }
  static GPTOSS_INLINE void convert(uint16_t from, uint16_t& to) { to = from; }
  static GPTOSS_INLINE void convert(float from, uint16_t& to) { to = bfloat16_of_float(from); }  // is not asked for

  template <class From>
  static void pack_row(const From* from, int64_t inputs, Value* to) {
    const int64_t whole = inputs / Dot::kInputs * Dot::kInputs;
    for (int64_t start = 0; start < whole; start += Dot::kInputs) {
      for (int64_t i = 0; i < Dot::kInputs; ++i) convert(from[start + Dot::input_of(i)], to[start + i]);
    }
    if (whole == inputs) return;
    for (int64_t i = 0; i < Dot::kInputs; ++i) {
      const int64_t input = whole + Dot::input_of(i);
      to[whole + i] = 0;
      if (input < inputs) convert(from[input], to[whole + i]);
    }
  }

  static void multiply(const Group& group, const uint8_t* packed, int64_t first, int64_t end, uint8_t*) {
    float sums[kTileRows][kChunkOutputs];
    for (int64_t from = first; from < end; from += kChunkOutputs) {
      const int64_t count = end - from < kChunkOutputs ? end - from : kChunkOutputs;
      for (int64_t row = 0; row < group.rows; row += kTileRows) {
        const int64_t rows = group.rows - row < kTileRows ? group.rows - row : kTileRows;
        const Value* x = reinterpret_cast<const Value*>(packed) + row * packed_row(group);
        rows_of_tile(rows, group, x, from, count, sums);
        for (int64_t m = 0; m < rows; ++m) finish(group.ending, row + m, from, count, sums[m]);
      }
    }
  }

  static void rows_of_tile(int64_t rows, const Group& group, const Value* x, int64_t first, int64_t count,
                           float (*sums)[kChunkOutputs]) {
    switch (rows) {
      case 1: return outputs<1>(group, x, first, count, sums);
      case 2: return outputs<2>(group, x, first, count, sums);
      case 3: return outputs<3>(group, x, first, count, sums);
      case 4: return outputs<4>(group, x, first, count, sums);
      case 5: return outputs<5>(group, x, first, count, sums);
      case 6: return outputs<6>(group, x, first, count, sums);
      case 7: return outputs<7>(group, x, first, count, sums);
      case 8: return outputs<8>(group, x, first, count, sums);
    }
  }

  template <int M>
  static void outputs(const Group& group, const Value* x, int64_t first, int64_t count, float (*sums)[kChunkOutputs]) {
    constexpr int kTogether = Dot::outputs_together(M);
    int64_t i = 0;
    for (; i + kTogether <= count; i += kTogether) dots<kTogether, M>(group, x, first + i, i, sums);
    for (; i < count; ++i) dots<1, M>(group, x, first + i, i, sums);
  }

  template <int R, int M>
  static GPTOSS_INLINE void dots(const Group& group, const Value* x, int64_t output, int64_t at,
                                 float (*sums)[kChunkOutputs]) {
    const int64_t whole = group.matrix.inputs / Dot::kInputs, rest = group.matrix.inputs % Dot::kInputs;
    const int64_t stride = packed_row(group);
    Row rows[R];
    typename Dot::Sum sum[R][M];
    for (int r = 0; r < R; ++r) {
      rows[r] = Dot::row(group.matrix, output + r);
      for (int m = 0; m < M; ++m) sum[r][m] = Dot::zero();
    }
    for (int64_t step = 0; step < whole; ++step) {
      typename Dot::Weights w[R];
      for (int r = 0; r < R; ++r) w[r] = Dot::load(rows[r], step);
      for (int m = 0; m < M; ++m) {
        for (int r = 0; r < R; ++r) sum[r][m] = Dot::add(sum[r][m], w[r], x + m * stride + step * Dot::kInputs);
      }
    }
    if (rest != 0) {
      typename Dot::Weights w[R];
      for (int r = 0; r < R; ++r) w[r] = Dot::load_tail(rows[r], whole, rest);
      for (int m = 0; m < M; ++m) {
        for (int r = 0; r < R; ++r) sum[r][m] = Dot::add(sum[r][m], w[r], x + m * stride + whole * Dot::kInputs);
      }
    }
    for (int r = 0; r < R; ++r) {
      const bool poisoned = Dot::poisoned(rows[r], group.matrix);
      for (int m = 0; m < M; ++m) sums[m][at + r] = poisoned ? float_of_bits(0x7FC00000u) : Dot::total(sum[r][m]);
    }
  }

  static constexpr Way way() { return {packed_bytes, pack, kTileRows, kChunkOutputs, scratch_bytes, multiply}; }
};

}  // namespace
}  // namespace gptoss
