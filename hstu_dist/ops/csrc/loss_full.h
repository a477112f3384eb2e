// Full softmax: blocks of positions against tiles of candidates, as loss.h describes them.
//
// Within a cell, candidates are the rows and positions the lanes, so that softmax needs no sums across lanes. Included
// only by loss_kernel.cpp.

#pragma once

constexpr double kNothing = -1e30;  // below every score

template <typename T>
struct FullBlock {
  int64_t first;   // position
  int64_t count;   // positions
  T* lanes;        // [D, kLaneBlock]: queries / temperature, zeros behind
  T* rows;         // [kLaneBlock, S]: queries, zeros behind
  T* found;        // [kLaneBlock]: score of the positive, then its weight in the gradients; zeros behind
};

template <typename T>
FullBlock<T> full_block(const FullPlan& plan, int64_t block) {
  const HstuLoss& call = *plan.call;
  FullBlock<T> x;
  x.first = plan.first + block * kLaneBlock;
  x.count = least(kLaneBlock, call.positions - x.first);
  x.lanes = static_cast<T*>(plan.lanes) + block * call.width * kLaneBlock;
  x.rows = static_cast<T*>(plan.rows) + block * kLaneBlock * call.stride;
  x.found = static_cast<T*>(plan.found) + block * kLaneBlock;
  return x;
}

// A block against a tile.
template <typename T>
struct FullCell {
  T* weights;  // [kTile, kLaneBlock]
  T* maximum;  // [kLaneBlock]: the largest score, then what the weights are multiplied by
  T* sum;      // [kLaneBlock]: of the weights
};

template <typename T>
FullCell<T> full_cell(const FullPlan& plan, int64_t tile, int64_t block) {
  const int64_t cell = tile * plan.blocks + block;
  return {static_cast<T*>(plan.weights) + cell * kTile * kLaneBlock,
          static_cast<T*>(plan.maxima) + cell * kLaneBlock, static_cast<T*>(plan.sums) + cell * kLaneBlock};
}

// Calls f(lane, row) for the positions of a block whose positive is in a tile.
template <typename T, typename F>
inline void for_positives(const FullPlan& plan, const FullBlock<T>& x, int64_t tile, F f) {
  const int64_t* positive = plan.call->positive + x.first;
  for (int64_t l = 0; l < x.count; ++l)
    if (positive[l] / kTile == tile) f(l, positive[l] % kTile);
}

template <typename T>
void full_prepare(const FullPlan& plan, int64_t block) {
  const HstuLoss& call = *plan.call;
  const FullBlock<T> x = full_block<T>(plan, block);
  const T* queries = static_cast<const T*>(call.queries) + x.first * call.width;
  __builtin_memset(x.lanes, 0, sizeof(T) * call.width * kLaneBlock);
  __builtin_memset(x.found, 0, sizeof(T) * kLaneBlock);
  __builtin_memset(x.rows, 0, sizeof(T) * kLaneBlock * call.stride);
  transpose(queries, call.width, x.count, call.width, x.lanes, kLaneBlock, T(1 / call.temperature));
  for (int64_t l = 0; l < x.count; ++l)
    __builtin_memcpy(x.rows + l * call.stride, queries + l * call.width, sizeof(T) * call.width);
}

// Scores of a tile, turned into e^(score - largest of the tile); zero for positives, which `found` keeps apart.
template <typename T>
void full_scores(const FullPlan& plan, int64_t tile) {
  const HstuLoss& call = *plan.call;
  const int64_t rows = least(kTile, call.candidates - tile * kTile);
  const T* items = static_cast<const T*>(call.items) + tile * kTile * call.stride;
  for (int64_t b = 0; b < plan.blocks; ++b) {
    const FullBlock<T> x = full_block<T>(plan, b);
    const FullCell<T> cell = full_cell<T>(plan, tile, b);
    multiply<false>(Product<T>{items, call.stride, 1, x.lanes, kLaneBlock, cell.weights, kLaneBlock, call.width}, rows,
                    kLaneBlock);
    for_positives(plan, x, tile, [&](int64_t l, int64_t r) {
      x.found[l] = cell.weights[r * kLaneBlock + l];
      cell.weights[r * kLaneBlock + l] = T(-__builtin_huge_val());
    });
    for (int64_t l = 0; l < kLaneBlock; l += kLanes<T>) {
      T* weights = cell.weights + l;
      V<T> maximum = splat(T(kNothing)), sum{};
      for (int64_t r = 0; r < rows; ++r) maximum = larger<T>(maximum, load(weights + r * kLaneBlock));
      for (int64_t r = 0; r < rows; ++r) {
        const V<T> weight = weight_of<T>(load(weights + r * kLaneBlock) - maximum);
        store(weights + r * kLaneBlock, weight);
        sum += weight;
      }
      store(cell.maximum + l, maximum);
      store(cell.sum + l, sum);
    }
  }
}

