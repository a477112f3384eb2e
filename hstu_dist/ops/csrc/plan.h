// The work of one call as tasks over blocks of 64 queries or keys, and who sees whom block by block.
//
// Everything here is plain data, so that the kernel files, which are compiled once per instruction set, share no
// inline code with the rest of the library: the linker could keep a copy the machine cannot run.

#pragma once

#include <stdint.h>

#include "abi.h"

namespace hstu {

constexpr int kBlock = 64;        // queries or keys of a block
constexpr int kChunk = 128;       // queries of a forward task, keys of a backward task: they share what streams past
constexpr int kChunkBlocks = kChunk / kBlock;
constexpr int kGroup = 16;        // granularity at which hidden parts of a block are skipped
constexpr int kGroups = kBlock / kGroup;
constexpr int kBuckets = 129;

struct Sequence {
  int64_t query_row;  // first row of q
  int64_t key_row;    // first row of k and v
  int32_t queries;
  int32_t keys;
  int32_t contextual;
  int32_t targets;
  int64_t first_span;  // of its query blocks
};

// Keys that one query sees: [0, a_hi), [b_lo, b_hi) and its own position.
struct KeySet {
  int32_t a_hi;
  int32_t b_lo;
  int32_t b_hi;
  int32_t own;
};

// Chunks of keys that a query block touches: [0, a_hi), [b_lo, b_hi) and [c_lo, c_hi).
struct Span {
  int32_t a_hi;
  int32_t b_lo;
  int32_t b_hi;
  int32_t c_lo;
  int32_t c_hi;
};

static inline KeySet key_set(const Sequence& s, int64_t window, int64_t prefix, int32_t position) {
  // contextual tokens see exactly each other
  if (position < s.contextual) return {s.contextual, INT32_MAX, 0, position};
  const int32_t history = s.keys - s.targets;
  const int32_t past = position + 1 < history ? position + 1 : history;
  if (window == 0) return {0, 0, past, position};
  const int64_t always = s.contextual > prefix ? s.contextual : prefix;
  const int64_t begin = (position < history ? position : history) - window + 1;
  return {always < past ? static_cast<int32_t>(always) : past, begin > 0 ? static_cast<int32_t>(begin) : 0, past,
          position};
}

static inline bool touches(const Span& s, int32_t chunk) {
  return chunk < s.a_hi || (s.b_lo <= chunk && chunk < s.b_hi) || (s.c_lo <= chunk && chunk < s.c_hi);
}

// Number of touched chunks below `chunk`.
static inline int32_t touched_before(const Span& s, int32_t chunk) {
  int32_t count = 0, end = 0;
  const bool b_first = s.b_lo <= s.c_lo;
  const int32_t low[3] = {0, b_first ? s.b_lo : s.c_lo, b_first ? s.c_lo : s.b_lo};
  const int32_t high[3] = {s.a_hi, b_first ? s.b_hi : s.c_hi, b_first ? s.c_hi : s.b_hi};
  for (int i = 0; i < 3; ++i) {
    const int32_t from = low[i] > end ? low[i] : end, to = high[i] < chunk ? high[i] : chunk;
    if (to > from) {
      count += to - from;
      end = to;
    }
  }
  return count;
}

struct Task {
  int32_t sequence;
  int32_t chunk;       // of queries (forward) or keys (backward)
  int32_t head_group;
  int64_t cost;
};

// What a bucket lookup needs: elapsed times are split by their leading one and the four bits below it, fine enough
// that no cell holds two bucket boundaries.
struct BucketTable {
  uint64_t boundary[64 * 16];  // smallest elapsed time of the next bucket, or the largest integer
  uint8_t base[64 * 16];
};

// Everything the kernels read, beside the call itself.
struct Plan {
  const HstuCall* call;
  const Sequence* sequences;
  const Span* spans;
  const BucketTable* buckets;  // null without a time bias
  const void* position_table;  // position_weight between kBlock zeros; reversed for the forward
  int32_t group_heads;         // heads that one task serves
  int32_t head_groups;
  int64_t max_keys;
  int32_t* visits;             // [query blocks, head groups]: chunks of keys whose share of grad_q is in
  int32_t* merged;             // [B]: tasks whose share of the bias gradients is in
  double* position_sums;       // per sequence [2 keys - 1], at 2 key_row
  double* time_sums;           // [B, 129]
};

// Returns when *counter == value: tasks add into shared results in one fixed order, whatever the threads do.
void wait_for(const int32_t* counter, int32_t value);

typedef void (*TaskFunction)(const Plan& plan, const Task& task, void* scratch);

// One instruction set: scratch sizes in bytes and the two kinds of task, for [float, double].
struct Kernels {
  int64_t (*forward_scratch[2])(const Plan& plan);
  int64_t (*backward_scratch[2])(const Plan& plan);
  TaskFunction forward[2];
  TaskFunction backward[2];
};

extern const Kernels portable_kernels;
extern const Kernels avx2_kernels;
extern const Kernels avx512_kernels;

}  // namespace hstu
