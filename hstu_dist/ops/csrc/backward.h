// Backward of one chunk of keys: keys are the lanes, queries the rows; the scores are computed again.
//
// A task owns the gradients of its keys and values. Its shares of grad_q and of the bias gradients are added to
// the shared results in the order of the chunks, so that every run gives the same bits on any number of
// threads. Included only by attention_kernel.cpp.

#pragma once

template <typename T>
struct BackwardHead {
  T* key;         // [Q, kBlock], scaled by alpha
  T* value;       // [V, kBlock], scaled by 1/n
  T* key_rows;    // [kBlock, Q rounded up], scaled by alpha, zeros behind
  T* grad_key;    // [Q, kBlock]
  T* grad_value;  // [V, kBlock]
};

// What the heads share of one block of keys: the tile of the current block of queries, and its bias.
template <typename T>
struct SharedTile {
  int32_t first_key;
  int32_t keys;
  Axis key_axis;
  Cells cells;
  BiasTile<T> bias;
  // summed over heads; zeros in front of and behind each row let its diagonals be summed without bounds
  alignas(64) T grad_bias[kBlock + kBlock * 2 * kBlock];
};

template <typename T>
struct BackwardScratch {
  SharedTile<T> tiles[kChunkBlocks];
  Queries<T> queries;
  Axis query_axis;
  alignas(64) T weights[kBlock * kBlock];
  alignas(64) T grad_scores[kBlock * kBlock];
  SoftmaxRows<T> rows;  // softmax only
  MeanScratch<T> mean;  // softmax with a bias only
  alignas(64) T grad_buckets[kBuckets * kGroup];
  double bucket_sums[kBuckets];  // what was moved out of grad_buckets
};

// Buffers whose size depends on the call.
template <typename T>
struct BackwardBuffers {
  T* grad_query;  // [kBlock, Q rounded up]
  // by distance to the chunk's first key; double, because all targets share one position
  double* grad_position;
  T* lanes;  // of find_row_sums
  T* heads;
};

template <typename T>
int64_t backward_head_size(const HstuCall& call) {
  return kBlock * (2 * call.q_width + 2 * call.v_width + round_up(call.q_width, kGroup));
}

inline int64_t position_sum_size(const HstuCall& call, int64_t keys) {
  return call.position_weight == nullptr ? 0 : round_up(keys, kBlock) + kBlock + kChunk;
}

template <typename T>
BackwardBuffers<T> backward_buffers(const Plan& plan, void* scratch) {
  const int64_t q_row = round_up(plan.call->q_width, kGroup);
  BackwardBuffers<T> b;
  b.grad_query = reinterpret_cast<T*>(static_cast<char*>(scratch) + round_up(sizeof(BackwardScratch<T>), 64));
  b.grad_position = reinterpret_cast<double*>(b.grad_query + kBlock * q_row);
  b.lanes = reinterpret_cast<T*>(b.grad_position + position_sum_size(*plan.call, plan.max_keys));
  b.heads = b.lanes + (plan.call->row_sums == nullptr ? 0 : lanes_size(*plan.call));
  return b;
}

template <typename T>
int64_t backward_scratch(const Plan& plan) {
  const HstuCall& call = *plan.call;
  const int64_t rows = kBlock * round_up(call.q_width, kGroup);
  const int64_t sums = position_sum_size(call, plan.max_keys);
  return round_up(sizeof(BackwardScratch<T>), 64) + static_cast<int64_t>(sizeof(double)) * sums +
         static_cast<int64_t>(sizeof(T)) *
             (rows + lanes_size(call) + kChunkBlocks * plan.group_heads * backward_head_size<T>(call));
}

template <typename T>
BackwardHead<T> backward_head(const HstuCall& call, T* heads, int64_t i) {
  BackwardHead<T> head;
  head.key = heads + i * backward_head_size<T>(call);
  head.value = head.key + kBlock * call.q_width;
  head.key_rows = head.value + kBlock * call.v_width;
  head.grad_key = head.key_rows + kBlock * round_up(call.q_width, kGroup);
  head.grad_value = head.grad_key + kBlock * call.q_width;
  return head;
}

