// The state of matrices in phase 2, for the kernels of every device: pointers to the first of a stack of matrices.
#pragma once

#include "int8.h"

// What the operations take; as in scao_hf/ops.py, which refuses a library that was built from other sources.
#define SCAO_INTERFACE 4

namespace scao {

constexpr float LARGEST_GRADIENT = 1e15f, LARGEST_JUMP = 10.0f, LEVEL_DECAY = 0.95f;  // (U3), as in scao_hf/rules/base.py
constexpr float DAMPING = 1e-3f;  // (U14), as in scao_hf/rules/eigenbasis.py

// (U3): the largest magnitude that a gradient may have at a level, and the level after one of that magnitude.
SCAO_HD static inline float limit_of(float level) {
  return level > 0 && level * LARGEST_JUMP < LARGEST_GRADIENT ? level * LARGEST_JUMP : LARGEST_GRADIENT;
}

SCAO_HD static inline float level_after(float level, float magnitude) {
  const float limit = limit_of(level), bounded = magnitude > limit ? limit : magnitude, faded = level * LEVEL_DECAY;
  return magnitude > 0 ? (bounded > faded ? bounded : faded) : level;
}

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
