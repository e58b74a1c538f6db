// A step of one matrix in phase 2, in three passes over its columns, vector lanes along the long side. Between the
// passes lie the sums over all columns that the next one needs: P and (E1), then the second moments of the rows.
#include "cpu_products.h"
#include "cpu_kernels.h"

namespace scao {
namespace {

constexpr long T = 128;  // columns of a tile of the first pass; the others work on COLS

struct Step {
  const EigenbasisTask& t;
  const Numbers& n;
  const long r, l, k, rp, kp, kw;
  const View long_basis;
  float scale = 1;  // of the gradient, (U3)
  // Tiles: G and the results, [rp][], and U^T, [kp][].
  float *grads, *bases, *results;
  float *gram_sums, *cross_sums, *basis_t, *product_sums, *kept, *mixed, *row_sums, *row_root;

  Step(const EigenbasisTask& task, const Numbers& numbers, void* scratch)
      : t(task), n(numbers), r(task.r), l(task.l), k(used(task)), rp(round_up(r, ROW_BLOCK)),
        kp(round_up(k, 4)), kw(round_up(t.k, VL)), long_basis{const_cast<void*>(t.long_vectors), l, 1, t.long_dtype} {
    Arena arena{static_cast<char*>(scratch)};
    grads = arena.take(rp * T);
    bases = arena.take(kp * T);
    results = arena.take(rp * COLS);
    gram_sums = arena.take(gram_size(rp));
    cross_sums = arena.take(cross_size(rp, kp));
    basis_t = arena.take(r * rp);
    product_sums = arena.take(rp * kw);
    kept = arena.take(r * kw);
    mixed = arena.take(kp * rp);
    row_sums = arena.take(rp * VL);
    row_root = arena.take(rp);
  }

  static unsigned long scratch(long r, long k) {
    const long rp = round_up(r, ROW_BLOCK), kp = round_up(k, 4), kw = round_up(k, VL);
    return 4 * ((rp + kp) * T + rp * COLS + gram_size(rp) + cross_size(rp, kp) + r * rp + (rp + r) * kw + kp * rp +
                rp * (VL + 1)) + 12 * 64;
  }

  // Columns of U up to the last one that is kept.
  static long used(const EigenbasisTask& task) {
    long k = task.k;
    while (k > 0 && task.mask[k - 1] == 0) k--;
    return k;
  }

  void load_grad(long first, long width, long stride) const {
    load_tile(from(t.grad, first), r, width, grads, stride);
    if (scale != 1.0f) scale_tile(grads, stride, r, round_up(width, VL), scale);
  }

  // Sums of G G^T and of G U. False where the gradient is not finite.
  bool gather() {
    clear(grads + r * T, (rp - r) * T);
    clear(bases + k * T, (kp - k) * T);
    for (int attempt = 0; attempt < 2; attempt++) {
      vi largest{};
      clear(gram_sums, gram_size(rp));
      clear(cross_sums, cross_size(rp, kp));
      for (long c = 0; c < l; c += T) {
        const long width = smaller(T, l - c), padded = round_up(width, VL);
        load_grad(c, width, T);
        load_tile(from(long_basis, c), k, width, bases, T);
        largest = largest_bits(grads, T, r, padded, largest);
        gram(grads, T, rp, padded, gram_sums);
        cross(grads, T, rp, bases, T, kp, padded, cross_sums);
      }
      if (attempt == 0 && !sanitize(largest, t.level, &scale)) return false;
      if (scale == 1.0f) break;
    }
    return true;
  }

