// Splits a softmax loss into chunks and runs their steps on OpenMP threads.

#include "loss.h"

#include <omp.h>

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <new>
#include <vector>

#include "isa.h"

namespace hstu {
namespace {

// Sizes that depend on the call alone, never on the number of threads: they decide the order of sums.
constexpr int64_t kBlockPairs = 8192;
constexpr int64_t kChunkBlocks = 32;
constexpr int64_t kRangeBytes = 16 << 10;  // stays in a first-level cache
constexpr int64_t kMostRanges = 1024;
constexpr int64_t kKeptScores = 1 << 21;
constexpr int64_t kMostBlocks = 64;
constexpr int64_t kMostGroups = 64;

int64_t blocks_of(int64_t n, int64_t size) { return (n + size - 1) / size; }

// Memory of a call, uninitialised, on its own pages.
class Buffer {
 public:
  explicit Buffer(int64_t bytes)
      : memory_(std::aligned_alloc(4096, static_cast<size_t>(bytes / 4096 + 1) * 4096), &std::free) {
    if (!memory_) throw std::bad_alloc();
  }
  void* at(int64_t byte = 0) const { return static_cast<char*>(memory_.get()) + byte; }

 private:
  std::unique_ptr<void, decltype(&std::free)> memory_;
};

// Calls f(i, thread) for each i below count.
template <typename F>
void each(int32_t threads, int64_t count, F f) {
  const int team = static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(threads, count)));
#pragma omp parallel for num_threads(team) schedule(dynamic, 1)
  for (int64_t i = 0; i < count; ++i) f(i, omp_get_thread_num());
}

double sampled(const HstuLoss& call, const LossKernels& isa) {
  const int64_t element = call.is_double ? 8 : 4, pair = call.is_double ? sizeof(Pair<double>) : sizeof(Pair<float>);
  SampledPlan plan{};
  plan.call = &call;
  plan.block_positions = std::clamp<int64_t>(kBlockPairs / (call.negatives + 1), 1, kBlockPositions);
  while (call.stride * element << (plan.range_bits + 1) <= kRangeBytes) ++plan.range_bits;
  while (call.candidates >> plan.range_bits >= kMostRanges) ++plan.range_bits;
  plan.ranges = blocks_of(call.candidates, int64_t{1} << plan.range_bits);

  const int64_t most = std::min(kChunkBlocks, blocks_of(call.positions, plan.block_positions));
  const Buffer queries(most * plan.block_positions * call.stride * element);
  const Buffer pairs(most * plan.block_positions * call.negatives * pair);
  std::vector<int32_t> segments(static_cast<size_t>(most * (plan.ranges + 1)));
  const Buffer pulls(call.positions * element);
  std::vector<double> losses(static_cast<size_t>(most));
  const int64_t own = (isa.sampled_scratch[call.is_double](plan) + 4095) / 4096 * 4096;
  const Buffer scratch(own * std::max(1, call.threads));
  plan.queries = queries.at();
  plan.pairs = pairs.at();
  plan.segments = segments.data();
  plan.pulls = pulls.at();
  plan.losses = losses.data();

  double loss = 0;
  for (; plan.first < call.positions; plan.first += plan.count) {
    plan.count = std::min(kChunkBlocks * plan.block_positions, call.positions - plan.first);
    plan.blocks = blocks_of(plan.count, plan.block_positions);
    each(call.threads, plan.blocks, [&](int64_t block, int thread) {
      isa.sampled_block[call.is_double](plan, block, scratch.at(own * thread));
    });
    each(call.threads, plan.ranges, [&](int64_t range, int) { isa.sampled_range[call.is_double](plan, range); });
    for (int64_t b = 0; b < plan.blocks; ++b) loss += losses[static_cast<size_t>(b)];
  }
  isa.pull[call.is_double](call, plan.pulls);
  return loss;
}

double full(const HstuLoss& call, const LossKernels& isa) {
  const int64_t element = call.is_double ? 8 : 4, kind = call.is_double;
  FullPlan plan{};
  plan.call = &call;
  plan.tiles = blocks_of(call.candidates, kTile);
  plan.group_tiles = blocks_of(plan.tiles, kMostGroups);
  plan.groups = blocks_of(plan.tiles, plan.group_tiles);
  const int64_t kept = std::clamp<int64_t>(kKeptScores / (call.candidates * kLaneBlock), 1, kMostBlocks);
  const int64_t most = std::min(kept, blocks_of(call.positions, kLaneBlock));

  const Buffer lanes(most * call.width * kLaneBlock * element), rows(most * kLaneBlock * call.stride * element);
  const Buffer found(most * kLaneBlock * element), shares(plan.groups * most * call.width * kLaneBlock * element);
  const int64_t cells = plan.tiles * most * kLaneBlock;
  const Buffer weights(cells * kTile * element), maxima(cells * element), sums(cells * element);
  const Buffer pulls(call.positions * element);
  std::vector<double> losses(static_cast<size_t>(most));
  plan.lanes = lanes.at();
  plan.rows = rows.at();
  plan.found = found.at();
  plan.shares = shares.at();
  plan.weights = weights.at();
  plan.maxima = maxima.at();
  plan.sums = sums.at();
  plan.pulls = pulls.at();
  plan.losses = losses.data();

  double loss = 0;
  for (; plan.first < call.positions; plan.first += most * kLaneBlock) {
    plan.blocks = std::min(most, blocks_of(call.positions - plan.first, kLaneBlock));
    const auto step = [&](int64_t count, auto function) {
      each(call.threads, count, [&](int64_t i, int) { function(plan, i); });
    };
    step(plan.blocks, isa.full_prepare[kind]);
    step(plan.tiles, isa.full_scores[kind]);
    step(plan.blocks, isa.full_settle[kind]);
    step(plan.groups, isa.full_gradients[kind]);
    step(plan.blocks, isa.full_collect[kind]);
    for (int64_t b = 0; b < plan.blocks; ++b) loss += losses[static_cast<size_t>(b)];
  }
  isa.pull[call.is_double](call, plan.pulls);
  return loss;
}

const LossKernels* kernels(int32_t isa) { return table_for(isa, HSTU_TABLES(loss_kernels)); }

}  // namespace
}  // namespace hstu

extern "C" int32_t hstu_softmax_loss(const HstuLoss* call) {
  if (call == nullptr || call->bytes != sizeof(HstuLoss)) return HSTU_BAD_CALL;
  const hstu::LossKernels* isa = hstu::kernels(call->isa);
  if (isa == nullptr || call->stride % hstu::kRowMultiple != 0 || call->stride < call->width) return HSTU_BAD_CALL;
  try {
    *call->loss = call->positions == 0 ? 0 : call->is_full ? hstu::full(*call, *isa) : hstu::sampled(*call, *isa);
    return HSTU_OK;
  } catch (const std::bad_alloc&) {
    return HSTU_OUT_OF_MEMORY;
  }
}
