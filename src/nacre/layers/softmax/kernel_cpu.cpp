// Softmax and log-softmax: formula.py, with a row, or a tile of columns, kept in cache between its passes.
//
// x: (N, D, M): N outer positions, D values along the dimension, M inner positions.
#include "nacre/core/cpu_math.h"
#include "nacre/core/cpu_memory.h"
#include "nacre/core/cpu_primitives.h"
#include "nacre/core/cpu_softmax.h"

#include <algorithm>
#include <array>
#include <vector>

namespace nacre {
namespace {

// What is kept of z = x - maximum and e = exp<A>(z) until their sum is known, what of the sum, and the result of both; then
// what the backward adds up, and the gradient that follows from the sum.
template <class A>
struct Softmax {
  using V = Vector<A>;
  static V kept(V, V e) { return e; }
  static V statistic(V sum) { return 1 / sum; }
  static V result(V e, V factor) { return e * factor; }
  static V term(V g, V s) { return g * s; }
  static V gradient(V g, V s, V sum) { return s * (g - sum); }
};

template <class A>
struct LogSoftmax {
  using V = Vector<A>;
  static V kept(V z, V) { return z; }
  static V statistic(V sum) { return log<A>(sum); }
  static V result(V z, V log_sum) { return z - log_sum; }
  static V term(V g, V) { return g; }
  static V gradient(V g, V l, V sum) { return g - exp<A>(l) * sum; }
};

// While the exponentials are computed, the next row comes from memory. x, next, y: (D); scratch: (D)
template <template <class> class Kind, class T, class A = Accumulator<T>>
void forward_row(const T* x, const T* next, int64_t size, bool stream, T* y, A* scratch) {
  const A maximum = maximum_of_row(x, size);
  const auto [sum] = sums_over_row<A, 1>(size, [&](int64_t i, auto which) {
    __builtin_prefetch(next + i);
    const Vector<A> z = load(x + i, which) - maximum, e = exp<A>(z);
    store(scratch + i, Kind<A>::kept(z, e), which);
    return std::array<Vector<A>, 1>{e};
  });
  const Vector<A> statistic = Kind<A>::statistic(every<A>(sum));
  write_row(y, size, stream, [&](int64_t i, auto which) -> Vector<A> {
    return Kind<A>::result(load(scratch + i, which), statistic);
  });
}

// x, y: (D, W), rows `stride` apart; scratch: (D + 2, W)
template <template <class> class Kind, class T, class A = Accumulator<T>>
void forward_tile(const T* x, int64_t size, int64_t stride, int64_t columns, T* y, A* scratch) {
  A *tile = scratch, *maximum = tile + size * columns, *sum = maximum + columns;
  read_tile(x, size, stride, columns, tile, maximum);
  std::fill(sum, sum + columns, A(0));
  over_tile<A>(size, columns, columns, [&](int64_t, int64_t i, int64_t at, auto which) {
    const Vector<A> z = load(tile + at, which) - load(maximum + i, which), e = exp<A>(z);
    store(tile + at, Kind<A>::kept(z, e), which);
    store(sum + i, load(sum + i, which) + e, which);
  });
  over_row<A>(columns, [&](int64_t i, auto which) { store(sum + i, Kind<A>::statistic(load(sum + i, which)), which); });
  over_tile<A>(size, stride, columns, [&](int64_t d, int64_t i, int64_t at, auto which) {
    store(y + at, Kind<A>::result(load(tile + d * columns + i, which), load(sum + i, which)), which);
  });
}

// While the gradient is written, the next row, `ahead` values from this one, comes from memory.
// g, s, grad: (D), s being the output, of either kind
template <template <class> class Kind, class T, class A = Accumulator<T>>
void backward_row(const T* g, const T* s, int64_t ahead, int64_t size, bool stream, T* grad) {
  const auto [total] = sums_over_row<A, 1>(size, [&](int64_t i, auto which) {
    return std::array<Vector<A>, 1>{Kind<A>::term(load(g + i, which), load(s + i, which))};
  });
  write_row(grad, size, stream, [&, sum = every<A>(total)](int64_t i, auto which) -> Vector<A> {
    __builtin_prefetch(g + i + ahead);
    __builtin_prefetch(s + i + ahead);
    return Kind<A>::gradient(load(g + i, which), load(s + i, which), sum);
  });
}

// g, s, grad: (D, W), rows `stride` apart; scratch: (2 D + 1, W)
template <template <class> class Kind, class T, class A = Accumulator<T>>
void backward_tile(const T* g, const T* s, int64_t size, int64_t stride, int64_t columns, T* grad, A* scratch) {
  A *g_tile = scratch, *s_tile = g_tile + size * columns, *sum = s_tile + size * columns;
  std::fill(sum, sum + columns, A(0));
  over_tile<A>(size, stride, columns, [&](int64_t d, int64_t i, int64_t at, auto which) {
    __builtin_prefetch(g + at + stride);
    __builtin_prefetch(s + at + stride);
    const Vector<A> g_values = load(g + at, which), s_values = load(s + at, which);
    store(g_tile + d * columns + i, g_values, which);
    store(s_tile + d * columns + i, s_values, which);
    store(sum + i, load(sum + i, which) + Kind<A>::term(g_values, s_values), which);
  });
  over_tile<A>(size, stride, columns, [&](int64_t d, int64_t i, int64_t at, auto which) {
    const int64_t in_tile = d * columns + i;
    store(grad + at, Kind<A>::gradient(load(g_tile + in_tile, which), load(s_tile + in_tile, which), load(sum + i, which)),
          which);
  });
}

Sizes sizes_of(const Tensor& tensor) {
  const auto sizes = tensor.sizes();
  return Sizes(sizes.begin(), sizes.end());
}

Slices slices_of(const Tensor& tensor, int64_t dim) {
  const int64_t dimensions = std::max<int64_t>(tensor.dim(), 1);
  STD_TORCH_CHECK(-dimensions <= dim && dim < dimensions, "softmax runs along one dimension of its input");
  return Slices(sizes_of(tensor), dim < 0 ? dim + dimensions : dim);
}

template <template <class> class Kind>
Tensor forward(const Tensor& input, int64_t dim) {
  const Slices slices = slices_of(input, dim);
  const int64_t size = slices.size, inner = slices.inner, slice = size * inner;
  const Tensor x = contiguous_as(input, input.scalar_type());
  const Tensor y = new_tensor(sizes_of(input), input.scalar_type());
  if (slices.values() == 0) return y;

  with_type(input.scalar_type(), [&](auto type) {
    using T = decltype(type);
    using A = Accumulator<T>;
    const T* from = static_cast<const T*>(x.const_data_ptr());  // (N, D, M)
    T* to = static_cast<T*>(y.mutable_data_ptr());              // (N, D, M)
    const bool stream = slices.stream_rows(to);
    if (inner == 1)
      slices.over_rows<A>(size, [&](int64_t row, int64_t following, A* scratch) {
        forward_row<Kind>(from + row * size, from + following * size, size, stream, to + row * size, scratch);
      });
    else
      slices.over_tiles<A>((size + 2) * slices.width(), [&](int64_t n, int64_t first, int64_t columns, A* scratch) {
        const int64_t start = n * slice + first;
        forward_tile<Kind>(from + start, size, inner, columns, to + start, scratch);
      });
  });
  return y;
}

// needs: the gradient of input, the only one, is asked for
template <template <class> class Kind>
Tensor backward(const Tensor& grad_output, const Tensor& output, int64_t dim, const std::vector<bool>& needs) {
  const Slices slices = slices_of(output, dim);
  const int64_t size = slices.size, inner = slices.inner, slice = size * inner;
  STD_TORCH_CHECK(needs.size() == 1, "softmax: one gradient is asked for");
  STD_TORCH_CHECK(grad_output.numel() == output.numel(), "softmax: the gradient has the shape of the output");
  const Tensor g = contiguous_as(grad_output, output.scalar_type()), s = contiguous_as(output, output.scalar_type());
  const Tensor grad = new_tensor(sizes_of(output), output.scalar_type());
  if (slices.values() == 0) return grad;

  with_type(output.scalar_type(), [&](auto type) {
    using T = decltype(type);
    using A = Accumulator<T>;
    const T* g_from = static_cast<const T*>(g.const_data_ptr());  // (N, D, M)
    const T* s_from = static_cast<const T*>(s.const_data_ptr());  // (N, D, M)
    T* to = static_cast<T*>(grad.mutable_data_ptr());             // (N, D, M)
    const bool stream = slices.stream_rows(to);
    if (inner == 1)
      slices.over_rows<A>(0, [&](int64_t row, int64_t following, A*) {
        const int64_t start = row * size, ahead = (following - row) * size;
        backward_row<Kind>(g_from + start, s_from + start, ahead, size, stream, to + start);
      });
    else
      slices.over_tiles<A>((2 * size + 1) * slices.width(), [&](int64_t n, int64_t first, int64_t columns, A* scratch) {
        const int64_t start = n * slice + first;
        backward_tile<Kind>(g_from + start, s_from + start, size, inner, columns, to + start, scratch);
      });
  });
  return grad;
}

}  // namespace
}  // namespace nacre

STABLE_TORCH_LIBRARY_IMPL(nacre, CPU, m) {
  m.impl("softmax.kernel", TORCH_BOX(&nacre::forward<nacre::Softmax>));
  m.impl("softmax_backward.kernel", TORCH_BOX(&nacre::backward<nacre::Softmax>));
  m.impl("log_softmax.kernel", TORCH_BOX(&nacre::forward<nacre::LogSoftmax>));
  m.impl("log_softmax_backward.kernel", TORCH_BOX(&nacre::backward<nacre::LogSoftmax>));
}
