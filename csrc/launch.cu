// Launchers: raw pointers, sizes and a stream in, a CUDA error code out. nvcc compiles this for the device, g++ with
// SCAO_EMULATE for the tests.
#ifdef SCAO_EMULATE
#include "emulator/cuda_emulator.h"
namespace scao {
namespace cuda {
inline float half_to_float(unsigned short h) {
  _Float16 x;
  __builtin_memcpy(&x, &h, 2);
  return static_cast<float>(x);
}
inline unsigned short float_to_half(float f) {
  _Float16 x = static_cast<_Float16>(f);
  unsigned short h;
  __builtin_memcpy(&h, &x, 2);
  return h;
}
}  // namespace cuda
}  // namespace scao
#else
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#define SCAO_LAUNCH(kernel, grid, stream, ...) \
  kernel<<<grid, scao::cuda::THREADS, 0, static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__)
#define SCAO_LAST_ERROR static_cast<int>(cudaGetLastError())
namespace scao {
namespace cuda {
__device__ inline float half_to_float(unsigned short h) { return __half2float(__ushort_as_half(h)); }
__device__ inline unsigned short float_to_half(float f) { return __half_as_ushort(__float2half_rn(f)); }
}  // namespace cuda
}  // namespace scao
#endif

#include "kernels.cuh"

using namespace scao;

static_assert(sizeof(cuda::Batch) + sizeof(cuda::State) + sizeof(Numbers) <= 4096, "kernel arguments are at most 4 KB");

extern "C" long scao_cuda_scratch(int r, int l, int k) { return cuda::scratch_size(r, l, k); }

extern "C" int scao_cuda_eigenbasis(const View* grads, const View* params, int matrices, cuda::State state,
                                    Numbers numbers, void* stream) {
  state.chunks = (state.l + cuda::CHUNK - 1) / cuda::CHUNK;
  for (int first = 0; first < matrices; first += cuda::BATCH) {
    const int count = matrices - first < cuda::BATCH ? matrices - first : cuda::BATCH;
    cuda::Batch batch{};
    for (int i = 0; i < count; i++) batch.grad[i] = grads[first + i], batch.param[i] = params[first + i];
    cuda::State s = state;
    s.skip(first);
    const dim3 grid(state.chunks, count);
    SCAO_LAUNCH(cuda::project, grid, stream, batch, s);
    SCAO_LAUNCH(cuda::settle, dim3(count), stream, batch, s, numbers);
    SCAO_LAUNCH(cuda::residual, grid, stream, batch, s, numbers);
    SCAO_LAUNCH(cuda::apply, grid, stream, batch, s, numbers);
    SCAO_LAUNCH(cuda::finish, dim3(count), stream, s, numbers);
    if (const int error = SCAO_LAST_ERROR) return error;
  }
  return 0;
}

extern "C" int scao_cuda_probe() {
#ifdef SCAO_EMULATE
  return 0;
#else
  cudaFuncAttributes attributes;
  const cudaError_t error = cudaFuncGetAttributes(&attributes, cuda::int8_ema);
  cudaGetLastError();  // it is not the next launch's
  return static_cast<int>(error);
#endif
}

extern "C" int scao_cuda_int8_ema(signed char* codes, float* scales, const float* values, const float* weights,
                                  long numel, long blocks_per_matrix, long blocks, unsigned seed_key, void* stream) {
  if (blocks == 0) return 0;
  SCAO_LAUNCH(cuda::int8_ema, dim3(static_cast<unsigned>(blocks)), stream, codes, scales, values, weights, numel,
              blocks_per_matrix, seed_key);
  return SCAO_LAST_ERROR;
}
