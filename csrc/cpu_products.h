// Small products with their sums in registers, Gram matrices, and what is done with them.
#pragma once

#include "cpu_tiles.h"

namespace scao {
namespace {

// A factor of a product: a is [depth][lda] and multiplies b, [depth][ldb].
struct Part {
  const float* a;
  long lda;
  const float* b;
  long ldb;
  long depth;
};

INLINE void add_product(vf (*acc)[COL_BLOCK], const Part& part) {
  const float *a = part.a, *b = part.b;
  for (long j = 0; j < part.depth; j++, a += part.lda, b += part.ldb) {
    vf right[COL_BLOCK];
    UNROLL
    for (int c = 0; c < COL_BLOCK; c++) right[c] = load(b + c * VL);
    UNROLL
    for (int i = 0; i < ROW_BLOCK; i++) {
      const vf left = splat(a[i]);
      UNROLL
      for (int c = 0; c < COL_BLOCK; c++) acc[i][c] += left * right[c];
    }
  }
}

// out(sums) with the sums over both parts of a[j][i] b[j][c] for ROW_BLOCK rows and COLS columns.
template <class Out>
INLINE void product(const Part& first, const Part& second, Out out) {
  vf acc[ROW_BLOCK][COL_BLOCK] = {};
  add_product(acc, first);
  add_product(acc, second);
  out(acc);
}

INLINE void store_block(float* out, long T, const vf (*acc)[COL_BLOCK]) {
  UNROLL
  for (int i = 0; i < ROW_BLOCK; i++) {
    UNROLL
    for (int c = 0; c < COL_BLOCK; c++) store(out + i * T + c * VL, acc[i][c]);
  }
}

// sums += products of four rows of a with four rows of b, lanes still apart: 16 vectors.
INLINE void gram_block(const float* a, long lda, const float* b, long ldb, long width, float* sums) {
  vf acc[4][4];
  UNROLL
  for (int i = 0; i < 4; i++) {
    UNROLL
    for (int j = 0; j < 4; j++) acc[i][j] = load(sums + (i * 4 + j) * VL);
  }
  for (long c = 0; c < width; c += VL) {
    vf left[4], right[4];
    UNROLL
    for (int i = 0; i < 4; i++) left[i] = load(a + i * lda + c);
    UNROLL
    for (int j = 0; j < 4; j++) right[j] = load(b + j * ldb + c);
    UNROLL
    for (int i = 0; i < 4; i++) {
      UNROLL
      for (int j = 0; j < 4; j++) acc[i][j] += left[i] * right[j];
    }
  }
  UNROLL
  for (int i = 0; i < 4; i++) {
    UNROLL
    for (int j = 0; j < 4; j++) store(sums + (i * 4 + j) * VL, acc[i][j]);
  }
}

// G G^T of a tile: blocks of four rows against blocks at or above them.
INLINE void gram(const float* g, long ldg, long rows, long width, float* sums) {
  for (long i = 0; i < rows; i += 4) {
    for (long j = 0; j <= i; j += 4, sums += 16 * VL) gram_block(g + i * ldg, ldg, g + j * ldg, ldg, width, sums);
  }
}

// A B^T of two tiles.
INLINE void cross(const float* a, long lda, long rows_a, const float* b, long ldb, long rows_b, long width, float* sums) {
  for (long i = 0; i < rows_a; i += 4) {
    for (long j = 0; j < rows_b; j += 4, sums += 16 * VL) gram_block(a + i * lda, lda, b + j * ldb, ldb, width, sums);
  }
}

constexpr long gram_size(long rp) { return (rp / 4) * (rp / 4 + 1) / 2 * 16 * VL; }
constexpr long cross_size(long rp, long kp) { return (rp / 4) * (kp / 4) * 16 * VL; }

// Sums over the lanes of VL vectors at p: one vector of sums.
INLINE vf sum_lanes(const float* p) {
  vf x[VL];
  UNROLL
  for (int i = 0; i < VL; i++) x[i] = load(p + i * VL);
  transpose(x);
  UNROLL
  for (int step = VL / 2; step > 0; step /= 2) {
    UNROLL
    for (int i = 0; i < step; i++) x[i] += x[i + step];
  }
  return x[0];
}

// The sixteen sums of a block.
INLINE void block_sums(const float* sums, float* out) {
  for (int part = 0; part < 16; part += VL) store(out + part, sum_lanes(sums + part * VL));
}

// (E1) with the sums of gram().
inline void accumulate(float* factor, long r, const float* sums, float weight) {
  for (long i = 0; i < round_up(r, 4); i += 4) {
    for (long j = 0; j <= i; j += 4, sums += 16 * VL) {
      float outer[16];
      block_sums(sums, outer);
      for (long a = i; a < smaller(i + 4, r); a++) {
        for (long b = j; b < smaller(j + 4, a + 1); b++) {
          const float x = outer[(a - i) * 4 + b - j];
          // Both halves from their own value: a state that was loaded need not be symmetric to the last bit.
          factor[a * r + b] += weight * (x - factor[a * r + b]);
          if (a != b) factor[b * r + a] += weight * (x - factor[b * r + a]);
        }
      }
    }
  }
}

INLINE void clear(float* p, long n) {
  for (long i = 0; i < n; i++) p[i] = 0;
}

// (U5)
INLINE double bias(double beta, double count) { return count > 0 ? 1 - __builtin_pow(beta, count) : 1.0; }

// (U12): what a diagonal entry of L is multiplied by.
INLINE float plain_scale(const float* activity, double rho, double count, float bias2, long l) {
  const float held = static_cast<float>(bias(rho, activity ? activity[0] : count));
  return (activity ? activity[1] : bias2) / ((held > 1e-30f ? held : 1e-30f) * static_cast<float>(l));
}

struct Arena {
  char* at;
  float* take(long floats) {
    float* p = reinterpret_cast<float*>(at);
    at += round_up(floats * 4, 64);
    return p;
  }
};

}  // namespace
}  // namespace scao
