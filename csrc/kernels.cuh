// CUDA kernels: plain CUDA C++, no torch header, no CUDA library. The same text is compiled by nvcc and, through
// emulator/cuda_emulator.h, by g++ for tests without a GPU.
//
// A step of a bucket in phase 2 is five launches, one of phase 1 the first two and adamw. Blocks work on one matrix and
// CHUNK of its columns:
//   project   reads G and U, leaves per-chunk sums of G G^T and of Q^T G U and the largest magnitude
//   settle    one block a matrix: (U3), (E1), the kept part's moments, Q and Q K scaled for the last launch
//   adamw     phase 1: reads G, moments and the parameter and writes the latter two
//   residual  reads G, U and the momentum: the residual, its momentum, col, per-chunk sums for row
//   apply     reads the momentum and U, writes the parameter; in the ramp the step is mixed with AdamW's (U9)
//   finish    stores row and the agreement
// Sums over chunks are added in a fixed order, so results are reproducible.
#pragma once

#include "state.h"

#ifdef SCAO_EMULATE
#include "emulator/cuda_emulator.h"
#endif

// Barriers are numbered: the emulator's tests leave one out at a time to show that its absence is noticed.
#ifndef SCAO_SYNC
#define SCAO_SYNC(id) __syncthreads()
#endif

