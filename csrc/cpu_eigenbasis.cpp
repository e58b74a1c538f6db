// A step of one matrix in phase 2, in three passes over tiles of T columns, vector lanes along the long side. Between the
// passes lie the sums over all columns that the next one needs: P and (E1), then the second moments of the rows.
#include "cpu_products.h"
#include "cpu_table.h"

namespace scao {
namespace SCAO_ISA {
namespace {

constexpr long T = 128;

// R: the small side where it is known when this is compiled, or 0.
template <int R>
struct Step {
  static constexpr int RB = R ? (R < ROW_BLOCK ? R : ROW_BLOCK) : ROW_BLOCK;
  const EigenbasisTask& t;
  const Numbers& n;
  const long r, l, k, rp, kp;
  const View long_basis;
  bool direct;    // whether G is read again where it lies
  float *copy;    // or from here: tile after tile, each [rp][T]
  float *packed;  // one tile
  float *basis;   // U^T of the tile, [kp][T]
  float *tile, *result, *gram_sums, *cross_sums, *turn, *kept, *mixed, *row_sums, *row_root, *col_root;

  Step(const EigenbasisTask& task, const Numbers& numbers, void* scratch)
      : t(task), n(numbers), r(R ? R : task.r), l(task.l), k(used(task)), rp(R ? R : round_up(r, ROW_BLOCK)),
        kp(round_up(k, 4)), long_basis{const_cast<void*>(t.long_vectors), l, 1, t.long_dtype} {
    direct = t.grad.col_stride == 1;
    Arena arena{static_cast<char*>(scratch)};
    copy = arena.take(rp * round_up(l, T));
    packed = arena.take(rp * T);
    basis = arena.take(kp * T);
    tile = arena.take(rp * T);
    result = arena.take(rp * T);
    gram_sums = arena.take(gram_size(rp));
    cross_sums = arena.take(cross_size(rp, kp));
    turn = arena.take(r * rp);
    kept = arena.take(rp * (kp + VL));
    mixed = arena.take(kp * rp);
    row_sums = arena.take(rp * VL);
    row_root = arena.take(rp);
    col_root = arena.take(T);
    if (kp > k) clear(basis + k * T, (kp - k) * T);
  }

  static unsigned long scratch(long r, long l, long k) {
    const long rp = round_up(r, ROW_BLOCK), kp = round_up(k, 4);
    return 4 * (rp * round_up(l, T) + (3 * rp + kp + 1) * T + gram_size(rp) + cross_size(rp, kp) + r * rp +
                rp * (2 * kp + VL) + rp * (VL + 1)) + 16 * 64;
  }

  // Columns of U up to the last one that is kept.
  static long used(const EigenbasisTask& task) {
    long k = task.k;
    while (k > 0 && task.mask[k - 1] == 0) k--;
    return k;
  }

  void load_basis(long c, long width) { load_tile(long_basis, c, k, width, basis, T); }

  // G of a tile, with zeros beyond the matrix: one that is stored by rows is packed for every pass, as rows that lie a
  // power of two apart would evict one another from the first-level cache; one stored by columns is transposed once.
  float* gradient(long c) const {
    if (!direct) return copy + c * rp;
    load_tile(t.grad, c, r, smaller(T, l - c), packed, T);
    if (rp > r) clear(packed + r * T, (rp - r) * T);
    return packed;
  }

  // Sums of G G^T and of G U. False where the gradient is not finite.
  bool gather() {
    float scale = 1;
    for (int attempt = 0; attempt < 2; attempt++) {
      vi largest{};
      clear(gram_sums, gram_size(rp));
      clear(cross_sums, cross_size(rp, kp));
      prefetch(t.grad, 0, r, smaller(AHEAD, l));
      prefetch(long_basis, 0, k, smaller(AHEAD, l));
      for (long c = 0; c < l; c += T) {
        const long width = smaller(T, l - c), padded = round_up(width, VL);
        if (c + AHEAD < l) {
          prefetch(t.grad, c + AHEAD, r, smaller(T, l - c - AHEAD));
          prefetch(long_basis, c + AHEAD, k, smaller(T, l - c - AHEAD));
        }
        float* g = gradient(c);
        if (!direct) {
          load_tile(t.grad, c, r, width, g, T);
          if (rp > r) clear(g + r * T, (rp - r) * T);
          if (scale != 1.0f) scale_tile(g, T, r, padded, scale);
        }
        load_basis(c, width);
        if (attempt == 0) largest = largest_bits(g, T, r, padded, largest);
        gram(g, T, rp, padded, gram_sums);
        cross(g, T, rp, basis, T, kp, padded, cross_sums);
      }
      if (attempt == 0 && !sanitize(largest, t.level, &scale)) return false;
      if (scale == 1.0f) break;
      direct = false;
    }
    return true;
  }

