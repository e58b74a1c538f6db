// The table of the kernels of one instruction set.
#include "cpu_table.h"
#include "cpu_vector.h"

#define NAME_(x) #x
#define NAME(x) NAME_(x)

namespace scao {
namespace SCAO_ISA {

extern const Kernels kernels;
const Kernels kernels = {NAME(SCAO_ISA), adamw_scratch, adamw, eigenbasis_scratch, eigenbasis, VL, eigh_scratch, eigh, int8_ema};

}  // namespace SCAO_ISA
}  // namespace scao
