// Plans an attention call and runs the tasks on OpenMP threads.

#include <sched.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <vector>

#include "isa.h"
#include "plan.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace hstu {

void wait_for(const int32_t* counter, int32_t value) {
  for (int spins = 0; __atomic_load_n(counter, __ATOMIC_ACQUIRE) != value; ++spins) {
#if defined(__x86_64__)
    _mm_pause();
#endif
    // the thread waited for may have lost its core
    if (spins > 1000) sched_yield();
  }
}

namespace {

// Bytes of per-head state that a task may hold, so that it stays in a core's second-level cache.
constexpr int64_t kHeadBudget = 384 << 10;

struct Batch {
  std::vector<Sequence> sequences;
  std::vector<Span> spans;
  int64_t max_keys = 0;
};

int32_t blocks(int64_t n) { return static_cast<int32_t>((n + kBlock - 1) / kBlock); }
int32_t chunks(int64_t n) { return static_cast<int32_t>((n + kChunk - 1) / kChunk); }

Span span_of(const HstuCall& call, const Sequence& s, int32_t block) {
  const int32_t begin = s.keys - s.queries + block * kBlock;
  const int32_t end = std::min(begin + kBlock, s.keys);
  KeySet low = key_set(s, call.window, call.global_prefix, begin), high = low;
  for (int32_t p = begin + 1; p < end; ++p) {
    const KeySet set = key_set(s, call.window, call.global_prefix, p);
    high.a_hi = std::max(high.a_hi, set.a_hi);
    low.b_lo = std::min(low.b_lo, set.b_lo);
    high.b_hi = std::max(high.b_hi, set.b_hi);
  }
  const int32_t b_hi = low.b_lo < high.b_hi ? chunks(high.b_hi) : 0;
  return {chunks(high.a_hi), b_hi == 0 ? 0 : low.b_lo / kChunk, b_hi, begin / kChunk, chunks(end)};
}

Batch read_batch(const HstuCall& call) {
  Batch batch;
  for (int64_t b = 0; b < call.batch; ++b) {
    Sequence s;
    s.query_row = call.offsets[b];
    s.key_row = call.key_offsets[b];
    s.queries = static_cast<int32_t>(call.offsets[b + 1] - s.query_row);
    s.keys = static_cast<int32_t>(call.key_offsets[b + 1] - s.key_row);
    s.contextual = call.num_contextual ? static_cast<int32_t>(call.num_contextual[b]) : 0;
    s.targets = call.num_targets ? static_cast<int32_t>(call.num_targets[b]) : 0;
    s.first_span = static_cast<int64_t>(batch.spans.size());
    for (int32_t i = 0; i < blocks(s.queries); ++i) batch.spans.push_back(span_of(call, s, i));
    batch.max_keys = std::max<int64_t>(batch.max_keys, s.keys);
    batch.sequences.push_back(s);
  }
  return batch;
}

// Longest first.
void sort_tasks(std::vector<Task>& tasks) {
  std::stable_sort(tasks.begin(), tasks.end(), [](const Task& a, const Task& b) { return a.cost > b.cost; });
}

// Counts a task as at least as long as those behind it in its sequence: sorting then leaves them in the order that
// the sums of the backward need.
void keep_order(std::vector<Task>& tasks) {
  for (size_t i = tasks.size(); i-- > 1;)
    if (tasks[i - 1].sequence == tasks[i].sequence) tasks[i - 1].cost = std::max(tasks[i - 1].cost, tasks[i].cost);
}

std::vector<Task> forward_tasks(const Batch& batch, int32_t head_groups) {
  std::vector<Task> tasks;
  for (size_t b = 0; b < batch.sequences.size(); ++b) {
    const Sequence& s = batch.sequences[b];
    for (int32_t c = 0; c < chunks(s.queries); ++c) {
      int64_t cost = 0;
      for (int32_t i = c * kChunkBlocks; i < std::min((c + 1) * kChunkBlocks, blocks(s.queries)); ++i)
        cost += touched_before(batch.spans[s.first_span + i], chunks(s.keys));
      for (int32_t g = 0; g < head_groups; ++g) tasks.push_back({static_cast<int32_t>(b), c, g, cost});
    }
  }
  sort_tasks(tasks);
  return tasks;
}

std::vector<Task> backward_tasks(const Batch& batch, int32_t head_groups) {
  std::vector<Task> tasks;
  std::vector<int64_t> cost;
  for (size_t b = 0; b < batch.sequences.size(); ++b) {
    const Sequence& s = batch.sequences[b];
    // differences, then their running sum: how many query blocks touch each chunk
    cost.assign(static_cast<size_t>(chunks(s.keys)) + 1, 0);
    for (int32_t i = 0; i < blocks(s.queries); ++i) {
      const Span& span = batch.spans[s.first_span + i];
      const int32_t ends[3][2] = {{0, span.a_hi}, {span.b_lo, span.b_hi}, {span.c_lo, span.c_hi}};
      for (const auto& end : ends) {
        if (end[0] >= end[1]) continue;
        ++cost[end[0]];
        --cost[end[1]];
      }
    }
    for (int32_t c = 0; c < chunks(s.keys); ++c) {
      for (int32_t g = 0; g < head_groups; ++g) tasks.push_back({static_cast<int32_t>(b), c, g, cost[c]});
      cost[c + 1] += cost[c];
    }
  }
  keep_order(tasks);
  sort_tasks(tasks);
  return tasks;
}

BucketTable bucket_table(const int64_t* thresholds) {
  BucketTable table;
  for (int e = 0; e < 64; ++e)
    for (int m = 0; m < 16; ++m) {
      // first elapsed time with this leading one and these four bits below it
      const uint64_t start = (uint64_t{1} << 63 | static_cast<uint64_t>(m) << 59) >> (63 - e);
      int base = 0;
      while (base < kBuckets - 1 && static_cast<uint64_t>(thresholds[base]) <= start) ++base;
      table.base[e * 16 + m] = static_cast<uint8_t>(base);
      table.boundary[e * 16 + m] = base < kBuckets - 1 ? static_cast<uint64_t>(thresholds[base]) : UINT64_MAX;
    }
  return table;
}

template <typename T>
std::vector<T> padded_positions(const HstuCall& call, bool reversed) {
  const T* from = static_cast<const T*>(call.position_weight);
  std::vector<T> table(static_cast<size_t>(2 * call.table_length - 1 + 2 * kBlock), T(0));
  std::copy(from, from + 2 * call.table_length - 1, table.begin() + kBlock);
  if (reversed) std::reverse(table.begin(), table.end());
  return table;
}

// Runs the tasks in order of dispatch; the first error of a thread ends the call.
int32_t run(const Plan& plan, const std::vector<Task>& tasks, TaskFunction function, int64_t scratch_bytes) {
  const int64_t count = static_cast<int64_t>(tasks.size());
  if (count == 0) return HSTU_OK;
  const int threads = static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(plan.call->threads, count)));
  const size_t stride = (static_cast<size_t>(scratch_bytes) + 4095) / 4096 * 4096;
  const std::unique_ptr<void, decltype(&std::free)> scratch(std::aligned_alloc(4096, stride * threads), &std::free);
  if (!scratch) return HSTU_OUT_OF_MEMORY;
  int64_t next = 0;
  int32_t thread = 0;
