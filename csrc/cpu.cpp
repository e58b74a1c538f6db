// CPU side of the native operations: LibTorch's stable ABI, so one binary serves every torch from 2.10 on. Checks the
// arguments, picks the instruction set and spreads matrices over torch's threads; a result depends on one matrix alone.
#include <torch/csrc/stable/ops.h>

#include <cstdlib>
#include <cstring>
#include <memory>

#include "checks.h"
#include "int8.h"

namespace scao {
namespace {

const Kernels* best() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c") &&
                  __builtin_cpu_supports("bmi2");
  const bool v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (v4) return &v4::kernels;
  if (v3) return &v3::kernels;
#endif
  return &base::kernels;
}

const Kernels* chosen = best();

struct Free {
  void operator()(void* p) const { std::free(p); }
};

std::unique_ptr<void, Free> scratch(unsigned long bytes) {
  std::unique_ptr<void, Free> memory(std::aligned_alloc(64, (bytes + 63) / 64 * 64));
  STD_TORCH_CHECK(memory != nullptr, "scao: no memory for ", bytes, " bytes of scratch");
  return memory;
}

template <class Task>
void run(std::vector<Task>& tasks, const Numbers& numbers, unsigned long bytes,
         void (*kernel)(const Task&, const Numbers&, void*)) {
  torch::stable::parallel_for(0, static_cast<int64_t>(tasks.size()), 1, [&](int64_t first, int64_t last) {
    const auto memory = scratch(bytes);
    for (int64_t index = first; index < last; index++) kernel(tasks[index], numbers, memory.get());
  });
}

void adamw_step_(std::vector<Tensor> params, std::vector<Tensor> grads, Tensor exp_avg, Tensor exp_avg_sq,
                 std::optional<Tensor> factor, Tensor taken, double lr, double beta1, double beta2, double eps,
                 double weight_decay, double rho) {
  const auto [matrices, r, l] = sizes_of(exp_avg, params, grads);
  float* mean = floats(exp_avg, "exp_avg", exp_avg, {matrices, r, l});
  float* square = floats(exp_avg_sq, "exp_avg_sq", exp_avg, {matrices, r, l});
  float* outer = factor ? floats(*factor, "factor", exp_avg, {matrices, r, r}) : nullptr;
  float* count = floats(taken, "taken", exp_avg, {matrices});
  std::vector<AdamwTask> tasks;
  for (int64_t i = 0; i < matrices; i++) {
    tasks.push_back({view_of(grads[i], "grads", exp_avg, r, l), view_of(params[i], "params", exp_avg, r, l),
                     mean + i * r * l, square + i * r * l, outer ? outer + i * r * r : nullptr, count + i, r, l});
  }
  run(tasks, {lr, beta1, beta2, eps, weight_decay, rho}, chosen->adamw_scratch(r, l), chosen->adamw);
}

void eigenbasis_step_(std::vector<Tensor> params, std::vector<Tensor> grads, Tensor exp_avg, Tensor factor,
                      Tensor inside_avg, Tensor inside_sq, Tensor row, Tensor col, Tensor taken, Tensor vectors,
                      Tensor mask, Tensor gain, Tensor long_vectors, double lr, double beta1, double beta2, double eps,
                      double weight_decay, double rho) {
  const auto [matrices, r, l] = sizes_of(exp_avg, params, grads);
  STD_TORCH_CHECK(inside_avg.dim() == 3, "scao: inside_avg must be [N, r, k]");
  const int64_t k = inside_avg.size(2);
  const Dtype long_dtype = dtype_of(long_vectors, "long_vectors");
  STD_TORCH_CHECK(long_dtype != F16, "scao: long_vectors must be float32 or bfloat16");
  check_shape(long_vectors, "long_vectors", {matrices, l, k});
  const char* basis = static_cast<const char*>(long_vectors.data_ptr());
  EigenbasisTask task{};
  task.exp_avg = floats(exp_avg, "exp_avg", exp_avg, {matrices, r, l});
  task.factor = floats(factor, "factor", exp_avg, {matrices, r, r});
  task.inside_avg = floats(inside_avg, "inside_avg", exp_avg, {matrices, r, k});
  task.inside_sq = floats(inside_sq, "inside_sq", exp_avg, {matrices, r, k});
  task.row = floats(row, "row", exp_avg, {matrices, r, 1});
  task.col = floats(col, "col", exp_avg, {matrices, 1, l});
  task.taken = floats(taken, "taken", exp_avg, {matrices});
  task.vectors = floats(vectors, "vectors", exp_avg, {matrices, r, r});
  task.mask = floats(mask, "mask", exp_avg, {matrices, 1, k});
  task.gain = floats(gain, "gain", exp_avg, {matrices});
  task.long_vectors = basis;
  task.long_dtype = long_dtype;
  task.r = r, task.l = l, task.k = k;
  std::vector<EigenbasisTask> tasks;
  for (int64_t i = 0; i < matrices; i++) {
    task.grad = view_of(grads[i], "grads", exp_avg, r, l);
    task.param = view_of(params[i], "params", exp_avg, r, l);
    tasks.push_back(task);
    task.exp_avg += r * l, task.factor += r * r, task.inside_avg += r * k, task.inside_sq += r * k;
    task.row += r, task.col += l, task.taken += 1, task.vectors += r * r, task.mask += k, task.gain += 1;
    task.long_vectors = basis + (i + 1) * l * k * (long_dtype == F32 ? 4 : 2);
  }
  run(tasks, {lr, beta1, beta2, eps, weight_decay, rho}, chosen->eigenbasis_scratch(r, l, k), chosen->eigenbasis);
}

void int8_ema_(Tensor codes, Tensor scales, Tensor values, Tensor weights, int64_t seed) {
  STD_TORCH_CHECK(scales.dim() == 2 && values.dim() >= 1, "scao: scales must be [N, blocks] and values [N, ...]");
  const int64_t matrices = scales.size(0), blocks = scales.size(1);
  signed char* code = pointer<signed char>(codes, "codes", ScalarType::Char, scales, {matrices, blocks * INT8_BLOCK});
  float* scale = floats(scales, "scales", scales, {matrices, blocks});
  const float* weight = floats(weights, "weights", scales, {matrices});
  const int64_t numel = matrices ? values.numel() / matrices : 0;
  STD_TORCH_CHECK(values.scalar_type() == ScalarType::Float && values.is_contiguous() && values.size(0) == matrices &&
                      (numel + INT8_BLOCK - 1) / INT8_BLOCK == blocks,
                  "scao: values must be contiguous float32, [N, ...] with as many entries as the codes hold");
  const float* value = static_cast<const float*>(values.data_ptr());
  const unsigned key = mix32(static_cast<unsigned>(seed));
  torch::stable::parallel_for(0, matrices * blocks, 64, [&](int64_t first, int64_t last) {
    chosen->int8_ema(code, scale, value, weight, numel, blocks, key, first, last);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(scao, CPU, m) {
  m.impl("adamw_step_", TORCH_BOX(&adamw_step_));
  m.impl("eigenbasis_step_", TORCH_BOX(&eigenbasis_step_));
  m.impl("int8_ema_", TORCH_BOX(&int8_ema_));
}

}  // namespace scao

// The instruction set in use: "base", "v3" or "v4" (x86-64 levels).
extern "C" __attribute__((visibility("default"))) const char* scao_cpu_isa() { return scao::chosen->isa; }

// Choose another one, for tests; 0 where this processor lacks it.
extern "C" __attribute__((visibility("default"))) int scao_use_cpu_isa(const char* name) {
#if defined(__x86_64__)
  const scao::Kernels* levels[] = {&scao::base::kernels, &scao::v3::kernels, &scao::v4::kernels};
#else
  const scao::Kernels* levels[] = {&scao::base::kernels};
#endif
  for (const scao::Kernels* level : levels) {
    if (std::strcmp(level->isa, name) == 0) {
      scao::chosen = level;
      return 1;
    }
    if (level == scao::best()) break;
  }
  return 0;
}
