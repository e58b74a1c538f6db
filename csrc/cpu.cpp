// CPU side of the native operations: LibTorch's stable ABI, so one binary serves every torch from 2.10 on. Checks the
// arguments and spreads matrices over torch's threads; a result depends on one matrix alone.
#include <torch/csrc/stable/ops.h>

#include <cstdlib>
#include <memory>

#include "checks.h"

namespace scao {
namespace {

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
  run(tasks, adamw_scratch(r, l), [&](const AdamwTask& task, void* memory) { adamw(task, n, memory); });
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
  run(tasks, eigenbasis_scratch(r, l, fields.k), [&](const EigenbasisTask& task, void* memory) { eigenbasis(task, n, memory); });
}

std::tuple<Tensor, Tensor> symmetric_eigh(Tensor matrices) {
  STD_TORCH_CHECK(matrices.dim() == 3, "scao: matrices must be [N, n, n]");
  const int64_t count = matrices.size(0), n = matrices.size(1);
  const float* from = floats(matrices, "matrices", matrices, {count, n, n});
  Tensor values = torch::stable::new_empty(matrices, {count, n}), vectors = torch::stable::new_empty(matrices, {count, n, n});
  const EighTask task{from, static_cast<float*>(values.data_ptr()), static_cast<float*>(vectors.data_ptr()), n};
  torch::stable::parallel_for(0, (count + lanes - 1) / lanes, 1, [&](int64_t first, int64_t last) {
    const auto memory = scratch(eigh_scratch(n));
    for (int64_t from = first * lanes; from < last * lanes && from < count; from += lanes) {
      eigh(task, from, from + lanes < count ? from + lanes : count, memory.get());
    }
  });
  return {values, vectors};
}

void int8_ema_(Tensor codes, Tensor scales, Tensor values, Tensor weights, int64_t seed) {
  const Int8Average average = average_of(codes, scales, values, weights, seed);
  torch::stable::parallel_for(0, average.blocks, 64, [&](int64_t first, int64_t last) { int8_ema(average, first, last); });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(scao, CPU, m) {
  m.impl("adamw_step_", TORCH_BOX(&adamw_step_));
  m.impl("eigenbasis_step_", TORCH_BOX(&eigenbasis_step_));
  m.impl("symmetric_eigh", TORCH_BOX(&symmetric_eigh));
  m.impl("int8_ema_", TORCH_BOX(&int8_ema_));
}

}  // namespace scao

extern "C" __attribute__((visibility("default"))) int scao_interface() { return SCAO_INTERFACE; }
