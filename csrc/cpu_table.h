// The kernels of one instruction set; each is described in cpu_kernels.h.
#pragma once

#include "cpu_kernels.h"

namespace scao {
namespace SCAO_ISA {

unsigned long adamw_scratch(long r, long l);
void adamw(const AdamwTask&, const Numbers&, void* scratch);
unsigned long eigenbasis_scratch(long r, long l, long k);
void eigenbasis(const EigenbasisTask&, const Numbers&, void* scratch);
unsigned long eigh_scratch(long n);
void eigh(const EighTask&, long first, long last, void* scratch);
void int8_ema(signed char* codes, float* scales, const float* values, const float* weights, long numel,
              long blocks_per_matrix, unsigned seed_key, long first, long last);

}  // namespace SCAO_ISA
}  // namespace scao
