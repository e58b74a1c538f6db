// What the glue of both devices checks before it hands out a pointer. The messages name the argument and the rule.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <initializer_list>
#include <vector>

#include "cpu_kernels.h"

namespace scao {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline void check_shape(const Tensor& tensor, const char* name, std::initializer_list<int64_t> sizes) {
  const auto found = tensor.sizes();
  bool same = found.size() == sizes.size();
  size_t axis = 0;
  for (int64_t size : sizes) {
    same = same && found[axis] == size;
    axis++;
  }
  STD_TORCH_CHECK(same, "scao: ", name, " has the wrong shape");
  STD_TORCH_CHECK(tensor.is_contiguous(), "scao: ", name, " must be contiguous");
}

template <class T>
T* pointer(const Tensor& tensor, const char* name, ScalarType dtype, const Tensor& like,
           std::initializer_list<int64_t> sizes) {
  check_shape(tensor, name, sizes);
  STD_TORCH_CHECK(tensor.scalar_type() == dtype, "scao: ", name, " has the wrong dtype");
  STD_TORCH_CHECK(tensor.device() == like.device(), "scao: ", name, " is on another device");
  return static_cast<T*>(tensor.data_ptr());
}

// A field by its number of entries alone; its stack has the sides that scao_hf/rules/base.py gives it.
inline float* entries_of(const Tensor& tensor, const char* name, const Tensor& like, int64_t entries) {
  STD_TORCH_CHECK(tensor.numel() == entries, "scao: ", name, " has the wrong shape");
  STD_TORCH_CHECK(tensor.is_contiguous(), "scao: ", name, " must be contiguous");
  STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Float, "scao: ", name, " has the wrong dtype");
  STD_TORCH_CHECK(tensor.device() == like.device(), "scao: ", name, " is on another device");
  return static_cast<float*>(tensor.data_ptr());
}

inline float* floats(const Tensor& tensor, const char* name, const Tensor& like, std::initializer_list<int64_t> sizes) {
  return pointer<float>(tensor, name, ScalarType::Float, like, sizes);
}

inline Dtype dtype_of(const Tensor& tensor, const char* name) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return F32;
    case ScalarType::BFloat16: return BF16;
    case ScalarType::Half: return F16;
    default: STD_TORCH_CHECK(false, "scao: ", name, " must be float32, bfloat16 or float16");
  }
}

// The dtype of a long basis.
inline Dtype basis_dtype(const Tensor& tensor, const Tensor& like, std::initializer_list<int64_t> sizes) {
  const Dtype dtype = dtype_of(tensor, "long_vectors");
  STD_TORCH_CHECK(dtype != F16, "scao: long_vectors must be float32 or bfloat16");
  check_shape(tensor, "long_vectors", sizes);
  STD_TORCH_CHECK(tensor.device() == like.device(), "scao: long_vectors is on another device");
  return dtype;
}

