// What the CUDA kernels, their launchers and the glue share: stored numbers, noise, the state of a stack of matrices.
#pragma once

#ifdef __CUDACC__
#define SCAO_HD __host__ __device__
#else
#define SCAO_HD
#endif

// What the operations take; as in scao_hf/ops.py, which refuses a library that was built from other sources.
#define SCAO_INTERFACE 5

namespace scao {

enum Dtype { F32, BF16, F16 };

constexpr unsigned NOT_FINITE = 0x7f800000u;  // bits of Inf, below those of NaN
constexpr float TINY = 1.17549435e-38f;

SCAO_HD static inline unsigned bits_of(float f) {
  unsigned u;
  __builtin_memcpy(&u, &f, 4);
  return u;
}

SCAO_HD static inline float float_of(unsigned u) {
  float f;
  __builtin_memcpy(&f, &u, 4);
  return f;
}

SCAO_HD static inline float bf16_to_float(unsigned short h) { return float_of(static_cast<unsigned>(h) << 16); }

SCAO_HD static inline unsigned short float_to_bf16(float f) {  // to nearest even, as torch rounds
  const unsigned u = bits_of(f);
  if ((u & 0x7fffffffu) > NOT_FINITE) return 0x7fc0;
  return static_cast<unsigned short>((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
}

#ifndef __CUDACC__  // launch.cu has CUDA's own
static inline float half_to_float(unsigned short h) {
  _Float16 x;
  __builtin_memcpy(&x, &h, 2);
  return static_cast<float>(x);
}

static inline unsigned short float_to_half(float f) {
  const _Float16 x = static_cast<_Float16>(f);
  unsigned short h;
  __builtin_memcpy(&h, &x, 2);
  return h;
}
#endif

constexpr int INT8_BLOCK = 128;
constexpr float INT8_LEVELS = 127.0f;

// Averages in blocks of int8 and what goes into them: numel values and one weight for each matrix.
struct Int8Average {
  signed char* codes;  // [blocks, INT8_BLOCK]
  float* scales;       // [blocks]
  const float *values, *weights;
  long numel, blocks_per_matrix, blocks;
  unsigned seed_key;
};

// The noise of stochastic rounding, for which scao_hf/quantization.py has the same in torch operations: one seed gives one
// noise everywhere. Bijective mixing of 32 bits (lowbias32 by Chris Wellons, public domain).
SCAO_HD static inline unsigned mix32(unsigned x) {
  x ^= x >> 16;
  x *= 0x7feb352du;
  x ^= x >> 15;
  x *= 0x846ca68bu;
  x ^= x >> 16;
  return x;
}

SCAO_HD static inline unsigned block_key(unsigned seed_key, unsigned block) { return mix32(block ^ seed_key); }

// Uniform in [0, 1) with 24 bits.
SCAO_HD static inline float uniform(unsigned key, unsigned lane) {
  return static_cast<float>(static_cast<int>(mix32(key + lane * 0x9e3779b9u) >> 8)) * 0x1p-24f;
}

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

constexpr int TILE = 32;     // columns in shared memory at once: as many as a warp has threads
constexpr int CHUNK = 512;   // columns of one block
constexpr int LARGEST = 64;  // of r and of k: 60 KB of shared memory, of which a T4 has 64
constexpr int BATCH = 504;   // matrices of one launch: its arguments must fit in 32,764 bytes
constexpr int HEADER = 8;    // floats a matrix: scale, bias1, root of bias2, (U14) over the trace, (U14)

struct Batch {
  View grad[BATCH], param[BATCH];
};

// Name and entries a matrix, in the order of scao_hf/rules/eigenbasis.py (`native_fields`), where they are explained. After them
// come long_vectors, U^T in float32 or bfloat16, and of experts activity (X3).
#define SCAO_FIELDS(FIELD)                                                                                             \
  FIELD(taken, 1) FIELD(level, 1) FIELD(exp_avg, r * l) FIELD(factor, r * r) FIELD(inside_avg, r * k)                  \
  FIELD(inside_sq, r * k) FIELD(row, r) FIELD(col, l) FIELD(vectors, r * r) FIELD(mask, k) FIELD(gain, 1)              \
  FIELD(agreement, 1)

// Everything but G and W, of a batch's matrices: pointers to the first. In phase 1 k is 0, and of the fields there are taken,
// level, exp_avg and, of matrices, factor; the others are null.
struct State {
#define SCAO_POINTER(name, entries) float* name;
  SCAO_FIELDS(SCAO_POINTER)
#undef SCAO_POINTER
  void* long_vectors;
  float* activity;  // [2] a matrix, or null
  Dtype long_dtype;
  int r, l, k;
  float* exp_avg_sq;  // [r, l] in phase 1, else null
  int chunks, cautious;
  float blend;     // the step's weight in the ramp (U9), 1 after it
  float* scratch;  // scao_cuda_scratch() floats a matrix

  // Moves on by so many matrices; what is null stays so.
  void skip(long matrices) {
    const long r = this->r, l = this->l, k = this->k;
#define SCAO_SKIP(name, entries) if (name) name += matrices * (entries);
    SCAO_FIELDS(SCAO_SKIP)
#undef SCAO_SKIP
    if (long_vectors) long_vectors = static_cast<char*>(long_vectors) + matrices * k * l * (long_dtype == F32 ? 4 : 2);
    if (activity) activity += 2 * matrices;
    if (exp_avg_sq) exp_avg_sq += matrices * r * l;
  }
};

}  // namespace scao

extern "C" {
// Floats of scratch that one matrix of a batch needs.
long scao_cuda_scratch(int r, int l, int k);
// A step of phase 1 or 2: 0 or a CUDA error.
int scao_cuda_step(const scao::View* grads, const scao::View* params, int matrices, scao::State state, scao::Numbers numbers,
                   void* stream);
// Whether the current device's driver can load these kernels: 0 or a CUDA error, found without a launch.
int scao_cuda_probe();
int scao_cuda_int8_ema(scao::Int8Average average, void* stream);
}