  // P = Q^T G U, and the kept part's moments: kept becomes its direction, mixed -P^T.
  void inside(float first, float second, float bias1, float root2, float eps) {
    const long width = kp + VL;  // of a row of kept: the last vector of a row may reach over
    clear(kept, rp * width);
    for (long i = 0; i < rp; i += 4) {
      for (long m = 0; m < kp; m += 4) {
        float block[16];
        block_sums(cross_sums + (i / 4 * (kp / 4) + m / 4) * 16 * VL, block);
        for (long a = i; a < smaller(i + 4, r); a++) {
          for (long j = 0; j < r; j++) {
            for (long b = 0; b < 4; b++) kept[j * width + m + b] += t.vectors[a * r + j] * block[(a - i) * 4 + b];
          }
        }
      }
    }
    clear(mixed, kp * rp);
    for (long i = 0; i < r; i++) {
      float* p = kept + i * width;
      for (long m = 0; m < k; m++) {
        p[m] *= t.mask[m];
        mixed[m * rp + i] = -p[m];
      }
      float *mean = t.inside_avg + i * t.k, *square = t.inside_sq + i * t.k;
      for (long m = 0; m < t.k; m++) {
        const float x = m < k ? p[m] : 0;
        mean[m] += first * (x - mean[m]);
        square[m] += second * (x * x - square[m]);
        if (m < k) p[m] = mean[m] / bias1 / (__builtin_sqrtf(square[m]) / root2 + eps);
      }
    }
  }

  // The residual of a tile, Q^T G - P U^T, and its moments. Where the tile is whole it never leaves the registers.
  void residual(float first, float second, vf* col_total) {
    clear(row_sums, rp * VL);
    for (long c = 0; c < l; c += T) {
      const long width = smaller(T, l - c), padded = round_up(width, COLS), whole = width / VL * VL;
      const View mean_view{t.exp_avg, l, 1, F32};
      if (c == 0) prefetch(mean_view, 0, r, smaller(AHEAD, l));
      if (c + AHEAD < l) prefetch(mean_view, c + AHEAD, r, smaller(T, l - c - AHEAD));
      load_basis(c, width);
      const float* g = gradient(c);
      for (long j = 0; j < padded; j += COLS) {
        vf energy[COL_BLOCK] = {};
        for (long i = 0; i < rp; i += RB) {
          float* mean = t.exp_avg + i * l + c + j;
          const bool inner = j + COLS <= width && i + RB <= r;
          product<RB>({turn + i, rp, g + j, T, r}, {mixed + i, rp, basis + j, T, k},
                      [&](const vf(&acc)[RB][COL_BLOCK]) {
                        UNROLL
                        for (int ii = 0; ii < RB; ii++) {
                          vf row = load(row_sums + (i + ii) * VL);
                          UNROLL
                          for (int cc = 0; cc < COL_BLOCK; cc++) {
                            const vf x = acc[ii][cc], square = x * x;
                            row += square;
                            energy[cc] += square;
                            if (inner) {
                              float* at = mean + ii * l + cc * VL;
                              const vf m = load(at);
                              store(at, m + first * (x - m));
                            }
                          }
                          store(row_sums + (i + ii) * VL, row);
                        }
                        if (!inner) store_block<RB>(result + i * T + j, T, acc);
                      });
          if (!inner) {
            for (long ii = i; ii < smaller(i + RB, r); ii++) {
              for (long jj = j; jj < smaller(j + COLS, width); jj++) {
                float* at = t.exp_avg + ii * l + c + jj;
                *at += first * (result[ii * T + jj] - *at);
              }
            }
          }
        }
        UNROLL
        for (int cc = 0; cc < COL_BLOCK; cc++) store(col_root + j + cc * VL, energy[cc] / static_cast<float>(r));
      }
      float* col = t.col + c;
      for (long j = 0; j < whole; j += VL) {
        vf v = load(col + j);
        v += second * (load(col_root + j) - v);
        store(col + j, v);
        *col_total += v;
      }
      for (long j = whole; j < width; j++) {
        col[j] += second * (col_root[j] - col[j]);
        (*col_total)[0] += col[j];
      }
    }
  }

  // turn becomes gain Q^T, mixed gain (Q K)^T.
  void mix(float gain) {
    clear(turn, r * rp);
    for (long i = 0; i < r; i++) {
      for (long j = 0; j < r; j++) turn[j * rp + i] = gain * t.vectors[i * r + j];
    }
    clear(mixed, kp * rp);
    for (long m = 0; m < k; m++) {
      for (long j = 0; j < r; j++) {
        const float x = kept[j * (kp + VL) + m];
        for (long i = 0; i < rp; i++) mixed[m * rp + i] += turn[j * rp + i] * x;
      }
    }
  }

