// What a tile of queries x keys needs beside its products: which cells are visible, and their relative bias.
//
// A tile is kBlock "rows" by kBlock "lanes" (vector elements). The forward runs with keys as rows and queries as
// lanes, the backward the other way round; both skip hidden 16 x 16 cells and mask only the partly visible ones.
// Included only by attention_kernel.cpp.

#pragma once

enum CellState : uint8_t { kHidden, kPartial, kFull };

// The queries of a block, with the keys each sees.
template <typename T>
struct Queries {
  int32_t count;
  Int<T> a_hi[kBlock];
  Int<T> b_lo[kBlock];
  Int<T> b_hi[kBlock];
  Int<T> own[kBlock];
  KeySet least_of[kGroups];  // over the queries of a group
  KeySet most_of[kGroups];
};

template <typename T>
void load_queries(const Plan& plan, const Sequence& s, int32_t block, Queries<T>& out) {
  out.count = least(kBlock, s.queries - block * kBlock);
  const int32_t first = s.keys - s.queries + block * kBlock;
  for (int32_t i = 0; i < kBlock; ++i) {
    // lanes past the end repeat the last query: their results are not stored
    const KeySet set = key_set(s, plan.call->window, plan.call->global_prefix, first + least(i, out.count - 1));
    out.a_hi[i] = set.a_hi;
    out.b_lo[i] = set.b_lo;
    out.b_hi[i] = set.b_hi;
    out.own[i] = set.own;
    KeySet& low = out.least_of[i / kGroup];
    KeySet& high = out.most_of[i / kGroup];
    if (i % kGroup == 0) low = high = set;
    low = {least(low.a_hi, set.a_hi), least(low.b_lo, set.b_lo), least(low.b_hi, set.b_hi), least(low.own, set.own)};
    high = {most(high.a_hi, set.a_hi), most(high.b_lo, set.b_lo), most(high.b_hi, set.b_hi), most(high.own, set.own)};
  }
}

inline CellState cell_state(const KeySet& low, const KeySet& high, int32_t key, int32_t key_end) {
  const bool none_near = key >= high.b_hi || key_end <= low.b_lo;
  if (key >= high.a_hi && none_near && (key > high.own || key_end <= low.own)) return kHidden;
  return key_end <= low.a_hi || (high.b_lo <= key && key_end <= low.b_hi) ? kFull : kPartial;
}

// Cells of a tile; a group of rows works on the lanes from its first to its last visible cell.
struct Cells {
  int32_t rows;
  CellState state[kGroups][kGroups];
  int32_t first[kGroups];  // lanes, multiples of kGroup
  int32_t last[kGroups];
  bool complete;           // nothing hidden
  bool empty;              // nothing visible
};

template <typename T, bool QueryLanes>
void load_cells(const Queries<T>& queries, int32_t first_key, int32_t keys, Cells& out) {
  out.rows = QueryLanes ? least(kBlock, keys - first_key) : queries.count;
  const int32_t lanes = QueryLanes ? queries.count : least(kBlock, keys - first_key);
  out.complete = out.rows == kBlock && lanes == kBlock;
  out.empty = true;
  for (int r = 0; r < kGroups; ++r) {
    out.first[r] = out.last[r] = 0;
    for (int l = 0; l < kGroups; ++l) {
      const int q = QueryLanes ? l : r;
      const int32_t key = first_key + (QueryLanes ? r : l) * kGroup;
      const bool outside = r * kGroup >= out.rows || l * kGroup >= lanes;
      // keys past the end are never visible, so that their cell counts as partial
      const int32_t key_end = QueryLanes ? least(key + kGroup, keys) : key + kGroup;
      const CellState state = outside ? kHidden : cell_state(queries.least_of[q], queries.most_of[q], key, key_end);
      out.state[r][l] = state;
      if (state == kHidden) {
        out.complete = false;
        continue;
      }
      out.empty = false;
      if (out.last[r] == 0) out.first[r] = l * kGroup;
      out.last[r] = (l + 1) * kGroup;
    }
  }
}

// Calls f(first row, rows, first lane, lanes) for runs of row groups that work on the same lanes.
template <typename F>
inline void for_runs(const Cells& cells, F f) {
  for (int r = 0; r * kGroup < cells.rows;) {
    int end = r + 1;
    while (end * kGroup < cells.rows && cells.first[end] == cells.first[r] && cells.last[end] == cells.last[r]) ++end;
    if (cells.last[r] > cells.first[r])
      f(r * kGroup, least(end * kGroup, cells.rows) - r * kGroup, cells.first[r], cells.last[r] - cells.first[r]);
    r = end;
  }
}

// Calls f(row group, first row, end row, first lane, state) for every cell that its row group works on.
template <typename F>
inline void for_cells(const Cells& cells, F f) {
  for (int r = 0; r * kGroup < cells.rows; ++r)
    for (int32_t lane = cells.first[r]; lane < cells.last[r]; lane += kGroup)
      f(r * kGroup, least((r + 1) * kGroup, cells.rows), lane, cells.state[r][lane / kGroup]);
}

// All ones where the query sees the key, for one vector of lanes of a row.
template <typename T, bool QueryLanes>
inline VI<T> visible(const Queries<T>& q, int32_t first_key, int row, int lane) {
  if constexpr (QueryLanes) {
    const VI<T> key = VI<T>{} + static_cast<Int<T>>(first_key + row);
    return (key < load_int<T>(q.a_hi + lane)) |
           ((key >= load_int<T>(q.b_lo + lane)) & (key < load_int<T>(q.b_hi + lane))) |
           (key == load_int<T>(q.own + lane));
  } else {
    const VI<T> key = iota<T>() + static_cast<Int<T>>(first_key + lane);
    return (key < q.a_hi[row]) | ((key >= q.b_lo[row]) & (key < q.b_hi[row])) | (key == q.own[row]);
  }
}
