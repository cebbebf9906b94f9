// What XLA calls: checks the arrays, finds the groups and shares their work among threads. Knows XLA's buffers and
// which way is taken; knows no instruction set.
#include "handlers.h"

#include <algorithm>
#include <cstring>
#include <string>
#include <vector>

#include "checks.h"
#include "parallel.h"
#include "problem.h"

namespace gptoss {
namespace {

int64_t size_of(Type type) { return type == Type::kFloat32 ? 4 : 2; }

// ---- work ----

// A group, the way it goes, and where its packed rows and its share of the chunks lie.
struct Job {
  Group group;
  const Way* way;
  int64_t packed_at;
  int64_t first_tile;
  int64_t first_chunk;
};

struct Jobs {
  std::vector<Job> all;
  int64_t packed_bytes = 0, tiles = 0, chunks = 0, products = 0;
};

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

const Way* choose_way(const Form& form, const Group& group, bool fixed_order) {
  const Packing packing = group.matrix.packing;
  const bool many = !fixed_order && group.rows >= form.many_from(group.x_type, packing);
  return many ? form.many(group.x_type, packing) : form.few(group.x_type, packing);
}

void add_job(Jobs& jobs, const Form& form, const Group& group, bool fixed_order) {
  if (group.rows == 0 || group.outputs == 0) return;
  const Way* way = choose_way(form, group, fixed_order);
  jobs.all.push_back({group, way, jobs.packed_bytes, jobs.tiles, jobs.chunks});
  jobs.packed_bytes += ceil_div(way->packed_bytes(group), 64) * 64;
  jobs.tiles += ceil_div(group.rows, way->tile_rows);
  jobs.chunks += ceil_div(group.outputs, way->chunk_outputs);
  jobs.products += group.rows * group.outputs * group.matrix.inputs;
}

// The job to which a tile or a chunk belongs; there are as many jobs as experts at most.
template <int64_t Job::* kFirst>
const Job& job_of(const Jobs& jobs, int64_t index) {
  size_t job = jobs.all.size() - 1;
  while (jobs.all[job].*kFirst > index) --job;
  return jobs.all[job];
}

// What the caller does alone, since to wake a thread takes longer: some ten microseconds.
constexpr int64_t kFewBytes = 1 << 16, kFewProducts = 400'000;

ffi::Error run(const Jobs& jobs, ffi::ThreadPool& pool) {
  if (jobs.all.empty()) return ffi::Error::Success();
  Scratch memory;
  uint8_t* packed;
  try {
    packed = memory.get(jobs.packed_bytes);
  } catch (const std::bad_alloc&) {
    return ffi::Error(ffi::ErrorCode::kResourceExhausted, "gptoss_jax: no memory for packed rows");
  }
  const auto schedule = [&pool](auto task) { pool.Schedule(std::move(task)); };
  const Body pack = [&](int64_t tile, Scratch&) {
    const Job& job = job_of<&Job::first_tile>(jobs, tile);
    job.way->pack(job.group, tile - job.first_tile, packed + job.packed_at);
  };
  const Body multiply = [&](int64_t chunk, Scratch& scratch) {
    const Job& job = job_of<&Job::first_chunk>(jobs, chunk);
    const int64_t first = (chunk - job.first_chunk) * job.way->chunk_outputs;
    const int64_t end = std::min(first + job.way->chunk_outputs, job.group.outputs);
    job.way->multiply(job.group, packed + job.packed_at, first, end, scratch.get(job.way->scratch_bytes(job.group)));
  };
  const int64_t threads = jobs.products < kFewProducts ? 1 : pool.num_threads();
  const bool done = for_each_chunk(jobs.tiles, jobs.packed_bytes < kFewBytes ? 1 : threads, schedule, pack) &&
                    for_each_chunk(jobs.chunks, threads, schedule, multiply);
  if (!done) return ffi::Error(ffi::ErrorCode::kResourceExhausted, "gptoss_jax: no memory for decoded weights");
  return ffi::Error::Success();
}

// ---- one matrix ----

Group one_group(const ffi::AnyBuffer& x, Matrix matrix, int64_t outputs, float* out) {
  const Ending ending = {nullptr, Type::kFloat32, false, 0, out, Type::kFloat32, outputs};
  const uint8_t* rows = static_cast<const uint8_t*>(x.untyped_data());
  return {matrix, ending, rows, type_of(x), x.dimensions()[0], outputs};
}

ffi::Error run_one(const Form& form, const Group& group, bool fixed_order, ffi::ThreadPool& pool) {
  Jobs jobs;
  add_job(jobs, form, group, fixed_order);
  return run(jobs, pool);
}

ffi::Error linear(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer weight,
                  ffi::Result<ffi::BufferR2<ffi::F32>> out, int32_t isa, bool fixed_order) {
  GPTOSS_RETURN_IF_ERROR(expect_float("x", x.element_type()));
  GPTOSS_RETURN_IF_ERROR(expect_float("weight", weight.element_type()));
  GPTOSS_RETURN_IF_ERROR(expect_rank("x", x.dimensions(), 2));
  GPTOSS_RETURN_IF_ERROR(expect_rank("weight", weight.dimensions(), 2));
  const int64_t rows = x.dimensions()[0], inputs = x.dimensions()[1], outputs = weight.dimensions()[0];
  GPTOSS_RETURN_IF_ERROR(expect("weight", weight.dimensions(), {outputs, inputs}));
  GPTOSS_RETURN_IF_ERROR(expect("out", out->dimensions(), {rows, outputs}));
  const ffi::ErrorOr<const Candidate*> found = find_candidate(isa);
  if (!found.has_value()) return found.error();
  const uint8_t* values = static_cast<const uint8_t*>(weight.untyped_data());
  const Group group = one_group(x, {plain_packing(weight), values, nullptr, inputs}, outputs, out->typed_data());
  return run_one(*found.value()->form, group, fixed_order, pool);
}

ffi::Error linear_int8(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::BufferR2<ffi::S8> codes,
                       ffi::BufferR2<ffi::F32> scales, ffi::Result<ffi::BufferR2<ffi::F32>> out, int32_t isa,
                       bool fixed_order) {
  GPTOSS_RETURN_IF_ERROR(expect_float("x", x.element_type()));
  GPTOSS_RETURN_IF_ERROR(expect_rank("x", x.dimensions(), 2));
  const int64_t rows = x.dimensions()[0], inputs = x.dimensions()[1], outputs = codes.dimensions()[0];
  if (inputs % kBlock != 0) return refuse("x has " + std::to_string(inputs) + " inputs, expected a multiple of 32");
  GPTOSS_RETURN_IF_ERROR(expect("codes", codes.dimensions(), {outputs, inputs}));
  GPTOSS_RETURN_IF_ERROR(expect("scales", scales.dimensions(), {outputs, inputs / kBlock}));
  GPTOSS_RETURN_IF_ERROR(expect("out", out->dimensions(), {rows, outputs}));
  const ffi::ErrorOr<const Candidate*> found = find_candidate(isa);
  if (!found.has_value()) return found.error();
  const uint8_t* values = reinterpret_cast<const uint8_t*>(codes.typed_data());
  const uint8_t* scale_bytes = reinterpret_cast<const uint8_t*>(scales.typed_data());
  const Group group = one_group(x, {Packing::kInt8, values, scale_bytes, inputs}, outputs, out->typed_data());
  return run_one(*found.value()->form, group, fixed_order, pool);
}

// ---- one matrix for each group of rows ----

// All experts' matrices lie one behind the other, and so do their biases.
struct Experts {
  Matrix first;
  const uint8_t* bias;
  Type bias_type;
  int64_t count, outputs;

