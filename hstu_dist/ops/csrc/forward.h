// Forward of one chunk of queries: queries are the lanes, keys the rows, so that softmax needs no sums across lanes.
//
// scores^T = K Q^T, weights^T = f(scores^T), out^T += V^T weights^T. Included only by attention_kernel.cpp.

#pragma once

template <typename T>
struct ForwardHead {
  T* query;   // [Q, kBlock], scaled by alpha
  T* out;     // [V, kBlock]
  T* maximum;  // [kBlock], softmax only
  T* sum;      // [kBlock]
};

template <typename T>
struct ForwardScratch {
  Queries<T> queries[kChunkBlocks];
  Axis query_axis[kChunkBlocks];
  Cells cells;
  Axis key_axis;
  BiasTile<T> bias;
  alignas(64) T weights[kBlock * kBlock];
};

template <typename T>
int64_t forward_head_size(const HstuCall& call) {
  return kBlock * (call.q_width + call.v_width + 2);
}

template <typename T>
int64_t forward_scratch(const Plan& plan) {
  const HstuCall& call = *plan.call;
  return round_up(sizeof(ForwardScratch<T>), 64) +
         static_cast<int64_t>(sizeof(T)) * kChunkBlocks * plan.group_heads * forward_head_size<T>(call);
}

// weights = SiLU(scores + bias), zero where hidden; 1/n comes last, on the output.
template <typename T, bool Masked>
inline void silu_cell(ForwardScratch<T>& x, const Queries<T>& queries, bool biased, int32_t first_key, int row,
                      int end_row, int lane) {
  for (int r = row; r < end_row; ++r)
#pragma GCC unroll 8
    for (int l = lane; l < lane + kGroup; l += kLanes<T>) {
      T* at = x.weights + r * kBlock + l;
      V<T> score = load(at);
      if (biased) score += load(x.bias.value + r * kBlock + l);
      V<T> weight = score * reciprocal(exponential(-score) + T(1));
      if constexpr (Masked) weight = keep<T>(visible<T, true>(queries, first_key, r, l), weight);
      store(at, weight);
    }
}

template <typename T>
void silu_tile(ForwardScratch<T>& x, const Queries<T>& queries, bool biased, int32_t first_key) {
  for_cells(x.cells, [&](int row, int end_row, int lane, CellState state) {
    if (state == kFull)
      silu_cell<T, false>(x, queries, biased, first_key, row, end_row, lane);
    else
      silu_cell<T, true>(x, queries, biased, first_key, row, end_row, lane);
  });
}

// Running softmax: rescales what a head has so far to the new maximum of each query.
template <typename T>
void softmax_tile(ForwardScratch<T>& x, const Queries<T>& queries, ForwardHead<T>& head, bool biased, int32_t first_key,
                  int64_t v_width) {
  const V<T> hidden = splat(T(-1e30));
  V<T> maximum[kBlock / kLanes<T>];
  for (int l = 0; l < kBlock; l += kLanes<T>) maximum[l / kLanes<T>] = load(head.maximum + l);
  for_cells(x.cells, [&](int row, int end_row, int lane, CellState state) {
    for (int l = lane; l < lane + kGroup; l += kLanes<T>)
      for (int r = row; r < end_row; ++r) {
        T* at = x.weights + r * kBlock + l;
        V<T> score = load(at);
        if (biased) score += load(x.bias.value + r * kBlock + l);
        if (state != kFull) {
          const VI<T> mask = visible<T, true>(queries, first_key, r, l);
          score = mask != 0 ? score : hidden;
        }
        store(at, score);
        maximum[l / kLanes<T>] = larger<T>(maximum[l / kLanes<T>], score);
      }
  });
  for (int l = 0; l < kBlock; l += kLanes<T>) {
    const V<T> scale = exponential(load(head.maximum + l) - maximum[l / kLanes<T>]);
    store(head.maximum + l, maximum[l / kLanes<T>]);
    store(head.sum + l, load(head.sum + l) * scale);
    for (int64_t v = 0; v < v_width; ++v) store(head.out + v * kBlock + l, load(head.out + v * kBlock + l) * scale);
  }
  for_cells(x.cells, [&](int row, int end_row, int lane, CellState) {
    for (int l = lane; l < lane + kGroup; l += kLanes<T>) {
      V<T> sum{};
      for (int r = row; r < end_row; ++r) {
        T* at = x.weights + r * kBlock + l;
        const V<T> score = load(at);
        const V<T> weight = keep<T>(score > hidden, exponential(score - maximum[l / kLanes<T>]));
        store(at, weight);
        sum += weight;
      }
      store(head.sum + l, load(head.sum + l) + sum);
    }
  });
}

