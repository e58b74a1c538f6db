// Tiles: [rows][T] floats of a matrix stored in any layout and dtype; columns beyond the matrix are zero.
#pragma once

#include "cpu_kernels.h"
#include "cpu_vector.h"

namespace scao {
namespace {

// Columns [0, width) of a matrix with `rows` rows into the tile; the columns up to a multiple of COLS become zero.
template <Dtype D>
inline void load_tile_as(const View& view, long rows, long width, float* tile, long T) {
  const auto [data, row_stride, col_stride, dtype] = view;
  const long whole = width / VL * VL, padded = round_up(width, COLS);
  if (col_stride == 1) {
    for (long i = 0; i < rows; i++) {
      const long at = i * row_stride;
      float* out = tile + i * T;
      for (long c = 0; c < whole; c += VL) store(out + c, get_vector<D>(data, at + c));
      for (long c = whole; c < width; c++) out[c] = get<D>(data, at + c);
    }
  } else {
    const long row_whole = row_stride == 1 ? rows / VL * VL : 0;
    for (long c = 0; c < whole && row_whole; c += VL) {
      for (long i = 0; i < row_whole; i += VL) {
        vf x[VL];
        UNROLL
        for (int j = 0; j < VL; j++) x[j] = get_vector<D>(data, (c + j) * col_stride + i);
        transpose(x);
        UNROLL
        for (int j = 0; j < VL; j++) store(tile + (i + j) * T + c, x[j]);
      }
    }
    for (long c = 0; c < width; c++) {
      for (long i = c < whole ? row_whole : 0; i < rows; i++) {
        tile[i * T + c] = get<D>(data, i * row_stride + c * col_stride);
      }
    }
  }
  if (width < padded) {
    for (long i = 0; i < rows; i++) {
      for (long c = width; c < padded; c++) tile[i * T + c] = 0;
    }
  }
}

// The matrix without its columns before `column`.
INLINE View from(View view, long column) {
  view.data = static_cast<char*>(view.data) + column * view.col_stride * (view.dtype == F32 ? 4 : 2);
  return view;
}

inline void load_tile(const View& view, long rows, long width, float* tile, long T) {
  switch (view.dtype) {
    case F32: return load_tile_as<F32>(view, rows, width, tile, T);
    case BF16: return load_tile_as<BF16>(view, rows, width, tile, T);
    case F16: return load_tile_as<F16>(view, rows, width, tile, T);
  }
}

// w <- keep w - lr delta, delta a tile; keep = 1 - lr * weight_decay.
template <Dtype D>
inline void apply_tile_as(const View& view, long rows, long width, const float* tile, long T, float keep, float lr) {
  const auto [data, row_stride, col_stride, dtype] = view;
  const long whole = width / VL * VL;
  const vf kept = splat(keep), rate = splat(lr);
  if (col_stride == 1) {
    for (long i = 0; i < rows; i++) {
      const long at = i * row_stride;
      const float* delta = tile + i * T;
      for (long c = 0; c < whole; c += VL) {
        put_vector<D>(data, at + c, get_vector<D>(data, at + c) * kept - rate * load(delta + c));
      }
      for (long c = whole; c < width; c++) put<D>(data, at + c, get<D>(data, at + c) * keep - lr * delta[c]);
    }
    return;
  }
  const long row_whole = row_stride == 1 ? rows / VL * VL : 0;
  for (long c = 0; c < whole && row_whole; c += VL) {
    for (long i = 0; i < row_whole; i += VL) {
      vf x[VL];
      UNROLL
      for (int j = 0; j < VL; j++) x[j] = load(tile + (i + j) * T + c);
      transpose(x);
      UNROLL
      for (int j = 0; j < VL; j++) {
        const long at = (c + j) * col_stride + i;
        put_vector<D>(data, at, get_vector<D>(data, at) * kept - rate * x[j]);
      }
    }
  }
  for (long c = 0; c < width; c++) {
    for (long i = c < whole ? row_whole : 0; i < rows; i++) {
      const long at = i * row_stride + c * col_stride;
      put<D>(data, at, get<D>(data, at) * keep - lr * tile[i * T + c]);
    }
  }
}

inline void apply_tile(const View& view, long rows, long width, const float* tile, long T, float keep, float lr) {
  switch (view.dtype) {
    case F32: return apply_tile_as<F32>(view, rows, width, tile, T, keep, lr);
    case BF16: return apply_tile_as<BF16>(view, rows, width, tile, T, keep, lr);
    case F16: return apply_tile_as<F16>(view, rows, width, tile, T, keep, lr);
  }
}

// Largest magnitude as bits, lane by lane: as integers a NaN is above Inf and Inf above every number.
INLINE vi largest_bits(const float* tile, long T, long rows, long width, vi largest) {
  vi other = largest;
  for (long i = 0; i < rows; i++) {
    for (long c = 0; c < width; c += 2 * VL) {
      largest = larger(largest, bits(load(tile + i * T + c)) & 0x7fffffff);
      if (c + VL < width) other = larger(other, bits(load(tile + i * T + c + VL)) & 0x7fffffff);
    }
  }
  return larger(largest, other);
}

inline void scale_tile(float* tile, long T, long rows, long width, float scale) {
  for (long i = 0; i < rows; i++) {
    for (long c = 0; c < width; c += VL) store(tile + i * T + c, load(tile + i * T + c) * scale);
  }
}

// (U3): whether the matrix is finite, and by how much to scale it; keeps the level.
INLINE bool sanitize(vi largest, float* level, float* scale) {
  unsigned most = 0;
  for (int i = 0; i < VL; i++) most = static_cast<unsigned>(largest[i]) > most ? static_cast<unsigned>(largest[i]) : most;
  if (most >= NOT_FINITE) return false;
  const float magnitude = float_of(most);
  const float limit = limit_of(*level);
  *scale = magnitude > limit ? limit / magnitude : 1.0f;
  *level = level_after(*level, magnitude);
  return true;
}

}  // namespace
}  // namespace scao
