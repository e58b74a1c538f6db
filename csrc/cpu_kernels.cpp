// CPU kernels: one matrix at a time, in tiles of T columns that stay in the first-level cache, vector lanes along the
// long side. Compiled with -DSCAO_ISA=base|v3|v4 and the matching -march; every function is local to its copy, so that
// the linker cannot take the wide copy of a function for the narrow one.
#include "cpu_kernels.h"

#include "int8.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define INLINE static inline __attribute__((always_inline))
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
constexpr float LARGEST_GRADIENT = 1e15f;  // as in scao_hf/update.py
constexpr float TINY = 1.17549435e-38f;

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

// ---- tiles: [rows][T] in float, columns beyond the matrix zero ------------------------------------------------------

#if defined(__GNUC__) && !defined(__clang__)
#define SHUFFLE(a, b, mask) __builtin_shuffle(a, b, mask)
#endif

#ifdef SHUFFLE
// Lane pattern of one step of a transposition: interleave groups of S lanes of a and b, low or high half of each 2 S.
template <int S, bool HIGH>
INLINE vi pattern() {
  vi mask;
  UNROLL
  for (int l = 0; l < VL; l++) {
    // Steps within 128 bits are what unpack instructions do, the others exchange 128-bit groups.
    const int group = l / 4, lane = l % 4;
    if (S == 1) mask[l] = group * 4 + (HIGH ? 2 : 0) + lane / 2 + (lane % 2 ? VL : 0);
    if (S == 2) mask[l] = group * 4 + (HIGH ? 2 : 0) + lane % 2 + (lane / 2 ? VL : 0);
    if (S >= 4) mask[l] = (group < VL / 8 ? 0 : VL) + (2 * (group % (VL / 8 ? VL / 8 : 1)) + HIGH) * 4 + lane;
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
      const vf a = SHUFFLE(y[q], y[q + 4 % VL], (pattern<4, false>()));       // rows 0-7, columns q, q + 8
      const vf b = SHUFFLE(y[q], y[q + 4 % VL], (pattern<4, true>()));        // rows 0-7, columns q + 4, q + 12
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

// Columns [0, width) of a matrix with `rows` rows into the tile; the columns up to a multiple of COLS become zero.
template <Dtype D>
void load_tile_as(const void* data, long row_stride, long col_stride, long rows, long width, float* tile, long T) {
  const long whole = width / VL * VL, padded = round_up(width, COLS);
  if (col_stride == 1) {
    for (long i = 0; i < rows; i++) {
      const long at = i * row_stride;
      float* out = tile + i * T;
      for (long c = 0; c < whole; c += VL) store(out + c, get_vector<D>(data, at + c));
      for (long c = whole; c < width; c++) out[c] = get<D>(data, at + c);
    }
  } else {
    const long row_whole = row_stride == 1 ? rows / VL * VL : 0;
    for (long c = 0; c < whole && row_whole; c += VL) {
      for (long i = 0; i < row_whole; i += VL) {
        vf x[VL];
        UNROLL
        for (int j = 0; j < VL; j++) x[j] = get_vector<D>(data, (c + j) * col_stride + i);
        transpose(x);
        UNROLL
        for (int j = 0; j < VL; j++) store(tile + (i + j) * T + c, x[j]);
      }
    }
    for (long c = 0; c < width; c++) {
      for (long i = c < whole ? row_whole : 0; i < rows; i++) {
        tile[i * T + c] = get<D>(data, i * row_stride + c * col_stride);
      }
    }
  }
  if (width < padded) {
    for (long i = 0; i < rows; i++) {
      for (long c = width; c < padded; c++) tile[i * T + c] = 0;
    }
  }
}

INLINE const void* offset(const void* data, Dtype dtype, long elements) {
  return static_cast<const char*>(data) + elements * (dtype == F32 ? 4 : 2);
}

void load_tile(const View& view, long first, long rows, long width, float* tile, long T) {
  const void* data = offset(view.data, view.dtype, first * view.col_stride);
  switch (view.dtype) {
    case F32: return load_tile_as<F32>(data, view.row_stride, view.col_stride, rows, width, tile, T);
    case BF16: return load_tile_as<BF16>(data, view.row_stride, view.col_stride, rows, width, tile, T);
    case F16: return load_tile_as<F16>(data, view.row_stride, view.col_stride, rows, width, tile, T);
  }
}

// w <- keep w - delta, delta a tile; keep = 1 - lr * weight_decay.
template <Dtype D>
void apply_tile_as(void* data, long row_stride, long col_stride, long rows, long width, const float* tile, long T,
                   float keep) {
  const long whole = width / VL * VL;
  const vf kept = splat(keep);
  if (col_stride == 1) {
    for (long i = 0; i < rows; i++) {
      const long at = i * row_stride;
      const float* delta = tile + i * T;
      for (long c = 0; c < whole; c += VL) {
        put_vector<D>(data, at + c, get_vector<D>(data, at + c) * kept - load(delta + c));
      }
      for (long c = whole; c < width; c++) put<D>(data, at + c, get<D>(data, at + c) * keep - delta[c]);
    }
    return;
  }
  const long row_whole = row_stride == 1 ? rows / VL * VL : 0;
  for (long c = 0; c < whole && row_whole; c += VL) {
    for (long i = 0; i < row_whole; i += VL) {
      vf x[VL];
      UNROLL
      for (int j = 0; j < VL; j++) x[j] = load(tile + (i + j) * T + c);
      transpose(x);
      UNROLL
      for (int j = 0; j < VL; j++) {
        const long at = (c + j) * col_stride + i;
        put_vector<D>(data, at, get_vector<D>(data, at) * kept - x[j]);
      }
    }
  }
  for (long c = 0; c < width; c++) {
    for (long i = c < whole ? row_whole : 0; i < rows; i++) {
      const long at = i * row_stride + c * col_stride;
      put<D>(data, at, get<D>(data, at) * keep - tile[i * T + c]);
    }
  }
}

void apply_tile(const View& view, long first, long rows, long width, const float* tile, long T, float keep) {
  void* data = const_cast<void*>(offset(view.data, view.dtype, first * view.col_stride));
  switch (view.dtype) {
    case F32: return apply_tile_as<F32>(data, view.row_stride, view.col_stride, rows, width, tile, T, keep);
    case BF16: return apply_tile_as<BF16>(data, view.row_stride, view.col_stride, rows, width, tile, T, keep);
    case F16: return apply_tile_as<F16>(data, view.row_stride, view.col_stride, rows, width, tile, T, keep);
  }
}

// Largest magnitude as bits, lane by lane: as integers a NaN is above Inf and Inf above every number.
vi largest_bits(const float* tile, long T, long rows, long width, vi largest) {
  for (long i = 0; i < rows; i++) {
    for (long c = 0; c < width; c += VL) {
      vi magnitude = bits(load(tile + i * T + c)) & 0x7fffffff;
      largest = magnitude > largest ? magnitude : largest;
    }
  }
  return largest;
}

void scale_tile(float* tile, long T, long rows, long width, float scale) {
  for (long i = 0; i < rows; i++) {
    for (long c = 0; c < width; c += VL) store(tile + i * T + c, load(tile + i * T + c) * scale);
  }
}

// (U3): whether the matrix is finite, and by how much to scale it.
INLINE bool sanitize(vi largest, float* scale) {
  unsigned most = 0;
  for (int i = 0; i < VL; i++) most = static_cast<unsigned>(largest[i]) > most ? static_cast<unsigned>(largest[i]) : most;
  float magnitude;
  __builtin_memcpy(&magnitude, &most, 4);
  *scale = magnitude > LARGEST_GRADIENT ? LARGEST_GRADIENT / magnitude : 1.0f;
  return most < NOT_FINITE;
}

// ---- small products -------------------------------------------------------------------------------------------------

// out(sums) with sums = start() + sum_j a[j][i] b[j][c] for RB rows and COLS columns; a is [depth][lda], b [depth][ldb].
template <int RB, class Start, class Out>
INLINE void product(const float* a, long lda, const float* b, long ldb, long depth, Start start, Out out) {
  vf acc[RB][COL_BLOCK];
  UNROLL
  for (int i = 0; i < RB; i++) {
    UNROLL
    for (int c = 0; c < COL_BLOCK; c++) acc[i][c] = start(i, c * VL);
  }
  for (long j = 0; j < depth; j++) {
    vf right[COL_BLOCK];
    UNROLL
    for (int c = 0; c < COL_BLOCK; c++) right[c] = load(b + j * ldb + c * VL);
    UNROLL
    for (int i = 0; i < RB; i++) {
      const vf left = splat(a[j * lda + i]);
      UNROLL
      for (int c = 0; c < COL_BLOCK; c++) acc[i][c] += left * right[c];
    }
  }
  out(acc);
}

template <int RB>
INLINE void store_block(float* out, long T, const vf (*acc)[COL_BLOCK]) {
  UNROLL
  for (int i = 0; i < RB; i++) {
    UNROLL
    for (int c = 0; c < COL_BLOCK; c++) store(out + i * T + c * VL, acc[i][c]);
  }
}

// p[i][m] += sum_c g[i][c] u[c][m]: lanes along m, RB rows and MB vectors of m in registers.
template <int RB, int MB>
INLINE void project_block(const float* g, long T, const float* u, long kp, float* p, long width) {
  vf acc[RB][MB];
  UNROLL
  for (int i = 0; i < RB; i++) {
    UNROLL
    for (int m = 0; m < MB; m++) acc[i][m] = load(p + i * kp + m * VL);
  }
  for (long c = 0; c < width; c++) {
    vf right[MB];
    UNROLL
    for (int m = 0; m < MB; m++) right[m] = load(u + c * kp + m * VL);
    UNROLL
    for (int i = 0; i < RB; i++) {
      const vf left = splat(g[i * T + c]);
      UNROLL
      for (int m = 0; m < MB; m++) acc[i][m] += left * right[m];
    }
  }
  UNROLL
  for (int i = 0; i < RB; i++) {
    UNROLL
    for (int m = 0; m < MB; m++) store(p + i * kp + m * VL, acc[i][m]);
  }
}

template <int RB>
INLINE void project(const float* g, long T, const float* u, long kp, float* p, long rows, long width) {
  for (long m = 0; m < kp; m += 2 * VL) {
    const bool pair = m + VL < kp;
    if (!pair && VL == 16 && rows % 16 == 0) {
      for (long i = 0; i < rows; i += 16) project_block<16, 1>(g + i * T, T, u + m, kp, p + i * kp + m, width);
      continue;
    }
    for (long i = 0; i < rows; i += RB) {
      float* at = p + i * kp + m;
      if (pair) {
        project_block<RB, 2>(g + i * T, T, u + m, kp, at, width);
      } else {
        project_block<RB, 1>(g + i * T, T, u + m, kp, at, width);
      }
    }
  }
}

// Sums of the tile's G G^T for i-blocks of four rows against j-blocks at or below, lanes still apart: 16 vectors a pair.
INLINE void gram(const float* g, long T, long rows, long width, float* sums) {
  for (long i = 0; i < rows; i += 4) {
    for (long j = 0; j <= i; j += 4, sums += 16 * VL) {
      vf acc[4][4];
      UNROLL
      for (int a = 0; a < 4; a++) {
        UNROLL
        for (int b = 0; b < 4; b++) acc[a][b] = load(sums + (a * 4 + b) * VL);
      }
      for (long c = 0; c < width; c += VL) {
        vf left[4], right[4];
        UNROLL
        for (int a = 0; a < 4; a++) left[a] = load(g + (i + a) * T + c);
        UNROLL
        for (int b = 0; b < 4; b++) right[b] = load(g + (j + b) * T + c);
        UNROLL
        for (int a = 0; a < 4; a++) {
          UNROLL
          for (int b = 0; b < 4; b++) acc[a][b] += left[a] * right[b];
        }
      }
      UNROLL
      for (int a = 0; a < 4; a++) {
        UNROLL
        for (int b = 0; b < 4; b++) store(sums + (a * 4 + b) * VL, acc[a][b]);
      }
    }
  }
}

constexpr long gram_size(long rp) { return (rp / 4) * (rp / 4 + 1) / 2 * 16 * VL; }

// Sums over the lanes of VL vectors at p: one vector of sums.
INLINE vf sum_lanes(const float* p) {
  vf x[VL];
  UNROLL
  for (int i = 0; i < VL; i++) x[i] = load(p + i * VL);
  transpose(x);
  UNROLL
  for (int step = VL / 2; step > 0; step /= 2) {
    UNROLL
    for (int i = 0; i < step; i++) x[i] += x[i + step];
  }
  return x[0];
}

// (E1) with the sums of gram().
void accumulate(float* factor, long r, const float* sums, float weight) {
  for (long i = 0; i < round_up(r, 4); i += 4) {
    for (long j = 0; j <= i; j += 4, sums += 16 * VL) {
      float outer[16];
      for (int part = 0; part < 16; part += VL) store(outer + part, sum_lanes(sums + part * VL));
      for (long a = i; a < smaller(i + 4, r); a++) {
        for (long b = j; b < smaller(j + 4, a + 1); b++) {
          const float x = outer[(a - i) * 4 + b - j];
          // Both halves from their own value: a state that was loaded need not be symmetric to the last bit.
          factor[a * r + b] += weight * (x - factor[a * r + b]);
          if (a != b) factor[b * r + a] += weight * (x - factor[b * r + a]);
        }
      }
    }
  }
}

void clear(float* p, long n) {
  for (long i = 0; i < n; i++) p[i] = 0;
}

// (U5)
double bias(double beta, double count) { return count > 0 ? 1 - __builtin_pow(beta, count) : 1.0; }

struct Arena {
  char* at;
  float* take(long floats) {
    float* p = reinterpret_cast<float*>(at);
    at += round_up(floats * 4, 64);
    return p;
  }
};

// ---- phase 1 and vectors --------------------------------------------------------------------------------------------

long adamw_tile(long r) { return r > 16 ? 64 : r > 1 ? 128 : 2048; }

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
      load_tile(task.grad, c, r, width, tile, T);
      if (attempt == 0) largest = largest_bits(tile, T, r, padded, largest);
      if (scale != 1.0f) scale_tile(tile, T, r, padded, scale);
      if (sums) gram(tile, T, rp, padded, sums);
    }
    if (attempt == 0 && !sanitize(largest, &scale)) return;
    if (scale == 1.0f) break;
  }
  const double count = static_cast<double>(*task.taken) + 1;
  *task.taken = static_cast<float>(count);
  if (sums) accumulate(task.factor, r, sums, static_cast<float>(1 - n.rho));

  const float first = static_cast<float>(1 - n.beta1), second = static_cast<float>(1 - n.beta2);
  const float mean_scale = static_cast<float>(n.lr / bias(n.beta1, count));
  const float root_scale = static_cast<float>(1 / __builtin_sqrt(bias(n.beta2, count)));
  const float eps = static_cast<float>(n.eps), keep = static_cast<float>(1 - n.lr * n.weight_decay);
  for (long c = 0; c < l; c += T) {
    const long width = smaller(T, l - c), whole = width / VL * VL;
    load_tile(task.grad, c, r, width, tile, T);
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
    apply_tile(task.param, c, r, width, delta, T, keep);
  }
}

