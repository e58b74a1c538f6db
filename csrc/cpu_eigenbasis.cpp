// A step of one matrix in phase 2, in three passes over its columns, vector lanes along the long side. Between the passes
// lie the sums over all columns that the next one needs: P and (E1), then the second moments of the rows. What is read is
// unpacked, transposed or divided a tile ahead and written a tile behind, in portions between the products: those wait for
// multiplications, and the portions fill the slots of the processor that they leave.
#include "cpu_products.h"
#include "cpu_table.h"

namespace scao {
namespace SCAO_ISA {
namespace {

constexpr long T = 128;  // columns of a tile of the first pass; the others work on COLS
// Bytes of a matrix with what belongs to it that the second-level cache keeps from one pass to the next.
constexpr long KEPT_BYTES = 600000, BYTES_PER_ENTRY = 10;
constexpr long AHEAD = 2 * COLS;  // how far ahead of the computation the last two passes ask for memory, in columns

// Ask for the line at p, to be read and perhaps written.
INLINE void fetch(const void* p) { __builtin_prefetch(p, 0, 3); }
// R: the small side where it is known when this is compiled, or 0.
template <int R>
struct Step {
  static constexpr int RB = R ? (R < ROW_BLOCK ? R : ROW_BLOCK) : ROW_BLOCK;
  const EigenbasisTask& t;
  const Numbers& n;
  const long r, l, k, rp, kp, kw;
  const View long_basis;
  const bool big;  // whether every pass has to fetch everything again
  float scale = 1;  // of the gradient, (U3)
  // Two of each: of the tile that is worked on, and of the next (of the last, for results).
  float *grads[2];    // G, [rp][]
  float *bases[2];    // U^T, [kp][]
  float *tiles[2];    // the residual's direction, [rp][]
  float *results[2];  // [rp][]
  float *roots[2];    // of col
  float *gram_sums, *cross_sums, *basis_t, *product_sums, *kept, *mixed, *row_sums, *row_root;

  Step(const EigenbasisTask& task, const Numbers& numbers, void* scratch)
      : t(task), n(numbers), r(R ? R : task.r), l(task.l), k(used(task)), rp(R ? R : round_up(r, ROW_BLOCK)),
        kp(round_up(k, 4)), kw(round_up(t.k, VL)), long_basis{const_cast<void*>(t.long_vectors), l, 1, t.long_dtype},
        big(r * l * BYTES_PER_ENTRY > KEPT_BYTES) {
    Arena arena{static_cast<char*>(scratch)};
    for (int i = 0; i < 2; i++) {
      grads[i] = arena.take(rp * T);
      bases[i] = arena.take(kp * T);
      tiles[i] = arena.take(rp * COLS);
      results[i] = arena.take(rp * COLS);
      roots[i] = arena.take(COLS);
    }
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
    return 4 * (2 * ((rp + kp) * T + (2 * rp + 1) * COLS) + gram_size(rp) + cross_size(rp, kp) + r * rp +
                (rp + r) * kw + kp * rp + rp * (VL + 1)) + 20 * 64;
  }

  // Columns of U up to the last one that is kept.
  static long used(const EigenbasisTask& task) {
    long k = task.k;
    while (k > 0 && task.mask[k - 1] == 0) k--;
    return k;
  }

  // G and U of the tile of COLUMNS columns from `first`, in portions, where they are of the usual form: U in bfloat16 and G
  // in float32, stored by rows or by columns. Memory is asked for `ahead` columns further on. Everything is held by value:
  // what lay behind a pointer would be loaded again after every store.
  template <long COLUMNS, bool GRAD, bool SEARCH>
  struct Input {
    const unsigned short* from_basis;
    const float* from_grad;
    float *basis, *grad;
    const long l, stride, ahead;
    const bool across;
    long rows_of_basis, rows_or_columns;  // that are left to be read
    long at_basis = 0, at_grad = 0;

    INLINE_MEMBER Input(const Step& step, long first, int slot, long ahead)
        : from_basis(static_cast<const unsigned short*>(step.t.long_vectors) + first),
          from_grad(static_cast<const float*>(step.t.grad.data) + first * step.t.grad.col_stride), basis(step.bases[slot]),
          grad(step.grads[slot]), l(step.l), stride(is_across(step.t.grad) ? step.t.grad.row_stride : step.t.grad.col_stride),
          ahead(first + ahead + COLUMNS > step.l ? 0 : ahead), across(is_across(step.t.grad)),
          rows_of_basis(step.usual(first, COLUMNS) ? step.k : 0),
          rows_or_columns(!GRAD || !step.usual_grad(first, COLUMNS) ? 0 : across ? step.r : COLUMNS) {}

