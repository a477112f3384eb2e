// Splits a call of the row kernels over OpenMP threads.

#include "rows.h"

#include <algorithm>

#include "isa.h"

namespace hstu {
namespace {

// Elements below which another thread costs more than it saves.
constexpr int64_t kElementsPerThread = 1 << 14;

const RowKernels* kernels(int32_t isa) { return table_for(isa, HSTU_TABLES(row_kernels)); }

}  // namespace
}  // namespace hstu

extern "C" int32_t hstu_rows(const HstuRows* call) {
  if (call == nullptr || call->bytes != sizeof(HstuRows)) return HSTU_BAD_CALL;
  const hstu::RowKernels* kernels = hstu::kernels(call->isa);
  if (kernels == nullptr || call->operation < HSTU_NORMALIZE || call->operation > HSTU_DRAW) return HSTU_BAD_CALL;
  const int64_t rows = call->rows;
  const int64_t useful = rows * call->width / hstu::kElementsPerThread + 1;
  const int threads = static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(call->threads, useful)));
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int t = 0; t < threads; ++t) kernels->run[call->is_double](*call, rows * t / threads, rows * (t + 1) / threads);
  return HSTU_OK;
}
