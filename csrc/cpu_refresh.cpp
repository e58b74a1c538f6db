// A refresh of one matrix's bases: what grows with the long side. Z = [U^T; M], tiles of T columns.
#include "cpu_products.h"
#include "cpu_table.h"

namespace scao {
namespace SCAO_ISA {
namespace {

constexpr long T = 128;

// U^T and M of a tile, one above the other, zero beyond the matrix.
void load_rows(const void* basis, Dtype dtype, const float* moments, long r, long l, long k, long c, long width,
               float* tile) {
  load_tile({const_cast<void*>(basis), l, 1, dtype}, c, k, width, tile, T);
  load_tile({const_cast<float*>(moments), l, 1, F32}, c, r, width, tile + k * T, T);
}

// Asks for the memory of the next tile's rows, a few rows at a time between the products of this one.
struct Ahead {
  const char *basis, *moments;
  const long basis_row, moment_row, basis_bytes, moment_bytes, k, rows;
  long at = 0;

  Ahead(const void* long_vectors, Dtype dtype, const float* exp_avg, long r, long l, long k, long c, long columns)
      : basis(static_cast<const char*>(offset(long_vectors, dtype, c))), moments(reinterpret_cast<const char*>(exp_avg + c)),
        basis_row(l * (dtype == F32 ? 4 : 2)), moment_row(l * 4), basis_bytes(columns * (dtype == F32 ? 4 : 2)),
        moment_bytes(columns * 4), k(k), rows(c + columns <= l ? k + r : 0) {}