// ---- phase 2 --------------------------------------------------------------------------------------------------------

template <int R>
constexpr long tile_of() { return 64; }

unsigned long eigenbasis_scratch(long r, long l, long k) {
  const long rp = round_up(r, ROW_BLOCK), kp = round_up(k, VL), T = 128, tiles = l / 64 + 2;
  return 4 * (rp * 64 * tiles                 // Q^T G of the whole matrix
              + 2 * (rp + kp) * T             // tiles
              + 2 * T * kp + gram_size(rp)        // long vectors, Gram sums
              + 3 * rp * (rp + kp) + 4 * rp * VL + 2 * T) +
         32 * 64;
}

// The long basis of the tile with lanes along the long side, [kp][T].
INLINE void load_long(const EigenbasisTask& t, long first, long width, float* out, long T) {
  const View view{const_cast<void*>(t.long_vectors), 1, t.k, t.long_dtype};
  load_tile(view, first, t.k, width, out, T);
}

// The same as stored, [width][kp].
INLINE void load_long_rows(const EigenbasisTask& t, long first, long width, float* out, long kp) {
  const void* data = offset(t.long_vectors, t.long_dtype, first * t.k);
  if (t.k == kp) {
    if (t.long_dtype == BF16) {
      for (long j = 0; j < width * kp; j += VL) store(out + j, get_vector<BF16>(data, j));
    } else {
      for (long j = 0; j < width * kp; j += VL) store(out + j, get_vector<F32>(data, j));
    }
    return;
  }
  for (long c = 0; c < width; c++) {
    for (long m = 0; m < t.k; m++) {
      out[c * kp + m] = t.long_dtype == BF16 ? get<BF16>(data, c * t.k + m) : get<F32>(data, c * t.k + m);
    }
  }
}