template <typename T>
void load_keys(const HstuCall& call, int64_t row, int32_t count, int64_t h, BackwardHead<T>& head) {
  const T* k = static_cast<const T*>(call.k) + row * call.k_stride + h * call.q_width;
  const T alpha = T(call.alpha);
  __builtin_memset(head.key, 0, sizeof(T) * static_cast<size_t>(backward_head_size<T>(call)));
  load_lanes(call, row, count, h, head.key, head.value);
  const int64_t q_row = round_up(call.q_width, kGroup);
  for (int32_t r = 0; r < count; ++r)
    for (int64_t c = 0; c < call.q_width; ++c) head.key_rows[r * q_row + c] = alpha * k[r * call.k_stride + c];
}

// weights = f(score), grad_scores = grad of score, both zero where hidden; grad_bias adds up the heads.
template <typename T, bool Masked, bool Softmax>
inline void activation_cell(BackwardScratch<T>& x, SharedTile<T>& tile, bool biased, bool first_head, int row,
                            int end_row, int lane) {
  for (int r = row; r < end_row; ++r)
#pragma GCC unroll 8
    for (int l = lane; l < lane + kGroup; l += kLanes<T>) {
      T* weight_at = x.weights + r * kBlock + l;
      T* grad_at = x.grad_scores + r * kBlock + l;
      V<T> score = load(weight_at);
      if (biased) score += load(tile.bias.value + r * kBlock + l);
      V<T> weight, grad = load(grad_at);
      if constexpr (Softmax) {
        weight = exponential((score - x.rows.lse[r]) - x.rows.lse_rest[r]);
        grad = weight * x.rows.free[r] * ((grad - x.rows.mean[r]) - x.rows.mean_rest[r]);
      } else {
        // 1 - sigmoid as e^-x sigmoid: the difference would cancel for large x
        const V<T> inverse = exponential(-score);
        const V<T> sigmoid = reciprocal(inverse + T(1));
        weight = score * sigmoid;
        grad *= sigmoid + weight * (inverse * sigmoid);
      }
      if constexpr (Masked) {
        const VI<T> mask = visible<T, false>(x.queries, tile.first_key, r, l);
        weight = keep<T>(mask, weight);
        grad = keep<T>(mask, grad);
      }
      store(weight_at, weight);
      store(grad_at, grad);
      if (biased) {
        T* sum = tile.grad_bias + kBlock + r * 2 * kBlock + l;
        store(sum, first_head ? grad : grad + load(sum));
      }
    }
}

template <typename T, bool Softmax>
void activation_tile(BackwardScratch<T>& x, SharedTile<T>& tile, bool biased, bool first_head) {
  for_cells(tile.cells, [&](int row, int end_row, int lane, CellState state) {
    if (state == kFull)
      activation_cell<T, false, Softmax>(x, tile, biased, first_head, row, end_row, lane);
    else
      activation_cell<T, true, Softmax>(x, tile, biased, first_head, row, end_row, lane);
  });
}

