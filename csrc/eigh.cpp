// Eigendecompositions of VL small symmetric matrices at a time, one in each vector lane: Householder's reduction to
// tridiagonal form, then QL with implicit shifts, as G. H. Golub and C. F. Van Loan, Matrix Computations, have them. Entry
// (i, j) of an n x n stack is the vector at (i n + j) VL. A lane's results depend on its own matrix alone: what another
// lane still has to do reaches it as rotations by nothing.
//
// The glue at the end is LibTorch's stable ABI, so that one binary serves every torch from 2.10 on.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdlib>
#include <memory>

#include "state.h"

#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")

namespace scao {
namespace {

#if defined(__AVX2__)
constexpr int VL = 8;  // floats in a register
#else
constexpr int VL = 4;
#endif

typedef float vf __attribute__((vector_size(VL * 4)));
typedef int vi __attribute__((vector_size(VL * 4)));
typedef float vf_any __attribute__((vector_size(VL * 4), aligned(4), may_alias));

INLINE vf load(const float* p) { return *reinterpret_cast<const vf_any*>(p); }
INLINE void store(float* p, vf v) { *reinterpret_cast<vf_any*>(p) = v; }
INLINE vf splat(float x) { return x - vf{}; }
INLINE vi bits(vf v) { return reinterpret_cast<vi>(v); }

INLINE vf root(vf x) {
#if defined(__AVX2__)
  return __builtin_ia32_sqrtps256(x);
#else
  for (int i = 0; i < VL; i++) x[i] = __builtin_sqrtf(x[i]);
  return x;
#endif
}

// Matrices to decompose, and where the results go: NaN where one is not finite or does not converge.
struct Task {
  const float* matrices;  // [N, n, n]
  float* values;          // [N, n], rising
  float* vectors;         // [N, n, n]
  long n;
};

constexpr float EPSILON = 1.1920929e-7f;
// The largest entry of a matrix is brought to between 2^57 and 2^58, as much as leaves the squares of eigenvalues finite. What
// is below NEGLIGIBLE then is zero: reflections and rotations from numbers whose squares are not normal would not be
// orthogonal.
constexpr int LARGEST_EXPONENT = 57;
constexpr float NEGLIGIBLE = 1e-18f;
constexpr int MOST_SWEEPS = 30;  // for each eigenvalue

INLINE vf magnitude(vf x) { return reinterpret_cast<vf>(bits(x) & 0x7fffffff); }
INLINE vi integers(int x) { return x - vi{}; }
INLINE bool any(vi mask) {
  int found = 0;
  for (int i = 0; i < VL; i++) found |= mask[i];
  return found != 0;
}
INLINE vf at(const float* p, long i) { return load(p + i * VL); }
INLINE void put_at(float* p, long i, vf v) { store(p + i * VL, v); }

// y[i] = sum over j of a[i][j] x[j] for `rows` rows, `lda` vectors apart.
INLINE void multiply(const float* a, long lda, const float* x, float* y, long rows, long columns) {
  long i = 0;
  for (; i + 4 <= rows; i += 4) {
    vf acc[4] = {};
    for (long j = 0; j < columns; j++) {
      const vf right = at(x, j);
      UNROLL
      for (int ii = 0; ii < 4; ii++) acc[ii] += at(a, (i + ii) * lda + j) * right;
    }
    UNROLL
    for (int ii = 0; ii < 4; ii++) put_at(y, i + ii, acc[ii]);
  }
  for (; i < rows; i++) {
    vf acc{};
    for (long j = 0; j < columns; j++) acc += at(a, i * lda + j) * at(x, j);
    put_at(y, i, acc);
  }
}

// A = Q T Q^T, T and the columns of Q from the last to the first: the diagonal of T, its other diagonal, and Q in `vectors`.
// Where A falls from its beginning to its end, its small entries keep their precision: reflections then mix the small with
// the small, and QL, which begins where T is small, needs T the other way round. `a` is used up; `work` holds 3 n vectors.
inline void tridiagonalize(float* a, float* vectors, float* diagonal, float* off_diagonal, float* work, long n) {
  float *v = work, *w = work + n * VL, *scale = work + 2 * n * VL;
  for (long j = 0; j + 2 < n; j++) {
    const long m = n - j - 1;  // side of the rest
    float* rest = a + ((j + 1) * n + j + 1) * VL;
    vf below{};
    for (long i = 1; i < m; i++) {
      const vf x = at(a, (j + 1 + i) * n + j);
      below += x * x;
    }
    const vf first = at(a, (j + 1) * n + j), length = root(first * first + below);
    const vi idle = below <= NEGLIGIBLE * NEGLIGIBLE;  // nothing to be annihilated: no reflection
    const vf beta = idle ? first : (first > vf{} ? -length : length);
    const vf tau = idle ? vf{} : (beta - first) / beta, divisor = idle ? splat(1) : first - beta;
    put_at(off_diagonal, n - 2 - j, beta);
    put_at(scale, j, tau);
    put_at(v, 0, splat(1));
    for (long i = 1; i < m; i++) {
      const vf x = at(a, (j + 1 + i) * n + j) / divisor;
      put_at(v, i, x);
      put_at(a, (j + 1 + i) * n + j, x);  // kept for Q
    }
    multiply(rest, n, v, w, m, m);
    vf dot{};
    for (long i = 0; i < m; i++) dot += at(w, i) * at(v, i);
    dot *= 0.5f * tau;
    for (long i = 0; i < m; i++) put_at(w, i, tau * (at(w, i) - dot * at(v, i)));
    for (long i = 0; i < m; i++) {
      const vf vi_ = at(v, i), wi = at(w, i);
      float* row = rest + i * n * VL;
      for (long c = 0; c < m; c++) put_at(row, c, at(row, c) - vi_ * at(w, c) - wi * at(v, c));
    }
  }
  for (long i = 0; i < n; i++) put_at(diagonal, n - 1 - i, at(a, i * n + i));
  if (n > 1) put_at(off_diagonal, 0, at(a, (n - 1) * n + n - 2));
  put_at(off_diagonal, n - 1, vf{});
  for (long i = 0; i < n; i++) {
    for (long c = 0; c < n; c++) put_at(vectors, i * n + c, splat(i + c == n - 1));
  }
  for (long j = n - 3; j >= 0; j--) {
    const long m = n - j - 1;
    float *block = vectors + (j + 1) * n * VL, *sums = w;
    const vf tau = at(scale, j);
    for (long c = 0; c < m; c++) put_at(sums, c, at(block, c));  // the reflector's first entry is one
    for (long i = 1; i < m; i++) {
      const vf x = at(a, (j + 1 + i) * n + j);
      for (long c = 0; c < m; c++) put_at(sums, c, at(sums, c) + x * at(block, i * n + c));
    }
    for (long c = 0; c < m; c++) {
      const vf x = tau * at(sums, c);
      put_at(sums, c, x);
      put_at(block, c, at(block, c) - x);
    }
    for (long i = 1; i < m; i++) {
      const vf x = at(a, (j + 1 + i) * n + j);
      for (long c = 0; c < m; c++) put_at(block, i * n + c, at(block, i * n + c) - x * at(sums, c));
    }
  }
}

// The rotations of columns i and i + 1 for i from `last` - 1 down to `first`, in `rows` rows.
INLINE void rotate(float* vectors, const float* cosines, const float* sines, long n, long first, long last) {
  long k = 0;
  for (; k + 4 <= n; k += 4) {
    float* row = vectors + k * n * VL;
    vf carry[4];
    UNROLL
    for (int kk = 0; kk < 4; kk++) carry[kk] = at(row, kk * n + last);
    for (long i = last - 1; i >= first; i--) {
      const vf c = at(cosines, i), s = at(sines, i);
      UNROLL
      for (int kk = 0; kk < 4; kk++) {
        const vf x = at(row, kk * n + i);
        put_at(row, kk * n + i + 1, s * x + c * carry[kk]);
        carry[kk] = c * x - s * carry[kk];
      }
    }
    UNROLL
    for (int kk = 0; kk < 4; kk++) put_at(row, kk * n + first, carry[kk]);
  }
  for (; k < n; k++) {
    float* row = vectors + k * n * VL;
    vf carry = at(row, last);
    for (long i = last - 1; i >= first; i--) {
      const vf c = at(cosines, i), s = at(sines, i), x = at(row, i);
      put_at(row, i + 1, s * x + c * carry);
      carry = c * x - s * carry;
    }
    put_at(row, first, carry);
  }
}

// Eigenvalues of the tridiagonal matrices into `diagonal`, `vectors` times their eigenvectors. Lanes that have not
// converged: nonzero in the result. `work` holds 2 n vectors.
inline vi iterate(float* diagonal, float* off_diagonal, float* vectors, float* work, long n) {
  float *cosines = work, *sines = work + n * VL;
  const vf one = splat(1), zero{};
  for (long sweep = 0;; sweep++) {
    // The first block of each lane that is not diagonal yet: rows l to m.
    vi l = integers(static_cast<int>(n)), m = integers(0), inside{};
    vf dl{}, above{}, el{}, dm{};
    vf next = at(diagonal, n - 1);
    for (long i = n - 2; i >= 0; i--) {
      const vf d = at(diagonal, i), e = at(off_diagonal, i);
      const vi open = magnitude(e) > EPSILON * (magnitude(d) + magnitude(next)) + NEGLIGIBLE;
      const vi starts = open & ~inside, index = integers(static_cast<int>(i));
      put_at(off_diagonal, i, open ? e : zero);
      m = starts ? index + 1 : m;
      dm = starts ? next : dm;
      l = open ? index : l;
      dl = open ? d : dl;
      above = open ? next : above;
      el = open ? e : el;
      inside = open;
      next = d;
    }
    const vi left = l < static_cast<int>(n);
    if (!any(left)) return vi{};
    if (sweep == MOST_SWEEPS * n) return left;
    long first = n, last = 0;
    for (int lane = 0; lane < VL; lane++) {
      if (l[lane] < first) first = l[lane];
      if (left[lane] && m[lane] > last) last = m[lane];
    }
    const vf slope = (above - dl) / (left ? 2 * el : one), length = root(slope * slope + 1);
    vf g = dm - dl + el / (slope + (slope < zero ? -length : length));
    vf s = one, c = one, p{};
    for (long i = last - 1; i >= first; i--) {
      const vi index = integers(static_cast<int>(i)), active = (l <= index) & (index < m), ends = l == index;
      const vf e = at(off_diagonal, i), d = at(diagonal, i), behind = at(diagonal, i + 1);
      const vf f = s * e, b = c * e, square = f * f + g * g;
      const vi none = square <= NEGLIGIBLE * NEGLIGIBLE;  // the block falls apart here
      const vf r = none ? zero : root(square), length = none ? one : r, sine = none ? zero : f / length, cosine = none ? one : g / length;
      const vf pivot = behind - p, t = (d - pivot) * sine + 2 * cosine * b, shift = sine * t;
      put_at(cosines, i, active ? cosine : one);
      put_at(sines, i, active ? sine : zero);
      put_at(diagonal, i + 1, active ? pivot + shift : behind);
      put_at(off_diagonal, i + 1, active & (index + 1 != m) ? r : at(off_diagonal, i + 1));
      g = active ? cosine * t - b : g;
      p = active ? shift : p;
      s = active ? sine : s;
      c = active ? cosine : c;
      put_at(diagonal, i, ends ? d - p : d);
      put_at(off_diagonal, i, ends ? g : e);
    }
    rotate(vectors, cosines, sines, n, first, last);
  }
}

// Either sign is right; where it followed from the number of sweeps, a rounding could change it, and with it what codes in
// few bits make of the vectors. So the largest entry of each column becomes positive.
inline void settle_signs(float* vectors, long n) {
  for (long j = 0; j < n; j++) {
    vf largest{};
    for (long i = 0; i < n; i++) {
      const vf x = at(vectors, i * n + j);
      largest = magnitude(x) > magnitude(largest) ? x : largest;
    }
    const vi flip = (largest < vf{}) & static_cast<int>(0x80000000u);
    for (long i = 0; i < n; i++) put_at(vectors, i * n + j, reinterpret_cast<vf>(bits(at(vectors, i * n + j)) ^ flip) + vf{});
  }
}

// In which place each entry of x is, largest first, lane by lane; equal ones in the order in which they are.
INLINE void places(const float* x, long n, int* out) {
  for (long i = 0; i < n; i++) {
    const vf own = at(x, i);
    vi place{};
    for (long j = 0; j < n; j++) place -= j < i ? at(x, j) >= own : at(x, j) > own;  // a mask is -1
    store(reinterpret_cast<float*>(out) + i * VL, reinterpret_cast<vf>(place));
  }
}

unsigned long scratch_size(long n) { return 4 * VL * (2 * n * n + 9 * n); }

// Matrices [first, last) of the stack, at most VL, of which the lower halves are read. Eigenvalues rise; the largest entry of
// each vector is positive.
void eigh(const Task& t, long first, long last, void* scratch) {
  const long n = t.n, size = n * n, count = last - first;
  float *sorted = static_cast<float*>(scratch), *vectors = sorted + size * VL, *values = vectors + size * VL;
  float *diagonal = values + n * VL, *work = diagonal + 3 * n * VL, *off_diagonal = work + 3 * n * VL;
  int *order = reinterpret_cast<int*>(diagonal + n * VL), *rows = reinterpret_cast<int*>(work);
  // Lanes that are left over repeat the first matrix.
  const auto matrix = [&](long lane) { return t.matrices + (first + (lane < count ? lane : 0)) * size; };
  vi largest{};
  for (long lane = 0; lane < VL; lane++) {
    const float* a = matrix(lane);
    for (long i = 0; i < n; i++) {
      for (long j = 0; j <= i; j++) {
        int size_bits;
        __builtin_memcpy(&size_bits, a + i * n + j, 4);
        size_bits &= 0x7fffffff;
        largest[lane] = size_bits > largest[lane] ? size_bits : largest[lane];
      }
      diagonal[i * VL + lane] = __builtin_fabsf(a[i * n + i]);
    }
  }
  const vi bad = largest >= static_cast<int>(NOT_FINITE);
  // By a power of two, so that nothing is rounded; 2^127 is the largest.
  const vi wanted = LARGEST_EXPONENT + 2 * 127 - (((bad ? vi{} : largest) >> 23) & 255);
  const vf scale = reinterpret_cast<vf>((wanted < 254 ? wanted : integers(254)) << 23), unit = 1 / scale;
  places(diagonal, n, order);
  for (long lane = 0; lane < VL; lane++) {
    const float *a = matrix(lane), factor = scale[lane];
    for (long i = 0; i < n; i++) {
      const long to = order[i * VL + lane];
      for (long j = 0; j <= i; j++) {
        const long other = order[j * VL + lane];
        const float x = bad[lane] ? 0 : a[i * n + j] * factor;
        sorted[(to * n + other) * VL + lane] = sorted[(other * n + to) * VL + lane] = x;
      }
    }
  }
  tridiagonalize(sorted, vectors, values, off_diagonal, work, n);
  const vi failed = bad | iterate(values, off_diagonal, vectors, work, n);
  settle_signs(vectors, n);
  // The order of the eigenvalues takes the place of the other one, once the rows have gone back.
  for (long i = 0; i < n * VL; i++) rows[i] = order[i];
  places(values, n, order);
  const float nan = __builtin_nanf("");
  for (long lane = 0; lane < count; lane++) {
    float *to_values = t.values + (first + lane) * n, *to = t.vectors + (first + lane) * size;
    for (long j = 0; j < n; j++) {
      const long place = failed[lane] ? j : n - 1 - order[j * VL + lane];
      to_values[place] = failed[lane] ? nan : values[j * VL + lane] * unit[lane];
      for (long i = 0; i < n; i++) {
        to[i * n + place] = failed[lane] ? nan : vectors[(rows[i * VL + lane] * n + j) * VL + lane];
      }
    }
  }
}

struct Free {
  void operator()(void* p) const { std::free(p); }
};

using torch::stable::Tensor;

// Work is spread over torch's threads by groups of VL matrices.
std::tuple<Tensor, Tensor> symmetric_eigh(Tensor matrices) {
  STD_TORCH_CHECK(matrices.dim() == 3 && matrices.size(1) == matrices.size(2), "scao: matrices must be [N, n, n]");
  STD_TORCH_CHECK(matrices.scalar_type() == torch::headeronly::ScalarType::Float && matrices.is_contiguous(),
                  "scao: matrices must be contiguous float32");
  const int64_t count = matrices.size(0), n = matrices.size(1);
  Tensor values = torch::stable::new_empty(matrices, {count, n}), vectors = torch::stable::new_empty(matrices, {count, n, n});
  const Task task{static_cast<const float*>(matrices.data_ptr()), static_cast<float*>(values.data_ptr()),
                  static_cast<float*>(vectors.data_ptr()), n};
  torch::stable::parallel_for(0, (count + VL - 1) / VL, 1, [&](int64_t first, int64_t last) {
    const std::unique_ptr<void, Free> memory(std::aligned_alloc(64, (scratch_size(n) + 63) / 64 * 64));
    STD_TORCH_CHECK(memory != nullptr, "scao: no memory for ", scratch_size(n), " bytes of scratch");
    for (int64_t from = first * VL; from < last * VL && from < count; from += VL) {
      eigh(task, from, from + VL < count ? from + VL : count, memory.get());
    }
  });
  return {values, vectors};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(scao, CPU, m) { m.impl("symmetric_eigh", TORCH_BOX(&symmetric_eigh)); }

}  // namespace scao

extern "C" __attribute__((visibility("default"))) int scao_interface() { return SCAO_INTERFACE; }
