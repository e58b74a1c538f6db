// CUDA kernels: plain CUDA C++, no torch header, no CUDA library. The same text is compiled by nvcc and, through
// emulator/cuda_emulator.h, by g++ for tests without a GPU.
//
// A step of a bucket in phase 2 is five launches; blocks work on one matrix and CHUNK of its columns:
//   project   reads G and U, leaves per-chunk sums of G G^T and of Q^T G U and the largest magnitude
//   settle    one block a matrix: (U3), (E1), the kept part's moments, Q and Q K scaled for the last launch
//   residual  reads G, U and the momentum: the residual, its momentum, col, per-chunk sums for row
//   apply     reads the momentum and U, writes the parameter
//   finish    stores row and the agreement
// Sums over chunks are added in a fixed order, so results are reproducible.
#pragma once

#include "int8.h"
#include "launch.h"

#ifdef SCAO_EMULATE
#include "emulator/cuda_emulator.h"
#endif

// Barriers are numbered: the emulator's tests leave one out at a time to show that its absence is noticed.
#ifndef SCAO_SYNC
#define SCAO_SYNC(id) __syncthreads()
#endif

namespace scao {
namespace cuda {

SCAO_HD inline long scratch_size(int r, int l, int k) {
  const int chunks = (l + CHUNK - 1) / CHUNK;
  return HEADER + 2 * r * k + r * r + static_cast<long>(chunks) * (r * r + r * k + 1) + chunks * (r + 3L);
}

// Where the parts of a matrix's scratch lie.
struct Scratch {
  float *header, *kept, *mixed, *scaled, *partial, *largest, *rows, *cols, *agreed, *counted;
};

__device__ inline Scratch scratch_of(const State& s, int matrix) {
  float* at = s.scratch + matrix * scratch_size(s.r, s.l, s.k);
  Scratch x;
  x.header = at;
  x.kept = x.header + HEADER;             // P, [r][k]
  x.mixed = x.kept + s.r * s.k;           // gain Q K, [r][k]
  x.scaled = x.mixed + s.r * s.k;         // gain Q, [r][r]
  x.partial = x.scaled + s.r * s.r;       // chunk after chunk: G G^T, then Q^T G U
  x.largest = x.partial + static_cast<long>(s.chunks) * (s.r * s.r + s.r * s.k);
  x.rows = x.largest + s.chunks;          // [chunks][r]
  x.cols = x.rows + s.chunks * s.r;       // [chunks]
  x.agreed = x.cols + s.chunks;           // [chunks]: entries of the step that agree with the gradient (U16)
  x.counted = x.agreed + s.chunks;        // [chunks]: of how many that have one
  return x;
}

__device__ inline float bf16(unsigned short h) {
  union {
    unsigned u;
    float f;
  } x;
  x.u = static_cast<unsigned>(h) << 16;
  return x.f;
}

__device__ inline unsigned bits_of(float f) {
  union {
    float f;
    unsigned u;
  } x;
  x.f = f;
  return x.u;
}

constexpr float DAMPING = 1e-3f;  // (U14), as in scao_hf/rules/eigenbasis_refresh.py

// x within 1, (U10).
__device__ inline float bounded(float x) { return x > 1 ? 1.0f : x < -1 ? -1.0f : x; }

__device__ inline float read(const void* data, Dtype dtype, long at) {
  if (dtype == F32) return static_cast<const float*>(data)[at];
  if (dtype == BF16) return bf16(static_cast<const unsigned short*>(data)[at]);
  return half_to_float(static_cast<const unsigned short*>(data)[at]);
}

__device__ inline void write(void* data, Dtype dtype, long at, float x) {
  if (dtype == F32) {
    static_cast<float*>(data)[at] = x;
  } else if (dtype == BF16) {
    const unsigned u = bits_of(x);
    const bool nan = (u & 0x7fffffffu) > 0x7f800000u;
    static_cast<unsigned short*>(data)[at] =
        nan ? 0x7fc0 : static_cast<unsigned short>((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
  } else {
    static_cast<unsigned short*>(data)[at] = float_to_half(x);
  }
}

// One tile of G, [r][TILE], zero beyond the matrix; threads run along the contiguous side.
__device__ inline void load_gradient(const View& g, int r, int first, int width, float scale, float* tile) {
  for (int at = threadIdx.x; at < r * TILE; at += THREADS) {
    const int i = g.col_stride == 1 ? at / TILE : at % r, c = g.col_stride == 1 ? at % TILE : at / r;
    const long from = i * g.row_stride + (first + c) * g.col_stride;
    tile[i * TILE + c] = c < width ? read(g.data, g.dtype, from) * scale : 0.0f;
  }
}

// One tile of U, [TILE][k].
__device__ inline void load_basis(const State& s, int matrix, int first, int width, float* tile) {
  const long from = static_cast<long>(matrix) * s.l * s.k + first;
  for (int at = threadIdx.x; at < TILE * s.k; at += THREADS) {
    const int m = at / TILE, j = at % TILE;
    tile[m * BASIS_ROW + j] = j < width ? read(s.long_vectors, s.long_dtype, from + static_cast<long>(m) * s.l + j) : 0.0f;
  }
}

// rotated = Q^T G for a tile.
__device__ inline void rotate(const float* q, const float* tile, int r, float* rotated) {
  for (int at = threadIdx.x; at < r * TILE; at += THREADS) {
    const int i = at / TILE, c = at % TILE;
    float sum = 0;
    for (int j = 0; j < r; j++) sum += q[j * r + i] * tile[j * TILE + c];
    rotated[at] = sum;
  }
}

// Shared memory of the kernels below: 8 + 8 + 16 KB, and 8 KB more for `rotated` where it is needed.
#define SCAO_SHARED                       \
  __shared__ float tile[LARGEST * TILE];  \
  __shared__ float basis[BASIS_ROW * LARGEST]; \
  __shared__ float square[LARGEST * LARGEST]

// Sums of one chunk; returns the largest magnitude that this thread has seen, as bits.
__device__ inline unsigned project_chunk(const State& s, const View& grad, int matrix, int chunk, float scale, float* tile,
                                     float* rotated, float* basis, const float* q, float* partial) {
  const int r = s.r, k = s.k, start = chunk * CHUNK, end = start + CHUNK < s.l ? start + CHUNK : s.l;
  const int total = r * r + r * k;
  float* sums = partial + static_cast<long>(chunk) * total;
  for (int at = threadIdx.x; at < total; at += THREADS) sums[at] = 0;
  unsigned most = 0;
  for (int c = start; c < end; c += TILE) {
    const int width = c + TILE < end ? TILE : end - c;
    load_gradient(grad, r, c, width, scale, tile);
    load_basis(s, matrix, c, width, basis);
    SCAO_SYNC(1);
    rotate(q, tile, r, rotated);
    for (int at = threadIdx.x; at < r * TILE; at += THREADS) {
      const unsigned magnitude = bits_of(tile[at]) & 0x7fffffffu;
      most = magnitude > most ? magnitude : most;
    }
    SCAO_SYNC(2);
    for (int at = threadIdx.x; at < total; at += THREADS) {
      float sum = sums[at];
      if (at < r * r) {
        const float *a = tile + at / r * TILE, *b = tile + at % r * TILE;
        for (int j = 0; j < TILE; j++) sum += a[j] * b[j];
      } else {
        const int i = (at - r * r) / k, m = (at - r * r) % k;
        for (int j = 0; j < TILE; j++) sum += rotated[i * TILE + j] * basis[m * BASIS_ROW + j];
      }
      sums[at] = sum;
    }
    SCAO_SYNC(3);
  }
  return most;
}

__global__ void project(Batch batch, State s) {
  SCAO_SHARED;
  __shared__ float rotated[LARGEST * TILE];
  const int matrix = blockIdx.y, chunk = blockIdx.x;
  const Scratch x = scratch_of(s, matrix);
  for (int at = threadIdx.x; at < s.r * s.r; at += THREADS) square[at] = s.vectors[matrix * s.r * s.r + at];
  // Q is first read behind a barrier of project_chunk.
  unsigned most = project_chunk(s, batch.grad[matrix], matrix, chunk, 1.0f, tile, rotated, basis, square, x.partial);
  unsigned* shared = reinterpret_cast<unsigned*>(tile);
  shared[threadIdx.x] = most;
  SCAO_SYNC(4);
  if (threadIdx.x == 0) {
    for (int i = 1; i < THREADS; i++) most = shared[i] > most ? shared[i] : most;
    reinterpret_cast<unsigned*>(x.largest)[chunk] = most;
  }
}

__global__ void settle(Batch batch, State s, Numbers n) {
  SCAO_SHARED;
  __shared__ float rotated[LARGEST * TILE];
  __shared__ float shared_scale;
  const int matrix = blockIdx.x, r = s.r, k = s.k, total = r * r + r * k;
  const Scratch x = scratch_of(s, matrix);
  for (int at = threadIdx.x; at < r * r; at += THREADS) square[at] = s.vectors[matrix * r * r + at];
  if (threadIdx.x == 0) {
    unsigned most = 0;
    for (int c = 0; c < s.chunks; c++) {
      const unsigned one = reinterpret_cast<const unsigned*>(x.largest)[c];
      most = one > most ? one : most;
    }
    const bool finite = most < 0x7f800000u;
    union {
      unsigned u;
      float f;
    } magnitude;
    magnitude.u = most;
    // (U3), as in cpu_kernels.cpp
    float& level = s.level[matrix];
    const float limit = level > 0 && level * 10.0f < 1e15f ? level * 10.0f : 1e15f;
    shared_scale = !finite ? 0.0f : magnitude.f > limit ? limit / magnitude.f : 1.0f;
    x.header[0] = shared_scale;
    if (finite) {
      const float bounded = magnitude.f > limit ? limit : magnitude.f, faded = level * 0.95f;
      if (magnitude.f > 0) level = bounded > faded ? bounded : faded;
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
  if (shared_scale == 0.0f) return;  // not finite: the whole block leaves, and so do the launches after this one
  if (shared_scale != 1.0f) {
    for (int c = 0; c < s.chunks; c++) {
      project_chunk(s, batch.grad[matrix], matrix, c, shared_scale, tile, rotated, basis, square, x.partial);
    }
  }
  const float first = static_cast<float>(1 - n.beta1), second = static_cast<float>(1 - n.beta2);
  const float outer = static_cast<float>(1 - n.rho), eps = static_cast<float>(n.eps);
  const float gain = s.gain[matrix];
  const float bias1 = x.header[1], root2 = x.header[2];
  const auto total_of = [&](int at) {
    float sum = 0;
    for (int c = 0; c < s.chunks; c++) sum += x.partial[static_cast<long>(c) * total + at];
    return sum;
  };
  for (int at = threadIdx.x; at < r * r; at += THREADS) {
    float& factor = s.factor[matrix * r * r + at];
    factor += outer * (total_of(at) - factor);
    x.scaled[at] = gain * square[at];
  }
  SCAO_SYNC(20);
  float trace = 0;
  for (int i = 0; i < r; i++) trace += s.factor[matrix * r * r + i * r + i];
  const float damping = x.header[3] * trace;
  if (threadIdx.x == 0) x.header[4] = damping;
  for (int entry = threadIdx.x; entry < r * k; entry += THREADS) {
    const float p = total_of(r * r + entry) * s.mask[matrix * k + entry % k];
    float &mean = s.inside_avg[matrix * r * k + entry], &variance = s.inside_sq[matrix * r * k + entry];
    mean += first * (p - mean);
    variance += second * (p * p - variance);
    x.kept[entry] = p;
    x.mixed[entry] = bounded(mean / bias1 / (sqrtf(variance + damping) / root2 + eps));  // K, still without Q
  }
  SCAO_SYNC(6);
  // Q K needs every row of K: through shared memory, a tile of columns of K at a time.
  for (int m = 0; m < k; m += TILE) {
    const int width = m + TILE < k ? TILE : k - m;
    for (int at = threadIdx.x; at < r * width; at += THREADS) tile[at / width * TILE + at % width] = x.mixed[at / width * k + m + at % width];
    SCAO_SYNC(7);
    for (int at = threadIdx.x; at < r * width; at += THREADS) {
      const int i = at / width, c = at % width;
      float sum = 0;
      for (int j = 0; j < r; j++) sum += square[i * r + j] * tile[j * TILE + c];
      x.mixed[i * k + m + c] = gain * sum;
    }
    SCAO_SYNC(8);
  }
}

__global__ void residual(Batch batch, State s, Numbers n) {
  SCAO_SHARED;
  __shared__ float rotated[LARGEST * TILE];
  __shared__ float col_total[TILE];
  const int matrix = blockIdx.y, chunk = blockIdx.x, r = s.r, k = s.k;
  const Scratch x = scratch_of(s, matrix);
  const float scale = x.header[0];
  if (scale == 0.0f) return;
  const int start = chunk * CHUNK, end = start + CHUNK < s.l ? start + CHUNK : s.l;
  const float first = static_cast<float>(1 - n.beta1), second = static_cast<float>(1 - n.beta2);
  for (int at = threadIdx.x; at < r * r; at += THREADS) square[at] = s.vectors[matrix * r * r + at];
  if (threadIdx.x < TILE) col_total[threadIdx.x] = 0;
  float row_sum = 0;  // of row threadIdx.x
  for (int c = start; c < end; c += TILE) {
    const int width = c + TILE < end ? TILE : end - c;
    load_gradient(batch.grad[matrix], r, c, width, scale, tile);
    load_basis(s, matrix, c, width, basis);
    SCAO_SYNC(9);
    rotate(square, tile, r, rotated);
    // P U^T in pieces of TILE columns of P; every thread subtracts from entries that it wrote itself.
    float* kept = tile;  // G is no longer needed once it is rotated
    SCAO_SYNC(18);
    for (int m = 0; m < k; m += TILE) {
      const int depth = m + TILE < k ? TILE : k - m;
      for (int at = threadIdx.x; at < r * depth; at += THREADS) kept[at / depth * TILE + at % depth] = x.kept[at / depth * k + m + at % depth];
      SCAO_SYNC(10);
      for (int at = threadIdx.x; at < r * TILE; at += THREADS) {
        const int i = at / TILE, j = at % TILE;
        float sum = 0;
        for (int d = 0; d < depth; d++) sum += kept[i * TILE + d] * basis[(m + d) * BASIS_ROW + j];
        rotated[at] -= sum;
      }
      SCAO_SYNC(11);
    }
    for (int at = threadIdx.x; at < r * width; at += THREADS) {
      const int i = at / width, j = at % width;
      float& mean = s.exp_avg[(static_cast<long>(matrix) * r + i) * s.l + c + j];
      mean += first * (rotated[i * TILE + j] - mean);
    }
    if (static_cast<int>(threadIdx.x) < r) {
      for (int j = 0; j < width; j++) row_sum += rotated[threadIdx.x * TILE + j] * rotated[threadIdx.x * TILE + j];
    } else if (static_cast<int>(threadIdx.x) - LARGEST >= 0 && static_cast<int>(threadIdx.x) - LARGEST < width) {
      const int j = threadIdx.x - LARGEST;
      float sum = 0;
      for (int i = 0; i < r; i++) sum += rotated[i * TILE + j] * rotated[i * TILE + j];
      float& col = s.col[static_cast<long>(matrix) * s.l + c + j];
      col += second * (sum / r - col);
      col_total[j] += col;
    }
    SCAO_SYNC(12);
  }
  if (static_cast<int>(threadIdx.x) < r) x.rows[chunk * r + threadIdx.x] = row_sum;
  if (threadIdx.x == 0) {
    float sum = 0;
    for (int j = 0; j < TILE; j++) sum += col_total[j];
    x.cols[chunk] = sum;
  }
}

__global__ void apply(Batch batch, State s, Numbers n) {
  SCAO_SHARED;
  __shared__ float row_root[LARGEST];
  __shared__ float col_mean;
  __shared__ int agreed[2 * THREADS];
  const int matrix = blockIdx.y, chunk = blockIdx.x, r = s.r, k = s.k;
  const Scratch x = scratch_of(s, matrix);
  if (x.header[0] == 0.0f) return;
  const int start = chunk * CHUNK, end = start + CHUNK < s.l ? start + CHUNK : s.l;
  const float second = static_cast<float>(1 - n.beta2), eps = static_cast<float>(n.eps);
  const float mean_scale = 1 / x.header[1], root2 = x.header[2];
  const float keep = static_cast<float>(1 - n.lr * n.weight_decay);
  if (static_cast<int>(threadIdx.x) < r) {
    // Every block works the new row out for itself; `finish` stores it when all have read the old one.
    float sum = 0;
    for (int c = 0; c < s.chunks; c++) sum += x.rows[c * r + threadIdx.x];
    const float old = s.row[matrix * r + threadIdx.x];
    row_root[threadIdx.x] = old + second * (sum / s.l - old) + x.header[4];
  }
  if (threadIdx.x == 0) {
    float sum = 0;
    for (int c = 0; c < s.chunks; c++) sum += x.cols[c];
    sum /= s.l;
    col_mean = sum > 1.17549435e-38f ? sum : 1.17549435e-38f;
  }
  for (int at = threadIdx.x; at < r * r; at += THREADS) square[at] = x.scaled[at];
  SCAO_SYNC(13);
  const View &w = batch.param[matrix], &g = batch.grad[matrix];
  const float least = s.agreement[matrix] > 0.5f ? s.agreement[matrix] : 0.5f;
  const float lr = static_cast<float>(n.lr) / (s.cautious ? least : 1.0f);
  int agrees = 0, counts = 0;
  for (int c = start; c < end; c += TILE) {
    const int width = c + TILE < end ? TILE : end - c;
    load_basis(s, matrix, c, width, basis);
    for (int at = threadIdx.x; at < r * TILE; at += THREADS) {
      const int i = at / TILE, j = at % TILE;
      if (j < width) {
        const float mean = s.exp_avg[(static_cast<long>(matrix) * r + i) * s.l + c + j];
        const float col = s.col[static_cast<long>(matrix) * s.l + c + j] / col_mean + DAMPING;
        tile[at] = bounded(mean * mean_scale / (sqrtf(row_root[i]) * sqrtf(col) / root2 + eps));
      } else {
        tile[at] = 0;
      }
    }
    SCAO_SYNC(14);
    for (int at = threadIdx.x; at < r * width; at += THREADS) {
      const int i = w.col_stride == 1 ? at / width : at % r, j = w.col_stride == 1 ? at % width : at / r;
      float delta = 0;
      for (int d = 0; d < r; d++) delta += square[i * r + d] * tile[d * TILE + j];
      for (int d = 0; d < k; d++) delta += x.mixed[i * k + d] * basis[d * BASIS_ROW + j];
      if (s.cautious) {
        const float product = delta * read(g.data, g.dtype, i * g.row_stride + (c + j) * g.col_stride);
        const bool agree = product > 0;
        agrees += agree, counts += product != 0;
        delta = agree ? delta : 0.0f;
      }
      const long to = i * w.row_stride + (c + j) * w.col_stride;
      write(w.data, w.dtype, to, read(w.data, w.dtype, to) * keep - lr * delta);
    }
    SCAO_SYNC(15);
  }
  agreed[threadIdx.x] = agrees, agreed[THREADS + threadIdx.x] = counts;
  SCAO_SYNC(19);
  if (threadIdx.x < 2) {
    float sum = 0;
    for (int i = 0; i < THREADS; i++) sum += agreed[threadIdx.x * THREADS + i];
    (threadIdx.x ? x.counted : x.agreed)[chunk] = sum;
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
__global__ void int8_ema(signed char* codes, float* scales, const float* values, const float* weights, long numel,
                         long blocks_per_matrix, unsigned seed_key) {
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
  SCAO_SYNC(16);
  for (int step = INT8_BLOCK / 2; step > 0; step /= 2) {
    if (j < step && magnitude[j + step] > magnitude[j]) magnitude[j] = magnitude[j + step];
    SCAO_SYNC(17);
  }
  const float fresh = magnitude[0] / INT8_LEVELS;
  const float inverse = fresh > 1.17549435e-38f ? 1 / fresh : 0.0f;
  const float y = x * inverse + uniform(block_key(seed_key, static_cast<unsigned>(block)), j);
  float code = floorf(y);
  code = code > 127 ? 127 : code < -127 ? -127 : code;
  codes[block * INT8_BLOCK + j] = static_cast<signed char>(inside ? code : 0);
  if (j == 0) scales[block] = fresh;
}

}  // namespace cuda
}  // namespace scao
