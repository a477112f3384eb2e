// The C interface of the row kernels: normalisation, SiLU, gating, dropout and random integers, row by row.
//
// Matrices have `rows` rows of `width` contiguous elements, float or double where is_double; strides count elements.

#pragma once

#include <stdint.h>

#include "abi.h"

extern "C" {

enum HstuRowOperation {
  HSTU_NORMALIZE = 0,           // out[0] = norm(in[0])
  HSTU_NORMALIZE_BACKWARD = 1,  // out[0] = gradient of in[0], given in[1] = gradient of norm(in[0])
  HSTU_SILU = 2,                // out[0] = silu(in[0])
  HSTU_SILU_BACKWARD = 3,       // out[0] = gradient of in[0], given that of silu(in[0]) in the parts in[1], in[2], ...
  HSTU_GATE = 4,                // out[0] = drop(in[1] * norm(in[0]))
  HSTU_GATE_BACKWARD = 5,       // out[0], out[1] = gradients of in[0] and in[1], given that of the gate in in[2]
  HSTU_DROP = 6,                // out[0] = drop(in[0])
  HSTU_DRAW = 7,                // integers [rows, width] = uniform in [0, high)
};

#define HSTU_MAX_PARTS 4

struct HstuRows {
  int64_t bytes;  // sizeof(HstuRows) as the caller sees it
  int32_t threads;
  int32_t isa;
  int32_t is_double;
  int32_t operation;

  int64_t rows;
  int64_t width;
  int64_t part_width[HSTU_MAX_PARTS];  // of the parts of HSTU_SILU_BACKWARD; they add up to the width
  double epsilon;                      // added to the variance

  const void* in[1 + HSTU_MAX_PARTS];
  int64_t in_stride[1 + HSTU_MAX_PARTS];
  void* out[2];
  int64_t out_stride[2];

  const int64_t* tokens;  // [rows], identities for random numbers; null: nothing is dropped
  int64_t key;
  int32_t threshold;  // elements whose random word is below it are dropped, the others scaled
  double scale;
  int64_t high;  // in [1, 2^20]
  int64_t* integers;
};

// Returns an HstuStatus.
HSTU_EXPORT int32_t hstu_rows(const HstuRows* call);

}  // extern "C"

namespace hstu {

// Works on rows [first, end), for [float, double].
struct RowKernels {
  void (*run[2])(const HstuRows& call, int64_t first, int64_t end);
};

extern const RowKernels portable_row_kernels;
extern const RowKernels avx2_row_kernels;
extern const RowKernels avx512_row_kernels;

}  // namespace hstu