#pragma omp parallel num_threads(threads)
  {
    void* own = static_cast<char*>(scratch.get()) + stride * __atomic_fetch_add(&thread, 1, __ATOMIC_RELAXED);
    for (;;) {
      const int64_t t = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED);
      if (t >= count) break;
      function(plan, tasks[t], own);
    }
  }
  return HSTU_OK;
}

// A plan and what it points to.
struct Prepared {
  Batch batch;
  BucketTable buckets;
  std::vector<float> positions;
  std::vector<double> positions_double;
  Plan plan{};

  Prepared(const HstuCall& call, bool backward) : batch(read_batch(call)) {
    const int64_t element = call.is_double ? 8 : 4;
    const int64_t widths = backward ? 3 * call.q_width + 2 * call.v_width : call.q_width + call.v_width;
    const bool biased = call.position_weight || call.time_weight;
    // heads share a task only where they can share the bias
    plan.group_heads = static_cast<int32_t>(
        biased ? std::clamp<int64_t>(kHeadBudget / (kChunk * widths * element), 1, call.heads) : 1);
    plan.head_groups = static_cast<int32_t>((call.heads + plan.group_heads - 1) / plan.group_heads);
    plan.call = &call;
    plan.sequences = batch.sequences.data();
    plan.spans = batch.spans.data();
    plan.max_keys = batch.max_keys;
    if (call.time_weight) {
      buckets = bucket_table(call.time_thresholds);
      plan.buckets = &buckets;
    }
    if (call.position_weight && call.is_double) {
      positions_double = padded_positions<double>(call, !backward);
      plan.position_table = positions_double.data();
    } else if (call.position_weight) {
      positions = padded_positions<float>(call, !backward);
      plan.position_table = positions.data();
    }
  }
};

