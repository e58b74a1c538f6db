// All of a refresh but the long side, for VL matrices at a time, one in each vector lane: both decompositions, (E4), (E6),
// (E7), (E8), and the moments in the new bases. The equations are those of scao_hf/rules/eigenbasis_refresh.py,
// in the same order and under the same names. An [m, n] stack is m n vectors.
#include "cpu_eigh.h"
#include "cpu_products.h"
#include "cpu_table.h"

namespace scao {
namespace SCAO_ISA {
namespace {

constexpr float LEAST_OUTSIDE = 0.3f, SOLID = 1e-6f, RANK_TOLERANCE = 1e-6f;  // as in scao_hf/rules/eigenbasis_refresh.py, scao_hf/linalg.py

INLINE vf most(vf a, vf b) { return a > b ? a : b; }

// A factor of a product: entry (i, j) is the vector at i `down` + j `right`.
struct Stack {
  const float* data;
  long down, right;
};

// out[m, n] = a[m, p] b[p, n].
__attribute__((noinline)) void product(const Stack& a, const Stack& b, float* out, long m, long n, long p) {
  constexpr int B = 4;
  for (long i = 0; i < m; i += B) {
    for (long j = 0; j < n; j += B) {
      const float *left[B], *right[B];
      UNROLL
      for (int ii = 0; ii < B; ii++) left[ii] = a.data + smaller(i + ii, m - 1) * a.down * VL;
      UNROLL
      for (int jj = 0; jj < B; jj++) right[jj] = b.data + smaller(j + jj, n - 1) * b.right * VL;
      vf acc[B][B] = {};
      const long step = a.right * VL, other = b.down * VL;
      for (long q = 0; q < p; q++) {
        vf x[B], y[B];
        UNROLL
        for (int ii = 0; ii < B; ii++) x[ii] = load(left[ii] + q * step);
        UNROLL
        for (int jj = 0; jj < B; jj++) y[jj] = load(right[jj] + q * other);
        UNROLL
        for (int ii = 0; ii < B; ii++) {
          UNROLL
          for (int jj = 0; jj < B; jj++) acc[ii][jj] += x[ii] * y[jj];
        }
      }
      for (long ii = 0; ii < smaller(B, m - i); ii++) {
        for (long jj = 0; jj < smaller(B, n - j); jj++) put_at(out, (i + ii) * n + j + jj, acc[ii][jj]);
      }
    }
  }
}

// (E3) without damping: a matrix made of rounding errors may be slightly indefinite.
void clamp(float* values, long n) {
  for (long i = 0; i < n; i++) put_at(values, i, most(at(values, i), vf{}));
}

}  // namespace

unsigned long bases_scratch(long r, long k) {
  const long h = k + r;
  return 4 * VL * (2 * h * h + 5 * r * h + 3 * k * h + 6 * r * r + 6 * r * k + k * k + 10 * h + decompose_size(h)) + 48 * 64;
}

void bases(const RefreshTask& t, long first, long last, void* scratch) {
  const long r = t.r, k = t.k, h = k + r;
  const Lanes lanes{first, last - first};
  Arena arena{static_cast<char*>(scratch)};
  const auto take = [&](long vectors) { return arena.take(vectors * VL); };
  const vf zero{}, one = splat(1), tiny = splat(TINY), decay = splat(t.decay);
  vf bias1 = one, bias2 = one, plain = one;
  vi taken{};
  for (long lane = 0; lane < lanes.count; lane++) {
    const double count = t.taken[first + lane];
    taken[lane] = t.finite[first + lane] > 0 ? -1 : 0;
    bias1[lane] = static_cast<float>(bias(t.beta1, count));
    bias2[lane] = static_cast<float>(bias(t.beta2, count));
    plain[lane] = plain_scale(t.activity ? t.activity + 2 * (first + lane) : nullptr, t.rho, count, bias2[lane], t.l);
  }

  float *gram = take(h * h), *old_basis = take(r * r), *factor = take(r * r), *factor_values = take(r), *basis = take(r * r);
  float* work = take(decompose_size(h));
  pack(t.gram, lanes, h * h, gram);
  pack(t.vectors, lanes, r * r, old_basis);
  pack(t.factor, lanes, r * r, factor);
  float* plain_row = take(r);
  vf damping{};  // (U14)
  for (long i = 0; i < r; i++) {
    put_at(plain_row, i, at(factor, i * r + i) * plain);
    damping += DAMPING * at(plain_row, i);
  }
  vi failed = decompose(factor, r, r, factor_values, basis, work);
  clamp(factor_values, r);

  // (E6)
  float *inside_avg = take(r * k), *lift = take(r * h), *weights = take(k), *values = take(k);
  float *product_ = take(r * h), *block = take(r * h), *whole = take(h * h), *spectrum = take(h), *mixing = take(h * k);
  pack(t.inside_avg, lanes, r * k, inside_avg);
  pack(t.long_values, lanes, k, values);
  product({old_basis, r, 1}, {inside_avg, k, 1}, block, r, k, r);
  for (long i = 0; i < r; i++) {
    for (long c = 0; c < k; c++) put_at(lift, i * h + c, at(block, i * k + c));
    for (long c = 0; c < r; c++) put_at(lift, i * h + k + c, at(old_basis, i * r + c));
  }
  for (long c = 0; c < k; c++) put_at(weights, c, root(decay * at(values, c)));
  const vf inverse = one / bias1;
  product({lift, h, 1}, {gram, h, 1}, product_, r, h, h);
  product({product_, h, 1}, {lift, 1, h}, block, r, r, h);
  for (long i = 0; i < k; i++) {
    for (long c = 0; c < k; c++) put_at(whole, i * h + c, at(weights, i) * at(weights, c) * at(gram, i * h + c));
  }
  for (long i = 0; i < r; i++) {
    for (long c = 0; c < k; c++) {
      const vf x = inverse * at(product_, i * h + c) * at(weights, c);
      put_at(whole, (k + i) * h + c, x);
      put_at(whole, c * h + k + i, x);
    }
    for (long c = 0; c < r; c++) put_at(whole, (k + i) * h + k + c, inverse * inverse * at(block, i * r + c));
  }
  failed |= decompose(whole, h, k, spectrum, mixing, work);
  clamp(spectrum, h);
  float *long_basis = take(k * h), *across = take(k * h);
  product({mixing + k * k * VL, 1, k}, {lift, h, 1}, long_basis, k, h, r);
  const vf least = SOLID * at(spectrum, 0);
  vf sum_of_values{}, lost{};
  for (long m = 0; m < k; m++) {
    const vf kept = at(spectrum, m);
    const vi solid = kept > least;
    const vf scale = solid ? one / root(most(kept, tiny)) : zero;
    for (long c = 0; c < h; c++) {
      const vf own = c < k ? at(mixing, c * k + m) * at(weights, c) : zero;
      put_at(long_basis, m * h + c, scale * (own + inverse * at(long_basis, m * h + c)));
    }
    put_at(values, m, solid ? kept : zero);
    sum_of_values += at(values, m);
  }
  for (long m = k; m < h; m++) lost += at(spectrum, m);

  // (E4)
  float *tail = take(1), *mask = take(k), *old_mask = take(k), *share = take(k), *unseen = take(k);
  pack(t.long_tail, lanes, 1, tail);
  pack(t.mask, lanes, k, old_mask);
  put_at(tail, 0, decay * at(tail, 0) + lost);
  const vf total = sum_of_values + at(tail, 0), threshold = (1 - t.epsilon_sparse) * total * (1 - RANK_TOLERANCE);
  vi rank = integers(1);
  vf running{};
  for (long m = 0; m < k; m++) {
    running += at(values, m);
    rank -= running < threshold;  // a mask is -1
  }
  rank = larger(rank, integers(static_cast<int>(smaller(t.k_min, k))));
  const int most_rank = static_cast<int>(smaller(t.k_max, k));
  vf held{};
  for (long m = 0; m < k; m++) {
    const vi on = (static_cast<int>(m) < rank) & (static_cast<int>(m) < integers(most_rank)) & (at(values, m) > zero);
    put_at(mask, m, on ? one : zero);
    // (E8)
    const vf x = on ? at(values, m) / most(total, tiny) : zero;
    put_at(share, m, x);
    held += x;
  }
  const vf spread = (one - most(one - held, splat(LEAST_OUTSIDE))) / most(held, tiny);

  // The share of each new direction that lay in the old ones.
  float* overlap = take(k * k);
  product({long_basis, h, 1}, {gram, h, 1}, across, k, h, h);
  for (long m = 0; m < k; m++) {
    vf seen{};
    for (long c = 0; c < k; c++) {
      const vf x = at(across, m * h + c) * at(mask, m) * at(old_mask, c);
      put_at(overlap, m * k + c, x * x);
      seen += x * x;
    }
    const vf rest = most(at(mask, m) - seen, zero);
    put_at(unseen, m, rest < one ? rest : one);
  }

  // (E7)
  float *moved = take(r * k), *old_square = take(r * k), *row = take(r), *old_row = take(r), *between = take(r * r);
  float *rotated = take(r * h), *inside = take(r * k), *inside_sq = take(r * k), *outside = take(r * h);
  pack(t.inside_sq, lanes, r * k, old_square);
  pack(t.row, lanes, r, old_row);
  product({basis, 1, r}, {old_basis, r, 1}, between, r, r, r);
  for (long i = 0; i < r * r; i++) put_at(between, i, at(between, i) * at(between, i));
  product({between, r, 1}, {old_row, 1, 1}, row, r, 1, r);
  product({between, r, 1}, {old_square, k, 1}, moved, r, k, r);
  product({basis, 1, r}, {lift, h, 1}, rotated, r, h, r);
  product({rotated, h, 1}, {across, 1, h}, inside, r, k, h);
  for (long i = 0; i < r; i++) {
    for (long m = 0; m < k; m++) put_at(inside, i * k + m, at(inside, i * k + m) * at(mask, m));
  }
  product({moved, k, 1}, {overlap, 1, k}, inside_sq, r, k, k);
  product({inside, k, 1}, {long_basis, h, 1}, outside, r, h, k);
  for (long i = 0; i < r * h; i++) put_at(outside, i, at(rotated, i) - at(outside, i));
  float* mean_square = take(k);
  for (long m = 0; m < k; m++) put_at(mean_square, m, zero);
  vf norm{};
  const vf slope = bias1 / root(bias2), shift = bias1 * t.eps;
  for (long i = 0; i < r; i++) {
    vf energy = static_cast<float>(t.l) * at(row, i);
    for (long m = 0; m < k; m++) energy += at(moved, i * k + m);
    for (long m = 0; m < k; m++) {
      const vf mean = at(inside, i * k + m);
      const vf square = at(inside_sq, i * k + m) + energy * (at(share, m) * spread) * at(unseen, m);
      put_at(inside_sq, i * k + m, square);
      put_at(mean_square, m, at(mean_square, m) + square / static_cast<float>(r));
      const vf step = bounded(mean / (root(square + damping) * slope + shift));  // (U6)
      norm += step * step;
    }
  }

  for (long lane = 0; lane < lanes.count; lane++) {
    t.failed[first + lane] = taken[lane] && failed[lane] ? 1 : 0;
    t.bias1[first + lane] = bias1[lane];
    t.bias2[first + lane] = bias2[lane];
    t.inside_norm[first + lane] = norm[lane];
    if (failed[lane]) taken[lane] = 0;
    t.refreshed[first + lane] = taken[lane] ? 1 : 0;
  }
  unpack(basis, lanes, taken, r * r, r * r, t.vectors);
  unpack(factor_values, lanes, taken, r, r, t.factor_values);
  unpack(values, lanes, taken, k, k, t.long_values);
  unpack(tail, lanes, taken, 1, 1, t.long_tail);
  unpack(mask, lanes, taken, k, k, t.mask);
  unpack(row, lanes, taken, r, r, t.row);
  unpack(inside_sq, lanes, taken, r * k, r * k, t.inside_sq);
  unpack(inside, lanes, taken, r * k, r * k, t.inside_avg);
  unpack(plain_row, lanes, taken, r, r, t.plain_row);
  unpack(mean_square, lanes, taken, k, k, t.mean_square);
  const long stride = (k + 2 * r) * h;
  unpack(outside, lanes, taken, r * h, stride, t.coefficients);
  unpack(long_basis, lanes, taken, k * h, stride, t.coefficients + r * h);
  unpack(lift, lanes, taken, r * h, stride, t.coefficients + h * h);
}

}  // namespace SCAO_ISA
}  // namespace scao
