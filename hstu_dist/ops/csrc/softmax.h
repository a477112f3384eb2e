// What the backward of a softmax knows of each row: its log-sum-exp, and the mean that is subtracted from its gradient.
//
// ds = p (dp - mean), where the mean of dp under p equals sum(out * grad_out). A bias gradient adds up whole rows of
// ds, which cancel: only a mean of the very p and dp that ds is made of cancels with them, while the rounding of `out`
// would remain. Calls with a bias therefore take the mean from a pass of its own over the keys. Included only by
// attention_kernel.cpp.

#pragma once

// Each number as its rounded value and the rest.
template <typename T>
struct SoftmaxRows {
  T lse[kBlock];
  T lse_rest[kBlock];
  T mean[kBlock];
  T mean_rest[kBlock];
  T free[kBlock];  // 0 for a query with one key: its weight is 1 whatever the score, where rounding would differ
};

template <typename T>
struct MeanScratch {
  SoftmaxRows<T> rows;
  Cells cells;
  Axis key_axis;
  BiasTile<T> bias;
  alignas(64) T scores[kBlock * kBlock];
  alignas(64) T grads[kBlock * kBlock];
  // lane by lane: of p dp and of p
  alignas(64) T weighted[kBlock * kLanes<T>];
  alignas(64) T weights[kBlock * kLanes<T>];
};

// Size of the keys and values of one block as lanes.
inline int64_t lanes_size(const HstuCall& call) { return kBlock * (call.q_width + call.v_width); }

// Keys [Q, kBlock] scaled by alpha and values [V, kBlock] scaled by 1/n, into zeros.
template <typename T>
void load_lanes(const HstuCall& call, int64_t row, int32_t count, int64_t h, T* key, T* value) {
  const T* k = static_cast<const T*>(call.k) + row * call.k_stride + h * call.q_width;
  const T* v = static_cast<const T*>(call.v) + row * call.v_stride + h * call.v_width;
  transpose(k, call.k_stride, count, call.q_width, key, int64_t{kBlock}, T(call.alpha));
  transpose(v, call.v_stride, count, call.v_width, value, int64_t{kBlock},
            call.is_softmax ? T(1) : T(1 / call.normalizer));
}

template <typename T>
void split(double x, T& value, T& rest) {
  value = T(x);
  rest = T(x - double{value});
}

template <typename T>
void load_lse(const HstuCall& call, int64_t row, int32_t count, int64_t h, SoftmaxRows<T>& out) {
  const double* lse = call.lse + h * call.offsets[call.batch] + row;
  for (int32_t r = 0; r < count; ++r) split(lse[r], out.lse[r], out.lse_rest[r]);
}

template <typename T>
void load_softmax(const HstuCall& call, int64_t row, const Queries<T>& queries, int64_t h, SoftmaxRows<T>& out) {
  load_lse(call, row, queries.count, h, out);
  const int64_t total = call.offsets[call.batch];
  for (int32_t r = 0; r < queries.count; ++r) {
    double mean = 0;
    if (call.row_sums != nullptr) {
      const double* weighted = call.row_sums + h * total + row + r;
      mean = weighted[0] / weighted[call.heads * total];
    } else {
      const int64_t at = ((row + r) * call.heads + h) * call.v_width;
      const T* result = static_cast<const T*>(call.out) + at;
      const T* grad = static_cast<const T*>(call.grad_out) + at;
      for (int64_t c = 0; c < call.v_width; ++c) mean += double{result[c]} * double{grad[c]};
    }
    split(mean, out.mean[r], out.mean_rest[r]);
    const Int<T> own = queries.own[r], b_lo = queries.b_lo[r], b_hi = queries.b_hi[r];
    const bool one_key = queries.a_hi[r] <= (own == 0) && (b_hi <= b_lo || (b_lo == own && b_hi == own + 1));
    out.free[r] = one_key ? 0 : 1;
  }
}