    // What is due when `done` of `of` products have been made.
    INLINE_MEMBER void some(long done, long of, vi* largest) {
      for (; at_basis * of < rows_of_basis * done; at_basis++, from_basis += l, basis += COLUMNS) {
        UNROLL
        for (long c = 0; c < COLUMNS; c += VL) store(basis + c, get_vector<BF16>(from_basis, c));
        UNROLL
        for (long c = 0; c < COLUMNS; c += 32) fetch(from_basis + ahead + c);
      }
      if (!GRAD) return;
      if (across) {
        for (; at_grad * of < rows_or_columns * done; at_grad++, from_grad += stride, grad += COLUMNS) {
          UNROLL
          for (long c = 0; c < COLUMNS; c += VL) {
            const vf x = load(from_grad + c);
            if (SEARCH) *largest = larger(*largest, bits(x) & 0x7fffffff);
            store(grad + c, x);
          }
          UNROLL
          for (long c = 0; c < COLUMNS; c += 16) fetch(from_grad + ahead + c);
        }
      } else {
        for (; at_grad * of < rows_or_columns * done; at_grad += VL, from_grad += VL * stride, grad += VL) {
          for (long i = 0; i < (R ? R : 1); i += VL) {
            vf x[VL];
            UNROLL
            for (int j = 0; j < VL; j++) x[j] = load(from_grad + j * stride + i);
            UNROLL
            for (int j = 0; j < VL && SEARCH; j++) *largest = larger(*largest, bits(x[j]) & 0x7fffffff);
            transpose(x);
            UNROLL
            for (int j = 0; j < VL; j++) store(grad + (i + j) * COLUMNS, x[j]);
            UNROLL
            for (int j = 0; j < VL; j++) fetch(from_grad + (j + ahead) * stride + i);
          }
        }
      }
    }
  };

  bool usual(long first, long columns) const {
    return first + columns <= l && t.long_dtype == BF16;
  }
  bool usual_grad(long first, long columns) const {
    return usual(first, columns) && scale == 1.0f && (is_across(t.grad) || (is_tall(t.grad) && R && R % VL == 0));
  }

  // What `Input` leaves out.
  __attribute__((noinline)) void rest(long first, long columns, int slot, bool with_grad, vi* largest) const {
    if (first >= l) return;
    const long width = smaller(columns, l - first);
    if (!usual(first, columns)) load_tile(long_basis, first, k, width, bases[slot], columns);
    if (!with_grad || usual_grad(first, columns)) return;
    float* tile = grads[slot];
    load_tile(t.grad, first, r, width, tile, columns);
    if (scale != 1.0f) scale_tile(tile, columns, r, round_up(width, VL), scale);
    if (largest) *largest = largest_bits(tile, columns, r, round_up(width, VL), *largest);
  }

  template <long COLUMNS, bool GRAD, bool SEARCH>
  void all(long first, int slot, long ahead, vi* largest) const {
    Input<COLUMNS, GRAD, SEARCH>(*this, first, slot, ahead).some(1, 1, largest);
    rest(first, COLUMNS, slot, GRAD, SEARCH ? largest : nullptr);
  }

  static bool is_across(const View& view) { return view.dtype == F32 && view.col_stride == 1; }
  static bool is_tall(const View& view) { return view.dtype == F32 && view.row_stride == 1 && view.col_stride != 1; }

  // Rows beyond the matrix, which no piece fills.
  void clear_rows(long columns) {
    for (int i = 0; i < 2; i++) {
      clear(grads[i] + r * columns, (rp - r) * columns);
      clear(bases[i] + k * columns, (kp - k) * columns);
    }
  }

