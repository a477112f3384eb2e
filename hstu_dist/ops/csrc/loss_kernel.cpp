// The softmax losses for one instruction set; compiled once for each, with HSTU_ISA naming it.
//
// Nothing here may share code with other files (see plan.h), hence the unnamed namespace around everything.

#include <stddef.h>
#include <stdint.h>

#include "isa.h"
#include "loss.h"

namespace hstu {
namespace {
#include "simd.h"
#include "gemm.h"
#include "lanes.h"
#include "loss_sampled.h"
#include "loss_full.h"

template <typename T>
void pull(const HstuLoss& call, const void* pulls) {
  for (int64_t t = 0; t < call.positions; ++t) {
    const T* query = static_cast<const T*>(call.queries) + t * call.width;
    T* grad = static_cast<T*>(call.grad_items) + call.positive[t] * call.stride;
    const T weight = static_cast<const T*>(pulls)[t];
    for (int64_t c = 0; c < call.width; ++c) grad[c] += weight * query[c];
  }
}

}  // namespace

extern const LossKernels HSTU_TABLE(loss_kernels) = {
    {sampled_scratch<float>, sampled_scratch<double>},
    {sampled_block<float>, sampled_block<double>},
    {sampled_range<float>, sampled_range<double>},
    {full_prepare<float>, full_prepare<double>},
    {full_scores<float>, full_scores<double>},
    {full_settle<float>, full_settle<double>},
    {full_gradients<float>, full_gradients<double>},
    {full_collect<float>, full_collect<double>},
    {pull<float>, pull<double>},
};

}  // namespace hstu