// One head of one tile: its share of grad_q is added to `grad_query`.
template <typename T>
void backward_tile(const HstuCall& call, BackwardScratch<T>& x, SharedTile<T>& tile, const BackwardHead<T>& head,
                   T* grad_query, int64_t query_row, int64_t h, bool first_head) {
  const int64_t q_row = round_up(call.q_width, kGroup), g_row = call.heads * call.v_width;
  const T* q = static_cast<const T*>(call.q) + query_row * call.q_stride + h * call.q_width;
  const T* g = static_cast<const T*>(call.grad_out) + (query_row * call.heads + h) * call.v_width;
  // the last block of keys fetches the block of queries that most likely comes next
  const bool more = &tile == x.tiles + kChunkBlocks - 1 && query_row + 2 * kBlock <= call.offsets[call.batch];
  const Rows<T> next_q{q + more * kBlock * call.q_stride, call.q_stride, more * call.q_width};
  const Rows<T> next_g{g + more * kBlock * g_row, g_row, more * call.v_width};
  for_runs(tile.cells, [&](int r, int rows, int lane, int lanes) {
    const int at = r * kBlock + lane;
    multiply<false>(Product<T>{q + r * call.q_stride, call.q_stride, 1, head.key + lane, kBlock, x.weights + at, kBlock,
                               call.q_width, next_q.from(r)},
                    rows, lanes);
    multiply<false>(Product<T>{g + r * g_row, g_row, 1, head.value + lane, kBlock, x.grad_scores + at, kBlock,
                               call.v_width, next_g.from(r)},
                    rows, lanes);
  });
  const bool biased = call.position_weight != nullptr || call.time_weight != nullptr;
  if (call.is_softmax) {
    load_softmax(call, query_row, x.queries, h, x.rows);
    activation_tile<T, true>(x, tile, biased, first_head);
  } else {
    activation_tile<T, false>(x, tile, biased, first_head);
  }
  for_runs(tile.cells, [&](int r, int rows, int lane, int lanes) {
    const int at = r * kBlock + lane;
    multiply<true>(Product<T>{g + r * g_row, 1, g_row, x.weights + at, kBlock, head.grad_value + lane, kBlock, rows},
                   call.v_width, lanes);
    multiply<true>(Product<T>{q + r * call.q_stride, 1, call.q_stride, x.grad_scores + at, kBlock, head.grad_key + lane,
                              kBlock, rows},
                   call.q_width, lanes);
    multiply<true>(Product<T>{x.grad_scores + at, kBlock, 1, head.key_rows + lane * q_row, q_row,
                              grad_query + r * q_row, q_row, lanes},
                    rows, q_row);
  });
}

// Position gradient of a tile: the sums along its diagonals.
template <typename T>
void add_positions(const Axis& rows, const SharedTile<T>& tile, int32_t first_distance, double* sums) {
  const Axis& lanes = tile.key_axis;
  const T* grad = tile.grad_bias + kBlock;
  // without targets, positions count up by one
  if (rows.position[rows.count - 1] - rows.position[0] == rows.count - 1 &&
      lanes.position[lanes.count - 1] - lanes.position[0] == lanes.count - 1) {
    double* to = sums + (lanes.position[0] - rows.position[0] - first_distance);
    for (int d = -round_up(rows.count, kGroup); d < kBlock; d += kLanes<T>) {
      V<T> sum{};
      for (int r = most(0, -d - kLanes<T> + 1); r < least(rows.count, kBlock - d); ++r)
        sum += load(grad + r * 2 * kBlock + r + d);
      for (int l = 0; l < kLanes<T>; ++l) to[d + l] += double{sum[l]};
    }
    return;
  }
  for_cells(tile.cells, [&](int row, int end_row, int lane, CellState) {
    for (int r = row; r < end_row; ++r)
      for (int l = lane; l < least(lane + kGroup, lanes.count); ++l)
        sums[lanes.position[l] - rows.position[r] - first_distance] += grad[r * 2 * kBlock + l];
  });
}

// Each lane of a group has its own sums, so that whole vectors are added where the bucket is shared.
template <typename T>
void add_buckets(const SharedTile<T>& tile, T* sums) {
  for_cells(tile.cells, [&](int row, int end_row, int lane, CellState) {
    for (int r = row; r < end_row; ++r) {
      const T* grad = tile.grad_bias + kBlock + r * 2 * kBlock + lane;
      const uint8_t shared = tile.bias.group_bucket[r * kGroups + lane / kGroup];
      if (shared != kMixed) {
        T* to = sums + shared * kGroup;
        for (int l = 0; l < kGroup; l += kLanes<T>) store(to + l, load(to + l) + load(grad + l));
      } else {
        const uint8_t* bucket = tile.bias.bucket + r * kBlock + lane;
        for (int l = 0; l < kGroup; ++l) sums[bucket[l] * kGroup + l] += grad[l];
      }
    }
  });
}

template <typename T>
void move_buckets(BackwardScratch<T>& x) {
  for (int b = 0; b < kBuckets; ++b) {
    double sum = 0;
    for (int l = 0; l < kGroup; ++l) sum += double{x.grad_buckets[b * kGroup + l]};
    x.bucket_sums[b] += sum;
  }
  __builtin_memset(x.grad_buckets, 0, sizeof x.grad_buckets);
}

