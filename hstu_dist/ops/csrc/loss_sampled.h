// Sampled softmax: blocks of positions and ranges of candidates, as loss.h describes them.
//
// Included only by loss_kernel.cpp.

#pragma once

constexpr double kMasked = -5e4;  // score of a negative that equals its positive

template <typename T>
struct SampledScratch {
  const T** rows;  // [R rounded up], the negatives of a position
  T* weights;      // [R rounded up], their scores, then their weights
  T* grad;         // [S]
  int32_t* next;   // [ranges], where the next pair of a range goes
};

template <typename T>
int64_t sampled_scratch(const SampledPlan& plan) {
  const HstuLoss& call = *plan.call;
  const int64_t padded = round_up(call.negatives, kRowMultiple);
  return padded * static_cast<int64_t>(sizeof(T*) + sizeof(T)) + call.stride * static_cast<int64_t>(sizeof(T)) +
         plan.ranges * static_cast<int64_t>(sizeof(int32_t));
}

template <typename T>
SampledScratch<T> sampled_layout(const SampledPlan& plan, void* scratch) {
  const int64_t padded = round_up(plan.call->negatives, kRowMultiple);
  SampledScratch<T> x;
  x.grad = static_cast<T*>(scratch);
  x.weights = x.grad + plan.call->stride;
  x.rows = reinterpret_cast<const T**>(x.weights + padded);
  x.next = reinterpret_cast<int32_t*>(x.rows + padded);
  return x;
}

// sums[i] += the lanes of query * row i, over Vectors vectors.
template <typename T, int Vectors>
inline void add_products(const T* query, const T* const* rows, int64_t column, V<T> (&sums)[kLanes<T>]) {
  V<T> part[Vectors];
#pragma GCC unroll 4
  for (int n = 0; n < Vectors; ++n) part[n] = load(query + column + n * kLanes<T>);
#pragma GCC unroll 16
  for (int i = 0; i < kLanes<T>; ++i)
#pragma GCC unroll 4
    for (int n = 0; n < Vectors; ++n) sums[i] += part[n] * load(rows[i] + column + n * kLanes<T>);
}

constexpr int kColumns = 4;  // vectors of a row handled together

// Dot products of a query with as many rows as a vector has lanes.
template <typename T>
inline V<T> dot_products(const T* query, const T* const* rows, int64_t stride) {
  V<T> sums[kLanes<T>]{};
  int64_t column = 0;
  for (; column + kColumns * kLanes<T> <= stride; column += kColumns * kLanes<T>)
    add_products<T, kColumns>(query, rows, column, sums);
  for (; column < stride; column += kLanes<T>) add_products<T, 1>(query, rows, column, sums);
  return sum_each<T>(sums);
}

template <typename T, int Vectors>
inline void add_columns(T weight, const T* row, T* sum) {
#pragma GCC unroll 4
  for (int n = 0; n < Vectors; ++n)
    store(sum + n * kLanes<T>, load(sum + n * kLanes<T>) + weight * load(row + n * kLanes<T>));
}

// sum += weight * row, S elements.
template <typename T>
inline void add_row(T weight, const T* row, T* sum, int64_t stride) {
  int64_t c = 0;
  for (; c + kColumns * kLanes<T> <= stride; c += kColumns * kLanes<T>)
    add_columns<T, kColumns>(weight, row + c, sum + c);
  for (; c < stride; c += kLanes<T>) add_columns<T, 1>(weight, row + c, sum + c);
}

constexpr int64_t kSummed = 64;  // rows added up before they meet the rest, so that rounding does not pile up