  // Sums of G G^T and of G U. False where the gradient is not finite.
  bool gather() {
    const long rp = R ? R : this->rp, kp = this->kp, l = this->l, blocks = rp / 4 * (rp / 4 + 1) / 2 + rp / 4 * (kp / 4);
    clear_rows(T);
    for (int attempt = 0; attempt < 2; attempt++) {
      vi largest{};
      clear(gram_sums, gram_size(rp));
      clear(cross_sums, cross_size(rp, kp));
      all<T, true, true>(0, 0, T, &largest);
      int slot = 0;
      for (long c = 0; c < l; c += T, slot = 1 - slot) {
        const long padded = round_up(smaller(T, l - c), VL);
        Input<T, true, true> next(*this, c + T, 1 - slot, T);
        const float *g = grads[slot], *u = bases[slot];
        float *sums = gram_sums, *crossed = cross_sums;
        long done = 0;
        for (long i = 0; i < rp; i += 4) {
          for (long j = 0; j < i + 4 + kp; j += 4) {
            const bool own = j < i + 4;
            const float* other = own ? g + j * T : u + (j - i - 4) * T;
            float*& to = own ? sums : crossed;
            gram_block(g + i * T, T, other, T, padded, to);
            to += 16 * VL;
            next.some(++done, blocks, &largest);
          }
        }
        rest(c + T, T, 1 - slot, true, &largest);
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

  // The residual of a tile, Q^T G - P U^T, and its moments. Where the tile is WHOLE it never leaves the registers.
  template <bool WHOLE>
  INLINE_MEMBER void residual_tile(long c, int slot, float first, vf* energy) {
    const long rp = R ? R : this->rp, r = R ? R : this->r, l = this->l, k = this->k, width = smaller(COLS, l - c);
    const long ahead = c + AHEAD + COLS <= l ? AHEAD : 0;
    const float *g = grads[slot], *u = bases[slot], *left = basis_t, *other = mixed;
    float *mean = t.exp_avg + c, *sums = row_sums, *result = results[0];
    Input<COLS, true, false> next(*this, c + COLS, 1 - slot, big ? AHEAD - COLS : 0);
    for (long i = 0; i < rp; i += RB, mean += RB * l, sums += RB * VL) {
      product<RB>({left + i, rp, g, COLS, r}, {other + i, rp, u, COLS, k}, [&](const vf(&acc)[RB][COL_BLOCK]) {
        UNROLL
        for (int ii = 0; ii < RB; ii++) {
          vf row = load(sums + ii * VL);
          UNROLL
          for (int cc = 0; cc < COL_BLOCK; cc++) {
            const vf x = acc[ii][cc], square = x * x;
            row += square;
            energy[cc] += square;
            if (WHOLE) {
              float* at = mean + ii * l + cc * VL;
              const vf m = load(at);
              store(at, m + first * (x - m));
              if (cc * VL % 16 == 0) fetch(at + ahead);
            } else {
              store(result + ii * COLS + cc * VL, x);
            }
          }
          store(sums + ii * VL, row);
        }
      });
      if (!WHOLE) {
        for (long ii = 0; ii < smaller(RB, r - i); ii++) {
          for (long j = 0; j < width; j++) mean[ii * l + j] += first * (result[ii * COLS + j] - mean[ii * l + j]);
        }
      }
      next.some(i + RB, rp, nullptr);
    }
    rest(c + COLS, COLS, 1 - slot, true, nullptr);
  }

  void residual(float first, float second, vf* col_total) {
    clear(row_sums, rp * VL);
    clear_rows(COLS);
    int slot = 0;
    all<COLS, true, false>(0, 0, 0, nullptr);
    for (long c = 0; c < l; c += COLS, slot = 1 - slot) {
      const long width = smaller(COLS, l - c), whole = width / VL * VL;
      vf energy[COL_BLOCK] = {};
      R && width == COLS ? residual_tile<R != 0>(c, slot, first, energy) : residual_tile<false>(c, slot, first, energy);
      float *col = t.col + c, means[COLS];
      UNROLL
      for (int cc = 0; cc < COL_BLOCK; cc++) store(means + cc * VL, energy[cc] / static_cast<float>(r));
      for (long j = 0; j < whole; j += VL) {
        vf v = load(col + j);
        v += second * (load(means + j) - v);
        store(col + j, v);
        *col_total += v;
      }
      for (long j = whole; j < width; j++) {
        col[j] += second * (means[j] - col[j]);
        (*col_total)[0] += col[j];
      }
    }
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

  // The residual's direction in the tile of COLS columns from c, in portions.
  struct Direction {
    const float *mean, *roots, *row_root;
    float* out;
    const float mean_scale, eps;
    const long l, ahead, rows;
    long at = 0;

    INLINE_MEMBER Direction(const Step& step, long c, int slot, float mean_scale, float col_mean, float eps)
        : mean(step.t.exp_avg + c), roots(step.roots[slot]), row_root(step.row_root), out(step.tiles[slot]),
          mean_scale(mean_scale), eps(eps), l(step.l), ahead(step.big && c + AHEAD <= step.l ? AHEAD - COLS : 0),
          rows(c + COLS <= step.l ? step.r : 0) {
      if (rows == 0) return;
      UNROLL
      for (long j = 0; j < COLS; j += VL) store(step.roots[slot] + j, root(load(step.t.col + c + j) / col_mean + DAMPING));
    }

    INLINE_MEMBER void some(long done, long of) {
      for (; at * of < rows * done; at++, mean += l, out += COLS) {
        const vf own = splat(row_root[at]);
        UNROLL
        for (long j = 0; j < COLS; j += VL) {
          store(out + j, bounded(load(mean + j) * mean_scale / (load(roots + j) * own + eps)));
        }
        UNROLL
        for (long j = 0; j < COLS; j += 16) fetch(mean + ahead + j);
      }
    }
  };

  // ... in a tile at the end that is not whole.
  __attribute__((noinline)) void last_direction(long c, int slot, float mean_scale, float col_mean, float eps) const {
    if (c >= l || c + COLS <= l) return;
    const long width = l - c;
    for (long j = 0; j < COLS; j++) roots[slot][j] = j < width ? __builtin_sqrtf(t.col[c + j] / col_mean + DAMPING) : 0;
    for (long i = 0; i < r; i++) {
      const float* mean = t.exp_avg + i * l + c;
      float* out = tiles[slot] + i * COLS;
      for (long j = 0; j < COLS; j++) {
        out[j] = j < width ? bounded(mean[j] * mean_scale / (roots[slot][j] * row_root[i] + eps)) : 0;
      }
    }
  }

  // The step of a tile, `result` without its mask, into a parameter that lies by columns, as does the gradient, in portions.
  template <bool CAUTIOUS>
  struct Output {
    const float *result, *grad;
    float* param;
    const long grad_stride, param_stride, ahead, columns;
    const float keep, lr;
    long at = 0;

    INLINE_MEMBER Output(const Step& step, long c, int slot, float keep, float lr)
        : result(step.results[slot]), grad(static_cast<const float*>(step.t.grad.data) + c * step.t.grad.col_stride),
          param(static_cast<float*>(step.t.param.data) + c * step.t.param.col_stride), grad_stride(step.t.grad.col_stride),
          param_stride(step.t.param.col_stride), ahead(c + AHEAD + 2 * COLS <= step.l ? AHEAD + COLS : 0),
          columns(step.is_tall(c) ? COLS : 0), keep(keep), lr(lr) {}

    INLINE_MEMBER void some(long done, long of, Agreement* agreed) {
      for (; at * of < columns * done; at += VL, result += VL) {
        for (long i = 0; i < (R ? R : 1); i += VL) {
          vf x[VL];
          UNROLL
          for (int j = 0; j < VL; j++) x[j] = load(result + (i + j) * COLS);
          transpose(x);
          UNROLL
          for (int j = 0; j < VL; j++) {
            const float* g = grad + j * grad_stride + i;
            float* to = param + j * param_stride + i;
            if (CAUTIOUS) {
              x[j] = agreeing(x[j], load(g), agreed);
              fetch(g + ahead * grad_stride);
            }
            store(to, load(to) * keep - lr * x[j]);
            fetch(to + ahead * param_stride);
          }
        }
        grad += VL * grad_stride, param += VL * param_stride;
      }
    }
  };

  bool is_tall(long c) const {
    return c >= 0 && c + COLS <= l && R && R % VL == 0 && is_tall(t.param) && is_tall(t.grad);
  }

  // What `Output` leaves out.
  template <bool CAUTIOUS>
  __attribute__((noinline)) void write(long c, int slot, float keep, float lr, Agreement* agreed) const {
    if (c < 0 || is_tall(c)) return;
    const long width = smaller(COLS, l - c);
    float *result = results[slot], *g = grads[slot];
    if (CAUTIOUS) {
      load_tile(t.grad, c, r, width, g, COLS);
      for (long i = 0; i < r * COLS; i += VL) store(result + i, agreeing(load(result + i), load(g + i), agreed));
    }
    apply_tile(t.param, c, r, width, result, COLS, keep, lr);
  }

  // The direction of a tile and (U16), and the parameter: with the products still in registers where DIRECT, as gradient
  // and parameter lie by rows, else the tile `behind`.
  template <bool CAUTIOUS, bool DIRECT>
  INLINE_MEMBER void apply_tile_at(long c, long behind, int slot, float keep, float lr, float mean_scale, float col_mean,
                                   float eps, Agreement* agreed) {
    const long rp = R ? R : this->rp, r = R ? R : this->r, k = this->k;
    const float *d = tiles[slot], *u = bases[slot], *left = basis_t, *other = mixed;
    const long grad_stride = t.grad.row_stride, param_stride = t.param.row_stride;
    const long ahead = c + AHEAD + COLS <= l ? AHEAD : 0;
    const float* grad = static_cast<const float*>(t.grad.data) + c;
    float *param = static_cast<float*>(t.param.data) + c, *result = results[slot];
    Input<COLS, false, false> next(*this, c + COLS, 1 - slot, big ? AHEAD - COLS : 0);
    Direction direction(*this, c + COLS, 1 - slot, mean_scale, col_mean, eps);
    Output<CAUTIOUS> output(*this, behind, 1 - slot, keep, lr);
    for (long i = 0; i < rp; i += RB, grad += RB * grad_stride, param += RB * param_stride, result += RB * COLS) {
      product<RB>({left + i, rp, d, COLS, r}, {other + i, rp, u, COLS, k}, [&](const vf(&acc)[RB][COL_BLOCK]) {
        UNROLL
        for (int ii = 0; ii < RB; ii++) {
          UNROLL
          for (int cc = 0; cc < COL_BLOCK; cc++) {
            vf x = acc[ii][cc];
            if (DIRECT) {
              const float* g = grad + ii * grad_stride + cc * VL;
              float* at = param + ii * param_stride + cc * VL;
              if (CAUTIOUS) x = agreeing(x, load(g), agreed);
              store(at, load(at) * keep - lr * x);
              if (cc * VL % 16 == 0) {
                if (CAUTIOUS) fetch(g + ahead);
                fetch(at + ahead);
              }
            } else {
              store(result + ii * COLS + cc * VL, x);
            }
          }
        }
      });
      next.some(i + RB, rp, nullptr);
      direction.some(i + RB, rp);
      output.some(i + RB, rp, agreed);
    }
    rest(c + COLS, COLS, 1 - slot, false, nullptr);
    last_direction(c + COLS, 1 - slot, mean_scale, col_mean, eps);
    write<CAUTIOUS>(behind, 1 - slot, keep, lr, agreed);
  }

  // The direction, (U16), and the parameter.
  template <bool CAUTIOUS>
  void apply(float mean_scale, float col_mean, float eps) {
    const float keep = static_cast<float>(1 - n.lr * n.weight_decay);
    const float least = *t.agreement > 0.5f ? *t.agreement : 0.5f;
    const float lr = static_cast<float>(n.lr) / (CAUTIOUS ? least : 1.0f);
    const bool direct = R && is_across(t.param) && is_across(t.grad);
    for (int i = 0; i < 2; i++) clear(tiles[i] + r * COLS, (rp - r) * COLS);
    all<COLS, false, false>(0, 0, 0, nullptr);
    Direction(*this, 0, 0, mean_scale, col_mean, eps).some(1, 1);
    last_direction(0, 0, mean_scale, col_mean, eps);
    Agreement agreed;
    long behind = -1;
    int slot = 0;
    for (long c = 0; c < l; c += COLS, slot = 1 - slot) {
      if (direct && c + COLS <= l) {
        apply_tile_at<CAUTIOUS, R != 0>(c, behind, slot, keep, lr, mean_scale, col_mean, eps, &agreed);
      } else {
        apply_tile_at<CAUTIOUS, false>(c, behind, slot, keep, lr, mean_scale, col_mean, eps, &agreed);
        behind = c;
      }
    }
    Output<CAUTIOUS>(*this, behind, 1 - slot, keep, lr).some(1, 1, &agreed);
    write<CAUTIOUS>(behind, 1 - slot, keep, lr, &agreed);
    if (agreed.counted) {
      *t.agreement = static_cast<float>(static_cast<double>(agreed.agreed) / static_cast<double>(agreed.counted));
    }
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

template <int R>
void step(const EigenbasisTask& task, const Numbers& numbers, void* scratch) {
  Step<R>(task, numbers, scratch).run();
}

}  // namespace

unsigned long eigenbasis_scratch(long r, long, long k) { return Step<0>::scratch(r, k); }

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
