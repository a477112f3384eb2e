// The C interface of the native attention kernels: one plain struct of arguments, no other state.
//
// Shapes: T query rows, T_keys key rows, H heads, Q and V head widths, B sequences. Heads and width are
// contiguous within a row; row strides count elements. Tensors are float, or double where is_double.

#pragma once

#include <stdint.h>

extern "C" {

#define HSTU_EXPORT __attribute__((visibility("default")))

enum HstuIsa { HSTU_AUTO = 0, HSTU_PORTABLE = 1, HSTU_AVX2 = 2, HSTU_AVX512 = 3 };

enum HstuStatus { HSTU_OK = 0, HSTU_OUT_OF_MEMORY = 1, HSTU_BAD_CALL = 2 };

struct HstuCall {
  int64_t bytes;  // sizeof(HstuCall) as the caller sees it: guards against a library of another version
  int32_t threads;
  int32_t isa;
  int32_t is_double;
  int32_t is_softmax;

  int64_t batch;
  int64_t heads;
  int64_t q_width;
  int64_t v_width;
  int64_t window;
  int64_t global_prefix;
  int64_t table_length;  // N of position_weight [2N-1]
  double alpha;
  double normalizer;

  const void* q;
  const void* k;
  const void* v;
  int64_t q_stride;
  int64_t k_stride;
  int64_t v_stride;
  const int64_t* offsets;         // [B+1]
  const int64_t* key_offsets;     // [B+1]
  const int64_t* num_contextual;  // [B] or null
  const int64_t* num_targets;     // [B] or null

  const void* position_weight;  // [2N-1] or null
  const void* time_weight;      // [129] or null; then the three below are set
  const int64_t* query_times;
  const int64_t* key_times;
  const int64_t* time_thresholds;  // [128]: smallest elapsed time of buckets 1..128

  void* out;  // [T, H, V] contiguous: written by the forward, read by the backward of softmax
  double* lse;  // [H, T], softmax only, likewise

  // zeros, that the backward of a softmax with a bias works in; null otherwise
  double* row_sums;     // [2, H, T]
  int32_t* row_claims;  // [H, T]

  const void* grad_out;   // [T, H, V] contiguous
  void* grad_q;           // [T, H, Q], [T_keys, H, Q], [T_keys, H, V] contiguous
  void* grad_k;
  void* grad_v;
  double* grad_position;  // [2N-1], written where position_weight is set
  double* grad_time;      // [129], written where time_weight is set
};

// Each returns an HstuStatus.
HSTU_EXPORT int32_t hstu_forward(const HstuCall* call);
HSTU_EXPORT int32_t hstu_backward(const HstuCall* call);

// The widest instruction set of this machine that the library was built for.
HSTU_EXPORT int32_t hstu_best_isa(void);

}  // extern "C"
