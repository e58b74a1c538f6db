// Launchers: raw pointers, sizes and a stream in, a CUDA error code out. nvcc compiles this for the device, g++ with
// SCAO_EMULATE for the tests.
#ifdef SCAO_EMULATE
#include "emulator/cuda_emulator.h"
#else
#include <cuda_fp16.h>
#include <cuda_runtime.h>
namespace scao {
__device__ inline float half_to_float(unsigned short h) { return __half2float(__ushort_as_half(h)); }
__device__ inline unsigned short float_to_half(float f) { return __half_as_ushort(__float2half_rn(f)); }

constexpr int PLAIN_SHARED = 48 * 1024;  // bytes that a kernel may take without asking

template <class... Takes, class... Given>
int launch(void (*kernel)(Takes...), dim3 grid, int threads, int floats, void* stream, const Given&... given) {
  const int bytes = floats * static_cast<int>(sizeof(float));
  if (bytes > PLAIN_SHARED) {
    const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    if (error != cudaSuccess) return static_cast<int>(error);
  }
  kernel<<<grid, threads, bytes, static_cast<cudaStream_t>(stream)>>>(given...);
  return static_cast<int>(cudaGetLastError());
}
}  // namespace scao
#endif

#include "kernels.cuh"

using namespace scao;

static_assert(sizeof(Batch) + sizeof(State) + sizeof(Numbers) <= 32764, "arguments of a kernel");

extern "C" long scao_cuda_scratch(int r, int l, int k) { return scao::scratch_size(r, l, k); }

extern "C" int scao_cuda_step(const View* grads, const View* params, int matrices, State state, Numbers numbers,
                              void* stream) {
  state.chunks = (state.l + CHUNK - 1) / CHUNK;
  const int threads = threads_of(state.r), floats = shared_size(state.r, state.k);
  Batch batch{};
  for (int first = 0; first < matrices; first += BATCH) {
    const int count = matrices - first < BATCH ? matrices - first : BATCH;
    for (int i = 0; i < count; i++) batch.grad[i] = grads[first + i], batch.param[i] = params[first + i];
    State s = state;
    s.skip(first);
    const dim3 blocks(state.chunks, count), one(count);
    const auto run = [&](auto kernel, dim3 grid, const auto&... given) {
      return launch(kernel, grid, threads, floats, stream, given...);
    };
    int error = run(project, blocks, batch, s);
    if (!error) error = run(settle, one, batch, s, numbers);
    if (s.k == 0) {
      if (!error) error = run(adamw, blocks, batch, s, numbers);
    } else {
      if (!error) error = run(residual, blocks, batch, s, numbers);
      if (!error) error = run(apply, blocks, batch, s, numbers);
      if (!error) error = run(finish, one, s, numbers);
    }
    if (error) return error;
  }
  return 0;
}

extern "C" int scao_cuda_probe() {
#ifdef SCAO_EMULATE
  return 0;
#else
  int driver = 0;
  cudaDriverGetVersion(&driver);
  if (driver < 12010) return static_cast<int>(cudaErrorInsufficientDriver);  // so many arguments came with CUDA 12.1
  cudaFuncAttributes attributes;
  const cudaError_t error = cudaFuncGetAttributes(&attributes, project);
  cudaGetLastError();  // it is not the next launch's
  return static_cast<int>(error);
#endif
}

extern "C" int scao_cuda_int8_ema(Int8Average average, void* stream) {
  if (average.blocks == 0) return 0;
  return launch(int8_ema, dim3(static_cast<unsigned>(average.blocks)), INT8_BLOCK, 0, stream, average);
}
