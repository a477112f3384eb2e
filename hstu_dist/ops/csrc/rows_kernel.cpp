// The row kernels for one instruction set; compiled once for each, with HSTU_ISA naming it.
//
// Nothing here may share code with other files (see plan.h), hence the unnamed namespace around everything.

#include <stddef.h>
#include <stdint.h>

#include "isa.h"
#include "rows.h"

namespace hstu {
namespace {
#include "simd.h"
#include "noise.h"

// A whole vector of a row, or the first `count` elements of one, zeros behind.
struct Whole {};
struct Part {
  int count;
};

template <typename T>
inline V<T> load(const T* p, Whole) {
  return load(p);
}
template <typename T>
inline void store(T* p, V<T> v, Whole) {
  store(p, v);
}
template <typename T>
inline V<T> load(const T* p, Part part) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == sizeof(float)) return _mm512_maskz_loadu_ps((1u << part.count) - 1, p);
#endif
  V<T> v{};
  for (int l = 0; l < part.count; ++l) v[l] = p[l];
  return v;
}
template <typename T>
inline void store(T* p, V<T> v, Part part) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == sizeof(float)) return _mm512_mask_storeu_ps(p, (1u << part.count) - 1, v);
#endif
  for (int l = 0; l < part.count; ++l) p[l] = v[l];
}
// Zeros the lanes that a part does not have.
template <typename T>
inline V<T> trim(V<T> v, Whole) {
  return v;
}
template <typename T>
inline V<T> trim(V<T> v, Part part) {
  return keep<T>(iota<T>() < static_cast<Int<T>>(part.count), v);
}

// Calls f(column, Whole or Part) for every vector of a row.
template <typename T, typename F>
inline void for_vectors(int64_t width, F f) {
  int64_t c = 0;
  for (; c + kLanes<T> <= width; c += kLanes<T>) f(c, Whole{});
  if (c < width) f(c, Part{static_cast<int>(width - c)});
}

template <typename T>
inline T sum(V<T> v) {
  T total = 0;
  for (int l = 0; l < kLanes<T>; ++l) total += v[l];
  return total;
}

// norm(x) = (x - mean) / deviation
template <typename T>
struct Moments {
  T mean;
  T rate;  // 1 / deviation
};

template <typename T>
inline Moments<T> moments(const T* x, int64_t width, double epsilon) {
  V<T> total{};
  for_vectors<T>(width, [&](int64_t c, auto part) { total += load(x + c, part); });
  const T mean = sum<T>(total) / static_cast<T>(width);
  V<T> squares{}, rest{};
  for_vectors<T>(width, [&](int64_t c, auto part) {
    const V<T> centred = trim<T>(load(x + c, part) - mean, part);
    squares += centred * centred;
    rest += centred;
  });
  // what rounding left in the mean matters where the deviation is small beside it
  const double shift = static_cast<double>(sum<T>(rest)) / static_cast<double>(width);
  const double variance = static_cast<double>(sum<T>(squares)) / static_cast<double>(width) - shift * shift;
  return {mean + static_cast<T>(shift), T(1) / static_cast<T>(__builtin_sqrt(variance + epsilon))};
}

// out = gradient of x, where gradient(c, part) is that of norm(x).
template <typename T, typename F>
inline void normalize_backward(const T* x, int64_t width, const Moments<T>& m, F gradient, T* out) {
  V<T> total{}, products{};
  for_vectors<T>(width, [&](int64_t c, auto part) {
    const V<T> grad = gradient(c, part);
    total += grad;
    // the gradient is zero where the part ends
    products += grad * ((load(x + c, part) - m.mean) * m.rate);
  });
  const T mean = sum<T>(total) / static_cast<T>(width), slope = sum<T>(products) / static_cast<T>(width);
  for_vectors<T>(width, [&](int64_t c, auto part) {
    const V<T> normal = (load(x + c, part) - m.mean) * m.rate;
    store(out + c, (gradient(c, part) - mean - normal * slope) * m.rate, part);
  });
}

template <typename T>
inline V<T> sigmoid(V<T> x) {
  return reciprocal(exponential(-x) + T(1));
}

template <typename T>
inline const T* in(const HstuRows& call, int i, int64_t row) {
  return static_cast<const T*>(call.in[i]) + row * call.in_stride[i];
}
template <typename T>
inline T* out(const HstuRows& call, int i, int64_t row) {
  return static_cast<T*>(call.out[i]) + row * call.out_stride[i];
}

