// What the CPU kernels take: plain pointers and numbers, no torch header. The files of the kernels are compiled once for each
// instruction set with another SCAO_ISA; cpu.cpp picks one table when it is loaded.
#pragma once

#include "state.h"

namespace scao {

// A gradient or a parameter as an [r, l] matrix; strides in elements. Either stride may be the contiguous one.
struct View {
  void* data;
  long row_stride;
  long col_stride;
  Dtype dtype;
};

struct Numbers {
  double lr, beta1, beta2, eps, weight_decay, rho;
};

// One matrix in phase 1, or one vector ([1, numel], no factor). exp_avg and exp_avg_sq are contiguous [r, l].
struct AdamwTask {
  View grad, param;
  float *exp_avg, *exp_avg_sq;
  float* factor;  // [r, r], or null
  float *taken, *level;
  long r, l;
};

// One matrix in phase 2.
struct EigenbasisTask : Fields<long> {
  View grad, param;
  bool cautious;
};

// Inner products of the rows of [U^T; M], both halves.
struct GramTask {
  const float* exp_avg;      // [r, l]
  const void* long_vectors;  // [k, l]
  Dtype long_dtype;
  float* gram;  // [k + r, k + r]
  long r, l, k;
};

// (U15) of scao_hf/rules/eigenbasis_refresh.py (`rotate`), where the names are explained.
struct RotateTask {
  float* exp_avg;      // [r, l]
  void* long_vectors;  // [k, l]
  Dtype long_dtype;
  const float *row, *col, *coefficients, *plain_row, *inside_sq, *bias1, *bias2, *finite;
  float* norms;  // [2]
  float eps;
  long r, l, k;
};

// A refresh but for the long side; names as in scao_hf/rules/eigenbasis_refresh.py, every field a stack. A matrix whose gradient
// was not finite, or whose decompositions fail, stays as it is.
struct RefreshTask : Fields<long> {
  const float *gram, *finite;
  // What rotate takes; of these `refreshed` is 1 for what is to be rotated. inside_norm: squared norm of the kept part's step.
  float *coefficients, *plain_row, *mean_square, *bias1, *bias2, *refreshed, *inside_norm;
  float* failed;  // 1 where the decompositions failed
  double beta1, beta2, rho;
  float eps, decay, epsilon_sparse;
  long k_min, k_max;
};

// Eigendecompositions of symmetric matrices; NaN where one is not finite or does not converge.
struct EighTask {
  const float* matrices;  // [N, n, n]
  float* values;          // [N, n], rising
  float* vectors;         // [N, n, n]
  long n;
};

struct Kernels {
  const char* isa;
  // Scratch bytes that one call needs; the caller allocates once per thread.
  unsigned long (*adamw_scratch)(long r, long l);
  void (*adamw)(const AdamwTask&, const Numbers&, void* scratch);
  unsigned long (*eigenbasis_scratch)(long r, long l, long k);
  void (*eigenbasis)(const EigenbasisTask&, const Numbers&, void* scratch);
  unsigned long (*gram_scratch)(long r, long l, long k);
  void (*gram)(const GramTask&, void* scratch);
  unsigned long (*rotate_scratch)(long r, long l, long k);
  void (*rotate)(const RotateTask&, void* scratch);
  long lanes;  // matrices that are decomposed together
  unsigned long (*bases_scratch)(long r, long k);
  void (*bases)(const RefreshTask&, long first, long last, void* scratch);  // of at most `lanes` matrices
  unsigned long (*eigh_scratch)(long n);
  void (*eigh)(const EighTask&, long first, long last, void* scratch);  // of matrices [first, last)
  // Blocks [first, last) of an int8 EMA: see int8.h. values holds numel entries for each of the matrices.
  void (*int8_ema)(signed char* codes, float* scales, const float* values, const float* weights, long numel,
                   long blocks_per_matrix, unsigned seed_key, long first, long last);
};

namespace base { extern const Kernels kernels; }
namespace v3 { extern const Kernels kernels; }
namespace v4 { extern const Kernels kernels; }

}  // namespace scao
