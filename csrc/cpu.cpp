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

constexpr float MOST_GAIN = 2.0f;  // as in scao_hf/refresh.py

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

void adamw_step_(std::vector<Tensor> params, std::vector<Tensor> grads, Tensor exp_avg, Tensor exp_avg_sq,
                 std::optional<Tensor> factor, Tensor taken, Tensor level, double lr, double beta1, double beta2, double eps,
                 double weight_decay, double rho) {
  const auto [matrices, r, l] = sizes_of(exp_avg, params, grads);
  float* mean = floats(exp_avg, "exp_avg", exp_avg, {matrices, r, l});
  float* square = floats(exp_avg_sq, "exp_avg_sq", exp_avg, {matrices, r, l});
  float* outer = factor ? floats(*factor, "factor", exp_avg, {matrices, r, r}) : nullptr;
  float* count = floats(taken, "taken", exp_avg, {matrices});
  float* largest = floats(level, "level", exp_avg, {matrices});
  std::vector<AdamwTask> tasks;
  for (int64_t i = 0; i < matrices; i++) {
    tasks.push_back({view_of(grads[i], "grads", exp_avg, r, l), view_of(params[i], "params", exp_avg, r, l),
                     mean + i * r * l, square + i * r * l, outer ? outer + i * r * r : nullptr, count + i, largest + i, r, l});
  }
  const Numbers numbers{lr, beta1, beta2, eps, weight_decay, rho};
  run(tasks, chosen->adamw_scratch(r, l), [&](const AdamwTask& task, void* memory) { chosen->adamw(task, numbers, memory); });
}

