// Vector registers, 16-bit storage, and transposition in registers, in the compiler's own vector types.
#pragma once

#include "cpu_kernels.h"

#define INLINE static inline __attribute__((always_inline))
#define INLINE_MEMBER inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")

namespace scao {
namespace {

#if defined(__AVX2__)
constexpr int VL = 8;  // floats in a register
#else
constexpr int VL = 4;
#endif
constexpr int ROW_BLOCK = 4;  // rows and column vectors whose sums are held in registers at once
constexpr int COL_BLOCK = 2;
constexpr int COLS = VL * COL_BLOCK;

typedef float vf __attribute__((vector_size(VL * 4)));
typedef int vi __attribute__((vector_size(VL * 4)));
typedef float vf_any __attribute__((vector_size(VL * 4), aligned(4), may_alias));
typedef unsigned short vh __attribute__((vector_size(VL * 2)));
typedef unsigned short vh_any __attribute__((vector_size(VL * 2), aligned(2), may_alias));

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

INLINE vi larger(vi a, vi b) { return a > b ? a : b; }

// x within 1, (U10).
INLINE float bounded(float x) { return x > 1 ? 1 : x < -1 ? -1 : x; }
INLINE vf bounded(vf x) {
  const vf low = x > splat(-1) ? x : splat(-1);
  return low < splat(1) ? low : splat(1);
}

// How many entries of a step agree with their gradient, of how many that have one (U16), in lanes.
struct Agreement {
  vi agreed{}, counted{};
};

// x where x g > 0, else 0.
INLINE vf agreeing(vf x, vf g, Agreement* found) {
  const vf product = x * g;
  const vi mask = product > vf{};  // a mask is -1
  found->agreed -= mask;
  found->counted -= product != vf{};
  return reinterpret_cast<vf>(bits(x) & mask);
}

INLINE float sum(vf v) {
  float x[VL];
  store(x, v);
  UNROLL
  for (int step = VL / 2; step > 0; step /= 2) {
    UNROLL
    for (int i = 0; i < step; i++) x[i] += x[i + step];
  }
  return x[0];
}

// The first `count` lanes of a vector, from memory and to it.
INLINE void get_part(vf* v, const float* p, long count) {
  if (count == VL) *v = load(p);
  else for (long i = 0; i < count; i++) (*v)[i] = p[i];
}

INLINE void put_part(float* p, vf v, long count) {
  if (count == VL) store(p, v);
  else for (long i = 0; i < count; i++) p[i] = v[i];
}

constexpr long round_up(long n, long multiple) { return (n + multiple - 1) / multiple * multiple; }
INLINE long smaller(long a, long b) { return a < b ? a : b; }

// ---- 16-bit storage ----------------------------------------------------------------------------------------------

template <Dtype D>
INLINE float get(const void* p, long i) {
  if constexpr (D == F32) return static_cast<const float*>(p)[i];
  if constexpr (D == BF16) return bf16_to_float(static_cast<const unsigned short*>(p)[i]);
  return half_to_float(static_cast<const unsigned short*>(p)[i]);
}

template <Dtype D>
INLINE void put(void* p, long i, float x) {
  if constexpr (D == F32) static_cast<float*>(p)[i] = x;
  if constexpr (D == BF16) static_cast<unsigned short*>(p)[i] = float_to_bf16(x);
  if constexpr (D == F16) static_cast<unsigned short*>(p)[i] = float_to_half(x);
}

template <Dtype D>
INLINE vf get_vector(const void* p, long i) {
  if constexpr (D == F32) return load(static_cast<const float*>(p) + i);
  const unsigned short* h = static_cast<const unsigned short*>(p) + i;
  if constexpr (D == BF16) {
    return reinterpret_cast<vf>(__builtin_convertvector(vh(*reinterpret_cast<const vh_any*>(h)), vi) << 16);
  }
  vf v;
  for (int j = 0; j < VL; j++) v[j] = half_to_float(h[j]);
  return v;
}

template <Dtype D>
INLINE void put_vector(void* p, long i, vf v) {
  if constexpr (D == F32) {
    store(static_cast<float*>(p) + i, v);
    return;
  }
  unsigned short* h = static_cast<unsigned short*>(p) + i;
  if constexpr (D == BF16) {
    vi u = bits(v);
    vi rounded = u + 0x7fff + ((u >> 16) & 1);
    vi nan = (u & 0x7fffffff) > static_cast<int>(NOT_FINITE);
    rounded = (rounded & ~nan) | (nan & 0x7fc00000);
    *reinterpret_cast<vh_any*>(h) = __builtin_convertvector((rounded >> 16) & 0xffff, vh);
    return;
  }
  for (int j = 0; j < VL; j++) h[j] = float_to_half(v[j]);
}

// ---- transposition -------------------------------------------------------------------------------------------------

#if !defined(__clang__)
// Blocks of SIDE x SIDE change places across the diagonal of those twice as large.
template <int SIDE>
INLINE void swap_blocks(vf* x) {
  vi low, high;
  UNROLL
  for (int l = 0; l < VL; l++) low[l] = l & SIDE ? VL + l - SIDE : l, high[l] = l & SIDE ? VL + l : l + SIDE;
  UNROLL
  for (int i = 0; i < VL; i++) {
    if (i & SIDE) continue;
    const vf a = x[i], b = x[i + SIDE];
    x[i] = __builtin_shuffle(a, b, low);
    x[i + SIDE] = __builtin_shuffle(a, b, high);
  }
}
#endif

// Transpose VL x VL in registers.
INLINE void transpose(vf* x) {
#if !defined(__clang__)
  swap_blocks<1>(x);
  swap_blocks<2>(x);
  if constexpr (VL == 8) swap_blocks<4>(x);
#else
  for (int i = 0; i < VL; i++) {
    for (int j = i + 1; j < VL; j++) {
      const float t = x[i][j];
      x[i][j] = x[j][i];
      x[j][i] = t;
    }
  }
#endif
}

}  // namespace
}  // namespace scao