  Matrix matrix(int64_t expert) const {
    Matrix found = first;
    found.values += expert * outputs * first.row_bytes();
    if (found.scales != nullptr) found.scales += expert * outputs * first.scale_row_bytes();
    return found;
  }
  const void* bias_of(int64_t expert) const { return bias + expert * outputs * size_of(bias_type); }
};

struct Settings {
  bool swiglu;
  float limit;
  int32_t isa;
  bool fixed_order;
};

ffi::Error check_grouped(const ffi::AnyBuffer& x, const Experts& experts, const ffi::AnyBuffer& bias,
                         const ffi::BufferR1<ffi::S32>& sizes, const ffi::AnyBuffer& out, const Settings& settings) {
  const int64_t rows = x.dimensions()[0], outputs = experts.outputs;
  GPTOSS_RETURN_IF_ERROR(expect("bias", bias.dimensions(), {experts.count, outputs}));
  GPTOSS_RETURN_IF_ERROR(expect("group_sizes", sizes.dimensions(), {experts.count}));
  if (settings.swiglu && outputs % 2 != 0) {
    return refuse("there are " + std::to_string(outputs) + " outputs, expected an even number: gate and up of swiglu");
  }
  GPTOSS_RETURN_IF_ERROR(expect("out", out.dimensions(), {rows, settings.swiglu ? outputs / 2 : outputs}));
  const ffi::DataType type = settings.swiglu ? x.element_type() : ffi::DataType::F32;
  GPTOSS_RETURN_IF_ERROR(expect_type("out", out.element_type(), type));
  int64_t sum = 0;
  for (int64_t expert = 0; expert < experts.count; ++expert) {
    const int64_t size = sizes.typed_data()[expert];
    if (size < 0) return refuse("group_sizes[" + std::to_string(expert) + "] is " + std::to_string(size));
    sum += size;
  }
  if (sum <= rows) return ffi::Error::Success();
  return refuse("the groups have " + std::to_string(sum) + " rows, x has " + std::to_string(rows));
}

ffi::Error run_grouped(const ffi::AnyBuffer& x, const Experts& experts, const ffi::BufferR1<ffi::S32>& sizes,
                       ffi::AnyBuffer& out, const Settings& settings, ffi::ThreadPool& pool) {
  const ffi::ErrorOr<const Candidate*> found = find_candidate(settings.isa);
  if (!found.has_value()) return found.error();
  const Type out_type = settings.swiglu ? type_of(x) : Type::kFloat32;
  const int64_t columns = out.dimensions()[1], inputs = experts.first.inputs;
  const uint8_t* rows = static_cast<const uint8_t*>(x.untyped_data());
  uint8_t* results = static_cast<uint8_t*>(out.untyped_data());
  Jobs jobs;
  int64_t row = 0;
  for (int64_t expert = 0; expert < experts.count; ++expert) {
    const Ending ending = {experts.bias_of(expert),
                           experts.bias_type,
                           settings.swiglu,
                           settings.limit,
                           results + row * columns * size_of(out_type),
                           out_type,
                           columns};
    const int64_t size = sizes.typed_data()[expert];
    const uint8_t* first = rows + row * inputs * size_of(type_of(x));
    add_job(jobs, *found.value()->form, {experts.matrix(expert), ending, first, type_of(x), size, experts.outputs},
            settings.fixed_order);
    row += size;
  }
  const int64_t done = row * columns * size_of(out_type);
  std::memset(results + done, 0, x.dimensions()[0] * columns * size_of(out_type) - done);
  return run(jobs, pool);
}

ffi::Error moe_matmul(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::BufferR4<ffi::U8> codes,
                      ffi::BufferR3<ffi::U8> scales, ffi::AnyBuffer bias, ffi::BufferR1<ffi::S32> group_sizes,
                      ffi::Result<ffi::AnyBuffer> out, bool swiglu, float limit, int32_t isa, bool fixed_order) {
  GPTOSS_RETURN_IF_ERROR(expect_float("x", x.element_type()));
  GPTOSS_RETURN_IF_ERROR(expect_float("bias", bias.element_type()));
  GPTOSS_RETURN_IF_ERROR(expect_rank("x", x.dimensions(), 2));
  const int64_t inputs = x.dimensions()[1], count = codes.dimensions()[0], outputs = codes.dimensions()[1];
  if (inputs % kBlock != 0) return refuse("x has " + std::to_string(inputs) + " inputs, expected a multiple of 32");
  GPTOSS_RETURN_IF_ERROR(expect("codes", codes.dimensions(), {count, outputs, inputs / kBlock, kBlock / 2}));
  GPTOSS_RETURN_IF_ERROR(expect("scales", scales.dimensions(), {count, outputs, inputs / kBlock}));
  const Experts experts = {{Packing::kMxfp4, codes.typed_data(), scales.typed_data(), inputs},
                           static_cast<const uint8_t*>(bias.untyped_data()),
                           type_of(bias),
                           count,
                           outputs};
  const Settings settings = {swiglu, limit, isa, fixed_order};
  GPTOSS_RETURN_IF_ERROR(check_grouped(x, experts, bias, group_sizes, *out, settings));
  return run_grouped(x, experts, group_sizes, *out, settings, pool);
}

ffi::Error moe_matmul_plain(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer weight, ffi::AnyBuffer bias,
                            ffi::BufferR1<ffi::S32> group_sizes, ffi::Result<ffi::AnyBuffer> out, bool swiglu,
                            float limit, int32_t isa, bool fixed_order) {
  GPTOSS_RETURN_IF_ERROR(expect_float("x", x.element_type()));
  GPTOSS_RETURN_IF_ERROR(expect_float("weight", weight.element_type()));
  GPTOSS_RETURN_IF_ERROR(expect_float("bias", bias.element_type()));
  GPTOSS_RETURN_IF_ERROR(expect_rank("x", x.dimensions(), 2));
  GPTOSS_RETURN_IF_ERROR(expect_rank("weight", weight.dimensions(), 3));
  const int64_t inputs = x.dimensions()[1], count = weight.dimensions()[0], outputs = weight.dimensions()[1];
  GPTOSS_RETURN_IF_ERROR(expect("weight", weight.dimensions(), {count, outputs, inputs}));
  const Experts experts = {{plain_packing(weight), static_cast<const uint8_t*>(weight.untyped_data()), nullptr, inputs},
                           static_cast<const uint8_t*>(bias.untyped_data()),
                           type_of(bias),
                           count,
                           outputs};
  const Settings settings = {swiglu, limit, isa, fixed_order};
  GPTOSS_RETURN_IF_ERROR(check_grouped(x, experts, bias, group_sizes, *out, settings));
  return run_grouped(x, experts, group_sizes, *out, settings, pool);
}

// ---- what XLA is told of them ----

XLA_FFI_DEFINE_HANDLER(kLinear, linear,
                       ffi::Ffi::Bind()
                           .Ctx<ffi::ThreadPool>()
                           .Arg<ffi::AnyBuffer>()
                           .Arg<ffi::AnyBuffer>()
                           .Ret<ffi::BufferR2<ffi::F32>>()
                           .Attr<int32_t>("isa")
                           .Attr<bool>("fixed_order"));

XLA_FFI_DEFINE_HANDLER(kLinearInt8, linear_int8,
                       ffi::Ffi::Bind()
                           .Ctx<ffi::ThreadPool>()
                           .Arg<ffi::AnyBuffer>()
                           .Arg<ffi::BufferR2<ffi::S8>>()
                           .Arg<ffi::BufferR2<ffi::F32>>()
                           .Ret<ffi::BufferR2<ffi::F32>>()
                           .Attr<int32_t>("isa")
                           .Attr<bool>("fixed_order"));

XLA_FFI_DEFINE_HANDLER(kMoeMatmul, moe_matmul,
                       ffi::Ffi::Bind()
                           .Ctx<ffi::ThreadPool>()
                           .Arg<ffi::AnyBuffer>()
                           .Arg<ffi::BufferR4<ffi::U8>>()
                           .Arg<ffi::BufferR3<ffi::U8>>()
                           .Arg<ffi::AnyBuffer>()
                           .Arg<ffi::BufferR1<ffi::S32>>()
                           .Ret<ffi::AnyBuffer>()
                           .Attr<bool>("swiglu")
                           .Attr<float>("limit")
                           .Attr<int32_t>("isa")
                           .Attr<bool>("fixed_order"));

XLA_FFI_DEFINE_HANDLER(kMoeMatmulPlain, moe_matmul_plain,
                       ffi::Ffi::Bind()
                           .Ctx<ffi::ThreadPool>()
                           .Arg<ffi::AnyBuffer>()
                           .Arg<ffi::AnyBuffer>()
                           .Arg<ffi::AnyBuffer>()
                           .Arg<ffi::BufferR1<ffi::S32>>()
                           .Ret<ffi::AnyBuffer>()
                           .Attr<bool>("swiglu")
                           .Attr<float>("limit")
                           .Attr<int32_t>("isa")
                           .Attr<bool>("fixed_order"));

}  // namespace

const Target kTargets[] = {
    {"gptoss_attention", kAttention},
    {"gptoss_attention_int8", kAttentionInt8},
    {"gptoss_linear", kLinear},
    {"gptoss_linear_int8", kLinearInt8},
    {"gptoss_moe_matmul", kMoeMatmul},
    {"gptoss_moe_matmul_plain", kMoeMatmulPlain},
    {"gptoss_put_rows", kPutRows},
};
const int kNumTargets = sizeof(kTargets) / sizeof(kTargets[0]);

}  // namespace gptoss