template <typename T>
void silu_backward_row(const HstuRows& call, int64_t row) {
  const T* x = in<T>(call, 0, row);
  T* to = out<T>(call, 0, row);
  for (int p = 0; p < HSTU_MAX_PARTS; ++p) {
    const T* grad = in<T>(call, 1 + p, row);
    for_vectors<T>(call.part_width[p], [&](int64_t c, auto part) {
      const V<T> value = load(x + c, part), s = sigmoid<T>(value);
      // e^-x s instead of 1 - s, which cancels for large x
      const V<T> slope = s * (T(1) + value * (exponential(-value) * s));
      store(to + c, load(grad + c, part) * slope, part);
    });
    x += call.part_width[p];
    to += call.part_width[p];
  }
}

template <typename T>
void gate_row(const HstuRows& call, int64_t row) {
  const Noise noise(call, row);
  const T *attended = in<T>(call, 0, row), *u = in<T>(call, 1, row);
  T* to = out<T>(call, 0, row);
  const Moments<T> m = moments(attended, call.width, call.epsilon);
  for_vectors<T>(call.width, [&](int64_t c, auto part) {
    const V<T> normal = (load(attended + c, part) - m.mean) * m.rate;
    store(to + c, noise.drop<T>(load(u + c, part) * normal, c), part);
  });
}

template <typename T>
void gate_backward_row(const HstuRows& call, int64_t row) {
  const Noise noise(call, row);
  const T *attended = in<T>(call, 0, row), *u = in<T>(call, 1, row), *grad = in<T>(call, 2, row);
  const Moments<T> m = moments(attended, call.width, call.epsilon);
  T* grad_u = out<T>(call, 1, row);
  // kept in grad_u between the two passes over the row, which need it times u
  for_vectors<T>(call.width,
                 [&](int64_t c, auto part) { store(grad_u + c, noise.drop<T>(load(grad + c, part), c), part); });
  normalize_backward<T>(
      attended, call.width, m, [&](int64_t c, auto part) { return load(grad_u + c, part) * load(u + c, part); },
      out<T>(call, 0, row));
  for_vectors<T>(call.width, [&](int64_t c, auto part) {
    const V<T> normal = (load(attended + c, part) - m.mean) * m.rate;
    store(grad_u + c, load(grad_u + c, part) * normal, part);
  });
}

template <typename T>
void run_row(const HstuRows& call, int64_t row) {
  const T* x = in<T>(call, 0, row);
  switch (call.operation) {
    case HSTU_NORMALIZE: {
      const Moments<T> m = moments(x, call.width, call.epsilon);
      for_vectors<T>(call.width, [&](int64_t c, auto part) {
        store(out<T>(call, 0, row) + c, (load(x + c, part) - m.mean) * m.rate, part);
      });
      break;
    }
    case HSTU_NORMALIZE_BACKWARD: {
      const T* grad = in<T>(call, 1, row);
      normalize_backward<T>(
          x, call.width, moments(x, call.width, call.epsilon),
          [&](int64_t c, auto part) { return load(grad + c, part); }, out<T>(call, 0, row));
      break;
    }
    case HSTU_SILU:
      for_vectors<T>(call.width, [&](int64_t c, auto part) {
        const V<T> value = load(x + c, part);
        store(out<T>(call, 0, row) + c, value * sigmoid<T>(value), part);
      });
      break;
    case HSTU_SILU_BACKWARD: silu_backward_row<T>(call, row); break;
    case HSTU_GATE: gate_row<T>(call, row); break;
    case HSTU_GATE_BACKWARD: gate_backward_row<T>(call, row); break;
    case HSTU_DROP: {
      const Noise noise(call, row);
      for_vectors<T>(call.width, [&](int64_t c, auto part) {
        store(out<T>(call, 0, row) + c, noise.drop<T>(load(x + c, part), c), part);
      });
      break;
    }
    case HSTU_DRAW: draw_row(call, row); break;
  }
}

template <typename T>
void run(const HstuRows& call, int64_t first, int64_t end) {
  for (int64_t row = first; row < end; ++row) run_row<T>(call, row);
}

}  // namespace

extern const RowKernels HSTU_TABLE(row_kernels) = {{run<float>, run<double>}};

}  // namespace hstu
