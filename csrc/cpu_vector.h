// Vector registers of one instruction set, 16-bit storage, and transposition in registers. Every CPU kernel file is
// compiled with -DSCAO_ISA=base|v3|v4 and the matching -march; every function here is local to its copy, so that the
// linker cannot take the wide copy of a function for the narrow one. For the same reason no standard header may enter.
#pragma once

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "cpu_kernels.h"

#define INLINE static inline __attribute__((always_inline))
#define INLINE_MEMBER inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")

namespace scao {
namespace SCAO_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int VL = 16;       // floats in a register
constexpr int ROW_BLOCK = 4;  // rows and column vectors whose sums are held in registers at once
constexpr int COL_BLOCK = 4;
#elif defined(__AVX2__)
constexpr int VL = 8;
constexpr int ROW_BLOCK = 4;
constexpr int COL_BLOCK = 2;
#else
constexpr int VL = 4;
constexpr int ROW_BLOCK = 4;
constexpr int COL_BLOCK = 2;
#endif
constexpr int COLS = VL * COL_BLOCK;
constexpr unsigned NOT_FINITE = 0x7f800000u;
constexpr float LARGEST_GRADIENT = 1e15f, LARGEST_JUMP = 10.0f, LEVEL_DECAY = 0.95f;  // as in scao_hf/rules/base.py
constexpr float TINY = 1.17549435e-38f;
constexpr float DAMPING = 1e-3f;  // (U14), as in scao_hf/rules/eigenbasis_refresh.py

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
#if defined(__AVX512F__)
  return _mm512_maskz_sqrt_ps(0xffff, x);
#elif defined(__AVX2__)
  return _mm256_sqrt_ps(x);
#elif defined(__x86_64__)
  return _mm_sqrt_ps(x);
#else
  for (int i = 0; i < VL; i++) x[i] = __builtin_sqrtf(x[i]);
  return x;
#endif
}

INLINE vi larger(vi a, vi b) {
#if defined(__AVX512F__)
  return reinterpret_cast<vi>(_mm512_maskz_max_epi32(0xffff, reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(b)));
#elif defined(__AVX2__)
  return reinterpret_cast<vi>(_mm256_max_epi32(reinterpret_cast<__m256i>(a), reinterpret_cast<__m256i>(b)));
#else
  return a > b ? a : b;
#endif
}

// x within 1, (U10).
INLINE float bounded(float x) { return x > 1 ? 1 : x < -1 ? -1 : x; }
INLINE vf bounded(vf x) {
#if defined(__AVX512F__)
  return _mm512_maskz_max_ps(0xffff, splat(-1), _mm512_maskz_min_ps(0xffff, splat(1), x));
#elif defined(__AVX2__)
  return _mm256_max_ps(splat(-1), _mm256_min_ps(splat(1), x));
#else
  const vf low = x > splat(-1) ? x : splat(-1);
  return low < splat(1) ? low : splat(1);
#endif
}

// How many entries of a step agree with their gradient, of how many that have one (U16).
struct Agreement {
  long agreed = 0, counted = 0;
};

// x where x g > 0, else 0.
INLINE vf agreeing(vf x, vf g, Agreement* found) {
  const vf product = x * g;
#if defined(__AVX512F__)
  const __mmask16 mask = _mm512_cmp_ps_mask(product, vf{}, _CMP_GT_OQ);
  found->agreed += __builtin_popcount(mask);
  found->counted += __builtin_popcount(_mm512_cmp_ps_mask(product, vf{}, _CMP_NEQ_OQ));
  return _mm512_maskz_mov_ps(mask, x);
#else
  const vi mask = product > vf{}, counted = product != vf{};
  for (int i = 0; i < VL; i++) found->agreed -= mask[i], found->counted -= counted[i];
  return reinterpret_cast<vf>(bits(x) & mask);
#endif
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

INLINE float bf16_to_float(unsigned short h) {
  unsigned u = static_cast<unsigned>(h) << 16;
  float f;
  __builtin_memcpy(&f, &u, 4);
  return f;
}

INLINE unsigned short float_to_bf16(float f) {  // to nearest even, as torch rounds
  unsigned u;
  __builtin_memcpy(&u, &f, 4);
  if ((u & 0x7fffffffu) > NOT_FINITE) return 0x7fc0;
  return static_cast<unsigned short>((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
}

INLINE float half_to_float(unsigned short h) {
  _Float16 x;
  __builtin_memcpy(&x, &h, 2);
  return static_cast<float>(x);
}

INLINE unsigned short float_to_half(float f) {
  _Float16 x = static_cast<_Float16>(f);
  unsigned short h;
  __builtin_memcpy(&h, &x, 2);
  return h;
}

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
#if defined(__AVX512F__)
    const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(h));
    return _mm512_castsi512_ps(_mm512_maskz_slli_epi32(0xffff, _mm512_maskz_cvtepu16_epi32(0xffff, half), 16));
#elif defined(__AVX2__)
    const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(h));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
#endif
    return reinterpret_cast<vf>(__builtin_convertvector(vh(*reinterpret_cast<const vh_any*>(h)), vi) << 16);
  }