template <typename T, bool Masked>
inline void sum_cell(MeanScratch<T>& x, const Queries<T>& queries, int32_t first_key, int row, int end_row, int lane) {
  for (int r = row; r < end_row; ++r) {
    V<T> weighted = load(x.weighted + r * kLanes<T>), weights = load(x.weights + r * kLanes<T>);
    for (int l = lane; l < lane + kGroup; l += kLanes<T>) {
      const int at = r * kBlock + l;
      V<T> weight = exponential((load(x.scores + at) + load(x.bias.value + at) - x.rows.lse[r]) - x.rows.lse_rest[r]);
      if constexpr (Masked) weight = keep<T>(visible<T, false>(queries, first_key, r, l), weight);
      weighted += weight * load(x.grads + at);
      weights += weight;
    }
    store(x.weighted + r * kLanes<T>, weighted);
    store(x.weights + r * kLanes<T>, weights);
  }
}

// Adds one tile of one head to the sums of its rows.
template <typename T>
void sum_tile(const HstuCall& call, MeanScratch<T>& x, const Queries<T>& queries, const T* lanes, int32_t first_key,
              int64_t row, int64_t h) {
  const T* q = static_cast<const T*>(call.q) + row * call.q_stride + h * call.q_width;
  const T* g = static_cast<const T*>(call.grad_out) + (row * call.heads + h) * call.v_width;
  const T* values = lanes + kBlock * call.q_width;
  const int64_t g_row = call.heads * call.v_width;
  for_runs(x.cells, [&](int r, int rows, int lane, int width) {
    const int at = r * kBlock + lane;
    multiply<false>(Product<T>{q + r * call.q_stride, call.q_stride, 1, lanes + lane, kBlock, x.scores + at, kBlock,
                               call.q_width},
                    rows, width);
    multiply<false>(Product<T>{g + r * g_row, g_row, 1, values + lane, kBlock, x.grads + at, kBlock, call.v_width},
                    rows, width);
  });
  load_lse(call, row, queries.count, h, x.rows);
  __builtin_memset(x.weighted, 0, sizeof x.weighted);
  __builtin_memset(x.weights, 0, sizeof x.weights);
  for_cells(x.cells, [&](int first, int end, int lane, CellState state) {
    if (state == kFull)
      sum_cell<T, false>(x, queries, first_key, first, end, lane);
    else
      sum_cell<T, true>(x, queries, first_key, first, end, lane);
  });
  const int64_t total = call.offsets[call.batch];
  double* weighted = call.row_sums + h * total + row;
  double* weights = weighted + call.heads * total;
  for (int32_t r = 0; r < queries.count; ++r)
    for (int l = 0; l < kLanes<T>; ++l) {
      weighted[r] += double{x.weighted[r * kLanes<T> + l]};
      weights[r] += double{x.weights[r * kLanes<T> + l]};
    }
}

// The sums of a block of queries, for heads first_head..first_head+count-1. The first task that needs them computes
// them, others wait; which one it is makes no difference to the result.
template <typename T>
void find_row_sums(const Plan& plan, const Sequence& s, int32_t block, const Queries<T>& queries,
                   const Axis& query_axis, int64_t first_head, int64_t count, MeanScratch<T>& x, T* lanes) {
  const HstuCall& call = *plan.call;
  const int64_t row = s.query_row + block * kBlock;
  int32_t* claim = call.row_claims + first_head * call.offsets[call.batch] + row;
  int32_t unclaimed = 0;
  if (!__atomic_compare_exchange_n(claim, &unclaimed, 1, false, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE)) {
    wait_for(claim, 2);
    return;
  }
  for (int32_t first_key = 0; first_key < s.keys; first_key += kBlock) {
    if (!touches(plan.spans[s.first_span + block], first_key / kChunk)) continue;
    load_cells<T, false>(queries, first_key, s.keys, x.cells);
    if (x.cells.empty) continue;
    const int64_t key_row = s.key_row + first_key;
    const int32_t keys = least(kBlock, s.keys - first_key);
    load_axis(s, first_key, keys, call.key_times == nullptr ? nullptr : call.key_times + key_row, x.key_axis);
    load_bias(plan, x.cells, query_axis, x.key_axis, x.bias);
    for (int64_t h = first_head; h < first_head + count; ++h) {
      if (keys < kBlock) __builtin_memset(lanes, 0, sizeof(T) * static_cast<size_t>(lanes_size(call)));
      load_lanes(call, key_row, keys, h, lanes, lanes + kBlock * call.q_width);
      sum_tile(call, x, queries, lanes, first_key, row, h);
    }
  }
  __atomic_store_n(claim, 2, __ATOMIC_RELEASE);
}