  // The direction of a tile, (U16), and the parameter.
  template <bool CAUTIOUS>
  void apply(float mean_scale, float col_mean, float eps) {
    const float keep = static_cast<float>(1 - n.lr * n.weight_decay);
    const float least = *t.agreement > 0.5f ? *t.agreement : 0.5f;
    const float lr = static_cast<float>(n.lr) / (CAUTIOUS ? least : 1.0f);
    long agreed = 0;
    const bool in_place = t.param.dtype == F32 && t.param.col_stride == 1;
    if (rp > r) clear(tile + r * T, (rp - r) * T);
    prefetch(t.param, 0, r, smaller(AHEAD, l));
    for (long c = 0; c < l; c += T) {
      const long width = smaller(T, l - c), padded = round_up(width, COLS), whole = width / VL * VL;
      if (c + AHEAD < l) prefetch(t.param, c + AHEAD, r, smaller(T, l - c - AHEAD));
      load_basis(c, width);
      const float* g = gradient(c);
      for (long j = 0; j < width; j++) col_root[j] = t.col[c + j] / col_mean;
      for (long j = width; j < padded; j++) col_root[j] = 0;
      for (long j = 0; j < padded; j += VL) store(col_root + j, root(load(col_root + j)));
      for (long i = 0; i < r; i++) {
        const float* mean = t.exp_avg + i * l + c;
        float* out = tile + i * T;
        const vf row = splat(row_root[i]);
        for (long j = 0; j < whole; j += VL) {
          store(out + j, load(mean + j) * mean_scale / (load(col_root + j) * row + eps));
        }
        for (long j = whole; j < width; j++) out[j] = mean[j] * mean_scale / (col_root[j] * row_root[i] + eps);
        for (long j = width; j < padded; j++) out[j] = 0;
      }
      for (long j = 0; j < padded; j += COLS) {
        for (long i = 0; i < rp; i += RB) {
          float* weight = static_cast<float*>(t.param.data) + i * t.param.row_stride + c + j;
          const bool inner = in_place && j + COLS <= width && i + RB <= r;
          product<RB>({turn + i, rp, tile + j, T, r}, {mixed + i, rp, basis + j, T, k},
                      [&](const vf(&acc)[RB][COL_BLOCK]) {
                        const float* grad = g + i * T + j;
                        UNROLL
                        for (int ii = 0; ii < RB; ii++) {
                          UNROLL
                          for (int cc = 0; cc < COL_BLOCK; cc++) {
                            vf x = acc[ii][cc];
                            if (CAUTIOUS) x = agreeing(x, load(grad + ii * T + cc * VL), &agreed);
                            if (inner) {
                              float* at = weight + ii * t.param.row_stride + cc * VL;
                              store(at, load(at) * keep - lr * x);
                            } else {
                              store(result + (i + ii) * T + j + cc * VL, lr * x);
                            }
                          }
                        }
                      });
          if (in_place && !inner && i < r) {
            View part = t.param;
            part.data = static_cast<float*>(t.param.data) + i * t.param.row_stride;
            apply_tile(part, c + j, smaller(RB, r - i), smaller(COLS, width - j), result + i * T + j, T, keep);
          }
        }
        if (!in_place) apply_tile(t.param, c + j, r, smaller(COLS, width - j), result + j, T, keep);
      }
    }
    if (CAUTIOUS) *t.agreement = static_cast<float>(static_cast<double>(agreed) / static_cast<double>(r * l));
  }

  void run() {
    if (!gather()) return;
    const double count = static_cast<double>(*t.taken) + 1;
    *t.taken = static_cast<float>(count);
    accumulate(t.factor, r, gram_sums, static_cast<float>(1 - n.rho));
    const float first = static_cast<float>(1 - n.beta1), second = static_cast<float>(1 - n.beta2);
    const float bias1 = static_cast<float>(bias(n.beta1, count)), bias2 = static_cast<float>(bias(n.beta2, count));
    const float root2 = __builtin_sqrtf(bias2), eps = static_cast<float>(n.eps);
    inside(first, second, bias1, root2, eps);
    clear(turn, r * rp);  // Q, for (Q^T G)[i] = sum_j Q[j][i] G[j]
    for (long j = 0; j < r; j++) {
      for (long i = 0; i < r; i++) turn[j * rp + i] = t.vectors[j * r + i];
    }
    vf col_total{};
    residual(first, second, &col_total);
    // (U10) as a product of roots: sqrt(row_i) * sqrt(col_c / mean(col)).
    float col_mean = sum(col_total) / static_cast<float>(l);
    col_mean = col_mean > TINY ? col_mean : TINY;
    for (long i = 0; i < r; i++) {
      t.row[i] += second * (sum(load(row_sums + i * VL)) / static_cast<float>(l) - t.row[i]);
      row_root[i] = __builtin_sqrtf(t.row[i]) / root2;
    }
    mix(*t.gain);
    t.cautious ? apply<true>(1 / bias1, col_mean, eps) : apply<false>(1 / bias1, col_mean, eps);
  }
};

template <int R>
void step(const EigenbasisTask& task, const Numbers& numbers, void* scratch) {
  Step<R>(task, numbers, scratch).run();
}

}  // namespace

unsigned long eigenbasis_scratch(long r, long l, long k) { return Step<0>::scratch(r, l, k); }

void eigenbasis(const EigenbasisTask& task, const Numbers& numbers, void* scratch) {
  switch (task.r) {
    case 4: return step<4>(task, numbers, scratch);
    case 8: return step<8>(task, numbers, scratch);
    case 16: return step<16>(task, numbers, scratch);
    case 32: return step<32>(task, numbers, scratch);
    case 64: return step<64>(task, numbers, scratch);
    default: return step<0>(task, numbers, scratch);
  }
}

}  // namespace SCAO_ISA
}  // namespace scao
