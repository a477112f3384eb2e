// The one matrix product that everything is made of: C[M][lanes] (+)= A[M][depth] B[depth][lanes].
//
// A is read element by element with any two strides (so transposing it is free), B and C by whole vectors. A tile
// of C lives in registers while the depth runs. Included only by the *_kernel.cpp files.

#pragma once

template <typename T>
struct Rows {
  const T* first;
  int64_t stride;
  int64_t width;

  Rows from(int64_t r) const { return {first + r * stride, stride, width}; }
};

constexpr int64_t kLine = 64;  // bytes of a cache line

template <typename T>
inline void fetch(Rows<T>& rows, int64_t count) {
  for (; count > 0; --count, rows.first += rows.stride)
    for (int64_t c = 0; c < rows.width; c += kLine / static_cast<int64_t>(sizeof(T)))
      __builtin_prefetch(rows.first + c, 0, 2);
}

template <typename T>
struct Product {
  const T* a;
  int64_t a_row;    // stride between rows of A
  int64_t a_depth;  // stride along the depth
  const T* b;
  int64_t b_row;
  T* c;
  int64_t c_row;
  int64_t depth;
  Rows<T> soon{};  // fetched into the cache meanwhile, as many rows as C has
};

template <typename T, int Height, int Vectors, bool Add>
void multiply_tile(const Product<T>& product) {
  const Product<T> x = product;
  constexpr int W = kLanes<T>;
  V<T> sum[Height][Vectors];
#pragma GCC unroll 16
  for (int r = 0; r < Height; ++r)
#pragma GCC unroll 16
    for (int n = 0; n < Vectors; ++n) sum[r][n] = Add ? load(x.c + r * x.c_row + n * W) : V<T>{};
  const T* a = x.a;
  const T* b = x.b;
  for (int64_t i = 0; i < x.depth; ++i, a += x.a_depth, b += x.b_row) {
    V<T> row[Vectors];
#pragma GCC unroll 16
    for (int n = 0; n < Vectors; ++n) row[n] = load(b + n * W);
#pragma GCC unroll 16
    for (int r = 0; r < Height; ++r) {
      const V<T> element = splat(a[r * x.a_row]);
#pragma GCC unroll 16
      for (int n = 0; n < Vectors; ++n) sum[r][n] += element * row[n];
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < Height; ++r)
#pragma GCC unroll 16
    for (int n = 0; n < Vectors; ++n) store(x.c + r * x.c_row + n * W, sum[r][n]);
}

// Tallest tile whose accumulators, one row of B and one element of A fit the registers.
constexpr int tallest(int vectors) { return vectors > 3 ? 6 : (VECTOR_REGISTERS < 32 && vectors > 1) ? 6 : 8; }

template <typename T, bool Add, int Vectors>
void multiply_rows(Product<T> x, int64_t rows) {
  typedef void (*Tile)(const Product<T>&);
  static constexpr Tile tiles[8] = {
      multiply_tile<T, 1, Vectors, Add>, multiply_tile<T, 2, Vectors, Add>, multiply_tile<T, 3, Vectors, Add>,
      multiply_tile<T, 4, Vectors, Add>, multiply_tile<T, 5, Vectors, Add>, multiply_tile<T, 6, Vectors, Add>,
      multiply_tile<T, (tallest(Vectors) > 6 ? 7 : 1), Vectors, Add>,
      multiply_tile<T, (tallest(Vectors) > 6 ? 8 : 1), Vectors, Add>,
  };
  // tiles of nearly equal height: 50 rows are 5 x 6 + 4 x 5, not 8 x 6 + 2
  for (int64_t left = (rows + tallest(Vectors) - 1) / tallest(Vectors); left > 0; --left) {
    const int64_t height = (rows + left - 1) / left;
    fetch(x.soon, height);
    tiles[height - 1](x);
    x.a += height * x.a_row;
    x.c += height * x.c_row;
    rows -= height;
  }
}

constexpr int kPanel = VECTOR_REGISTERS < 32 ? 2 : 4;  // vectors of C side by side in one tile

// `lanes` is a multiple of the vector length.
template <bool Add, typename T>
void multiply(Product<T> x, int64_t rows, int64_t lanes) {
  for (int64_t vectors = lanes / kLanes<T>; vectors > 0; vectors -= kPanel) {
    switch (least<int64_t>(vectors, kPanel)) {
      case 1: multiply_rows<T, Add, 1>(x, rows); break;
      case 2: multiply_rows<T, Add, 2>(x, rows); break;
#if VECTOR_REGISTERS >= 32
      case 3: multiply_rows<T, Add, 3>(x, rows); break;
      default: multiply_rows<T, Add, 4>(x, rows); break;
#endif
    }
    x.soon.width = 0;
    x.b += kPanel * kLanes<T>;
    x.c += kPanel * kLanes<T>;
  }
}