// Adds the task's bias gradients to those of its sequence, after the tasks before it.
template <typename T>
void merge_bias(const Plan& plan, const Task& task, const BackwardScratch<T>& x, const double* grad_position,
                int32_t first_distance) {
  const Sequence& s = plan.sequences[task.sequence];
  int32_t* merged = plan.merged + task.sequence;
  wait_for(merged, task.chunk * plan.head_groups + task.head_group);
  if (plan.position_sums != nullptr) {
    double* sums = plan.position_sums + 2 * s.key_row + s.keys - 1;
    // distances outside the sequence only ever collect zeros
    const int32_t from = most(first_distance, 1 - s.keys), to = least((task.chunk + 1) * kChunk, s.keys);
    for (int32_t d = from; d < to; ++d) sums[d] += grad_position[d - first_distance];
  }
  if (plan.time_sums != nullptr)
    for (int b = 0; b < kBuckets; ++b) plan.time_sums[int64_t{task.sequence} * kBuckets + b] += x.bucket_sums[b];
  __atomic_store_n(merged, *merged + 1, __ATOMIC_RELEASE);
}

template <typename T>
void add_query_gradient(const HstuCall& call, int64_t query_row, int32_t count, int64_t h, const T* from, bool first) {
  const int64_t q_row = round_up(call.q_width, kGroup), stride = call.heads * call.q_width;
  T* to = static_cast<T*>(call.grad_q) + query_row * stride + h * call.q_width;
  for (int32_t r = 0; r < count; ++r, to += stride, from += q_row)
    if (first)
      __builtin_memcpy(to, from, sizeof(T) * static_cast<size_t>(call.q_width));
    else
      for (int64_t c = 0; c < call.q_width; ++c) to[c] += from[c];
}

template <typename T>
void load_tile(const Plan& plan, const BackwardScratch<T>& x, const Sequence& s, bool biased, SharedTile<T>& tile) {
  load_cells<T, false>(x.queries, tile.first_key, s.keys, tile.cells);
  if (tile.cells.empty || !biased) return;
  load_bias(plan, tile.cells, x.query_axis, tile.key_axis, tile.bias);
  if (!tile.cells.complete)
    for (int r = 0; r < kBlock; ++r) __builtin_memset(tile.grad_bias + kBlock + r * 2 * kBlock, 0, sizeof(T) * kBlock);
}

template <typename T>
void store_key_gradients(const HstuCall& call, const Sequence& s, const BackwardScratch<T>& x,
                         const SharedTile<T>* tiles, T* heads, int64_t first_head, int64_t count) {
  const T scale = call.is_softmax ? T(1) : T(1 / call.normalizer);
  for (const SharedTile<T>* tile = tiles; tile < x.tiles + kChunkBlocks; ++tile)
    for (int64_t i = 0; i < count; ++i) {
      const BackwardHead<T> head = backward_head(call, heads, (tile - tiles) * count + i);
      const int64_t at = (s.key_row + tile->first_key) * call.heads + first_head + i;
      transpose(head.grad_key, kBlock, call.q_width, tile->keys, static_cast<T*>(call.grad_k) + at * call.q_width,
                call.heads * call.q_width, T(call.alpha));
      transpose(head.grad_value, kBlock, call.v_width, tile->keys, static_cast<T*>(call.grad_v) + at * call.v_width,
                call.heads * call.v_width, scale);
    }
}