namespace scao {

#ifdef SCAO_EMULATE
using Floats = emulator::Shared;  // counts bank conflicts, and knows its end
#define SCAO_SHARED const Floats shared = emulator::shared
#define SCAO_BATCH const Batch&
#define SCAO_ROLLED
#else
using Floats = float*;  // in shared memory
#define SCAO_SHARED extern __shared__ float shared[]
#define SCAO_BATCH const __grid_constant__ Batch
#define SCAO_ROLLED _Pragma("unroll 1")  // a loop of the ramp alone, whose unrolling takes registers in every step
#endif

SCAO_HD inline long scratch_size(int r, int l, int k) {
  const int chunks = (l + CHUNK - 1) / CHUNK;
  return HEADER + 3 * r * k + r * r + static_cast<long>(chunks) * (r * r + r * k + 1) + chunks * (r + 4L) + (k ? l : 0);
}

SCAO_HD inline int threads_of(int r) { return r <= 16 ? 128 : 256; }

// Rows in shared memory are padded so that a warp's accesses spread over the 32 banks: of a tile along columns, along rows,
// and, for r below 32, along the columns of several rows; of what is walked along rows alone, an odd number.
SCAO_HD inline int tile_row(int r) { return TILE + (r < TILE ? TILE / r : 1); }
SCAO_HD inline int odd(int columns) { return columns | 1; }

// Shared memory of a block, in floats; k is 0 in phase 1. Sums over threads take two floats each.
SCAO_HD inline int shared_size(int r, int k) {
  const int tile = r * tile_row(r), least = 2 * threads_of(r);
  const int all = k ? 2 * tile + k * odd(TILE) + r * odd(r) + r * odd(k) + 2 * r + k : tile;
  return all > least ? all : least;
}

struct Shared {
  Floats tile, rotated;  // [r][tile_row]
  Floats basis;          // [k][odd(TILE)]
  Floats square;         // [r][odd(r)]
  Floats kept;           // [r][odd(k)]
  Floats roots;          // [2][r]: of row, and of AdamW's
  Floats inside;         // [k]: mean of inside_sq over the rows
};

__device__ inline Shared parts_of(Floats shared, int r, int k) {
  Shared x;
  x.tile = shared;
  x.rotated = x.tile + r * tile_row(r);
  x.basis = x.rotated + r * tile_row(r);
  x.square = x.basis + k * odd(TILE);
  x.kept = x.square + r * odd(r);
  x.roots = x.kept + r * odd(k);
  x.inside = x.roots + 2 * r;
  return x;
}

// Where the parts of a matrix's scratch lie.
struct Scratch {
  float *header, *kept, *mixed, *lift, *scaled, *partial, *largest, *rows, *cols, *agreed, *counted, *plain_cols, *plain_col;
};

__device__ inline Scratch scratch_of(const State& s, int matrix) {
  float* at = s.scratch + matrix * scratch_size(s.r, s.l, s.k);
  Scratch x;
  x.header = at;
  x.kept = x.header + HEADER;             // P, [r][k]
  x.mixed = x.kept + s.r * s.k;           // gain Q K, [r][k]
  x.lift = x.mixed + s.r * s.k;           // Q times the kept part's momentum, [r][k]
  x.scaled = x.lift + s.r * s.k;          // gain Q, [r][r]
  x.partial = x.scaled + s.r * s.r;       // chunk after chunk: G G^T, then Q^T G U
  x.largest = x.partial + static_cast<long>(s.chunks) * (s.r * s.r + s.r * s.k);  // of the magnitudes, NaN above Inf
  x.rows = x.largest + s.chunks;          // [chunks][r]
  x.cols = x.rows + s.chunks * s.r;       // [chunks]
  x.agreed = x.cols + s.chunks;           // [chunks]: entries of the step that agree with the gradient (U16)
  x.counted = x.agreed + s.chunks;        // [chunks]: of how many that have one
  x.plain_cols = x.counted + s.chunks;    // [chunks], as cols, of AdamW's second moment
  x.plain_col = x.plain_cols + s.chunks;  // [l]
  return x;
}

// Of magnitudes, NaN being the largest.
__device__ inline float larger(float a, float b) { return bits_of(a) > bits_of(b) ? a : b; }


// x within 1, (U10).
__device__ inline float bounded(float x) { return x > 1 ? 1.0f : x < -1 ? -1.0f : x; }

__device__ inline float read(const void* data, Dtype dtype, long at) {
  if (dtype == F32) return static_cast<const float*>(data)[at];
  if (dtype == BF16) return bf16_to_float(static_cast<const unsigned short*>(data)[at]);
  return half_to_float(static_cast<const unsigned short*>(data)[at]);
}

__device__ inline void write(void* data, Dtype dtype, long at, float x) {
  if (dtype == F32) {
    static_cast<float*>(data)[at] = x;
  } else if (dtype == BF16) {
    static_cast<unsigned short*>(data)[at] = float_to_bf16(x);
  } else {
    static_cast<unsigned short*>(data)[at] = float_to_half(x);
  }
}

// [rows][columns] into shared memory, `row` floats a row.
__device__ inline void load(const float* from, int rows, int columns, int row, Floats to) {
  for (int at = threadIdx.x; at < rows * columns; at += blockDim.x) to[at / columns * row + at % columns] = from[at];
}

// One tile of G, zero beyond the matrix; threads run along the contiguous side.
__device__ inline void load_gradient(const View& g, int r, int first, int width, float scale, Floats tile) {
  for (int at = threadIdx.x; at < r * TILE; at += blockDim.x) {
    const int i = g.col_stride == 1 ? at / TILE : at % r, c = g.col_stride == 1 ? at % TILE : at / r;
    const long from = i * g.row_stride + (first + c) * g.col_stride;
    tile[i * tile_row(r) + c] = c < width ? read(g.data, g.dtype, from) * scale : 0.0f;
  }
}

// One tile of U^T, zero beyond the matrix.
__device__ inline void load_basis(const State& s, int matrix, int first, int width, Floats tile) {
  const long from = static_cast<long>(matrix) * s.l * s.k + first;
  for (int at = threadIdx.x; at < TILE * s.k; at += blockDim.x) {
    const int m = at / TILE, j = at % TILE;
    tile[m * odd(TILE) + j] = j < width ? read(s.long_vectors, s.long_dtype, from + static_cast<long>(m) * s.l + j) : 0.0f;
  }
}

// Sums of one chunk; returns the largest magnitude that this thread has seen.
__device__ inline float project_chunk(const State& s, const View& grad, int matrix, int chunk, float scale, const Shared& x,
                                      float* partial) {
  const int r = s.r, k = s.k, row = tile_row(r), start = chunk * CHUNK, end = start + CHUNK < s.l ? start + CHUNK : s.l;
  float most = 0;
  if (!s.factor) {  // a vector
    for (int c = start + threadIdx.x; c < end; c += blockDim.x) most = larger(most, fabsf(read(grad.data, grad.dtype, c)));
    return most;
  }
  const int total = r * r + r * k;
  float* sums = partial + static_cast<long>(chunk) * total;
  for (int at = threadIdx.x; at < total; at += blockDim.x) sums[at] = 0;
  for (int c = start; c < end; c += TILE) {
    const int width = c + TILE < end ? TILE : end - c;
    load_gradient(grad, r, c, width, scale, x.tile);
    load_basis(s, matrix, c, width, x.basis);
    SCAO_SYNC(1);
    for (int at = threadIdx.x; at < r * TILE; at += blockDim.x) {
      const int i = at / TILE, j = at % TILE;
      most = larger(most, fabsf(x.tile[i * row + j]));
      if (k) {
        float sum = 0;
        for (int d = 0; d < r; d++) sum += x.square[d * odd(r) + i] * x.tile[d * row + j];
        x.rotated[i * row + j] = sum;  // Q^T G
      }
    }
    SCAO_SYNC(2);
    for (int at = threadIdx.x; at < total; at += blockDim.x) {
      const bool outer = at < r * r;
      const int entry = outer ? at : at - r * r, i = entry / (outer ? r : k), m = entry % (outer ? r : k);
      const Floats a = (outer ? x.tile : x.rotated) + i * row;
      const Floats b = outer ? x.tile + m * row : x.basis + m * odd(TILE);
      float sum = sums[at];
      for (int j = 0; j < TILE; j++) sum += a[j] * b[j];
      sums[at] = sum;
    }
    SCAO_SYNC(3);
  }
  return most;
}

// The largest of a block's magnitudes, for thread 0.
__device__ inline float largest_of(float most, Floats shared) {
  shared[threadIdx.x] = most;
  SCAO_SYNC(4);
  for (int i = 1; threadIdx.x == 0 && i < static_cast<int>(blockDim.x); i++) most = larger(most, shared[i]);
  return most;
}

__global__ void project(SCAO_BATCH batch, State s) {
  SCAO_SHARED;
  const int matrix = blockIdx.y, chunk = blockIdx.x;
  const Shared part = parts_of(shared, s.r, s.k);
  const Scratch x = scratch_of(s, matrix);
  // Q is first read behind a barrier of project_chunk.
  if (s.k) load(s.vectors + matrix * s.r * s.r, s.r, s.r, odd(s.r), part.square);
  const float most = largest_of(project_chunk(s, batch.grad[matrix], matrix, chunk, 1.0f, part, x.partial), shared);
  if (threadIdx.x == 0) x.largest[chunk] = most;
}

__global__ void settle(SCAO_BATCH batch, State s, Numbers n) {
  SCAO_SHARED;
  __shared__ float shared_scale;
  const int matrix = blockIdx.x, r = s.r, k = s.k, total = r * r + r * k;
  const Shared part = parts_of(shared, r, k);
  const Scratch x = scratch_of(s, matrix);
  float most = 0;
  for (int c = threadIdx.x; c < s.chunks; c += blockDim.x) most = larger(most, x.largest[c]);
  most = largest_of(most, shared);
  if (threadIdx.x == 0) {
    const bool finite = bits_of(most) < NOT_FINITE;
    const float limit = limit_of(s.level[matrix]);
    shared_scale = !finite ? 0.0f : most > limit ? limit / most : 1.0f;
    x.header[0] = shared_scale;
    if (finite) {
      s.level[matrix] = level_after(s.level[matrix], most);
      const double count = static_cast<double>(s.taken[matrix]) + 1;
      s.taken[matrix] = static_cast<float>(count);
      x.header[1] = static_cast<float>(1 - pow(n.beta1, count));
      const float bias2 = static_cast<float>(1 - pow(n.beta2, count));
      x.header[2] = sqrtf(bias2);
      const float* activity = s.activity ? s.activity + 2 * matrix : nullptr;
      const double averaged = activity ? activity[0] : count;
      const float held = averaged > 0 ? static_cast<float>(1 - pow(n.rho, averaged)) : 1.0f;
      x.header[3] = DAMPING * (activity ? activity[1] : bias2) / ((held > 1e-30f ? held : 1e-30f) * s.l);  // (U14) over tr(L)
    }
  }
  SCAO_SYNC(5);
  // Not finite: the whole block leaves, and so do the launches after this one.
  if (shared_scale == 0.0f || !s.factor) return;
  if (k) load(s.vectors + matrix * r * r, r, r, odd(r), part.square);  // first read behind a barrier below
  if (shared_scale != 1.0f) {
    for (int c = 0; c < s.chunks; c++) project_chunk(s, batch.grad[matrix], matrix, c, shared_scale, part, x.partial);
  }
  const float outer = static_cast<float>(1 - n.rho);
  const auto total_of = [&](int at) {
    float sum = 0;
    for (int c = 0; c < s.chunks; c++) sum += x.partial[static_cast<long>(c) * total + at];
    return sum;
  };
  for (int at = threadIdx.x; at < r * r; at += blockDim.x) {
    float& factor = s.factor[matrix * r * r + at];
    factor += outer * (total_of(at) - factor);
  }
  if (!k) return;
  SCAO_SYNC(6);
  const float first = static_cast<float>(1 - n.beta1), second = static_cast<float>(1 - n.beta2);
  const float bias1 = x.header[1], root2 = x.header[2], eps = static_cast<float>(n.eps), gain = s.gain[matrix];
  float trace = 0;
  for (int i = 0; i < r; i++) trace += s.factor[matrix * r * r + i * r + i];
  const float damping = x.header[3] * trace;
  if (threadIdx.x == 0) x.header[4] = damping;
  for (int entry = threadIdx.x; entry < r * k; entry += blockDim.x) {
    const int i = entry / k, m = entry % k;
    const float p = total_of(r * r + entry) * s.mask[matrix * k + m];
    float &mean = s.inside_avg[matrix * r * k + entry], &variance = s.inside_sq[matrix * r * k + entry];
    mean += first * (p - mean);
    variance += second * (p * p - variance);
    x.kept[entry] = p;
    part.kept[i * odd(k) + m] = bounded(mean / bias1 / (sqrtf(variance + damping) / root2 + eps));  // K
  }
  SCAO_SYNC(7);
  for (int at = threadIdx.x; at < r * r; at += blockDim.x) x.scaled[at] = gain * part.square[at / r * odd(r) + at % r];
  for (int entry = threadIdx.x; entry < r * k; entry += blockDim.x) {
    const int i = entry / k, m = entry % k;
    float sum = 0, lift = 0;
    for (int j = 0; j < r; j++) {
      const float q = part.square[i * odd(r) + j];
      sum += q * part.kept[j * odd(k) + m];
      lift += q * s.inside_avg[matrix * r * k + j * k + m];
    }
    x.mixed[entry] = gain * sum;
    x.lift[entry] = lift;
  }
}

// AdamW's step (U4, U6) of entries [i][j] of a matrix, which changes their moments.
struct Adam {
  float *means, *squares;  // [r][l]
  float first, second, mean_scale, root_scale, eps, keep, lr;

