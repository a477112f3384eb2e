// The relative bias of a tile: position weights by distance, time weights by bucket of elapsed time.
//
// It is computed once per tile and serves all heads of the task. Included only by attention_kernel.cpp.

#pragma once

constexpr uint8_t kMixed = 255;  // a group of lanes with more than one bucket

inline uint64_t magnitude(int64_t elapsed) {
  // unsigned: the smallest integer has no positive counterpart
  return elapsed < 0 ? 0 - static_cast<uint64_t>(elapsed) : static_cast<uint64_t>(elapsed);
}

inline int64_t difference(int64_t a, int64_t b) {
  return static_cast<int64_t>(static_cast<uint64_t>(a) - static_cast<uint64_t>(b));
}

inline uint8_t bucket_of(const BucketTable& table, uint64_t elapsed) {
  elapsed = most<uint64_t>(elapsed, 1);
  const int zeros = __builtin_clzll(elapsed);
  const uint64_t cell = static_cast<uint64_t>(63 - zeros) * 16 + ((elapsed << zeros) >> 59 & 15);
  return static_cast<uint8_t>(table.base[cell] + (elapsed >= table.boundary[cell]));
}

// Buckets of the times of a group of lanes as seen from `time`.
inline void load_buckets(const BucketTable& table, const int64_t* times, int64_t time, uint8_t* buckets) {
#if defined(__AVX512DQ__)
  const __m512i from = _mm512_set1_epi64(time);
  const __m512i low = _mm512_abs_epi64(_mm512_sub_epi64(_mm512_loadu_si512(times), from));
  const __m512i high = _mm512_abs_epi64(_mm512_sub_epi64(_mm512_loadu_si512(times + 8), from));
  const __m512 elapsed =
      _mm512_insertf32x8(_mm512_castps256_ps512(_mm512_cvtepu64_ps(low)), _mm512_cvtepu64_ps(high), 1);
  // log2 to 2e-5: too coarse only near a boundary, where the table decides
  const __m512 m = _mm512_getmant_ps(elapsed, _MM_MANT_NORM_1_2, _MM_MANT_SIGN_zero);
  __m512 p = _mm512_set1_ps(0.0439286278f);
  p = p * m - 0.409475586f;
  p = p * m + 1.61017755f;
  p = p * m - 3.52021884f;
  p = p * m + 5.06975632f;
  p = p * m - 2.79415368f;
  const __m512 position = (p + _mm512_getexp_ps(elapsed)) * 2.302814f;  // ln 2 / 0.301
  const __m512 down = _mm512_roundscale_ps(position, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  const __m512 rest = position - down;
  const __mmask16 beyond_one = _mm512_cmp_ps_mask(elapsed, _mm512_set1_ps(1.0f), _CMP_GT_OQ);
  unsigned unsure = _mm512_mask_cmp_ps_mask(beyond_one, rest, _mm512_set1_ps(3e-4f), _CMP_LT_OQ) |
                    _mm512_mask_cmp_ps_mask(beyond_one, rest, _mm512_set1_ps(1 - 3e-4f), _CMP_GT_OQ);
  const __m512 capped = _mm512_maskz_min_ps(beyond_one, down, _mm512_set1_ps(kBuckets - 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(buckets), _mm512_cvtepi32_epi8(_mm512_cvttps_epi32(capped)));
  for (; unsure != 0; unsure &= unsure - 1) {
    const int l = __builtin_ctz(unsure);
    buckets[l] = bucket_of(table, magnitude(difference(times[l], time)));
  }
#else
  for (int l = 0; l < kGroup; ++l) buckets[l] = bucket_of(table, magnitude(difference(times[l], time)));
#endif
}

// Positions and times of the queries or keys along one side of a tile.
struct Axis {
  int32_t count;
  int32_t position[kBlock];   // with all targets at one position
  int64_t time[kBlock];
  int64_t earliest[kGroups];
  int64_t latest[kGroups];
  bool straight[kGroups];     // positions of the group count up by one
};

inline void load_axis(const Sequence& s, int32_t first, int32_t count, const int64_t* times, Axis& out) {
  out.count = count;
  const int32_t history = s.keys - s.targets;
  for (int32_t i = 0; i < kBlock; ++i) {
    // past the end of the sequence positions simply go on: nothing there is used
    out.position[i] = first + i < s.keys ? least(first + i, history) : first + i;
    out.time[i] = times == nullptr || count == 0 ? 0 : times[least(i, count - 1)];
    const int g = i / kGroup;
    if (i % kGroup == 0) {
      out.straight[g] = true;
      out.earliest[g] = out.latest[g] = out.time[i];
    } else {
      out.straight[g] = out.straight[g] && out.position[i] == out.position[i - 1] + 1;
      out.earliest[g] = least(out.earliest[g], out.time[i]);
      out.latest[g] = most(out.latest[g], out.time[i]);
    }
  }
}

template <typename T>
struct BiasTile {
  alignas(64) T value[kBlock * kBlock];
  uint8_t bucket[kBlock * kBlock];
  uint8_t group_bucket[kBlock * kGroups];  // the one bucket of a row's group of lanes, or kMixed
};

// The bucket that all elapsed times between `time` and a group share, or kMixed.
inline uint8_t shared_bucket(const BucketTable& table, int64_t time, int64_t earliest, int64_t latest) {
  int64_t low, high;
  if (__builtin_sub_overflow(earliest, time, &low) || __builtin_sub_overflow(latest, time, &high)) return kMixed;
  if (low < 0 && high > 0) return kMixed;
  const uint8_t bucket = bucket_of(table, magnitude(low));
  return bucket == bucket_of(table, magnitude(high)) ? bucket : kMixed;
}

template <typename T>
void load_bias(const Plan& plan, const Cells& cells, const Axis& rows, const Axis& lanes, BiasTile<T>& out) {
  const HstuCall& call = *plan.call;
  const T* positions = static_cast<const T*>(plan.position_table);
  const T* times = static_cast<const T*>(call.time_weight);
  if (positions != nullptr) positions += kBlock + call.table_length - 1;
  for_cells(cells, [&](int first_row, int end_row, int lane, CellState) {
    const int g = lane / kGroup;
    for (int r = first_row; r < end_row; ++r) {
      T value[kGroup] = {};
      if (positions != nullptr) {
        const T* from = positions - rows.position[r];
        if (lanes.straight[g])
          __builtin_memcpy(value, from + lanes.position[lane], sizeof value);
        else
          for (int l = 0; l < kGroup; ++l) value[l] = from[lanes.position[lane + l]];
      }
      if (times != nullptr) {
        const uint8_t shared = shared_bucket(*plan.buckets, rows.time[r], lanes.earliest[g], lanes.latest[g]);
        out.group_bucket[r * kGroups + g] = shared;
        if (shared != kMixed) {
          for (int l = 0; l < kGroup; ++l) value[l] += times[shared];
        } else {
          uint8_t* bucket = out.bucket + r * kBlock + lane;
          load_buckets(*plan.buckets, lanes.time + lane, rows.time[r], bucket);
          for (int l = 0; l < kGroup; ++l) value[l] += times[bucket[l]];
        }
      }
      __builtin_memcpy(out.value + r * kBlock + lane, value, sizeof value);
    }
  });
}