// Read one word of every line of columns [first, first + width): a burst of independent misses is several times faster
// than the same misses between computations, and the tiles are then read from the second-level cache.
INLINE void touch(const View& view, long first, long rows, long width) {
  const long size = view.dtype == F32 ? 4 : 2;
  const bool across = view.col_stride == 1;
  if (!across && view.row_stride != 1) return;
  const char* data = static_cast<const char*>(view.data) + first * view.col_stride * size;
  const bool dense = !across && view.col_stride == rows;
  const long outer = across ? rows : dense ? 1 : width, inner = (across ? width : dense ? width * rows : rows) * size;
  const long step = (across ? view.row_stride : view.col_stride) * size;
  unsigned seen = 0;
  for (long i = 0; i < outer; i++) {
    const char* line = data + i * step;
    for (long j = 0; j < inner; j += 64) seen += static_cast<unsigned char>(line[j]);
  }
  asm volatile("" ::"r"(seen));
}

// Columns that are touched ahead at once: about a quarter of a second-level cache.
INLINE long chunk_of(long r, long T) { return round_up(65536 / (r < 16 ? 16 : r), T); }

// R: the small side where it is known when this is compiled, or 0.
template <int R>
void eigenbasis_as(const EigenbasisTask& t, const Numbers& n, void* scratch) {
  constexpr int RB = R ? (R < ROW_BLOCK ? R : ROW_BLOCK) : ROW_BLOCK;
  constexpr long T = tile_of<R>();
  const long r = R ? R : t.r, l = t.l, k = t.k;
  const long rp = R ? R : round_up(r, ROW_BLOCK), kp = round_up(k, VL);
  Arena arena{static_cast<char*>(scratch)};
  float* rotated = arena.take(rp * round_up(l, T));  // tile after tile, each [rp][T]
  float* tiles[2] = {arena.take((rp + kp) * T), arena.take((rp + kp) * T)};
  float* rows_of_u[2] = {arena.take(T * kp), arena.take(T * kp)};
  float* sums = arena.take(gram_size(rp));
  float* inside = arena.take(rp * kp);
  float* left = arena.take((rp + kp) * rp);
  float* row_sums = arena.take(rp * VL);
  float* row_root = arena.take(rp);
  float* col_root = arena.take(T);

  // A = Q, padded: (Q^T G)[i] = sum_j Q[j][i] G[j].
  clear(left, (rp + kp) * rp);
  for (long j = 0; j < r; j++) {
    for (long i = 0; i < r; i++) left[j * rp + i] = t.vectors[j * r + i];
  }
  for (int i = 0; i < 2; i++) {
    if (rp > r) clear(tiles[i] + r * T, (rp - r) * T);
    if (kp > k) clear(rows_of_u[i], T * kp);
  }

  const long chunk = chunk_of(r, T);
  const View long_basis{const_cast<void*>(t.long_vectors), 1, k, t.long_dtype};

  // First pass: is it finite, (E1), Q^T G, P. The next tile is read between the products of this one.
  float scale = 1;
  for (int attempt = 0; attempt < 2; attempt++) {
    vi largest{};
    clear(sums, gram_size(rp));
    clear(inside, rp * kp);
    auto fetch = [&](int into, long at, long width, long T_at) {
      load_tile(t.grad, at, r, width, tiles[into] + T_at, T);
      load_long_rows(t, at, width, rows_of_u[into] + T_at * kp, kp);
    };
    fetch(0, 0, smaller(T, l), 0);
    int now = 0;
    for (long c = 0; c < l; c += T, now ^= 1) {
      const long width = smaller(T, l - c), padded = round_up(width, COLS), next = smaller(T, l - c - T);
      float* tile = tiles[now];
      if (c % chunk == 0) {
        touch(t.grad, c, r, smaller(chunk, l - c));
        touch(long_basis, c, k, smaller(chunk, l - c));
      }
      if (attempt == 0) largest = largest_bits(tile, T, r, padded, largest);
      if (scale != 1.0f) scale_tile(tile, T, r, padded, scale);
      gram(tile, T, rp, padded, sums);
      float* turned = rotated + c * rp;
      for (long j = 0; j < padded; j += COLS) {
        if (j < next) fetch(now ^ 1, c + T + j, smaller(COLS, next - j), j);
        for (long i = 0; i < rp; i += RB) {
          product<RB>(left + i, rp, tile + j, T, r, [](int, int) { return vf{}; },
                      [&](const vf(&acc)[RB][COL_BLOCK]) { store_block<RB>(turned + i * T + j, T, acc); });
        }
      }
      project<RB>(turned, T, rows_of_u[now], kp, inside, rp, width);
    }
    if (attempt == 0 && !sanitize(largest, &scale)) return;
    if (scale == 1.0f) break;
  }
  const double count = static_cast<double>(*t.taken) + 1;
  *t.taken = static_cast<float>(count);
  accumulate(t.factor, r, sums, static_cast<float>(1 - n.rho));

  const float first = static_cast<float>(1 - n.beta1), second = static_cast<float>(1 - n.beta2);
  const float bias1 = static_cast<float>(bias(n.beta1, count)), bias2 = static_cast<float>(bias(n.beta2, count));
  const float root2 = __builtin_sqrtf(bias2), eps = static_cast<float>(n.eps);
  const float lr = static_cast<float>(n.lr) * *t.gain;
  const float keep = static_cast<float>(1 - n.lr * n.weight_decay);

  // A = -P for the residual. The kept part's direction replaces P.
  clear(left, (rp + kp) * rp);
  for (long i = 0; i < r; i++) {
    float* p = inside + i * kp;
    for (long m = 0; m < k; m++) {
      p[m] *= t.mask[m];
      left[m * rp + i] = -p[m];
    }
    float *mean = t.inside_avg + i * k, *square = t.inside_sq + i * k;
    for (long m = 0; m < k; m += VL) {
      const long count_m = smaller(VL, k - m);
      vf x = load(p + m), a{}, b{};
      __builtin_memcpy(&a, mean + m, count_m * 4);
      __builtin_memcpy(&b, square + m, count_m * 4);
      a += first * (x - a);
      b += second * (x * x - b);
      __builtin_memcpy(mean + m, &a, count_m * 4);
      __builtin_memcpy(square + m, &b, count_m * 4);
      store(p + m, a / bias1 / (root(b) / root2 + eps));
    }
  }

  // Second pass: the residual, its moments. Where the tile is whole the residual never leaves the registers.
  float *const tile = tiles[0], *const result = tiles[1], *const basis = tile + rp * T;
  clear(row_sums, rp * VL);
  vf col_total{};
  if (kp > k) clear(basis + k * T, (kp - k) * T);
  for (long c = 0; c < l; c += T) {
    const long width = smaller(T, l - c), padded = round_up(width, COLS), whole = width / VL * VL;
    const float* turned = rotated + c * rp;
    load_long(t, c, width, basis, T);
    for (long j = 0; j < padded; j += COLS) {
      vf energy[COL_BLOCK] = {};
      for (long i = 0; i < rp; i += RB) {
        float* mean = t.exp_avg + i * l + c + j;
        product<RB>(
            left + i, rp, basis + j, T, k, [&](int ii, int cc) { return load(turned + (i + ii) * T + j + cc); },
            [&](const vf(&acc)[RB][COL_BLOCK]) {
              const bool inner = j + COLS <= width && i + RB <= r;
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
        if (j + COLS > width || i + RB > r) {
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
      col_total += v;
    }
    for (long j = whole; j < width; j++) {
      col[j] += second * (col_root[j] - col[j]);
      col_total[0] += col[j];
    }
  }

  // (U10) as a product of roots: sqrt(row_i) * sqrt(col_c / mean(col)).
  float col_mean = sum(col_total) / static_cast<float>(l);
  col_mean = col_mean > TINY ? col_mean : TINY;
  for (long i = 0; i < r; i++) {
    t.row[i] += second * (sum(load(row_sums + i * VL)) / static_cast<float>(l) - t.row[i]);
    row_root[i] = __builtin_sqrtf(t.row[i]) / root2;
  }

  // A = lr [Q | Q K] for [D; U^T].
  clear(left, (rp + kp) * rp);
  for (long i = 0; i < r; i++) {
    for (long j = 0; j < r; j++) left[j * rp + i] = lr * t.vectors[i * r + j];
  }
  for (long m = 0; m < k; m++) {
    float* out = left + (rp + m) * rp;
    long i = 0;
    for (; i + VL <= rp; i += VL) {
      vf x{};
      for (long j = 0; j < r; j++) x += load(left + j * rp + i) * inside[j * kp + m];
      store(out + i, x);
    }
    for (; i < rp; i++) {
      for (long j = 0; j < r; j++) out[i] += left[j * rp + i] * inside[j * kp + m];
    }
  }

  // Third pass: the direction and the parameter.
  const float mean_scale = 1 / bias1;
  for (long c = 0; c < l; c += T) {
    const long width = smaller(T, l - c), padded = round_up(width, COLS), whole = width / VL * VL;
    load_long(t, c, width, basis, T);
    for (long j = 0; j < width; j++) col_root[j] = t.col[c + j] / col_mean;
    for (long j = width; j < padded; j++) col_root[j] = 0;
    for (long j = 0; j < padded; j += VL) store(col_root + j, root(load(col_root + j)));
    if (rp > r) clear(tile + r * T, (rp - r) * T);
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
    if (c % chunk == 0) touch(t.param, c, r, smaller(chunk, l - c));
    const bool direct = t.param.dtype == F32 && t.param.col_stride == 1;
    for (long j = 0; j < padded; j += COLS) {
      for (long i = 0; i < rp; i += RB) {
        float* weight = static_cast<float*>(t.param.data) + i * t.param.row_stride + c + j;
        const bool inner = direct && j + COLS <= width && i + RB <= r;
        product<RB>(left + i, rp, tile + j, T, rp + k, [](int, int) { return vf{}; },
                    [&](const vf(&acc)[RB][COL_BLOCK]) {
                      if (!inner) return store_block<RB>(result + i * T + j, T, acc);
                      UNROLL
                      for (int ii = 0; ii < RB; ii++) {
                        UNROLL
                        for (int cc = 0; cc < COL_BLOCK; cc++) {
                          float* at = weight + ii * t.param.row_stride + cc * VL;
                          store(at, load(at) * keep - acc[ii][cc]);
                        }
                      }
                    });
        if (direct && !inner) {
          View part = t.param;
          part.data = static_cast<float*>(t.param.data) + i * t.param.row_stride;
          if (i < r) apply_tile(part, c + j, smaller(RB, r - i), smaller(COLS, width - j), result + i * T + j, T, keep);
        }
      }
      if (!direct) apply_tile(t.param, c + j, r, smaller(COLS, width - j), result + j, T, keep);
    }
  }
}

void eigenbasis(const EigenbasisTask& task, const Numbers& numbers, void* scratch) {
  switch (task.r) {
    case 4: return eigenbasis_as<4>(task, numbers, scratch);
    case 8: return eigenbasis_as<8>(task, numbers, scratch);
    case 16: return eigenbasis_as<16>(task, numbers, scratch);
    case 32: return eigenbasis_as<32>(task, numbers, scratch);
    case 64: return eigenbasis_as<64>(task, numbers, scratch);
    default: return eigenbasis_as<0>(task, numbers, scratch);
  }
}

// ---- int8 -----------------------------------------------------------------------------------------------------------

// A product and a sum that are rounded once could round to another code than the two operations of the torch version.
#if defined(__clang__)
#pragma STDC FP_CONTRACT OFF
#else
#pragma GCC push_options
#pragma GCC optimize("fp-contract=off")
#endif
void int8_ema(signed char* codes, float* scales, const float* values, const float* weights, long numel,
              long blocks_per_matrix, unsigned seed_key, long first, long last) {
  for (long block = first; block < last; block++) {
    const long matrix = block / blocks_per_matrix, start = (block - matrix * blocks_per_matrix) * INT8_BLOCK;
    const float weight = weights[matrix];
    if (weight == 0.0f) continue;  // a skipped matrix keeps its codes
    const int count = static_cast<int>(smaller(INT8_BLOCK, numel - start));
    signed char* code = codes + block * INT8_BLOCK;
    const float* value = values + matrix * numel + start;
    float x[INT8_BLOCK];
    const float scale = scales[block];
    for (int j = 0; j < INT8_BLOCK; j++) x[j] = static_cast<float>(code[j]) * scale;
    if (weight < 0.5f) {
      for (int j = 0; j < count; j++) x[j] = x[j] + weight * (value[j] - x[j]);
    } else {
      for (int j = 0; j < count; j++) x[j] = value[j] - (value[j] - x[j]) * (1 - weight);
    }
    float most = 0;
#pragma omp simd reduction(max : most)
    for (int j = 0; j < INT8_BLOCK; j++) most = __builtin_fabsf(x[j]) > most ? __builtin_fabsf(x[j]) : most;
    const float fresh = most / INT8_LEVELS;
    const float inverse = fresh > TINY ? 1 / fresh : 0.0f;
    const unsigned key = block_key(seed_key, static_cast<unsigned>(block));
    scales[block] = fresh;
#pragma omp simd
    for (int j = 0; j < INT8_BLOCK; j++) {
      const float y = x[j] * inverse + uniform(key, static_cast<unsigned>(j));
      int floor = static_cast<int>(y);
      floor -= static_cast<float>(floor) > y;
      floor = floor > 127 ? 127 : floor < -127 ? -127 : floor;
      code[j] = static_cast<signed char>(j < count ? floor : 0);
    }
  }
}
#if !defined(__clang__)
#pragma GCC pop_options
#endif

#define NAME_(x) #x
#define NAME(x) NAME_(x)

}  // namespace

extern const Kernels kernels;
const Kernels kernels = {NAME(SCAO_ISA), adamw_scratch, adamw, eigenbasis_scratch, eigenbasis, int8_ema};

}  // namespace SCAO_ISA
}  // namespace scao
