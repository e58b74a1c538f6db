// Eigendecompositions of a stack of small symmetric matrices.
#include "cpu_eigh.h"

#include "cpu_table.h"

namespace scao {
namespace SCAO_ISA {

namespace {

// The power of two in a float's bits; the least normal one for numbers below it.
float power_of_two_below(unsigned bits) {
  bits &= NOT_FINITE;
  bits = bits ? bits : 0x00800000u;
  float x;
  __builtin_memcpy(&x, &bits, 4);
  return x;
}

}  // namespace

unsigned long eigh_scratch(long n) { return 4 * (2 * n * n + n) * VL + 4 * eigh_size(n); }

// Matrices [first, last) of the stack, of which the lower halves are read.
void eigh(const EighTask& t, long first, long last, void* scratch) {
  const long n = t.n;
  float *a = static_cast<float*>(scratch), *vectors = a + n * n * VL, *values = vectors + n * n * VL;
  float* rest = values + n * VL;
  for (long matrix = first; matrix < last; matrix += VL) {
    const long count = smaller(VL, last - matrix);
    float unit[VL];
    bool finite[VL];
    for (long lane = 0; lane < VL; lane++) {
      const float* from = t.matrices + (matrix + (lane < count ? lane : 0)) * n * n;
      unsigned largest = 0;
      for (long i = 0; i < n; i++) {
        for (long j = 0; j <= i; j++) {
          unsigned u;
          __builtin_memcpy(&u, from + i * n + j, 4);
          u &= 0x7fffffffu;
          largest = u > largest ? u : largest;
        }
      }
      finite[lane] = largest < NOT_FINITE;
      unit[lane] = power_of_two_below(finite[lane] ? largest : 0);
      const float factor = finite[lane] ? 1 / unit[lane] : 0;
      for (long i = 0; i < n; i++) {
        for (long j = 0; j <= i; j++) {
          // The last rows first: QL converges sooner where a matrix falls from its end to its beginning.
          const float x = finite[lane] ? from[i * n + j] * factor : 0;
          a[((n - 1 - i) * n + n - 1 - j) * VL + lane] = a[((n - 1 - j) * n + n - 1 - i) * VL + lane] = x;
        }
      }
    }
    const vi failed = eigh_lanes(a, vectors, values, rest, n);
    for (long lane = 0; lane < count; lane++) {
      float* to = t.values + (matrix + lane) * n;
      float* out = t.vectors + (matrix + lane) * n * n;
      if (!finite[lane] || failed[lane]) {
        for (long i = 0; i < n; i++) to[i] = __builtin_nanf("");
        for (long i = 0; i < n * n; i++) out[i] = __builtin_nanf("");
        continue;
      }
      for (long j = 0; j < n; j++) {
        const float value = values[j * VL + lane];
        long place = 0;
        for (long other = 0; other < n; other++) {
          const float x = values[other * VL + lane];
          place += x < value || (x == value && other < j);
        }
        to[place] = value * unit[lane];
        for (long i = 0; i < n; i++) out[i * n + place] = vectors[((n - 1 - i) * n + j) * VL + lane];
      }
    }
  }
}

}  // namespace SCAO_ISA
}  // namespace scao