void eigenbasis_step_(std::vector<Tensor> params, std::vector<Tensor> grads, Tensor exp_avg, Tensor factor,
                      Tensor inside_avg, Tensor inside_sq, Tensor row, Tensor col, Tensor taken, Tensor level,
                      Tensor vectors, Tensor mask, Tensor gain, Tensor long_vectors, Tensor agreement, bool cautious, double lr,
                      double beta1, double beta2, double eps, double weight_decay, double rho, std::optional<Tensor> activity) {
  const auto [matrices, r, l] = sizes_of(exp_avg, params, grads);
  STD_TORCH_CHECK(inside_avg.dim() == 3, "scao: inside_avg must be [N, r, k]");
  const int64_t k = inside_avg.size(2);
  const Dtype long_dtype = basis_dtype(long_vectors, exp_avg, {matrices, k, l});
  const char* basis = static_cast<const char*>(long_vectors.data_ptr());
  EigenbasisTask task{};
  task.exp_avg = floats(exp_avg, "exp_avg", exp_avg, {matrices, r, l});
  task.factor = floats(factor, "factor", exp_avg, {matrices, r, r});
  task.inside_avg = floats(inside_avg, "inside_avg", exp_avg, {matrices, r, k});
  task.inside_sq = floats(inside_sq, "inside_sq", exp_avg, {matrices, r, k});
  task.row = floats(row, "row", exp_avg, {matrices, r, 1});
  task.col = floats(col, "col", exp_avg, {matrices, 1, l});
  task.taken = floats(taken, "taken", exp_avg, {matrices});
  task.level = floats(level, "level", exp_avg, {matrices});
  task.vectors = floats(vectors, "vectors", exp_avg, {matrices, r, r});
  task.mask = floats(mask, "mask", exp_avg, {matrices, 1, k});
  task.gain = floats(gain, "gain", exp_avg, {matrices});
  task.agreement = floats(agreement, "agreement", exp_avg, {matrices});
  task.activity = activity ? floats(*activity, "activity", exp_avg, {matrices, 2}) : nullptr;
  task.cautious = cautious;
  task.long_vectors = basis;
  task.long_dtype = long_dtype;
  task.r = r, task.l = l, task.k = k;
  std::vector<EigenbasisTask> tasks;
  for (int64_t i = 0; i < matrices; i++) {
    task.grad = view_of(grads[i], "grads", exp_avg, r, l);
    task.param = view_of(params[i], "params", exp_avg, r, l);
    tasks.push_back(task);
    task.exp_avg += r * l, task.factor += r * r, task.inside_avg += r * k, task.inside_sq += r * k;
    task.row += r, task.col += l, task.taken += 1, task.level += 1, task.agreement += 1, task.vectors += r * r, task.mask += k, task.gain += 1;
    if (task.activity) task.activity += 2;
    task.long_vectors = basis + (i + 1) * k * l * (long_dtype == F32 ? 4 : 2);
  }
  const Numbers numbers{lr, beta1, beta2, eps, weight_decay, rho};
  run(tasks, chosen->eigenbasis_scratch(r, l, k), [&](const EigenbasisTask& task, void* memory) { chosen->eigenbasis(task, numbers, memory); });
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

Tensor eigenbasis_turn_(Tensor exp_avg, Tensor long_vectors, Tensor row, Tensor col, Tensor coefficients,
                        Tensor plain_row, Tensor inside_sq, Tensor bias1, Tensor bias2, Tensor finite, double eps) {
  const Bases b = bases_of(exp_avg, long_vectors);
  const auto [n, r, l, k, dtype, data, bytes] = b;
  Tensor norms = torch::stable::new_empty(exp_avg, {n, 2});
  TurnTask task{};
  task.exp_avg = floats(exp_avg, "exp_avg", exp_avg, {n, r, l});
  task.coefficients = floats(coefficients, "coefficients", exp_avg, {n, k + 2 * r, k + r});
  task.row = floats(row, "row", exp_avg, {n, r, 1});
  task.col = floats(col, "col", exp_avg, {n, 1, l});
  task.plain_row = floats(plain_row, "plain_row", exp_avg, {n, r, 1});
  task.inside_sq = floats(inside_sq, "inside_sq", exp_avg, {n, 1, k});
  task.bias1 = floats(bias1, "bias1", exp_avg, {n});
  task.bias2 = floats(bias2, "bias2", exp_avg, {n});
  task.finite = floats(finite, "finite", exp_avg, {n});
  task.norms = static_cast<float*>(norms.data_ptr());
  task.long_vectors = data, task.long_dtype = dtype, task.eps = static_cast<float>(eps);
  task.r = r, task.l = l, task.k = k;
  std::vector<TurnTask> tasks;
  for (int64_t i = 0; i < n; i++) {
    tasks.push_back(task);
    task.exp_avg += r * l, task.coefficients += (k + 2 * r) * (k + r), task.row += r, task.col += l;
    task.plain_row += r, task.inside_sq += k, task.bias1 += 1, task.bias2 += 1, task.finite += 1, task.norms += 2;
    task.long_vectors = data + (i + 1) * bytes;
  }
  run(tasks, chosen->turn_scratch(r, l, k), chosen->turn);
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

// The matrices [first, last) of the stacks, which are passed whole.
Tensor eigenbasis_refresh_(Tensor exp_avg, Tensor long_vectors, Tensor factor, Tensor inside_avg, Tensor inside_sq,
                           Tensor row, Tensor col, Tensor vectors, Tensor mask, Tensor gain, Tensor factor_values,
                           Tensor long_values, Tensor long_tail, Tensor taken, Tensor finite, int64_t first, int64_t last,
                           double beta1, double beta2, double eps, double rho, double decay, double epsilon_sparse,
                            int64_t k_min, int64_t k_max, std::optional<Tensor> activity) {
  const Bases b = bases_of(exp_avg, long_vectors);
  const int64_t n = b.matrices, r = b.r, l = b.l, k = b.k, h = k + r, count = last - first;
  STD_TORCH_CHECK(first >= 0 && first <= last && last <= n, "scao: first and last must be within the stack");
  RefreshTask task{};
  float* moments = floats(exp_avg, "exp_avg", exp_avg, {n, r, l}) + first * r * l;
  float* columns = floats(col, "col", exp_avg, {n, 1, l}) + first * l;
  float* sizes = floats(gain, "gain", exp_avg, {n}) + first;
  task.factor = floats(factor, "factor", exp_avg, {n, r, r}) + first * r * r;
  task.inside_avg = floats(inside_avg, "inside_avg", exp_avg, {n, r, k}) + first * r * k;
  task.inside_sq = floats(inside_sq, "inside_sq", exp_avg, {n, r, k}) + first * r * k;
  task.row = floats(row, "row", exp_avg, {n, r, 1}) + first * r;
  task.vectors = floats(vectors, "vectors", exp_avg, {n, r, r}) + first * r * r;
  task.mask = floats(mask, "mask", exp_avg, {n, 1, k}) + first * k;
  task.factor_values = floats(factor_values, "factor_values", exp_avg, {n, r}) + first * r;
  task.long_values = floats(long_values, "long_values", exp_avg, {n, k}) + first * k;
  task.long_tail = floats(long_tail, "long_tail", exp_avg, {n}) + first;
  task.taken = floats(taken, "taken", exp_avg, {n}) + first;
  task.finite = floats(finite, "finite", exp_avg, {n}) + first;
  task.activity = activity ? floats(*activity, "activity", exp_avg, {n, 2}) + 2 * first : nullptr;
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
  task.bias1 = take(1), task.bias2 = take(1), task.turns = take(1), task.inside_norm = take(1);
  float* norms = take(2);
  task.beta1 = beta1, task.beta2 = beta2, task.rho = rho, task.eps = static_cast<float>(eps);
  task.decay = static_cast<float>(decay);
  task.epsilon_sparse = static_cast<float>(epsilon_sparse), task.k_min = k_min, task.k_max = k_max;
  task.r = r, task.l = l, task.k = k;
  char* basis = b.data + first * b.bytes;
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
      if (task.finite[i] > 0) chosen->gram({moments + i * r * l, basis + i * b.bytes, b.dtype, gram + i * h * h, r, l, k}, memory);
    });
    each(from / lanes, (to + lanes - 1) / lanes, chosen->bases_scratch(r, k), [&](int64_t group, void* memory) {
      chosen->bases(task, group * lanes, (group + 1) * lanes < to ? (group + 1) * lanes : to, memory);
    });
    each(from, to, chosen->turn_scratch(r, l, k), [&](int64_t i, void* memory) {
      chosen->turn({moments + i * r * l, basis + i * b.bytes, b.dtype, task.row + i * r, columns + i * l,
                    task.coefficients + i * coefficients, task.plain_row + i * r, task.mean_square + i * k,
                    task.bias1 + i, task.bias2 + i, task.turns + i, norms + 2 * i, task.eps, r, l, k}, memory);
      if (task.turns[i] > 0) sizes[i] = gain_of(norms[2 * i], norms[2 * i + 1] + task.inside_norm[i]);
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
  m.impl("eigenbasis_turn_", TORCH_BOX(&eigenbasis_turn_));
  m.impl("eigenbasis_refresh_", TORCH_BOX(&eigenbasis_refresh_));
  m.impl("symmetric_eigh", TORCH_BOX(&eigh));
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
