// Sums over the lanes of vectors, and the weights of a softmax.
//
// Included only by loss_kernel.cpp.

#pragma once

// e^x for x <= 0, exactly zero where the result would not be a normal number.
template <typename T>
inline V<T> weight_of(V<T> x) {
  const V<T> smallest = splat(sizeof(T) == sizeof(float) ? T(-87) : T(-708));
  // NaN stays
  return x < smallest ? V<T>{} : exponential(x);
}

template <typename T>
inline T sum_lanes(V<T> v) {
  T total = 0;
  for (int l = 0; l < kLanes<T>; ++l) total += v[l];
  return total;
}

template <int... L>
struct Lanes {};
template <int Count, int... L>
struct FirstLanes : FirstLanes<Count - 1, Count - 1, L...> {};
template <int... L>
struct FirstLanes<0, L...> {
  typedef Lanes<L...> All;
};

// Within groups of 2 * Half lanes: the sum of the halves of a in the first half, that of b in the second.
template <typename T, int Half, int... L>
inline V<T> add_halves(V<T> a, V<T> b, Lanes<L...>) {
  constexpr int W = kLanes<T>;
#if defined(__clang__)
  return __builtin_shufflevector(a, b, (L & Half ? W + L - Half : L)...) +
         __builtin_shufflevector(a, b, (L & Half ? W + L : L + Half)...);
#else
  return __builtin_shuffle(a, b, VI<T>{(L & Half ? W + L - Half : L)...}) +
         __builtin_shuffle(a, b, VI<T>{(L & Half ? W + L : L + Half)...});
#endif
}

// Lane i = the sum over the lanes of sums[i].
template <typename T, int Count = kLanes<T>>
inline V<T> sum_each(V<T> (&sums)[kLanes<T>]) {
  if constexpr (Count == 1) {
    return sums[0];
  } else {
    constexpr int Half = Count / 2;
#pragma GCC unroll 8
    for (int i = 0; i < Half; ++i)
      sums[i] = add_halves<T, Half>(sums[i], sums[i + Half], typename FirstLanes<kLanes<T>>::All{});
    return sum_each<T, Half>(sums);
  }
}
