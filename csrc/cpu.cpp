// CPU side of the native operations: LibTorch's stable ABI, so one binary serves every torch from 2.10 on. Checks the
// arguments, picks the instruction set and spreads matrices over torch's threads; a result depends on one matrix alone.
#include <torch/csrc/stable/ops.h>

#include <cmath>
#include <cstdlib>
#include <cstring>
#include <memory>

#include "checks.h"
#include "int8.h"

namespace scao {
namespace {

constexpr float MOST_GAIN = 2.0f;  // as in scao_hf/rules/eigenbasis_refresh.py

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

// kernel(task, scratch) for every task.
template <class Task, class Kernel>
void run(const std::vector<Task>& tasks, unsigned long bytes, Kernel kernel) {
  torch::stable::parallel_for(0, static_cast<int64_t>(tasks.size()), 1, [&](int64_t first, int64_t last) {
    const auto memory = scratch(bytes);
    for (int64_t index = first; index < last; index++) kernel(tasks[index], memory.get());
  });
}

void adamw_step_(std::vector<Tensor> params, std::vector<Tensor> grads, std::vector<Tensor> state, std::vector<double> numbers) {
  const Adamw fields = adamw_of(state);
  const Tensor& exp_avg = state[2];
  const auto [matrices, r, l] = sizes_of(exp_avg, params, grads);
  std::vector<AdamwTask> tasks;
  for (int64_t i = 0; i < matrices; i++) {
    tasks.push_back({view_of(grads[i], "grads", exp_avg, r, l), view_of(params[i], "params", exp_avg, r, l),
                     fields.exp_avg + i * r * l, fields.exp_avg_sq + i * r * l,
                     fields.factor ? fields.factor + i * r * r : nullptr, fields.taken + i, fields.level + i, r, l});
  }
  const Numbers n = numbers_of(numbers);
  run(tasks, chosen->adamw_scratch(r, l), [&](const AdamwTask& task, void* memory) { chosen->adamw(task, n, memory); });
}

void eigenbasis_step_(std::vector<Tensor> params, std::vector<Tensor> grads, std::vector<Tensor> state,
                      std::vector<double> numbers, bool cautious) {
  const Fields<long> fields = fields_of<long>(state);
  const Tensor& exp_avg = state[2];
  const auto [matrices, r, l] = sizes_of(exp_avg, params, grads);
  std::vector<EigenbasisTask> tasks;
  for (int64_t i = 0; i < matrices; i++) {
    tasks.push_back({fields, view_of(grads[i], "grads", exp_avg, r, l), view_of(params[i], "params", exp_avg, r, l), cautious});
    tasks.back().skip(i);
  }
  const Numbers n = numbers_of(numbers);
  run(tasks, chosen->eigenbasis_scratch(r, l, fields.k), [&](const EigenbasisTask& task, void* memory) { chosen->eigenbasis(task, n, memory); });
}

struct Bases {
  int64_t matrices, r, l, k;
  Dtype dtype;
  char* data;
  long bytes;  // of one matrix
};

Bases bases_of(const Tensor& exp_avg, const Tensor& long_vectors) {
  STD_TORCH_CHECK(exp_avg.dim() == 3 && long_vectors.dim() == 3, "scao: exp_avg and long_vectors must be stacks");
  const int64_t matrices = exp_avg.size(0), r = exp_avg.size(1), l = exp_avg.size(2), k = long_vectors.size(1);
  const Dtype dtype = basis_dtype(long_vectors, exp_avg, {matrices, k, l});
  return {matrices, r, l, k, dtype, static_cast<char*>(long_vectors.data_ptr()), k * l * (dtype == F32 ? 4 : 2)};
}

// (U13)
float gain_of(float whole, float own) {
  if (!(own > 0)) return 1;
  const float gain = std::sqrt(whole / (own > 1.17549435e-38f ? own : 1.17549435e-38f));
  return gain < 1 / MOST_GAIN ? 1 / MOST_GAIN : gain > MOST_GAIN ? MOST_GAIN : gain;
}

Tensor eigenbasis_gram(Tensor exp_avg, Tensor long_vectors) {
  const Bases b = bases_of(exp_avg, long_vectors);
  const float* moments = floats(exp_avg, "exp_avg", exp_avg, {b.matrices, b.r, b.l});
  const int64_t rows = b.k + b.r;
  Tensor gram = torch::stable::new_empty(exp_avg, {b.matrices, rows, rows});
  float* out = static_cast<float*>(gram.data_ptr());
  std::vector<GramTask> tasks;
  for (int64_t i = 0; i < b.matrices; i++) {
    tasks.push_back({moments + i * b.r * b.l, b.data + i * b.bytes, b.dtype, out + i * rows * rows, b.r, b.l, b.k});
  }
  run(tasks, chosen->gram_scratch(b.r, b.l, b.k), chosen->gram);
  return gram;
}

// `fixed`: row, col, coefficients, plain_row, inside_sq, bias1, bias2, finite, none of which changes.
Tensor eigenbasis_rotate_(Tensor exp_avg, Tensor long_vectors, std::vector<Tensor> fixed, double eps) {
  STD_TORCH_CHECK(fixed.size() == 8, "scao: there must be 8 fixed tensors");
  const Bases b = bases_of(exp_avg, long_vectors);
  const auto [n, r, l, k, dtype, data, bytes] = b;
  Tensor norms = torch::stable::new_empty(exp_avg, {n, 2});
  RotateTask task{};
  task.exp_avg = floats(exp_avg, "exp_avg", exp_avg, {n, r, l});
  task.row = floats(fixed[0], "row", exp_avg, {n, r, 1});
  task.col = floats(fixed[1], "col", exp_avg, {n, 1, l});
  task.coefficients = floats(fixed[2], "coefficients", exp_avg, {n, k + 2 * r, k + r});
  task.plain_row = floats(fixed[3], "plain_row", exp_avg, {n, r, 1});
  task.inside_sq = floats(fixed[4], "inside_sq", exp_avg, {n, 1, k});
  task.bias1 = floats(fixed[5], "bias1", exp_avg, {n});
  task.bias2 = floats(fixed[6], "bias2", exp_avg, {n});
  task.finite = floats(fixed[7], "finite", exp_avg, {n});
  task.norms = static_cast<float*>(norms.data_ptr());
  task.long_vectors = data, task.long_dtype = dtype, task.eps = static_cast<float>(eps);
  task.r = r, task.l = l, task.k = k;
  std::vector<RotateTask> tasks;
  for (int64_t i = 0; i < n; i++) {
    tasks.push_back(task);
    task.exp_avg += r * l, task.coefficients += (k + 2 * r) * (k + r), task.row += r, task.col += l;
    task.plain_row += r, task.inside_sq += k, task.bias1 += 1, task.bias2 += 1, task.finite += 1, task.norms += 2;
    task.long_vectors = data + (i + 1) * bytes;
  }
  run(tasks, chosen->rotate_scratch(r, l, k), chosen->rotate);
  return norms;
}

std::tuple<Tensor, Tensor> eigh(Tensor matrices) {
  STD_TORCH_CHECK(matrices.dim() == 3, "scao: matrices must be [N, n, n]");
  const int64_t count = matrices.size(0), n = matrices.size(1);
  const float* from = floats(matrices, "matrices", matrices, {count, n, n});
  Tensor values = torch::stable::new_empty(matrices, {count, n}), vectors = torch::stable::new_empty(matrices, {count, n, n});
  const EighTask task{from, static_cast<float*>(values.data_ptr()), static_cast<float*>(vectors.data_ptr()), n};
  const int64_t lanes = chosen->lanes;
  torch::stable::parallel_for(0, (count + lanes - 1) / lanes, 1, [&](int64_t first, int64_t last) {
    const auto memory = scratch(chosen->eigh_scratch(n));
    chosen->eigh(task, first * lanes, last * lanes < count ? last * lanes : count, memory.get());
  });
  return {values, vectors};
}

// The matrices [first, last) of the stacks, which are passed whole. numbers: beta1, beta2, eps, rho, decay, epsilon_sparse.
Tensor eigenbasis_refresh_(std::vector<Tensor> state, Tensor finite, int64_t first, int64_t last, std::vector<double> numbers,
                           int64_t k_min, int64_t k_max) {
  RefreshTask task{};
  static_cast<Fields<long>&>(task) = fields_of<long>(state);
  const Tensor& exp_avg = state[2];
  const int64_t n = exp_avg.size(0), r = task.r, l = task.l, k = task.k, h = k + r, count = last - first;
  STD_TORCH_CHECK(first >= 0 && first <= last && last <= n, "scao: first and last must be within the stack");
  STD_TORCH_CHECK(numbers.size() == 6, "scao: there must be 6 numbers");
  task.skip(first);
  task.finite = floats(finite, "finite", exp_avg, {n}) + first;
  Tensor failed = torch::stable::new_empty(exp_avg, {count});
  task.failed = static_cast<float*>(failed.data_ptr());
  const int64_t coefficients = (k + 2 * r) * h;
  const auto between = scratch(4 * count * (h * h + coefficients + r + k + 6));
  float* at = static_cast<float*>(between.get());
  const auto take = [&](int64_t each) {
    float* part = at;
    at += count * each;
    return part;
  };
  float* gram = take(h * h);
  task.gram = gram, task.coefficients = take(coefficients), task.plain_row = take(r), task.mean_square = take(k);
  task.bias1 = take(1), task.bias2 = take(1), task.refreshed = take(1), task.inside_norm = take(1);
  float* norms = take(2);
  task.beta1 = numbers[0], task.beta2 = numbers[1], task.eps = static_cast<float>(numbers[2]), task.rho = numbers[3];
  task.decay = static_cast<float>(numbers[4]), task.epsilon_sparse = static_cast<float>(numbers[5]);
  task.k_min = k_min, task.k_max = k_max;
  char* basis = static_cast<char*>(task.long_vectors);
  const long bytes = k * l * (task.long_dtype == F32 ? 4 : 2);
  const auto each = [](int64_t from, int64_t to, unsigned long bytes, auto&& work) {
    torch::stable::parallel_for(from, to, 1, [&](int64_t begin, int64_t end) {
      const auto memory = scratch(bytes);
      for (int64_t i = begin; i < end; i++) work(i, memory.get());
    });
  };
  // A few matrices at a time, whose long sides stay in the caches.
  const int64_t lanes = chosen->lanes, portion = lanes * torch::stable::get_num_threads();
  for (int64_t from = 0; from < count; from += portion) {
    const int64_t to = from + portion < count ? from + portion : count;
    each(from, to, chosen->gram_scratch(r, l, k), [&](int64_t i, void* memory) {
      if (task.finite[i] > 0) chosen->gram({task.exp_avg + i * r * l, basis + i * bytes, task.long_dtype, gram + i * h * h, r, l, k}, memory);
    });
    each(from / lanes, (to + lanes - 1) / lanes, chosen->bases_scratch(r, k), [&](int64_t group, void* memory) {
      chosen->bases(task, group * lanes, (group + 1) * lanes < to ? (group + 1) * lanes : to, memory);
    });
    each(from, to, chosen->rotate_scratch(r, l, k), [&](int64_t i, void* memory) {
      chosen->rotate({task.exp_avg + i * r * l, basis + i * bytes, task.long_dtype, task.row + i * r, task.col + i * l,
                    task.coefficients + i * coefficients, task.plain_row + i * r, task.mean_square + i * k,
                    task.bias1 + i, task.bias2 + i, task.refreshed + i, norms + 2 * i, task.eps, r, l, k}, memory);
      if (task.refreshed[i] > 0) task.gain[i] = gain_of(norms[2 * i], norms[2 * i + 1] + task.inside_norm[i]);
    });
  }
  return failed;
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
  m.impl("eigenbasis_gram", TORCH_BOX(&eigenbasis_gram));
  m.impl("eigenbasis_rotate_", TORCH_BOX(&eigenbasis_rotate_));
  m.impl("eigenbasis_refresh_", TORCH_BOX(&eigenbasis_refresh_));
  m.impl("symmetric_eigh", TORCH_BOX(&eigh));
  m.impl("int8_ema_", TORCH_BOX(&int8_ema_));
}

}  // namespace scao

extern "C" __attribute__((visibility("default"))) int scao_interface() { return SCAO_INTERFACE; }

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