  // P = Q^T G U, and the kept part's moments: kept becomes its direction, mixed -P^T.
  void inside(float first, float second, float bias1, float root2, float damping, float eps) {
    clear(product_sums, rp * kw);
    for (long i = 0; i < rp; i += 4) {
      for (long m = 0; m < kp; m += 4) {
        float block[16];
        block_sums(cross_sums + (i / 4 * (kp / 4) + m / 4) * 16 * VL, block);
        for (long a = 0; a < 16; a++) product_sums[(i + a / 4) * kw + m + a % 4] = block[a];
      }
    }
    for (long i = 0; i < r; i++) {
      float *mean = t.inside_avg + i * t.k, *square = t.inside_sq + i * t.k, *out = kept + i * kw;
      for (long m = 0; m < t.k; m += VL) {
        vf x{}, mask{}, old_mean{}, old_square{};
        for (long j = 0; j < r; j++) x += t.vectors[j * r + i] * load(product_sums + j * kw + m);
        const long count = smaller(VL, t.k - m);
        get_part(&mask, t.mask + m, count);
        get_part(&old_mean, mean + m, count);
        get_part(&old_square, square + m, count);
        x *= mask;
        old_mean += first * (x - old_mean);
        old_square += second * (x * x - old_square);
        put_part(mean + m, old_mean, count);
        put_part(square + m, old_square, count);
        store(out + m, bounded(old_mean / bias1 / (root(old_square + damping) / root2 + eps)));
        for (long j = 0; j < smaller(VL, k - m); j++) mixed[(m + j) * rp + i] = -x[j];
      }
    }
  }

  // The residual Q^T G - P U^T and its moments.
  void residual(float first, float second, vf* col_total) {
    clear(row_sums, rp * VL);
    for (long c = 0; c < l; c += COLS) {
      const long width = smaller(COLS, l - c);
      load_grad(c, width, COLS);
      load_tile(from(long_basis, c), k, width, bases, COLS);
      vf energy[COL_BLOCK] = {};
      for (long i = 0; i < rp; i += ROW_BLOCK) {
        const Part own{basis_t + i, rp, grads, COLS, r}, inside{mixed + i, rp, bases, COLS, k};
        product(own, inside, [&](const vf(&acc)[ROW_BLOCK][COL_BLOCK]) {
          UNROLL
          for (int ii = 0; ii < ROW_BLOCK; ii++) {
            vf row = load(row_sums + (i + ii) * VL);
            UNROLL
            for (int cc = 0; cc < COL_BLOCK; cc++) {
              const vf square = acc[ii][cc] * acc[ii][cc];
              row += square;
              energy[cc] += square;
            }
            store(row_sums + (i + ii) * VL, row);
          }
          store_block(results + i * COLS, COLS, acc);
        });
      }
      for (long i = 0; i < r; i++) blend(t.exp_avg + i * l + c, results + i * COLS, first, width);
      float means[COLS];
      UNROLL
      for (int cc = 0; cc < COL_BLOCK; cc++) store(means + cc * VL, energy[cc] / static_cast<float>(r));
      *col_total += blend(t.col + c, means, second, width);
    }
  }

  // average <- average + weight (x - average); the sum of the averages, in lanes.
  INLINE_MEMBER static vf blend(float* average, const float* x, float weight, long width) {
    vf total{};
    for (long j = 0; j < width; j += VL) {
      vf v{};
      get_part(&v, average + j, smaller(VL, width - j));
      v += weight * (load(x + j) - v);
      put_part(average + j, v, smaller(VL, width - j));
      total += v;
    }
    return total;
  }

  // basis_t becomes gain Q^T, mixed gain (Q K)^T.
  void mix(float gain) {
    clear(basis_t, r * rp);
    for (long i = 0; i < r; i++) {
      for (long j = 0; j < r; j++) basis_t[j * rp + i] = gain * t.vectors[i * r + j];
    }
    clear(mixed, kp * rp);
    for (long m = 0; m < k; m++) {
      for (long j = 0; j < r; j++) {
        const float x = kept[j * kw + m];
        for (long i = 0; i < rp; i++) mixed[m * rp + i] += basis_t[j * rp + i] * x;
      }
    }
  }

