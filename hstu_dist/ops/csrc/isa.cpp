// What this machine runs.

#include "isa.h"

#include <initializer_list>

#include "abi.h"

namespace hstu {
namespace {

bool supports(int32_t isa) {
#if defined(HSTU_X86)
  if (isa == HSTU_AVX512)
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") && supports(HSTU_AVX2);
  if (isa == HSTU_AVX2)
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") &&
           __builtin_cpu_supports("bmi2");
#endif
  return isa == HSTU_PORTABLE;
}

}  // namespace

int32_t usable_isa(int32_t wanted) {
  if (wanted == HSTU_AUTO) return hstu_best_isa();
  return supports(wanted) ? wanted : HSTU_AUTO;
}

}  // namespace hstu

extern "C" int32_t hstu_best_isa(void) {
  for (int32_t isa : {HSTU_AVX512, HSTU_AVX2})
    if (hstu::usable_isa(isa) == isa) return isa;
  return HSTU_PORTABLE;
}