  INLINE_MEMBER void some(long done, long of) {
    for (; at * of < rows * done; at++) {
      const char* p = at < k ? basis + at * basis_row : moments + (at - k) * moment_row;
      const long bytes = at < k ? basis_bytes : moment_bytes;
      for (long i = 0; i < bytes; i += 64) __builtin_prefetch(p + i, 0, 3);
    }
  }
};

}  // namespace

unsigned long gram_scratch(long r, long, long k) {
  const long rows = round_up(k + r, 4);
  return 4 * (rows * T + gram_size(rows)) + 2 * 64;
}

void gram_of(const GramTask& t, void* scratch) {
  const long rows = t.k + t.r, padded_rows = round_up(rows, 4);
  Arena arena{static_cast<char*>(scratch)};
  float* tile = arena.take(padded_rows * T);
  float* sums = arena.take(gram_size(padded_rows));
  clear(tile + rows * T, (padded_rows - rows) * T);
  clear(sums, gram_size(padded_rows));
  for (long c = 0; c < t.l; c += T) {
    const long width = smaller(T, t.l - c);
    load_rows(t.long_vectors, t.long_dtype, t.exp_avg, t.r, t.l, t.k, c, width, tile);
    Ahead ahead(t.long_vectors, t.long_dtype, t.exp_avg, t.r, t.l, t.k, c + T, T);
    const long blocks = padded_rows / 4 * (padded_rows / 4 + 1) / 2;
    float* to = sums;
    long done = 0;
    for (long i = 0; i < padded_rows; i += 4) {
      for (long j = 0; j <= i; j += 4, to += 16 * VL) {
        ahead.some(++done, blocks);
        gram_block(tile + i * T, T, tile + j * T, T, round_up(width, VL), to);
      }
    }
  }
  for (long i = 0; i < padded_rows; i += 4) {
    for (long j = 0; j <= i; j += 4, sums += 16 * VL) {
      float block[16];
      block_sums(sums, block);
      for (long a = i; a < smaller(i + 4, rows); a++) {
        for (long b = j; b < smaller(j + 4, a + 1); b++) {
          t.gram[a * rows + b] = t.gram[b * rows + a] = block[(a - i) * 4 + b - j];
        }
      }
    }
  }
}

unsigned long rotate_scratch(long r, long l, long k) {
  const long rp = round_up(r, ROW_BLOCK), kp = round_up(k, ROW_BLOCK);
  return 4 * ((2 * rp + kp) * (k + r) + (k + r + 2 * rp + kp) * T + (r + 1) * round_up(l, VL)) + 16 * 64;
}

namespace {

// Sum of the squares of (U10) over a row of a matrix.
float step_norm(const float* x, const float* col_root, long l, float row_root, float mean_scale, float eps) {
  vf total{};
  const long whole = l / VL * VL;
  for (long c = 0; c < whole; c += VL) {
    const vf step = bounded(load(x + c) * mean_scale / (load(col_root + c) * row_root + eps));
    total += step * step;
  }
  float rest = 0;
  for (long c = whole; c < l; c++) {
    const float step = bounded(x[c] * mean_scale / (col_root[c] * row_root + eps));
    rest += step * step;
  }
  return sum(total) + rest;
}

// The columns' part of (U10).
void roots(float* out, const float* col, long l) {
  vf total{};
  const long whole = l / VL * VL;
  for (long c = 0; c < whole; c += VL) total += load(col + c);
  float mean = sum(total);
  for (long c = whole; c < l; c++) mean += col[c];
  mean /= static_cast<float>(l);
  mean = mean > TINY ? mean : TINY;
  for (long c = 0; c < whole; c += VL) store(out + c, root(load(col + c) / mean + DAMPING));
  for (long c = whole; c < l; c++) out[c] = __builtin_sqrtf(col[c] / mean + DAMPING);
}

}  // namespace

void rotate(const RotateTask& t, void* scratch) {
  t.norms[0] = t.norms[1] = 0;
  if (*t.finite == 0) return;
  const long r = t.r, l = t.l, k = t.k, depth = k + r, rp = round_up(r, ROW_BLOCK), kp = round_up(k, ROW_BLOCK);
  const long all = 2 * rp + kp;  // rows of the product: the new M, the new U^T, the whole momentum
  Arena arena{static_cast<char*>(scratch)};
  float* left = arena.take(depth * all);
  float* tile = arena.take(depth * T);
  float* fresh = arena.take(all * T);
  float* col_root = arena.take(round_up(l, VL));
  float* momentum = arena.take(r * l);
  clear(left, depth * all);
  for (long i = 0; i < 2 * r + k; i++) {
    const long to = i < r ? i : i < r + k ? rp + i - r : rp + kp + i - r - k;
    for (long j = 0; j < depth; j++) left[j * all + to] = t.coefficients[i * depth + j];
  }
  const View basis{t.long_vectors, l, 1, t.long_dtype};
  for (long c = 0; c < l; c += T) {
    const long width = smaller(T, l - c), padded = round_up(width, COLS), whole = width / VL * VL;
    load_rows(t.long_vectors, t.long_dtype, t.exp_avg, r, l, k, c, width, tile);
    Ahead ahead(t.long_vectors, t.long_dtype, t.exp_avg, r, l, k, c + T, T);
    const long blocks = padded / COLS * (all / ROW_BLOCK);
    long done = 0;
    for (long j = 0; j < padded; j += COLS) {
      for (long i = 0; i < all; i += ROW_BLOCK) {
        ahead.some(++done, blocks);
        product<ROW_BLOCK>({left + i, all, tile + j, T, depth}, {nullptr, 0, nullptr, 0, 0},
                           [&](const vf(&acc)[ROW_BLOCK][COL_BLOCK]) { store_block<ROW_BLOCK>(fresh + i * T + j, T, acc); });
      }
    }
    put_tile({t.exp_avg, l, 1, F32}, c, r, width, fresh, T);
    put_tile(basis, c, k, width, fresh + rp * T, T);
    put_tile({momentum, l, 1, F32}, c, r, width, fresh + (rp + kp) * T, T);
    // col + inside_sq U^2 with U as it is stored.
    load_tile(basis, c, k, width, tile, T);
    for (long j = 0; j < padded; j += VL) {
      vf total{};
      for (long m = 0; m < k; m++) {
        const vf u = load(tile + m * T + j);
        total += t.inside_sq[m] * u * u;
      }
      store(fresh + j, total);
    }
    for (long j = 0; j < whole; j += VL) store(col_root + c + j, load(fresh + j) + load(t.col + c + j));
    for (long j = whole; j < width; j++) col_root[c + j] = fresh[j] + t.col[c + j];
  }
  const float mean_scale = 1 / *t.bias1, root2 = __builtin_sqrtf(*t.bias2);
  roots(col_root, col_root, l);
  float damping = 0;  // (U14)
  for (long i = 0; i < r; i++) damping += DAMPING * t.plain_row[i];
  for (long i = 0; i < r; i++) {
    const float row_root = __builtin_sqrtf(t.plain_row[i] + damping) / root2;
    t.norms[0] += step_norm(momentum + i * l, col_root, l, row_root, mean_scale, t.eps);
  }
  roots(col_root, t.col, l);
  for (long i = 0; i < r; i++) {
    const float row_root = __builtin_sqrtf(t.row[i] + damping) / root2;
    t.norms[1] += step_norm(t.exp_avg + i * l, col_root, l, row_root, mean_scale, t.eps);
  }
}

}  // namespace SCAO_ISA
}  // namespace scao
