// Vectors of one instruction set in the compilers' portable vector notation: load, store, exp, transpose.
//
// Included only by the *_kernel.cpp files, inside the namespace of its instruction set. VECTOR_BYTES is the register width.

#pragma once

template <typename T>
struct Types;
template <>
struct Types<float> {
  typedef float V __attribute__((vector_size(VECTOR_BYTES)));
  typedef int32_t VI __attribute__((vector_size(VECTOR_BYTES)));
  typedef float Quad __attribute__((vector_size(16)));
  typedef int32_t Int;
};
template <>
struct Types<double> {
  typedef double V __attribute__((vector_size(VECTOR_BYTES)));
  typedef int64_t VI __attribute__((vector_size(VECTOR_BYTES)));
  typedef double Quad __attribute__((vector_size(32)));
  typedef int64_t Int;
};
template <typename T>
using V = typename Types<T>::V;
template <typename T>
using VI = typename Types<T>::VI;
template <typename T>
using Int = typename Types<T>::Int;

template <typename T>
constexpr int kLanes = VECTOR_BYTES / static_cast<int>(sizeof(T));

// std::min and friends could be emitted out of line for the wrong instruction set
template <typename N>
inline N least(N a, N b) {
  return a < b ? a : b;
}
template <typename N>
inline N most(N a, N b) {
  return a > b ? a : b;
}
inline int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

template <typename T>
inline V<T> load(const T* p) {
  V<T> v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
template <typename T>
inline VI<T> load_int(const Int<T>* p) {
  VI<T> v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
template <typename T>
inline void store(T* p, V<T> v) {
  __builtin_memcpy(p, &v, sizeof v);
}
template <typename T>
inline V<T> splat(T x) {
  return x - V<T>{};  // folds into a broadcast
}
template <typename T>
inline VI<T> iota() {
  VI<T> v;
  for (int l = 0; l < kLanes<T>; ++l) v[l] = l;
  return v;
}
template <typename T>
inline V<T> keep(VI<T> mask, V<T> x) {
  return reinterpret_cast<V<T>>(reinterpret_cast<VI<T>>(x) & mask);
}
template <typename T>
inline V<T> larger(V<T> a, V<T> b) {
  return a > b ? a : b;
}

// The compilers do not find these instructions by themselves: the limits of x, NaN kept, and 1 / x within 2 units in
// the last place, from an estimate of 14 or 12 bits and one step of Newton's method.
#if defined(__AVX512F__)
inline V<float> limited(V<float> x, float low, float high) {
  return _mm512_max_ps(splat(low), _mm512_min_ps(splat(high), x));
}
inline V<float> reciprocal(V<float> x) {
  const V<float> estimate = _mm512_rcp14_ps(x);
  return estimate * (2.0f - x * estimate);
}
#elif defined(__AVX2__)
inline V<float> limited(V<float> x, float low, float high) {
  return _mm256_max_ps(splat(low), _mm256_min_ps(splat(high), x));
}
inline V<float> reciprocal(V<float> x) {
  const V<float> estimate = _mm256_rcp_ps(x);
  return estimate * (2.0f - x * estimate);
}
#else
inline V<float> limited(V<float> x, float low, float high) {
  x = x < low ? splat(low) : x;
  return x > high ? splat(high) : x;
}
inline V<float> reciprocal(V<float> x) { return 1.0f / x; }
#endif
inline V<double> reciprocal(V<double> x) { return 1.0 / x; }

// e^x within 2 units in the last place; x is clamped to the range where the result is a normal number.
inline V<float> exponential(V<float> x) {
  x = limited(x, -87.3f, 88.3f);
  // adding 1.5 * 2^23 leaves the nearest integer in the low bits
  const V<float> magic = splat(12582912.0f);
  const V<float> shifted = x * 1.44269504f + magic;
  const V<float> n = shifted - magic;
  const V<float> r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  V<float> p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + (r + 1.0f);
  return reinterpret_cast<V<float>>(reinterpret_cast<VI<float>>(p) + (reinterpret_cast<VI<float>>(shifted) << 23));
}
inline V<double> exponential(V<double> x) {
  for (int l = 0; l < kLanes<double>; ++l) x[l] = __builtin_exp(x[l]);
  return x;
}

#if defined(__clang__)
#define SHUFFLE(a, b, i0, i1, i2, i3) __builtin_shufflevector(a, b, i0, i1, i2, i3)
#else
#define SHUFFLE(a, b, i0, i1, i2, i3) __builtin_shuffle(a, b, (Mask){i0, i1, i2, i3})
#endif

template <typename T>
inline void transpose_quad(const T* from, int64_t from_stride, T* to, int64_t to_stride, T scale) {
  typedef typename Types<T>::Quad Quad;
#if !defined(__clang__)
  typedef Int<T> Mask __attribute__((vector_size(sizeof(Quad))));
#endif
  Quad a, b, c, d;
  __builtin_memcpy(&a, from, sizeof a);
  __builtin_memcpy(&b, from + from_stride, sizeof b);
  __builtin_memcpy(&c, from + 2 * from_stride, sizeof c);
  __builtin_memcpy(&d, from + 3 * from_stride, sizeof d);
  const Quad ab_low = SHUFFLE(a, b, 0, 4, 1, 5), ab_high = SHUFFLE(a, b, 2, 6, 3, 7);
  const Quad cd_low = SHUFFLE(c, d, 0, 4, 1, 5), cd_high = SHUFFLE(c, d, 2, 6, 3, 7);
  a = SHUFFLE(ab_low, cd_low, 0, 1, 4, 5) * scale;
  b = SHUFFLE(ab_low, cd_low, 2, 3, 6, 7) * scale;
  c = SHUFFLE(ab_high, cd_high, 0, 1, 4, 5) * scale;
  d = SHUFFLE(ab_high, cd_high, 2, 3, 6, 7) * scale;
  __builtin_memcpy(to, &a, sizeof a);
  __builtin_memcpy(to + to_stride, &b, sizeof b);
  __builtin_memcpy(to + 2 * to_stride, &c, sizeof c);
  __builtin_memcpy(to + 3 * to_stride, &d, sizeof d);
}

// to[c][r] = scale * from[r][c] for rows x columns elements.
template <typename T>
void transpose(const T* from, int64_t from_stride, int64_t rows, int64_t columns, T* to, int64_t to_stride, T scale) {
  int64_t r = 0;
  for (; r + 4 <= rows; r += 4) {
    int64_t c = 0;
    for (; c + 4 <= columns; c += 4)
      transpose_quad(from + r * from_stride + c, from_stride, to + c * to_stride + r, to_stride, scale);
    for (; c < columns; ++c)
      for (int i = 0; i < 4; ++i) to[c * to_stride + r + i] = scale * from[(r + i) * from_stride + c];
  }
  for (; r < rows; ++r)
    for (int64_t c = 0; c < columns; ++c) to[c * to_stride + r] = scale * from[r * from_stride + c];
}

#undef SHUFFLE
