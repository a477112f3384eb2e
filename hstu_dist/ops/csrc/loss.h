// The C interface of the softmax losses, and how their work is split.
//
// Shapes: T positions, C candidates, R negatives, D width, S row stride of the candidates. Tensors are float, or
// double where is_double. Everything below the interface is plain data, as in plan.h and for the same reason.

#pragma once

#include <stdint.h>

#include "abi.h"

extern "C" {

struct HstuLoss {
  int64_t bytes;  // sizeof(HstuLoss) as the caller sees it: guards against a library of another version
  int32_t threads;
  int32_t isa;
  int32_t is_double;
  int32_t is_full;  // against all candidates; the negatives are not looked at

  int64_t positions;
  int64_t candidates;
  int64_t negatives;
  int64_t width;
  int64_t stride;  // S: a multiple of 16 and at least D; columns behind D are zero

  double temperature;
  double shift;  // added to the scores of negatives

  const void* queries;      // [T, D]
  const void* items;        // [C, S]
  const int64_t* positive;  // [T], all in [0, C)
  const int64_t* negative;  // [T, R], likewise

  double* loss;        // one number: the sum over positions
  void* grad_queries;  // [T, D]
  void* grad_items;    // [C, S], zeros on entry
};

// Writes loss and gradients; returns an HstuStatus.
HSTU_EXPORT int32_t hstu_softmax_loss(const HstuLoss* call);

}  // extern "C"

namespace hstu {

constexpr int64_t kRowMultiple = 16;  // of S: whole vectors of every instruction set

constexpr int kPositionBits = 7;
constexpr int64_t kBlockPositions = 1 << kPositionBits;

// One position against one of its negatives; small, because writing them all to their places is what takes time.
template <typename T>
struct Pair {
  T weight;        // derivative of the loss by the dot product
  uint32_t place;  // candidate within the range << kPositionBits | position within the block
};

// Sampled softmax. Positions go in chunks. First each block of a chunk's positions finds loss, gradients of its
// queries and its pairs, sorted by ranges of candidates; then each range adds up the gradients of its candidates, in
// the order of positions. So the bits do not depend on threads, and no thread needs a table of its own. Positives come
// last: their shares are by far the largest, and everything added to them would be rounded to their size.
struct SampledPlan {
  const HstuLoss* call;
  int64_t block_positions;
  int64_t range_bits;  // log2 of the candidates of a range
  int64_t ranges;
  int64_t first;       // position of the chunk
  int64_t count;       // positions of the chunk
  int64_t blocks;      // of the chunk
  void* queries;       // [chunk positions, S], copies
  void* pairs;         // [blocks, block positions * R] Pair
  int32_t* segments;   // [blocks, ranges + 1]: where the pairs of a range begin
  void* pulls;         // [T], weights of the positives
  double* losses;      // [blocks]
};

constexpr int64_t kLaneBlock = 64;  // positions of a block
constexpr int64_t kTile = 64;       // candidates of a tile

// Full softmax. Positions go in chunks, whose scores against all candidates are kept: one cell for each tile of
// candidates and block of positions. Tiles find the scores; blocks settle what all tiles of a position add up to;
// groups of tiles multiply out the gradients; blocks collect those of the queries. Again the bits do not depend on
// threads, and positives come last.
struct FullPlan {
  const HstuLoss* call;
  int64_t tiles;
  int64_t group_tiles;  // tiles of a group
  int64_t groups;
  int64_t first;   // position of the chunk
  int64_t blocks;  // of the chunk
  void* lanes;     // [blocks, D, kLaneBlock]
  void* rows;      // [blocks, kLaneBlock, S]
  void* found;     // [blocks, kLaneBlock]
  void* weights;   // [tiles, blocks, kTile, kLaneBlock]
  void* maxima;    // [tiles, blocks, kLaneBlock]
  void* sums;      // [tiles, blocks, kLaneBlock]
  void* shares;    // [groups, blocks, D, kLaneBlock]
  void* pulls;     // [T], weights of the positives
  double* losses;  // [blocks]
};

// Each for [float, double].
struct LossKernels {
  int64_t (*sampled_scratch[2])(const SampledPlan& plan);
  void (*sampled_block[2])(const SampledPlan& plan, int64_t block, void* scratch);
  void (*sampled_range[2])(const SampledPlan& plan, int64_t range);

  void (*full_prepare[2])(const FullPlan& plan, int64_t block);
  void (*full_scores[2])(const FullPlan& plan, int64_t tile);
  void (*full_settle[2])(const FullPlan& plan, int64_t block);
  void (*full_gradients[2])(const FullPlan& plan, int64_t group);
  void (*full_collect[2])(const FullPlan& plan, int64_t block);

  // Adds the shares of positives to the gradients of items, one position after the other.
  void (*pull[2])(const HstuLoss& call, const void* pulls);
};

extern const LossKernels portable_loss_kernels;
extern const LossKernels avx2_loss_kernels;
extern const LossKernels avx512_loss_kernels;

}  // namespace hstu
