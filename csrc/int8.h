// The noise of stochastic rounding, for CPU, CUDA and the emulator. scao_hf/quantization.py has the same in torch
// operations: one seed gives one noise everywhere.
#pragma once

#include "storage.h"

namespace scao {

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

// Bijective mixing of 32 bits (lowbias32 by Chris Wellons, public domain).
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

}  // namespace scao