  __device__ float direction(long at, float grad) const {
    float &mean = means[at], &square = squares[at];
    mean += first * (grad - mean);
    square += second * (grad * grad - square);
    return mean * mean_scale / (sqrtf(square) * root_scale + eps);
  }

  __device__ void apply(const View& w, long to, float delta) const {
    write(w.data, w.dtype, to, read(w.data, w.dtype, to) * keep - lr * delta);
  }
};

__global__ void adamw(SCAO_BATCH batch, State s, Numbers n) {
  SCAO_SHARED;
  const int matrix = blockIdx.y, chunk = blockIdx.x, r = s.r, row = tile_row(r);
  const Scratch x = scratch_of(s, matrix);
  const float scale = x.header[0];
  if (scale == 0.0f) return;
  const int start = chunk * CHUNK, end = start + CHUNK < s.l ? start + CHUNK : s.l;
  const View &w = batch.param[matrix], &g = batch.grad[matrix];
  const long before = static_cast<long>(matrix) * r * s.l;
  const Adam adam{s.exp_avg + before, s.exp_avg_sq + before, static_cast<float>(1 - n.beta1),
                  static_cast<float>(1 - n.beta2), 1 / x.header[1], 1 / x.header[2], static_cast<float>(n.eps),
                  static_cast<float>(1 - n.lr * n.weight_decay), static_cast<float>(n.lr)};
  if (!s.factor) {  // a vector
    for (int c = start + threadIdx.x; c < end; c += blockDim.x) {
      adam.apply(w, c, adam.direction(c, read(g.data, g.dtype, c) * scale));
    }
    return;
  }
  for (int c = start; c < end; c += TILE) {
    const int width = c + TILE < end ? TILE : end - c;
    load_gradient(g, r, c, width, scale, shared);
    SCAO_SYNC(8);
    for (int at = threadIdx.x; at < r * width; at += blockDim.x) {
      const int i = at / width, j = at % width;
      const float grad = shared[i * row + j];
      shared[i * row + j] = adam.direction(static_cast<long>(i) * s.l + c + j, grad);
    }
    SCAO_SYNC(9);
    for (int at = threadIdx.x; at < r * width; at += blockDim.x) {
      const int i = w.col_stride == 1 ? at / width : at % r, j = w.col_stride == 1 ? at % width : at / r;
      adam.apply(w, i * w.row_stride + (c + j) * w.col_stride, shared[i * row + j]);
    }
    SCAO_SYNC(10);
  }
}

__global__ void residual(SCAO_BATCH batch, State s, Numbers n) {
  SCAO_SHARED;
  const int matrix = blockIdx.y, chunk = blockIdx.x, r = s.r, k = s.k, row = tile_row(r), thread = threadIdx.x;
  const Shared part = parts_of(shared, r, k);
  const Scratch x = scratch_of(s, matrix);
  const float scale = x.header[0];
  if (scale == 0.0f) return;
  const int start = chunk * CHUNK, end = start + CHUNK < s.l ? start + CHUNK : s.l;
  const float first = static_cast<float>(1 - n.beta1), second = static_cast<float>(1 - n.beta2);
  load(s.vectors + matrix * r * r, r, r, odd(r), part.square);
  load(x.kept, r, k, odd(k), part.kept);
  const bool ramp = s.blend < 1;
  for (int m = thread; ramp && m < k; m += blockDim.x) {
    float sum = 0;
    SCAO_ROLLED for (int i = 0; i < r; i++) sum += s.inside_sq[(matrix * r + i) * k + m];
    part.inside[m] = sum / r;
  }
  float row_sum = 0, col_sum = 0, plain_sum = 0;  // of row `thread`; of every TILE-th column
  for (int c = start; c < end; c += TILE) {
    const int width = c + TILE < end ? TILE : end - c;
    load_gradient(batch.grad[matrix], r, c, width, scale, part.tile);
    load_basis(s, matrix, c, width, part.basis);
    SCAO_SYNC(11);
    for (int at = thread; at < r * TILE; at += blockDim.x) {
      const int i = at / TILE, j = at % TILE;
      float sum = 0, inside = 0;
      for (int d = 0; d < r; d++) sum += part.square[d * odd(r) + i] * part.tile[d * row + j];
      for (int d = 0; d < k; d++) inside += part.kept[i * odd(k) + d] * part.basis[d * odd(TILE) + j];
      part.rotated[i * row + j] = sum - inside;
      if (j < width) {
        float& mean = s.exp_avg[(static_cast<long>(matrix) * r + i) * s.l + c + j];
        mean += first * (sum - inside - mean);
      }
    }
    float within = 0;  // what AdamW's second moment has of column `thread` - LARGEST besides col
    if (ramp && thread >= LARGEST && thread < LARGEST + width) {
      SCAO_ROLLED for (int m = 0; m < k; m++) {
        const float u = part.basis[m * odd(TILE) + thread - LARGEST];
        within += part.inside[m] * u * u;
      }
    }
    SCAO_SYNC(12);
    // The next tile is loaded meanwhile; `rotated` is written behind the barrier after that.
    if (thread < r) {
      for (int j = 0; j < TILE; j++) {
        const float entry = part.rotated[thread * row + j];
        row_sum += entry * entry;
      }
    } else if (thread - LARGEST >= 0 && thread - LARGEST < width) {
      const int j = thread - LARGEST;
      float sum = 0;
      for (int i = 0; i < r; i++) {
        const float entry = part.rotated[i * row + j];
        sum += entry * entry;
      }
      float& col = s.col[static_cast<long>(matrix) * s.l + c + j];
      col += second * (sum / r - col);
      col_sum += col;
      if (ramp) x.plain_col[c + j] = col + within;
      plain_sum += col + within;
    }
  }
  if (thread < r) x.rows[chunk * r + thread] = row_sum;
  if (thread >= LARGEST && thread < LARGEST + TILE) {
    part.tile[thread - LARGEST] = col_sum;
    part.tile[thread - LARGEST + TILE] = plain_sum;
  }
  SCAO_SYNC(13);
  if (thread < 2) {
    float sum = 0;
    for (int j = 0; j < TILE; j++) sum += part.tile[thread * TILE + j];
    (thread ? x.plain_cols : x.cols)[chunk] = sum;
  }
}

__global__ void apply(SCAO_BATCH batch, State s, Numbers n) {
  SCAO_SHARED;
  __shared__ float col_means[2];  // of col, and of AdamW's
  const int matrix = blockIdx.y, chunk = blockIdx.x, r = s.r, k = s.k, row = tile_row(r), thread = threadIdx.x;
  const Shared part = parts_of(shared, r, k);
  const Scratch x = scratch_of(s, matrix);
  if (x.header[0] == 0.0f) return;
  const bool ramp = s.blend < 1;
  const int start = chunk * CHUNK, end = start + CHUNK < s.l ? start + CHUNK : s.l;
  const float second = static_cast<float>(1 - n.beta2), eps = static_cast<float>(n.eps);
  const float mean_scale = 1 / x.header[1], root2 = x.header[2];
  const float keep = static_cast<float>(1 - n.lr * n.weight_decay);
  if (thread < r) {
    // Every block works the new row out for itself; `finish` stores it when all have read the old one.
    float sum = 0;
    for (int c = 0; c < s.chunks; c++) sum += x.rows[c * r + thread];
    const float old = s.row[matrix * r + thread];
    part.roots[thread] = sqrtf(old + second * (sum / s.l - old) + x.header[4]);
    const float plain = x.header[3] / DAMPING * s.factor[(matrix * r + thread) * r + thread];  // (U12)
    part.roots[r + thread] = sqrtf(plain + x.header[4]);
  }
  if (thread < 2) {
    float sum = 0;
    for (int c = 0; c < s.chunks; c++) sum += (thread ? x.plain_cols : x.cols)[c];
    sum /= s.l;
    col_means[thread] = sum > TINY ? sum : TINY;
  }
  load(x.scaled, r, r, odd(r), part.square);
  load(x.mixed, r, k, odd(k), part.kept);
  SCAO_SYNC(14);
  const View &w = batch.param[matrix], &g = batch.grad[matrix];
  const float least = s.agreement[matrix] > 0.5f ? s.agreement[matrix] : 0.5f;
  const float own = s.blend / (s.cautious ? least : 1.0f), lr = static_cast<float>(n.lr);
  int agrees = 0, counts = 0;
  for (int c = start; c < end; c += TILE) {
    const int width = c + TILE < end ? TILE : end - c;
    load_basis(s, matrix, c, width, part.basis);
    for (int at = thread; at < r * width; at += blockDim.x) {
      const int i = at / width, j = at % width;
      const float mean = s.exp_avg[(static_cast<long>(matrix) * r + i) * s.l + c + j];
      const float col = s.col[static_cast<long>(matrix) * s.l + c + j] / col_means[0] + DAMPING;
      part.tile[i * row + j] = bounded(mean * mean_scale / (part.roots[i] * sqrtf(col) / root2 + eps));
      if (ramp) part.rotated[i * row + j] = mean;
    }
    SCAO_SYNC(15);
    for (int at = thread; at < r * width; at += blockDim.x) {
      const int i = w.col_stride == 1 ? at / width : at % r, j = w.col_stride == 1 ? at % width : at / r;
      float delta = 0;
      for (int d = 0; d < r; d++) delta += part.square[i * odd(r) + d] * part.tile[d * row + j];
      for (int d = 0; d < k; d++) delta += part.kept[i * odd(k) + d] * part.basis[d * odd(TILE) + j];
      if (s.cautious) {
        const float product = delta * read(g.data, g.dtype, i * g.row_stride + (c + j) * g.col_stride);
        const bool agree = product > 0;
        agrees += agree, counts += product != 0;
        delta = agree ? delta : 0.0f;
      }
      delta *= own;
      if (ramp) {  // AdamW's step, of the whole momentum
        float mean = 0;
        for (int d = 0; d < r; d++) mean += part.square[i * odd(r) + d] * part.rotated[d * row + j];
        mean /= s.gain[matrix];
        for (int d = 0; d < k; d++) mean += x.lift[i * k + d] * part.basis[d * odd(TILE) + j];
        const float col = x.plain_col[c + j] / col_means[1] + DAMPING;
        delta += (1 - s.blend) * bounded(mean * mean_scale / (part.roots[r + i] * sqrtf(col) / root2 + eps));
      }
      const long to = i * w.row_stride + (c + j) * w.col_stride;
      write(w.data, w.dtype, to, read(w.data, w.dtype, to) * keep - lr * delta);
    }
    SCAO_SYNC(16);
  }
  shared[thread] = agrees, shared[blockDim.x + thread] = counts;
  SCAO_SYNC(17);
  if (thread < 2) {
    float sum = 0;
    for (int i = 0; i < static_cast<int>(blockDim.x); i++) sum += shared[thread * blockDim.x + i];
    (thread ? x.counted : x.agreed)[chunk] = sum;
  }
}

// row <- (1 - w) row + w mean(R^2), and the share that agreed, once all blocks of `apply` have read the old ones.
__global__ void finish(State s, Numbers n) {
  const int matrix = blockIdx.x;
  const Scratch x = scratch_of(s, matrix);
  if (x.header[0] == 0.0f || static_cast<int>(threadIdx.x) >= s.r) return;
  if (threadIdx.x == 0 && s.cautious) {
    float agreed = 0, counted = 0;
    for (int c = 0; c < s.chunks; c++) agreed += x.agreed[c], counted += x.counted[c];
    if (counted > 0) s.agreement[matrix] = agreed / counted;
  }
  float sum = 0;
  for (int c = 0; c < s.chunks; c++) sum += x.rows[c * s.r + threadIdx.x];
  float& row = s.row[matrix * s.r + threadIdx.x];
  row += static_cast<float>(1 - n.beta2) * (sum / s.l - row);
}

// ---- int8 -----------------------------------------------------------------------------------------------------------

// One block of threads a block of 128 entries; see the CPU kernel.
__global__ void int8_ema(Int8Average average) {
  const auto [codes, scales, values, weights, numel, blocks_per_matrix, blocks, seed_key] = average;
  __shared__ float magnitude[INT8_BLOCK];
  const long block = blockIdx.x, matrix = block / blocks_per_matrix;
  const long start = (block - matrix * blocks_per_matrix) * INT8_BLOCK;
  const int j = threadIdx.x;
  const float weight = weights[matrix];
  if (weight == 0.0f) return;
  float x = static_cast<float>(codes[block * INT8_BLOCK + j]) * scales[block];
  const bool inside = start + j < numel;
  if (inside) {
    const float value = values[matrix * numel + start + j];
    x = weight < 0.5f ? x + weight * (value - x) : value - (value - x) * (1 - weight);
  }
  magnitude[j] = fabsf(x);
  SCAO_SYNC(18);
  for (int step = INT8_BLOCK / 2; step > 0; step /= 2) {
    if (j < step && magnitude[j + step] > magnitude[j]) magnitude[j] = magnitude[j + step];
    SCAO_SYNC(19);
  }
  const float fresh = magnitude[0] / INT8_LEVELS;
  const float inverse = fresh > TINY ? 1 / fresh : 0.0f;
  const float y = x * inverse + uniform(block_key(seed_key, static_cast<unsigned>(block)), j);
  float code = floorf(y);
  code = code > 127 ? 127 : code < -127 ? -127 : code;
  codes[block * INT8_BLOCK + j] = static_cast<signed char>(inside ? code : 0);
  if (j == 0) scales[block] = fresh;
}

}  // namespace scao
