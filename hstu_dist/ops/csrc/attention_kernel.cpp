// The attention kernels for one instruction set; compiled once for each, with HSTU_ISA naming it.
//
// Nothing here may share code with other files (see plan.h), hence the unnamed namespace around everything.

#include <stddef.h>
#include <stdint.h>

#include "isa.h"
#include "plan.h"

namespace hstu {
namespace {
#include "simd.h"
#include "gemm.h"
#include "tile.h"
#include "bias.h"
#include "forward.h"
#include "softmax.h"
#include "backward.h"
}  // namespace

extern const Kernels HSTU_TABLE(kernels) = {
    {forward_scratch<float>, forward_scratch<double>},
    {backward_scratch<float>, backward_scratch<double>},
    {forward_task<float>, forward_task<double>},
    {backward_task<float>, backward_task<double>},
};

}  // namespace hstu
