// Phase 1 and vectors: AdamW, and the factor of a matrix's small side.
#include "cpu_products.h"
#include "cpu_kernels.h"

namespace scao {
namespace {

long adamw_tile(long r) { return r > 16 ? 64 : r > 1 ? 128 : 2048; }

}  // namespace

unsigned long adamw_scratch(long r, long) {
  const long rp = round_up(r, 4);
  return 4 * (2 * rp * adamw_tile(r) + (r > 1 ? gram_size(rp) : 0)) + 256;
}

void adamw(const AdamwTask& task, const Numbers& n, void* scratch) {
  const long r = task.r, l = task.l, T = adamw_tile(r), rp = round_up(r, 4);
  Arena arena{static_cast<char*>(scratch)};
  float* tile = arena.take(rp * T);
  float* delta = arena.take(rp * T);
  float* sums = task.factor ? arena.take(gram_size(rp)) : nullptr;
  if (sums) clear(tile + r * T, (rp - r) * T);

  float scale = 1;
  for (int attempt = 0; attempt < 2; attempt++) {
    vi largest{};
    if (sums) clear(sums, gram_size(rp));
    for (long c = 0; c < l; c += T) {
      const long width = smaller(T, l - c), padded = round_up(width, VL);
      load_tile(from(task.grad, c), r, width, tile, T);
      if (attempt == 0) largest = largest_bits(tile, T, r, padded, largest);
      if (scale != 1.0f) scale_tile(tile, T, r, padded, scale);
      if (sums) gram(tile, T, rp, padded, sums);
    }
    if (attempt == 0 && !sanitize(largest, task.level, &scale)) return;
    if (scale == 1.0f) break;
  }
  const double count = static_cast<double>(*task.taken) + 1;
  *task.taken = static_cast<float>(count);
  if (sums) accumulate(task.factor, r, sums, static_cast<float>(1 - n.rho));

  const float first = static_cast<float>(1 - n.beta1), second = static_cast<float>(1 - n.beta2);
  const float mean_scale = static_cast<float>(1 / bias(n.beta1, count)), lr = static_cast<float>(n.lr);
  const float root_scale = static_cast<float>(1 / __builtin_sqrt(bias(n.beta2, count)));
  const float eps = static_cast<float>(n.eps), keep = static_cast<float>(1 - n.lr * n.weight_decay);
  for (long c = 0; c < l; c += T) {
    const long width = smaller(T, l - c), whole = width / VL * VL;
    load_tile(from(task.grad, c), r, width, tile, T);
    if (scale != 1.0f) scale_tile(tile, T, r, round_up(width, VL), scale);
    for (long i = 0; i < r; i++) {
      float *mean = task.exp_avg + i * l + c, *square = task.exp_avg_sq + i * l + c;
      const float* g = tile + i * T;
      float* out = delta + i * T;
      auto step = [&](vf grad, vf m, vf v, float* to_m, float* to_v, float* to) {
        m += first * (grad - m);
        v += second * (grad * grad - v);
        store(to_m, m);
        store(to_v, v);
        store(to, m * mean_scale / (root(v) * root_scale + eps));
      };
      for (long j = 0; j < whole; j += VL) {
        step(load(g + j), load(mean + j), load(square + j), mean + j, square + j, out + j);
      }
      if (whole < width) {
        float m[VL] = {}, v[VL] = {};
        for (long j = whole; j < width; j++) m[j - whole] = mean[j], v[j - whole] = square[j];
        step(load(g + whole), load(m), load(v), m, v, out + whole);
        for (long j = whole; j < width; j++) mean[j] = m[j - whole], square[j] = v[j - whole];
      }
    }
    apply_tile(from(task.param, c), r, width, delta, T, keep, lr);
  }
}

}  // namespace scao
