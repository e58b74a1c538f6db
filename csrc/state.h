// The state of matrices in phase 2, for the kernels of every device: pointers to the first of a stack of matrices.
#pragma once

// What the operations take; as in scao_hf/ops.py, which refuses a library that was built from other sources.
#define SCAO_INTERFACE 4

namespace scao {

enum Dtype { F32, BF16, F16 };

// Name and entries a matrix, in the order of scao_hf/rules/eigenbasis.py (`native_fields`), where they are explained. After them
// come long_vectors, U^T in float32 or bfloat16, and of experts activity (X3).
#define SCAO_FIELDS(FIELD)                                                                                             \
  FIELD(taken, 1) FIELD(level, 1) FIELD(exp_avg, r * l) FIELD(factor, r * r) FIELD(inside_avg, r * k)                  \
  FIELD(inside_sq, r * k) FIELD(row, r) FIELD(col, l) FIELD(vectors, r * r) FIELD(mask, k) FIELD(gain, 1)              \
  FIELD(agreement, 1)

// `Index` is int where a device counts in it.
template <class Index>
struct Fields {
#define SCAO_POINTER(name, entries) float* name;
  SCAO_FIELDS(SCAO_POINTER)
#undef SCAO_POINTER
  void* long_vectors;
  float* activity;  // [2] a matrix, or null
  Dtype long_dtype;
  Index r, l, k;

  // Moves on by so many matrices; what is null stays so.
  void skip(long matrices) {
    const long r = this->r, l = this->l, k = this->k;
#define SCAO_SKIP(name, entries) if (name) name += matrices * (entries);
    SCAO_FIELDS(SCAO_SKIP)
#undef SCAO_SKIP
    if (long_vectors) long_vectors = static_cast<char*>(long_vectors) + matrices * k * l * (long_dtype == F32 ? 4 : 2);
    if (activity) activity += 2 * matrices;
  }
};

}  // namespace scao
