// What the CUDA launchers take and the glue calls: plain pointers and numbers.
#pragma once

#include "cpu_kernels.h"

namespace scao {
namespace cuda {

constexpr int THREADS = 128;
constexpr int TILE = 32;         // columns in shared memory at once
constexpr int BASIS_ROW = TILE + 1;  // of U^T in shared memory: neither rows nor columns share a bank
constexpr int CHUNK = 512;       // columns of one block
constexpr int LARGEST = 64;      // of r and of k: 48 KB of static shared memory hold no more
constexpr int BATCH = 48;        // matrices of one launch: the arguments must fit in 4 KB
constexpr int HEADER = 8;        // floats a matrix: scale, bias1, root of bias2, (U14) over the trace, (U14)

struct Batch {
  View grad[BATCH], param[BATCH];
};

// Everything but G and W, of a batch's matrices.
struct State : Fields<int> {
  int chunks, cautious;
  float* scratch;  // scratch_size() floats a matrix
};

}  // namespace cuda
}  // namespace scao

extern "C" {
// Floats of scratch that one matrix of a batch needs.
long scao_cuda_scratch(int r, int l, int k);
int scao_cuda_eigenbasis(const scao::View* grads, const scao::View* params, int matrices, scao::cuda::State state,
                         scao::Numbers numbers, void* stream);
// Whether the current device's driver can load these kernels: 0 or a CUDA error, found without a launch.
int scao_cuda_probe();
int scao_cuda_int8_ema(signed char* codes, float* scales, const float* values, const float* weights, long numel,
                       long blocks_per_matrix, long blocks, unsigned seed_key, void* stream);
}