#if defined(__AVX512F__)
  return _mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(h)));
#elif defined(__F16C__)
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(h)));
#else
  vf v;
  for (int j = 0; j < VL; j++) v[j] = half_to_float(h[j]);
  return v;
#endif
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
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(h), _mm512_maskz_cvtps_ph(0xffff, v, 0));
#elif defined(__F16C__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(h), _mm256_cvtps_ph(v, 0));
#else
  for (int j = 0; j < VL; j++) h[j] = float_to_half(v[j]);
#endif
}

// ---- transposition -------------------------------------------------------------------------------------------------

#if defined(__GNUC__) && !defined(__clang__)
#define SHUFFLE(a, b, mask) __builtin_shuffle(a, b, mask)
#endif

#ifdef SHUFFLE
// Lane pattern of one step of a transposition. Within 128 bits: interleave groups of S lanes of a and b, of their low or
// high halves, as unpack instructions do. S = 4: the groups of 128 bits with even or odd index, a's before b's.
template <int S, bool HIGH>
INLINE vi pattern() {
  vi mask;
  UNROLL
  for (int l = 0; l < VL; l++) {
    const int group = l / 4, lane = l % 4;
    if (S == 1) mask[l] = group * 4 + (HIGH ? 2 : 0) + lane / 2 + (lane % 2 ? VL : 0);
    if (S == 2) mask[l] = group * 4 + (HIGH ? 2 : 0) + lane % 2 + (lane / 2 ? VL : 0);
    if (S >= 4 && VL == 8) mask[l] = (group ? VL : 0) + HIGH * 4 + lane;
    if (S >= 4 && VL == 16) mask[l] = (group < 2 ? 0 : VL) + (2 * (group % 2) + HIGH) * 4 + lane;
  }
  return mask;
}
#endif

// Transpose VL x VL in registers.
INLINE void transpose(vf* x) {
#ifdef SHUFFLE
  vf y[VL];
  UNROLL
  for (int i = 0; i < VL; i += 4) {  // 4 x 4 blocks within each 128 bits
    const vf a = SHUFFLE(x[i], x[i + 1], (pattern<1, false>())), b = SHUFFLE(x[i], x[i + 1], (pattern<1, true>()));
    const vf c = SHUFFLE(x[i + 2], x[i + 3], (pattern<1, false>()));
    const vf d = SHUFFLE(x[i + 2], x[i + 3], (pattern<1, true>()));
    y[i] = SHUFFLE(a, c, (pattern<2, false>()));
    y[i + 1] = SHUFFLE(a, c, (pattern<2, true>()));
    y[i + 2] = SHUFFLE(b, d, (pattern<2, false>()));
    y[i + 3] = SHUFFLE(b, d, (pattern<2, true>()));
  }
  // Rows 4 g + q now hold columns q, q + 4, ... of four rows: gather the groups of 128 bits.
  if constexpr (VL == 4) {
    UNROLL
    for (int i = 0; i < VL; i++) x[i] = y[i];
  } else if constexpr (VL == 8) {
    UNROLL
    for (int q = 0; q < 4; q++) {
      x[q] = SHUFFLE(y[q], y[q + 4], (pattern<4, false>()));
      x[q + 4] = SHUFFLE(y[q], y[q + 4], (pattern<4, true>()));
    }
  } else {
    UNROLL
    for (int q = 0; q < 4; q++) {
      const vf a = SHUFFLE(y[q], y[q + 4 % VL], (pattern<4, false>()));  // rows 0-7, columns q, q + 8
      const vf b = SHUFFLE(y[q], y[q + 4 % VL], (pattern<4, true>()));   // rows 0-7, columns q + 4, q + 12
      const vf c = SHUFFLE(y[q + 8 % VL], y[q + 12 % VL], (pattern<4, false>()));
      const vf d = SHUFFLE(y[q + 8 % VL], y[q + 12 % VL], (pattern<4, true>()));
      x[q] = SHUFFLE(a, c, (pattern<4, false>()));
      x[q + 8 % VL] = SHUFFLE(a, c, (pattern<4, true>()));
      x[q + 4 % VL] = SHUFFLE(b, d, (pattern<4, false>()));
      x[q + 12 % VL] = SHUFFLE(b, d, (pattern<4, true>()));
    }
  }
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
}  // namespace SCAO_ISA
}  // namespace scao
