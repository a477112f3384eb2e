// Stateless random numbers of a token, bit for bit those of ops/random.py. Included only by rows_kernel.cpp.

#pragma once

constexpr uint32_t kGolden32 = 0x9E3779B1u;

inline uint64_t mix64(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
  return x ^ (x >> 31);
}

// N is uint32_t or a vector of it.
template <typename N>
inline N mix32(N x, uint32_t salt) {
  x = (x ^ (x >> 16)) * 0x7FEB352Du;
  x = x ^ salt;
  x = (x ^ (x >> 15)) * 0x846CA68Bu;
  return x ^ (x >> 16);
}

typedef uint32_t Words __attribute__((vector_size(VECTOR_BYTES)));

struct Noise {
  uint32_t low = 0;
  uint32_t salt = 0;
  int32_t threshold;
  double scale;
  bool drops;

  Noise(const HstuRows& call, int64_t row)
      : threshold(call.threshold), scale(call.scale), drops(call.tokens != nullptr) {
    if (!drops) return;
    const uint64_t mixed = mix64(static_cast<uint64_t>(call.tokens[row]) + static_cast<uint64_t>(call.key));
    low = static_cast<uint32_t>(mixed);
    salt = static_cast<uint32_t>(mixed >> 32);
  }

  uint32_t word(int64_t column) const { return mix32(low + static_cast<uint32_t>(column + 1) * kGolden32, salt); }

  // Elements from `column` on, each dropped or scaled.
  template <typename T>
  V<T> drop(V<T> x, int64_t column) const {
    if (!drops) return x;
    VI<T> kept;
    if constexpr (sizeof(T) == sizeof(float)) {
      const VI<float> columns = iota<float>() + static_cast<int32_t>(column + 1);
      const Words steps = reinterpret_cast<Words>(columns) * kGolden32;
      kept = reinterpret_cast<VI<float>>(mix32(steps + low, salt)) >= threshold;
    } else {
      for (int l = 0; l < kLanes<T>; ++l) kept[l] = static_cast<int32_t>(word(column + l)) >= threshold ? -1 : 0;
    }
    return keep<T>(kept, x * static_cast<T>(scale));
  }
};

inline void draw_row(const HstuRows& call, int64_t row) {
  const Noise noise(call, row);
  int64_t* to = call.integers + row * call.width;
  for (int64_t c = 0; c < call.width; ++c)
    to[c] = static_cast<int64_t>(static_cast<uint64_t>(noise.word(c) & 0x7FFFFFFFu) * static_cast<uint64_t>(call.high) >> 31);
}
