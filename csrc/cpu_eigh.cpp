// Eigendecompositions of a stack of small symmetric matrices.
#include "cpu_eigh.h"
#include "cpu_table.h"

namespace scao {
namespace SCAO_ISA {

unsigned long eigh_scratch(long n) { return 4 * VL * (2 * n * n + n + decompose_size(n)) + 8 * 64; }

// Matrices [first, last) of the stack, of which the lower halves are read.
void eigh(const EighTask& t, long first, long last, void* scratch) {
  const long n = t.n;
  float *a = static_cast<float*>(scratch), *vectors = a + n * n * VL, *values = vectors + n * n * VL;
  float* work = values + n * VL;
  for (long matrix = first; matrix < last; matrix += VL) {
    const Lanes lanes{matrix, smaller(VL, last - matrix)};
    pack(t.matrices, lanes, n * n, a);
    const vi failed = decompose(a, n, n, values, vectors, work);
    for (long i = 0; i < n; i++) {  // rising
      for (long j = 0; j < n; j++) put_at(a, i * n + n - 1 - j, at(vectors, i * n + j));
    }
    float* rising = work;
    for (long j = 0; j < n; j++) put_at(rising, n - 1 - j, failed ? splat(__builtin_nanf("")) : at(values, j));
    unpack(rising, lanes, integers(-1), n, n, t.values);
    for (long i = 0; i < n * n; i++) put_at(a, i, failed ? splat(__builtin_nanf("")) : at(a, i));
    unpack(a, lanes, integers(-1), n * n, n * n, t.vectors);
  }
}

}  // namespace SCAO_ISA
}  // namespace scao
