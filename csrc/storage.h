// Numbers as they are stored, for CPU, CUDA and the emulator.
#pragma once

#ifdef __CUDACC__
#define SCAO_HD __host__ __device__
#else
#define SCAO_HD
#endif

namespace scao {

enum Dtype { F32, BF16, F16 };

constexpr unsigned NOT_FINITE = 0x7f800000u;  // bits of Inf, below those of NaN
constexpr float TINY = 1.17549435e-38f;

SCAO_HD static inline unsigned bits_of(float f) {
  unsigned u;
  __builtin_memcpy(&u, &f, 4);
  return u;
}

SCAO_HD static inline float float_of(unsigned u) {
  float f;
  __builtin_memcpy(&f, &u, 4);
  return f;
}

SCAO_HD static inline float bf16_to_float(unsigned short h) { return float_of(static_cast<unsigned>(h) << 16); }

SCAO_HD static inline unsigned short float_to_bf16(float f) {  // to nearest even, as torch rounds
  const unsigned u = bits_of(f);
  if ((u & 0x7fffffffu) > NOT_FINITE) return 0x7fc0;
  return static_cast<unsigned short>((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
}

#ifndef __CUDACC__  // launch.cu has CUDA's own
static inline float half_to_float(unsigned short h) {
  _Float16 x;
  __builtin_memcpy(&x, &h, 2);
  return static_cast<float>(x);
}

static inline unsigned short float_to_half(float f) {
  const _Float16 x = static_cast<_Float16>(f);
  unsigned short h;
  __builtin_memcpy(&h, &x, 2);
  return h;
}
#endif

}  // namespace scao
