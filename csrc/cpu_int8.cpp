// The blockwise int8 average: see int8.h and scao_hf/quantization.py.
#include "cpu_kernels.h"
#include "cpu_vector.h"

namespace scao {

// A product and a sum that are rounded once could round to another code than the two operations of the torch version.
#if defined(__clang__)
#pragma STDC FP_CONTRACT OFF
#else
#pragma GCC push_options
#pragma GCC optimize("fp-contract=off")
#endif
void int8_ema(const Int8Average& average, long first, long last) {
  const auto [codes, scales, values, weights, numel, blocks_per_matrix, blocks, seed_key] = average;
  for (long block = first; block < last; block++) {
    const long matrix = block / blocks_per_matrix, start = (block - matrix * blocks_per_matrix) * INT8_BLOCK;
    const float weight = weights[matrix];
    if (weight == 0.0f) continue;  // a skipped matrix keeps its codes
    const int count = static_cast<int>(smaller(INT8_BLOCK, numel - start));
    signed char* code = codes + block * INT8_BLOCK;
    const float* value = values + matrix * numel + start;
    float x[INT8_BLOCK];
    const float scale = scales[block];
    for (int j = 0; j < INT8_BLOCK; j++) x[j] = static_cast<float>(code[j]) * scale;
    if (weight < 0.5f) {
      for (int j = 0; j < count; j++) x[j] = x[j] + weight * (value[j] - x[j]);
    } else {
      for (int j = 0; j < count; j++) x[j] = value[j] - (value[j] - x[j]) * (1 - weight);
    }
    float most = 0;
#pragma omp simd reduction(max : most)
    for (int j = 0; j < INT8_BLOCK; j++) most = __builtin_fabsf(x[j]) > most ? __builtin_fabsf(x[j]) : most;
    const float fresh = most / INT8_LEVELS;
    const float inverse = fresh > TINY ? 1 / fresh : 0.0f;
    const unsigned key = block_key(seed_key, static_cast<unsigned>(block));
    scales[block] = fresh;
#pragma omp simd
    for (int j = 0; j < INT8_BLOCK; j++) {
      const float y = x[j] * inverse + uniform(key, static_cast<unsigned>(j));
      int floor = static_cast<int>(y);
      floor -= static_cast<float>(floor) > y;
      floor = floor > 127 ? 127 : floor < -127 ? -127 : floor;
      code[j] = static_cast<signed char>(j < count ? floor : 0);
    }
  }
}
#if !defined(__clang__)
#pragma GCC pop_options
#endif

}  // namespace scao