template <typename T>
void forward_tile(const Plan& plan, const Sequence& s, int64_t h, ForwardScratch<T>& x, const Queries<T>& queries,
                  ForwardHead<T>& head, int32_t first_key) {
  const HstuCall& call = *plan.call;
  const int64_t row = s.key_row + first_key;
  const T* k = static_cast<const T*>(call.k) + row * call.k_stride + h * call.q_width;
  const T* v = static_cast<const T*>(call.v) + row * call.v_stride + h * call.v_width;
  // the last block of queries fetches the block of keys that most likely comes next
  const bool more = &queries == x.queries + kChunkBlocks - 1 && first_key + 2 * kBlock <= s.keys;
  const Rows<T> next_keys{k + more * kBlock * call.k_stride, call.k_stride, more * call.q_width};
  const Rows<T> next_values{v + more * kBlock * call.v_stride, call.v_stride, more * call.v_width};
  for_runs(x.cells, [&](int r, int rows, int lane, int lanes) {
    multiply<false>(Product<T>{k + r * call.k_stride, call.k_stride, 1, head.query + lane, kBlock,
                               x.weights + r * kBlock + lane, kBlock, call.q_width, next_values.from(r)},
                    rows, lanes);
  });
  const bool biased = call.position_weight != nullptr || call.time_weight != nullptr;
  if (call.is_softmax)
    softmax_tile(x, queries, head, biased, first_key, call.v_width);
  else
    silu_tile(x, queries, biased, first_key);
  for_runs(x.cells, [&](int r, int rows, int lane, int lanes) {
    multiply<true>(Product<T>{v + r * call.v_stride, 1, call.v_stride, x.weights + r * kBlock + lane, kBlock,
                              head.out + lane, kBlock, rows, next_keys},
                   call.v_width, lanes);
  });
}

template <typename T>
ForwardHead<T> forward_head(const HstuCall& call, T* heads, int64_t i) {
  ForwardHead<T> head;
  head.query = heads + i * forward_head_size<T>(call);
  head.out = head.query + kBlock * call.q_width;
  head.maximum = head.out + kBlock * call.v_width;
  head.sum = head.maximum + kBlock;
  return head;
}

template <typename T>
void load_query(const HstuCall& call, int64_t row, int32_t count, int64_t h, ForwardHead<T>& head) {
  const T* q = static_cast<const T*>(call.q) + row * call.q_stride + h * call.q_width;
  __builtin_memset(head.query, 0, sizeof(T) * static_cast<size_t>(forward_head_size<T>(call)));
  transpose(q, call.q_stride, count, call.q_width, head.query, int64_t{kBlock}, T(call.alpha));
  for (int l = 0; l < kBlock; ++l) head.maximum[l] = T(-1e30);
}

template <typename T>
void store_output(const HstuCall& call, int64_t row, int32_t count, int64_t h, ForwardHead<T>& head) {
  T* out = static_cast<T*>(call.out) + (row * call.heads + h) * call.v_width;
  T scale = T(1 / call.normalizer);
  if (call.is_softmax) {
    double* lse = call.lse + h * call.offsets[call.batch] + row;
    for (int i = 0; i < count; ++i) {
      lse[i] = double{head.maximum[i]} + __builtin_log(double{head.sum[i]});
      for (int64_t v = 0; v < call.v_width; ++v) head.out[v * kBlock + i] /= head.sum[i];
    }
    scale = 1;
  }
  transpose(head.out, kBlock, call.v_width, count, out, call.heads * call.v_width, scale);
}

template <typename T>
void forward_task(const Plan& plan, const Task& task, void* scratch) {
  const HstuCall& call = *plan.call;
  const Sequence& s = plan.sequences[task.sequence];
  ForwardScratch<T>& x = *static_cast<ForwardScratch<T>*>(scratch);
  T* heads = reinterpret_cast<T*>(static_cast<char*>(scratch) + round_up(sizeof x, 64));
  const bool biased = call.position_weight != nullptr || call.time_weight != nullptr;
  const int64_t first_head = int64_t{task.head_group} * plan.group_heads;
  const int64_t count = least<int64_t>(plan.group_heads, call.heads - first_head);
  const int32_t first_block = task.chunk * kChunkBlocks;
  const int32_t blocks = least(kChunkBlocks, (s.queries + kBlock - 1) / kBlock - first_block);
  // the last one, whose rows most likely see most, comes last in the scratch too
  Queries<T>* queries = x.queries + kChunkBlocks - blocks;
  for (int32_t b = 0; b < blocks; ++b) {
    const int32_t first_query = (first_block + b) * kBlock;
    load_queries(plan, s, first_block + b, queries[b]);
    if (biased)
      load_axis(s, s.keys - s.queries + first_query, queries[b].count,
                call.query_times == nullptr ? nullptr : call.query_times + s.query_row + first_query, x.query_axis[b]);
    for (int64_t i = 0; i < count; ++i) {
      ForwardHead<T> head = forward_head(call, heads, b * count + i);
      load_query(call, s.query_row + first_query, queries[b].count, first_head + i, head);
    }
  }
  const Span* spans = plan.spans + s.first_span + first_block;
  for (int32_t first_key = 0; first_key < s.keys; first_key += kBlock) {
    bool loaded = false;
    for (int32_t b = 0; b < blocks; ++b) {
      if (!touches(spans[b], first_key / kChunk)) continue;
      load_cells<T, true>(queries[b], first_key, s.keys, x.cells);
      if (x.cells.empty) continue;
      if (biased) {
        if (!loaded)
          load_axis(s, first_key, least(kBlock, s.keys - first_key),
                    call.key_times == nullptr ? nullptr : call.key_times + s.key_row + first_key, x.key_axis);
        loaded = true;
        load_bias(plan, x.cells, x.key_axis, x.query_axis[b], x.bias);
      }
      for (int64_t i = 0; i < count; ++i) {
        ForwardHead<T> head = forward_head(call, heads, b * count + i);
        forward_tile(plan, s, first_head + i, x, queries[b], head, first_key);
      }
    }
  }
  for (int32_t b = 0; b < blocks; ++b)
    for (int64_t i = 0; i < count; ++i) {
      ForwardHead<T> head = forward_head(call, heads, b * count + i);
      store_output(call, s.query_row + (first_block + b) * kBlock, queries[b].count, first_head + i, head);
    }
}