// A parameter or gradient as [r, l]: stored that way or as [l, r], any strides; (1, l) takes any contiguous shape.
inline View view_of(const Tensor& tensor, const char* name, const Tensor& like, int64_t r, int64_t l) {
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

// The state of phase 2: SCAO_FIELDS, long_vectors, and of experts activity.
template <class Index>
Fields<Index> fields_of(const std::vector<Tensor>& state) {
#define SCAO_COUNT(name, entries) +1
  constexpr size_t plain = 0 SCAO_FIELDS(SCAO_COUNT);
#undef SCAO_COUNT
  STD_TORCH_CHECK(state.size() == plain + 1 || state.size() == plain + 2, "scao: the state has ", state.size(), " fields");
  const Tensor &exp_avg = state[2], &long_vectors = state[plain];
  STD_TORCH_CHECK(exp_avg.dim() == 3 && long_vectors.dim() == 3, "scao: exp_avg and long_vectors must be stacks");
  const int64_t matrices = exp_avg.size(0), r = exp_avg.size(1), l = exp_avg.size(2), k = long_vectors.size(1);
  Fields<Index> fields{};
  size_t at = 0;
#define SCAO_TAKE(name, entries) fields.name = entries_of(state[at++], #name, exp_avg, matrices * (entries));
  SCAO_FIELDS(SCAO_TAKE)
#undef SCAO_TAKE
  fields.long_dtype = basis_dtype(long_vectors, exp_avg, {matrices, k, l});
  fields.long_vectors = long_vectors.data_ptr();
  if (state.size() > plain + 1) fields.activity = entries_of(state[plain + 1], "activity", exp_avg, 2 * matrices);
  fields.r = static_cast<Index>(r), fields.l = static_cast<Index>(l), fields.k = static_cast<Index>(k);
  return fields;
}

// The state of phase 1 and of vectors: taken, level, exp_avg, exp_avg_sq, and factor where there is one, else null.
struct Adamw {
  float *taken, *level, *exp_avg, *exp_avg_sq, *factor;
};

inline Adamw adamw_of(const std::vector<Tensor>& state) {
  STD_TORCH_CHECK(state.size() == 4 || state.size() == 5, "scao: the state has ", state.size(), " fields");
  const Tensor& exp_avg = state[2];
  STD_TORCH_CHECK(exp_avg.dim() == 3, "scao: exp_avg must be [N, r, l]");
  const int64_t matrices = exp_avg.size(0), r = exp_avg.size(1), l = exp_avg.size(2);
  return {floats(state[0], "taken", exp_avg, {matrices}), floats(state[1], "level", exp_avg, {matrices}),
          floats(exp_avg, "exp_avg", exp_avg, {matrices, r, l}), floats(state[3], "exp_avg_sq", exp_avg, {matrices, r, l}),
          state.size() > 4 ? floats(state[4], "factor", exp_avg, {matrices, r, r}) : nullptr};
}

inline Numbers numbers_of(const std::vector<double>& numbers) {
  STD_TORCH_CHECK(numbers.size() == 6, "scao: there must be 6 numbers");
  return {numbers[0], numbers[1], numbers[2], numbers[3], numbers[4], numbers[5]};
}

inline Int8Average average_of(const Tensor& codes, const Tensor& scales, const Tensor& values, const Tensor& weights,
                              int64_t seed) {
  STD_TORCH_CHECK(scales.dim() == 2 && values.dim() >= 1, "scao: scales must be [N, blocks] and values [N, ...]");
  const int64_t matrices = scales.size(0), blocks = scales.size(1), numel = matrices ? values.numel() / matrices : 0;
  STD_TORCH_CHECK(values.scalar_type() == ScalarType::Float && values.is_contiguous() && values.size(0) == matrices &&
                      values.device() == scales.device() && (numel + INT8_BLOCK - 1) / INT8_BLOCK == blocks,
                  "scao: values must be contiguous float32, [N, ...] with as many entries as the codes hold");
  return {pointer<signed char>(codes, "codes", ScalarType::Char, scales, {matrices, blocks * INT8_BLOCK}),
          floats(scales, "scales", scales, {matrices, blocks}), static_cast<const float*>(values.data_ptr()),
          floats(weights, "weights", scales, {matrices}), numel, blocks, matrices * blocks,
          mix32(static_cast<unsigned>(seed))};
}

struct Sizes {
  int64_t matrices, r, l;
};

inline Sizes sizes_of(const Tensor& exp_avg, const std::vector<Tensor>& params, const std::vector<Tensor>& grads) {
  STD_TORCH_CHECK(exp_avg.dim() == 3, "scao: exp_avg must be [N, r, l]");
  const auto sizes = exp_avg.sizes();
  STD_TORCH_CHECK(static_cast<int64_t>(params.size()) == sizes[0] && params.size() == grads.size(),
                  "scao: as many params and grads are needed as exp_avg has matrices");
  STD_TORCH_CHECK(sizes[1] > 0 && sizes[2] > 0, "scao: exp_avg must not be empty");
  return {sizes[0], sizes[1], sizes[2]};
}

}  // namespace scao