  // The direction, (U16), and the parameter.
  template <bool CAUTIOUS>
  void apply(float mean_scale, float col_mean, float eps) {
    const float keep = static_cast<float>(1 - n.lr * n.weight_decay);
    const float least = *t.agreement > 0.5f ? *t.agreement : 0.5f;
    const float lr = static_cast<float>(n.lr) / (CAUTIOUS ? least : 1.0f);
    Agreement agreed;
    for (long c = 0; c < l; c += COLS) {
      const long width = smaller(COLS, l - c);
      float roots[COLS] = {}, *direction = grads;
      for (long j = 0; j < width; j += VL) {
        vf col{};
        get_part(&col, t.col + c + j, smaller(VL, width - j));
        store(roots + j, root(col / col_mean + DAMPING));
      }
      for (long i = 0; i < r; i++) {
        for (long j = 0; j < COLS; j += VL) {
          vf mean{};
          if (j < width) get_part(&mean, t.exp_avg + i * l + c + j, smaller(VL, width - j));
          store(direction + i * COLS + j, bounded(mean * mean_scale / (load(roots + j) * row_root[i] + eps)));
        }
      }
      load_tile(from(long_basis, c), k, width, bases, COLS);
      for (long i = 0; i < rp; i += ROW_BLOCK) {
        product({basis_t + i, rp, direction, COLS, r}, {mixed + i, rp, bases, COLS, k},
                    [&](const vf(&acc)[ROW_BLOCK][COL_BLOCK]) { store_block(results + i * COLS, COLS, acc); });
      }
      if (CAUTIOUS) {
        load_tile(from(t.grad, c), r, width, grads, COLS);
        for (long i = 0; i < r * COLS; i += VL) {
          store(results + i, agreeing(load(results + i), load(grads + i), &agreed));
        }
      }
      apply_tile(from(t.param, c), r, width, results, COLS, keep, lr);
    }
    long yes = 0, counted = 0;
    for (int i = 0; i < VL; i++) yes += agreed.agreed[i], counted += agreed.counted[i];
    if (counted) *t.agreement = static_cast<float>(static_cast<double>(yes) / static_cast<double>(counted));
  }

  void run() {
    if (!gather()) return;
    const double count = static_cast<double>(*t.taken) + 1;
    *t.taken = static_cast<float>(count);
    accumulate(t.factor, r, gram_sums, static_cast<float>(1 - n.rho));
    const float first = static_cast<float>(1 - n.beta1), second = static_cast<float>(1 - n.beta2);
    const float bias1 = static_cast<float>(bias(n.beta1, count)), bias2 = static_cast<float>(bias(n.beta2, count));
    const float root2 = __builtin_sqrtf(bias2), eps = static_cast<float>(n.eps);
    float trace = 0;
    for (long i = 0; i < r; i++) trace += t.factor[i * r + i];
    const float damping = DAMPING * trace * plain_scale(t.activity, n.rho, count, bias2, l);  // (U14)
    clear(mixed, kp * rp);
    inside(first, second, bias1, root2, damping, eps);
    clear(basis_t, r * rp);  // Q, for (Q^T G)[i] = sum_j Q[j][i] G[j]
    for (long j = 0; j < r; j++) {
      for (long i = 0; i < r; i++) basis_t[j * rp + i] = t.vectors[j * r + i];
    }
    vf col_total{};
    residual(first, second, &col_total);
    // (U10) as a product of roots: sqrt(row_i + damping) * sqrt(col_c / mean(col) + DAMPING).
    float col_mean = sum(col_total) / static_cast<float>(l);
    col_mean = col_mean > TINY ? col_mean : TINY;
    for (long i = 0; i < r; i++) {
      t.row[i] += second * (sum(load(row_sums + i * VL)) / static_cast<float>(l) - t.row[i]);
      row_root[i] = __builtin_sqrtf(t.row[i] + damping) / root2;
    }
    mix(*t.gain);
    t.cautious ? apply<true>(1 / bias1, col_mean, eps) : apply<false>(1 / bias1, col_mean, eps);
  }
};

}  // namespace

unsigned long eigenbasis_scratch(long r, long, long k) { return Step::scratch(r, k); }

void eigenbasis(const EigenbasisTask& task, const Numbers& numbers, void* scratch) {
  Step(task, numbers, scratch).run();
}

}  // namespace scao
