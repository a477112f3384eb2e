// The kernels for one instruction set; compiled once for each, with HSTU_ISA naming the table it defines.
//
// Nothing here may share code with other files (see plan.h), hence the unnamed namespace around everything.

#include <stddef.h>
#include <stdint.h>

#include "plan.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define VECTOR_BYTES 64
#define VECTOR_REGISTERS 32
#elif defined(__AVX2__)
#define VECTOR_BYTES 32
#define VECTOR_REGISTERS 16
#else
#define VECTOR_BYTES 16
#define VECTOR_REGISTERS 16
#endif

namespace hstu {
namespace {
#include "simd.h"
#include "gemm.h"
#include "tile.h"
#include "bias.h"
#include "forward.h"
#include "backward.h"
}  // namespace

extern const Kernels HSTU_ISA = {
    {forward_scratch<float>, forward_scratch<double>},
    {backward_scratch<float>, backward_scratch<double>},
    {forward_task<float>, forward_task<double>},
    {backward_task<float>, backward_task<double>},
};

}  // namespace hstu
