// What the CUDA launchers take and the glue calls: plain pointers and numbers.
#pragma once

#include "cpu_kernels.h"

namespace scao {
namespace cuda {

constexpr int TILE = 32;    // columns in shared memory at once: as many as a warp has threads
constexpr int CHUNK = 512;  // columns of one block
constexpr int LARGEST = 64;  // of r and of k: 60 KB of shared memory, of which a T4 has 64
constexpr int BATCH = 504;   // matrices of one launch: its arguments must fit in 32,764 bytes
constexpr int HEADER = 8;    // floats a matrix: scale, bias1, root of bias2, (U14) over the trace, (U14)

struct Batch {
  View grad[BATCH], param[BATCH];
};

// Everything but G and W, of a batch's matrices. In phase 1 k is 0, and of the fields there are taken, level, exp_avg and, of
// matrices, factor; the others are null.
struct State : Fields<int> {
  float* exp_avg_sq;  // [r, l] in phase 1, else null
  int chunks, cautious;
  float blend;  // the step's weight in the ramp (U9), 1 after it
  float* scratch;  // scratch_size() floats a matrix
};

}  // namespace cuda
}  // namespace scao

extern "C" {
// Floats of scratch that one matrix of a batch needs.
long scao_cuda_scratch(int r, int l, int k);
// A step of phase 1 or 2: 0 or a CUDA error.
int scao_cuda_step(const scao::View* grads, const scao::View* params, int matrices, scao::cuda::State state,
                   scao::Numbers numbers, void* stream);
// Whether the current device's driver can load these kernels: 0 or a CUDA error, found without a launch.
int scao_cuda_probe();
int scao_cuda_int8_ema(scao::Int8Average average, void* stream);
}