template <typename T>
void backward_task(const Plan& plan, const Task& task, void* scratch) {
  const HstuCall& call = *plan.call;
  const Sequence& s = plan.sequences[task.sequence];
  BackwardScratch<T>& x = *static_cast<BackwardScratch<T>*>(scratch);
  const BackwardBuffers<T> b = backward_buffers<T>(plan, scratch);
  const int64_t first_head = int64_t{task.head_group} * plan.group_heads;
  const int64_t count = least<int64_t>(plan.group_heads, call.heads - first_head);
  const bool biased = call.position_weight != nullptr || call.time_weight != nullptr;
  const int32_t first_key = task.chunk * kChunk;
  // the last one, which most queries see, comes last in the scratch too
  SharedTile<T>* const end = x.tiles + kChunkBlocks;
  SharedTile<T>* const tiles = end - least(kChunkBlocks, (s.keys - first_key + kBlock - 1) / kBlock);
  // of the chunk's first key from the sequence's last query, and room for the tile's own diagonals
  const int32_t first_distance = first_key - static_cast<int32_t>(round_up(s.keys, kGroup)) - kBlock;
  if (biased) {
    __builtin_memset(x.grad_buckets, 0, sizeof x.grad_buckets);
    __builtin_memset(x.bucket_sums, 0, sizeof x.bucket_sums);
    __builtin_memset(b.grad_position, 0, sizeof(double) * static_cast<size_t>(position_sum_size(call, s.keys)));
  }
  for (SharedTile<T>* tile = tiles; tile < end; ++tile) {
    tile->first_key = first_key + static_cast<int32_t>(tile - tiles) * kBlock;
    tile->keys = least(kBlock, s.keys - tile->first_key);
    const int64_t row = s.key_row + tile->first_key;
    if (biased) {
      __builtin_memset(tile->grad_bias, 0, sizeof tile->grad_bias);
      load_axis(s, tile->first_key, tile->keys, call.key_times == nullptr ? nullptr : call.key_times + row,
                tile->key_axis);
    }
    for (int64_t i = 0; i < count; ++i) {
      BackwardHead<T> head = backward_head(call, b.heads, (tile - tiles) * count + i);
      load_keys(call, row, tile->keys, first_head + i, head);
    }
  }
  for (int32_t block = 0; block * kBlock < s.queries; ++block) {
    const Span& span = plan.spans[s.first_span + block];
    if (!touches(span, task.chunk)) continue;
    const int32_t first_query = block * kBlock;
    const int64_t query_row = s.query_row + first_query;
    load_queries(plan, s, block, x.queries);
    if (biased)
      load_axis(s, s.keys - s.queries + first_query, x.queries.count,
                call.query_times == nullptr ? nullptr : call.query_times + query_row, x.query_axis);
    if (call.row_sums != nullptr)
      find_row_sums(plan, s, block, x.queries, x.query_axis, first_head, count, x.mean, b.lanes);
    for (SharedTile<T>* tile = tiles; tile < end; ++tile) load_tile(plan, x, s, biased, *tile);
    int32_t* visits = plan.visits + (s.first_span + block) * plan.head_groups + task.head_group;
    const int32_t turn = touched_before(span, task.chunk);
    for (int64_t i = 0; i < count; ++i) {
      __builtin_memset(b.grad_query, 0, sizeof(T) * static_cast<size_t>(kBlock * round_up(call.q_width, kGroup)));
      for (SharedTile<T>* tile = tiles; tile < end; ++tile)
        if (!tile->cells.empty)
          backward_tile(call, x, *tile, backward_head(call, b.heads, (tile - tiles) * count + i), b.grad_query,
                        query_row, first_head + i, i == 0);
      wait_for(visits, turn);
      add_query_gradient(call, query_row, x.queries.count, first_head + i, b.grad_query, turn == 0);
    }
    __atomic_store_n(visits, turn + 1, __ATOMIC_RELEASE);
    for (SharedTile<T>* tile = tiles; tile < end; ++tile) {
      if (tile->cells.empty) continue;
      if (plan.position_sums != nullptr) add_positions(x.query_axis, *tile, first_distance, b.grad_position);
      if (plan.time_sums != nullptr) add_buckets(*tile, x.grad_buckets);
    }
    // rows of a softmax add up to zero, and what is left of a bucket would drown in the rounding of a long sum
    if (plan.time_sums != nullptr && call.is_softmax) move_buckets(x);
  }
  store_key_gradients(call, s, x, tiles, b.heads, first_head, count);
  if (plan.time_sums != nullptr) move_buckets(x);
  if (biased) merge_bias(plan, task, x, b.grad_position, first_distance);
}