// Brings the tiles of a block together: loss, and what turns weights into derivatives by the dot products.
template <typename T>
void full_settle(const FullPlan& plan, int64_t block) {
  const FullBlock<T> x = full_block<T>(plan, block);
  const double temperature = plan.call->temperature;
  double loss = 0;
  for (int64_t l = 0; l < kLaneBlock; l += kLanes<T>) {
    V<T> maximum = load(x.found + l), sum{}, scale;
    for (int64_t i = 0; i < plan.tiles; ++i)
      maximum = larger<T>(maximum, load(full_cell<T>(plan, i, block).maximum + l));
    for (int64_t i = 0; i < plan.tiles; ++i) {
      const FullCell<T> cell = full_cell<T>(plan, i, block);
      const V<T> weight = weight_of<T>(load(cell.maximum + l) - maximum);
      store(cell.maximum + l, weight);
      sum += weight * load(cell.sum + l);
    }
    const V<T> own = weight_of<T>(load(x.found + l) - maximum);
    for (int64_t n = 0; n < kLanes<T>; ++n) {
      const bool present = l + n < x.count;
      const double total = double{sum[n]} + double{own[n]};
      if (present) loss += __builtin_log(total) + (double{maximum[n]} - double{x.found[l + n]});
      // lanes past the end have no part in the gradients of items
      scale[n] = present ? T(1 / (total * temperature)) : T(0);
      // p - 1, without the cancellation
      x.found[l + n] = present ? T(-double{sum[n]} / (total * temperature)) : T(0);
    }
    for (int64_t i = 0; i < plan.tiles; ++i) {
      T* weight = full_cell<T>(plan, i, block).maximum + l;
      store(weight, load(weight) * scale);
    }
  }
  for (int64_t l = 0; l < x.count; ++l) static_cast<T*>(plan.pulls)[x.first + l] = x.found[l];
  plan.losses[block] = loss;
}

// Gradients of the candidates of a group of tiles, and its share of the gradients of queries.
template <typename T>
void full_gradients(const FullPlan& plan, int64_t group) {
  const HstuLoss& call = *plan.call;
  const int64_t end = least(plan.tiles, (group + 1) * plan.group_tiles);
  T* shares = static_cast<T*>(plan.shares) + group * plan.blocks * call.width * kLaneBlock;
  __builtin_memset(shares, 0, sizeof(T) * plan.blocks * call.width * kLaneBlock);
  for (int64_t tile = group * plan.group_tiles; tile < end; ++tile) {
    const int64_t first = tile * kTile * call.stride, rows = least(kTile, call.candidates - tile * kTile);
    const T* items = static_cast<const T*>(call.items) + first;
    T* grads = static_cast<T*>(call.grad_items) + first;
    for (int64_t b = 0; b < plan.blocks; ++b) {
      const FullBlock<T> x = full_block<T>(plan, b);
      const FullCell<T> cell = full_cell<T>(plan, tile, b);
      for (int64_t r = 0; r < rows; ++r)
        for (int64_t l = 0; l < kLaneBlock; l += kLanes<T>) {
          T* at = cell.weights + r * kLaneBlock + l;
          store(at, load(at) * load(cell.maximum + l));
        }
      multiply<true>(
          Product<T>{cell.weights, kLaneBlock, 1, x.rows, call.stride, grads, call.stride, kLaneBlock}, rows,
          round_up(call.width, kLanes<T>));
      multiply<true>(Product<T>{items, 1, call.stride, cell.weights, kLaneBlock,
                                shares + b * call.width * kLaneBlock, kLaneBlock, rows},
                     call.width, kLaneBlock);
    }
  }
}

template <typename T>
void full_collect(const FullPlan& plan, int64_t block) {
  const HstuLoss& call = *plan.call;
  const FullBlock<T> x = full_block<T>(plan, block);
  const int64_t size = call.width * kLaneBlock;
  T* total = static_cast<T*>(plan.shares) + block * size;
  for (int64_t g = 1; g < plan.groups; ++g) {
    const T* share = total + g * plan.blocks * size;
    for (int64_t i = 0; i < size; i += kLanes<T>) store(total + i, load(total + i) + load(share + i));
  }
  T* grads = static_cast<T*>(call.grad_queries) + x.first * call.width;
  transpose(total, kLaneBlock, call.width, x.count, grads, call.width, T(1));
  for (int64_t l = 0; l < x.count; ++l) {
    const T* positive = static_cast<const T*>(call.items) + call.positive[x.first + l] * call.stride;
    for (int64_t c = 0; c < call.width; ++c) grads[l * call.width + c] += x.found[l] * positive[c];
  }
}