// x.grad[column ...] += sum of weight * row over `count` rows from `first` on.
template <typename T, int Vectors>
inline void add_rows(const SampledScratch<T>& x, int64_t first, int64_t count, int64_t column) {
  // two sets, so that sums need not wait for each other
  V<T> even[Vectors]{}, odd[Vectors]{};
  const T *const *row = x.rows + first, *weight = x.weights + first;
  for (; count >= 2; count -= 2, row += 2, weight += 2)
#pragma GCC unroll 4
    for (int n = 0; n < Vectors; ++n) {
      even[n] += weight[0] * load(row[0] + column + n * kLanes<T>);
      odd[n] += weight[1] * load(row[1] + column + n * kLanes<T>);
    }
  T* out = x.grad + column;
#pragma GCC unroll 4
  for (int n = 0; n < Vectors; ++n, out += kLanes<T>) {
    if (count > 0) even[n] += weight[0] * load(row[0] + column + n * kLanes<T>);
    store(out, load(out) + (even[n] + odd[n]));
  }
}

// x.grad = sum of weight * row over the negatives, and the positive last: its weight is the largest.
template <typename T>
void weigh_rows(const HstuLoss& call, const T* positive, T weight, const SampledScratch<T>& x) {
  __builtin_memset(x.grad, 0, sizeof(T) * call.stride);
  for (int64_t i = 0; i < call.negatives; i += kSummed) {
    const int64_t count = least(kSummed, call.negatives - i);
    int64_t c = 0;
    for (; c + kColumns * kLanes<T> <= call.stride; c += kColumns * kLanes<T>) add_rows<T, kColumns>(x, i, count, c);
    for (; c < call.stride; c += kLanes<T>) add_rows<T, 1>(x, i, count, c);
  }
  add_row(weight, positive, x.grad, call.stride);
}

// The scores of the negatives, in x.weights; returns whether one of them is the positive.
template <typename T>
bool score_negatives(const HstuLoss& call, const T* query, const int64_t* negative, int64_t positive,
                     SampledScratch<T>& x) {
  const T* items = static_cast<const T*>(call.items);
  const int64_t padded = round_up(call.negatives, kLanes<T>);
  bool masked = false;
  for (int64_t i = 0; i < call.negatives; ++i) {
    x.rows[i] = items + negative[i] * call.stride;
    masked |= negative[i] == positive;
  }
  for (int64_t i = call.negatives; i < padded; ++i) x.rows[i] = items + positive * call.stride;
  const V<T> temperature = splat(T(call.temperature)), shift = splat(T(call.shift));
  for (int64_t i = 0; i < padded; i += kLanes<T>)
    store(x.weights + i, dot_products(query, x.rows + i, call.stride) / temperature + shift);
  for (int64_t i = 0; masked && i < call.negatives; ++i)
    if (negative[i] == positive) x.weights[i] = T(kMasked);
  for (int64_t i = call.negatives; i < padded; ++i) x.weights[i] = -__builtin_huge_val();
  return masked;
}

template <typename T>
T largest(const T* scores, int64_t padded, T initial) {
  V<T> most_of = splat(initial);
  for (int64_t i = 0; i < padded; i += kLanes<T>) most_of = larger<T>(most_of, load(scores + i));
  T maximum = most_of[0];
  for (int l = 1; l < kLanes<T>; ++l) maximum = most(maximum, most_of[l]);
  return maximum;
}

// Turns scores into e^(score - maximum) and adds them up.
template <typename T>
double exponentiate(T* weights, int64_t padded, T maximum) {
  double total = 0;
  for (int64_t i = 0; i < padded;) {
    V<T> sum{};
    for (const int64_t end = least(padded, i + kSummed * kLanes<T>); i < end; i += kLanes<T>) {
      const V<T> weight = weight_of<T>(load(weights + i) - maximum);
      store(weights + i, weight);
      sum += weight;
    }
    total += sum_lanes<T>(sum);
  }
  return total;
}

