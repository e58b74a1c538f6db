// CUDA side of the native operations: LibTorch's stable ABI around the launchers. Checks, device, stream, scratch.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>

#include "checks.h"
#include "launch.h"

namespace scao {
namespace {

#ifdef SCAO_EMULATE  // tests/test_emulator.py: on the CPU, under a name of its own
#define SCAO_NAMESPACE scao_emulated
#define SCAO_KEY CPU
struct Guard {
  explicit Guard(int) {}
};
void* stream_of(const Tensor&) { return nullptr; }
#else
#define SCAO_NAMESPACE scao
#define SCAO_KEY CUDA
using Guard = torch::stable::accelerator::DeviceGuard;
void* stream_of(const Tensor& tensor) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return stream;
}
#endif

// A whole step, in phase 1 (k = 0) and 2.
void step(const std::vector<Tensor>& params, const std::vector<Tensor>& grads, const Tensor& exp_avg, cuda::State state,
          const std::vector<double>& numbers) {
  const auto [matrices, r, l] = sizes_of(exp_avg, params, grads);
  STD_TORCH_CHECK(r <= cuda::LARGEST && state.k <= cuda::LARGEST, "scao: r and k must be at most ", cuda::LARGEST);
  STD_TORCH_CHECK(l < (1 << 30), "scao: l must be below 2^30");
  const Guard guard(exp_avg.get_device_index());
  state.r = static_cast<int>(r), state.l = static_cast<int>(l);
  std::vector<View> gradients, weights;
  for (int64_t i = 0; i < matrices; i++) {
    gradients.push_back(view_of(grads[i], "grads", exp_avg, r, l));
    weights.push_back(view_of(params[i], "params", exp_avg, r, l));
  }
  const int64_t batch = matrices < cuda::BATCH ? matrices : cuda::BATCH;
  const Tensor scratch = torch::stable::new_empty(exp_avg, {batch * scao_cuda_scratch(state.r, state.l, state.k)});
  state.scratch = static_cast<float*>(scratch.data_ptr());
  const int error = scao_cuda_step(gradients.data(), weights.data(), static_cast<int>(matrices), state,
                                   numbers_of(numbers), stream_of(exp_avg));
  STD_TORCH_CHECK(error == 0, "scao: a launch failed with CUDA error ", error);
}

// In phase 1 and of vectors: taken, level, exp_avg, exp_avg_sq, and factor where there is one.
void adamw_step_(std::vector<Tensor> params, std::vector<Tensor> grads, std::vector<Tensor> fields,
                 std::vector<double> numbers) {
  const Adamw adamw = adamw_of(fields);
  cuda::State state{};
  state.taken = adamw.taken, state.level = adamw.level, state.exp_avg = adamw.exp_avg, state.factor = adamw.factor;
  state.exp_avg_sq = adamw.exp_avg_sq;
  step(params, grads, fields[2], state, numbers);
}

// In the ramp there is one more number, its weight.
void eigenbasis_step_(std::vector<Tensor> params, std::vector<Tensor> grads, std::vector<Tensor> fields,
                      std::vector<double> numbers, bool cautious) {
  cuda::State state{};
  state.blend = numbers.size() == 7 ? static_cast<float>(numbers.back()) : 1.0f;
  if (numbers.size() == 7) numbers.pop_back();
  static_cast<Fields<int>&>(state) = fields_of<int>(fields);
  state.cautious = cautious;
  step(params, grads, fields[2], state, numbers);
}

void int8_ema_(Tensor codes, Tensor scales, Tensor values, Tensor weights, int64_t seed) {
  const Int8Average average = average_of(codes, scales, values, weights, seed);
  const Guard guard(scales.get_device_index());
  const int error = scao_cuda_int8_ema(average, stream_of(scales));
  STD_TORCH_CHECK(error == 0, "scao: a launch failed with CUDA error ", error);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(SCAO_NAMESPACE, SCAO_KEY, m) {
  m.impl("adamw_step_", TORCH_BOX(&adamw_step_));
  m.impl("eigenbasis_step_", TORCH_BOX(&eigenbasis_step_));
  m.impl("int8_ema_", TORCH_BOX(&int8_ema_));
}

}  // namespace scao

extern "C" __attribute__((visibility("default"))) int scao_interface() { return SCAO_INTERFACE; }
