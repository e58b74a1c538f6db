// CUDA side of the native operations: LibTorch's stable ABI around the launchers. Checks, whose messages name the argument and
// the rule, then device, stream and scratch.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <initializer_list>
#include <vector>

#include "state.h"

namespace scao {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

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

// A stacked field by its number of entries; its sides are what scao_hf/rules/base.py gives it.
void* entries_of(const Tensor& tensor, const char* name, const Tensor& like, int64_t entries,
                 ScalarType dtype = ScalarType::Float) {
  STD_TORCH_CHECK(tensor.numel() == entries, "scao: ", name, " has the wrong shape");
  STD_TORCH_CHECK(tensor.is_contiguous(), "scao: ", name, " must be contiguous");
  STD_TORCH_CHECK(tensor.scalar_type() == dtype, "scao: ", name, " has the wrong dtype");
  STD_TORCH_CHECK(tensor.device() == like.device(), "scao: ", name, " is on another device");
  return tensor.data_ptr();
}

float* floats(const Tensor& tensor, const char* name, const Tensor& like, int64_t entries) {
  return static_cast<float*>(entries_of(tensor, name, like, entries));
}

Dtype dtype_of(const Tensor& tensor, const char* name) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return F32;
    case ScalarType::BFloat16: return BF16;
    case ScalarType::Half: return F16;
    default: STD_TORCH_CHECK(false, "scao: ", name, " must be float32, bfloat16 or float16");
  }
}

// A parameter or gradient as [r, l]: stored that way or as [l, r], any strides; (1, l) takes any contiguous shape.
View view_of(const Tensor& tensor, const char* name, const Tensor& like, int64_t r, int64_t l) {
  STD_TORCH_CHECK(tensor.device() == like.device(), "scao: ", name, " is on another device");
  const Dtype dtype = dtype_of(tensor, name);
  void* data = tensor.data_ptr();
  if (r == 1) {
    STD_TORCH_CHECK(tensor.numel() == l && tensor.is_contiguous(), "scao: ", name, " must be contiguous with l entries");
    return {data, static_cast<long>(l), 1, dtype};
  }
  const auto sizes = tensor.sizes();
  const auto strides = tensor.strides();
  STD_TORCH_CHECK(sizes.size() == 2, "scao: ", name, " must have two sides");
  if (sizes[0] == r && sizes[1] == l) return {data, static_cast<long>(strides[0]), static_cast<long>(strides[1]), dtype};
  STD_TORCH_CHECK(sizes[0] == l && sizes[1] == r, "scao: ", name, " is neither [r, l] nor [l, r]");
  return {data, static_cast<long>(strides[1]), static_cast<long>(strides[0]), dtype};
}

// A whole step, in phase 1 (k = 0) and 2.
void step(const std::vector<Tensor>& params, const std::vector<Tensor>& grads, const Tensor& exp_avg, State state,
          const std::vector<double>& numbers) {
  const int64_t matrices = exp_avg.size(0), r = exp_avg.size(1), l = exp_avg.size(2);
  STD_TORCH_CHECK(numbers.size() == 6, "scao: there must be 6 numbers");
  STD_TORCH_CHECK(static_cast<int64_t>(params.size()) == matrices && params.size() == grads.size(),
                  "scao: as many params and grads are needed as exp_avg has matrices");
  STD_TORCH_CHECK(r > 0 && l > 0, "scao: exp_avg must not be empty");
  STD_TORCH_CHECK(r <= LARGEST && state.k <= LARGEST, "scao: r and k must be at most ", LARGEST);
  STD_TORCH_CHECK(l < (1 << 30), "scao: l must be below 2^30");
  const Guard guard(exp_avg.get_device_index());
  state.r = static_cast<int>(r), state.l = static_cast<int>(l);
  std::vector<View> gradients, weights;
  for (int64_t i = 0; i < matrices; i++) {
    gradients.push_back(view_of(grads[i], "grads", exp_avg, r, l));
    weights.push_back(view_of(params[i], "params", exp_avg, r, l));
  }
  const int64_t batch = matrices < BATCH ? matrices : BATCH;
  const Tensor scratch = torch::stable::new_empty(exp_avg, {batch * scao_cuda_scratch(state.r, state.l, state.k)});
  state.scratch = static_cast<float*>(scratch.data_ptr());
  const Numbers n{numbers[0], numbers[1], numbers[2], numbers[3], numbers[4], numbers[5]};
  const int error = scao_cuda_step(gradients.data(), weights.data(), static_cast<int>(matrices), state, n, stream_of(exp_avg));
  STD_TORCH_CHECK(error == 0, "scao: a launch failed with CUDA error ", error);
}