template <typename T>
double sampled_position(const SampledPlan& plan, int64_t p, SampledScratch<T>& x, Pair<T>* pairs) {
  const HstuLoss& call = *plan.call;
  const int64_t t = plan.first + p, positive = call.positive[t];
  const int64_t* negative = call.negative + t * call.negatives;
  const T* row = static_cast<const T*>(call.items) + positive * call.stride;
  T* query = static_cast<T*>(plan.queries) + p * call.stride;
  __builtin_memcpy(query, static_cast<const T*>(call.queries) + t * call.width, sizeof(T) * call.width);
  __builtin_memset(query + call.width, 0, sizeof(T) * (call.stride - call.width));

  const bool masked = score_negatives(call, query, negative, positive, x);
  const int64_t padded = round_up(call.negatives, kLanes<T>);
  V<T> product{};
  for (int64_t c = 0; c < call.stride; c += kLanes<T>) product += load(query + c) * load(row + c);
  const T score = sum_lanes<T>(product) / T(call.temperature);
  const T maximum = largest(x.weights, padded, score);
  const double others = exponentiate(x.weights, padded, maximum);
  const double total = others + double{weight_of<T>(splat(score - maximum))[0]};
  // no gradient flows through a masked score
  for (int64_t i = 0; masked && i < call.negatives; ++i)
    if (negative[i] == positive) x.weights[i] = 0;
  const V<T> scale = splat(T(1 / (total * call.temperature)));
  for (int64_t i = 0; i < padded; i += kLanes<T>) store(x.weights + i, load(x.weights + i) * scale);
  // p - 1 of the positive, without the cancellation
  const T pull = T(-others / (total * call.temperature));

  weigh_rows(call, row, pull, x);
  __builtin_memcpy(static_cast<T*>(call.grad_queries) + t * call.width, x.grad, sizeof(T) * call.width);

  const int64_t inside = (int64_t{1} << plan.range_bits) - 1;
  const uint32_t position = static_cast<uint32_t>(p % plan.block_positions);
  static_cast<T*>(plan.pulls)[t] = pull;
  for (int64_t i = 0; i < call.negatives; ++i) {
    const uint32_t place = static_cast<uint32_t>(negative[i] & inside) << kPositionBits | position;
    pairs[x.next[negative[i] >> plan.range_bits]++] = {x.weights[i], place};
  }
  return __builtin_log(total) + (double{maximum} - double{score});
}

template <typename T>
void sampled_block(const SampledPlan& plan, int64_t block, void* scratch) {
  const HstuLoss& call = *plan.call;
  const int64_t first = block * plan.block_positions;
  const int64_t count = least(plan.block_positions, plan.count - first);
  SampledScratch<T> x = sampled_layout<T>(plan, scratch);
  int32_t* begin = plan.segments + block * (plan.ranges + 1);
  __builtin_memset(begin, 0, sizeof(int32_t) * (plan.ranges + 1));
  const int64_t* negative = call.negative + (plan.first + first) * call.negatives;
  for (int64_t i = 0; i < count * call.negatives; ++i) ++begin[1 + (negative[i] >> plan.range_bits)];
  for (int64_t r = 0; r < plan.ranges; ++r) {
    begin[r + 1] += begin[r];
    x.next[r] = begin[r];
  }
  Pair<T>* pairs = static_cast<Pair<T>*>(plan.pairs) + block * plan.block_positions * call.negatives;
  double loss = 0;
  for (int64_t i = 0; i < count; ++i) loss += sampled_position(plan, first + i, x, pairs);
  plan.losses[block] = loss;
}

template <typename T>
void sampled_range(const SampledPlan& plan, int64_t range) {
  const HstuLoss& call = *plan.call;
  T* grads = static_cast<T*>(call.grad_items) + (range << plan.range_bits) * call.stride;
  for (int64_t block = 0; block < plan.blocks; ++block) {
    const int32_t* begin = plan.segments + block * (plan.ranges + 1) + range;
    const Pair<T>* pairs =
        static_cast<const Pair<T>*>(plan.pairs) + block * plan.block_positions * call.negatives;
    const T* queries = static_cast<const T*>(plan.queries) + block * plan.block_positions * call.stride;
    for (int32_t i = begin[0]; i < begin[1]; ++i) {
      const Pair<T> pair = pairs[i];
      const T* query = queries + (pair.place & (kBlockPositions - 1)) * call.stride;
      T* grad = grads + (pair.place >> kPositionBits) * call.stride;
      add_row(pair.weight, query, grad, call.stride);
    }
  }
}
