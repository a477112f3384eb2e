// Which instruction set a call runs on, and what the files compiled once per instruction set need to know.

#pragma once

#include <stdint.h>

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

// HSTU_TABLE(kernels) is avx2_kernels where HSTU_ISA is avx2.
#define HSTU_JOIN(a, b) a##_##b
#define HSTU_EXPAND(a, b) HSTU_JOIN(a, b)
#define HSTU_TABLE(name) HSTU_EXPAND(HSTU_ISA, name)

namespace hstu {

// The instruction set that `wanted` (an HstuIsa) stands for on this machine, or HSTU_AUTO where it does not run.
int32_t usable_isa(int32_t wanted);

// The table of an instruction set for a call that wants `wanted`; null where it does not run. Only drivers call it,
// with HSTU_TABLES(name) as the last three arguments.
template <typename Table>
const Table* table_for(int32_t wanted, const Table* portable, const Table* avx2, const Table* avx512) {
  const Table* tables[] = {nullptr, portable, avx2, avx512};
  return tables[usable_isa(wanted)];
}

#if defined(HSTU_X86)
#define HSTU_TABLES(name) &portable_##name, &avx2_##name, &avx512_##name
#else
#define HSTU_TABLES(name) &portable_##name, nullptr, nullptr
#endif

}  // namespace hstu
