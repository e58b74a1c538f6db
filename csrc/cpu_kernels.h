// The CPU kernels and what they take: plain pointers and numbers, no torch header.
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

// Eigendecompositions of symmetric matrices; NaN where one is not finite or does not converge.
struct EighTask {
  const float* matrices;  // [N, n, n]
  float* values;          // [N, n], rising
  float* vectors;         // [N, n, n]
  long n;
};

// Each takes scratch of so many bytes, which the caller allocates once per thread.
unsigned long adamw_scratch(long r, long l);
void adamw(const AdamwTask&, const Numbers&, void* scratch);
unsigned long eigenbasis_scratch(long r, long l, long k);
void eigenbasis(const EigenbasisTask&, const Numbers&, void* scratch);
extern const long lanes;  // matrices that are decomposed together
unsigned long eigh_scratch(long n);
void eigh(const EighTask&, long first, long last, void* scratch);  // of matrices [first, last), `lanes` at most
void int8_ema(const Int8Average&, long first, long last);  // of blocks [first, last)

}  // namespace scao