int32_t forward(const HstuCall& call, const Kernels& isa) {
  const Prepared prepared(call, false);
  const Plan& plan = prepared.plan;
  return run(plan, forward_tasks(prepared.batch, plan.head_groups), isa.forward[call.is_double],
             isa.forward_scratch[call.is_double](plan));
}

int32_t backward(const HstuCall& call, const Kernels& isa) {
  Prepared prepared(call, true);
  Plan& plan = prepared.plan;
  const std::vector<Sequence>& sequences = prepared.batch.sequences;
  std::vector<int32_t> visits(prepared.batch.spans.size() * static_cast<size_t>(plan.head_groups), 0);
  std::vector<int32_t> merged(sequences.size(), 0);
  std::vector<double> position_sums, time_sums;
  plan.visits = visits.data();
  plan.merged = merged.data();
  if (call.position_weight) {
    position_sums.assign(static_cast<size_t>(2 * call.key_offsets[call.batch]), 0.0);
    plan.position_sums = position_sums.data();
  }
  if (call.time_weight) {
    time_sums.assign(sequences.size() * kBuckets, 0.0);
    plan.time_sums = time_sums.data();
  }
  const int32_t status = run(plan, backward_tasks(prepared.batch, plan.head_groups), isa.backward[call.is_double],
                             isa.backward_scratch[call.is_double](plan));
  if (status != HSTU_OK) return status;
  if (call.position_weight) std::fill_n(call.grad_position, 2 * call.table_length - 1, 0.0);
  if (call.time_weight) std::fill_n(call.grad_time, kBuckets, 0.0);
  for (size_t b = 0; b < sequences.size(); ++b) {
    const Sequence& s = sequences[b];
    for (int64_t d = 1 - s.keys; call.position_weight && d < s.keys; ++d)
      call.grad_position[call.table_length - 1 + d] += position_sums[2 * s.key_row + s.keys - 1 + d];
    for (int i = 0; call.time_weight && i < kBuckets; ++i) call.grad_time[i] += time_sums[b * kBuckets + i];
  }
  return HSTU_OK;
}

template <typename F>
int32_t guarded(const HstuCall* call, F f) {
  if (call == nullptr || call->bytes != sizeof(HstuCall)) return HSTU_BAD_CALL;
  const Kernels* isa = table_for(call->isa, HSTU_TABLES(kernels));
  if (isa == nullptr) return HSTU_BAD_CALL;
  try {
    return f(*call, *isa);
  } catch (const std::bad_alloc&) {
    return HSTU_OUT_OF_MEMORY;
  }
}

}  // namespace
}  // namespace hstu

extern "C" {

int32_t hstu_forward(const HstuCall* call) { return hstu::guarded(call, hstu::forward); }

int32_t hstu_backward(const HstuCall* call) { return hstu::guarded(call, hstu::backward); }

}  // extern "C"