// In phase 1 and of vectors: taken, level, exp_avg, exp_avg_sq, and factor where there is one.
void adamw_step_(std::vector<Tensor> params, std::vector<Tensor> grads, std::vector<Tensor> fields,
                 std::vector<double> numbers) {
  STD_TORCH_CHECK(fields.size() == 4 || fields.size() == 5, "scao: the state has ", fields.size(), " fields");
  const Tensor& exp_avg = fields[2];
  STD_TORCH_CHECK(exp_avg.dim() == 3, "scao: exp_avg must be [N, r, l]");
  const int64_t matrices = exp_avg.size(0), r = exp_avg.size(1), l = exp_avg.size(2);
  State state{};
  state.taken = floats(fields[0], "taken", exp_avg, matrices);
  state.level = floats(fields[1], "level", exp_avg, matrices);
  state.exp_avg = floats(exp_avg, "exp_avg", exp_avg, matrices * r * l);
  state.exp_avg_sq = floats(fields[3], "exp_avg_sq", exp_avg, matrices * r * l);
  if (fields.size() > 4) state.factor = floats(fields[4], "factor", exp_avg, matrices * r * r);
  step(params, grads, exp_avg, state, numbers);
}

// In phase 2: SCAO_FIELDS, long_vectors, and of experts activity. In the ramp there is one more number, its weight.
void eigenbasis_step_(std::vector<Tensor> params, std::vector<Tensor> grads, std::vector<Tensor> fields,
                      std::vector<double> numbers, bool cautious) {
#define SCAO_COUNT(name, entries) +1
  constexpr size_t plain = 0 SCAO_FIELDS(SCAO_COUNT);
#undef SCAO_COUNT
  STD_TORCH_CHECK(fields.size() == plain + 1 || fields.size() == plain + 2, "scao: the state has ", fields.size(), " fields");
  const Tensor &exp_avg = fields[2], &basis = fields[plain];
  STD_TORCH_CHECK(exp_avg.dim() == 3 && basis.dim() == 3, "scao: exp_avg and long_vectors must be stacks");
  const int64_t matrices = exp_avg.size(0), r = exp_avg.size(1), l = exp_avg.size(2), k = basis.size(1);
  State state{};
  size_t at = 0;
#define SCAO_TAKE(name, entries) state.name = floats(fields[at++], #name, exp_avg, matrices * (entries));
  SCAO_FIELDS(SCAO_TAKE)
#undef SCAO_TAKE
  state.long_dtype = dtype_of(basis, "long_vectors");
  STD_TORCH_CHECK(state.long_dtype != F16, "scao: long_vectors must be float32 or bfloat16");
  state.long_vectors = entries_of(basis, "long_vectors", exp_avg, matrices * k * l, basis.scalar_type());
  if (fields.size() > plain + 1) state.activity = floats(fields[plain + 1], "activity", exp_avg, 2 * matrices);
  state.k = static_cast<int>(k), state.cautious = cautious;
  state.blend = numbers.size() == 7 ? static_cast<float>(numbers.back()) : 1.0f;
  if (numbers.size() == 7) numbers.pop_back();
  step(params, grads, exp_avg, state, numbers);
}

void int8_ema_(Tensor codes, Tensor scales, Tensor values, Tensor weights, int64_t seed) {
  STD_TORCH_CHECK(scales.dim() == 2 && values.dim() >= 1, "scao: scales must be [N, blocks] and values [N, ...]");
  const int64_t matrices = scales.size(0), blocks = scales.size(1), numel = matrices ? values.numel() / matrices : 0;
  STD_TORCH_CHECK(values.size(0) == matrices && (numel + INT8_BLOCK - 1) / INT8_BLOCK == blocks,
                  "scao: values must be [N, ...] with as many entries as the codes hold");
  const Int8Average average{
      static_cast<signed char*>(entries_of(codes, "codes", scales, matrices * blocks * INT8_BLOCK, ScalarType::Char)),
      floats(scales, "scales", scales, matrices * blocks), floats(values, "values", scales, matrices * numel),
      floats(weights, "weights", scales, matrices), numel, blocks, matrices * blocks, mix32(static_cast<unsigned>(seed))};
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
