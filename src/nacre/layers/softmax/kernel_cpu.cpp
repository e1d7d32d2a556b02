// Softmax and log-softmax: formula.py, with a row, or a tile of columns, kept in cache between its passes.
//
// x: (N, D, M): N outer positions, D values along the dimension, M inner positions.
#include "nacre/core/cpu_layout.h"
#include "nacre/core/cpu_math.h"
#include "nacre/core/cpu_memory.h"
#include "nacre/core/cpu_primitives.h"
#include "nacre/core/cpu_softmax.h"
#include "nacre/core/cpu_tiles.h"

#include <algorithm>
#include <array>
#include <vector>

namespace nacre {
namespace {

// What is kept of z = x - maximum and e = exp(z) until the sum of e is known, what of the sum, and the result of both;
// then what the backward adds up, and the gradient that follows from the sum.
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

// While the exponentials are computed, the next row comes from memory. x, y: (N, D), from `first` on `rows` of them;
// scratch: (rows, D)
template <template <class> class Kind, class T, class A = Accumulator<T>>
void forward_rows(const T* x, int64_t first, int64_t rows, int64_t last, int64_t size, bool stream, T* y, A* scratch) {
  Vector<A> sums = every<A>(1);
  for (int64_t row = 0; row < rows; ++row) {
    const T* from = x + (first + row) * size;
    const T* next = x + std::min(first + row + 1, last) * size;
    A* kept = scratch + row * size;
    const A maximum = maximum_of_row(from, size);
    sums[row] = sums_over_row<A, 1>(size, [&](int64_t i, auto which) {
      __builtin_prefetch(next + i);
      const Vector<A> z = load(from + i, which) - maximum, e = exp<A>(z);
      store(kept + i, Kind<A>::kept(z, e), which);
      return std::array<Vector<A>, 1>{e};
    })[0];
  }
  const Vector<A> statistics = Kind<A>::statistic(sums);
  for (int64_t row = 0; row < rows; ++row) {
    const Vector<A> statistic = every<A>(statistics[row]);
    write_row(y + (first + row) * size, size, stream, [&](int64_t i, auto which) -> Vector<A> {
      return Kind<A>::result(load(scratch + row * size + i, which), statistic);
    });
  }
}

// Leaves what is kept in the tile, and the columns' statistics in `statistic`, (W); meanwhile() is called once a
// vector.
template <template <class> class Kind, class A, class Meanwhile>
void forward_tile(A* tile, const Tiles& tiles, int64_t columns, A* statistic, Meanwhile meanwhile) {
  for (int64_t i = 0; i < columns; i += lanes<A>) {
    A* const column = tile + i;
    Vector<A> maximum = Vector<A>{} - infinity<A>, sum = {};
    for (int64_t d = 0; d < tiles.size; ++d) maximum = larger(load(column + d * tiles.pitch, Whole{}), maximum);
    for (int64_t d = 0; d < tiles.size; ++d) {
      A* at = column + d * tiles.pitch;
      const Vector<A> z = load(at, Whole{}) - maximum, e = exp<A>(z);
      store(at, Kind<A>::kept(z, e), Whole{});
      sum += e;
      meanwhile();
    }
    store(statistic + i, Kind<A>::statistic(sum), Whole{});
  }
}

// from, to: (N, D, M)
template <template <class> class Kind, class T, class A = Accumulator<T>>
void forward_tiles(const T* from, const Tiles& tiles, T* to) {
  const bool stream = stream_tiles(tiles, to);
  over_tiles(tiles, [&](int64_t begin, int64_t end) {
    const Scratch<A> scratch(TileReader<T>::scratch_values(tiles) + tiles.pitch);
    A* const statistic = scratch.get() + TileReader<T>::scratch_values(tiles);  // (W)
    TileReader<T> reader(from, tiles, begin, end, scratch.get());
    for (int64_t index = begin; index < end; ++index) {
      const Block block = tiles.block(index);
      A* const tile = reader.take(stream ? nullptr : to + block.start);
      forward_tile<Kind>(tile, tiles, block.count, statistic, [&] { reader.step(); });
      write_tile(tile, tiles, block, stream, to, [&](int64_t, int64_t i, Vector<A> kept, auto which) -> Vector<A> {
        return Kind<A>::result(kept, load(statistic + i, which));
      });
    }
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

// g, s, grad: (D, M), rows `tiles.inner` apart, read where they lie; sums: (W). Rows to come, and those that will be
// written, are fetched by hand: so many runs of memory side by side are more than the processor follows.
template <template <class> class Kind, class T, class A = Accumulator<T>>
void backward_in_place(const T* g, const T* s, const Tiles& tiles, int64_t columns, bool stream, T* grad, A* sums) {
  const int64_t stride = tiles.inner;
  std::fill(sums, sums + columns, A(0));
  for (int64_t d = 0; d < tiles.size; ++d, g += stride, s += stride, grad += stride)
    over_row<A>(columns, [&](int64_t i, auto which) {
      __builtin_prefetch(g + i + stride);
      __builtin_prefetch(s + i + stride);
      if (!stream) __builtin_prefetch(grad + i, 1);
      store(sums + i, load(sums + i, which) + Kind<A>::term(load(g + i, which), load(s + i, which)), which);
    });
  for (int64_t d = 0; d < tiles.size; ++d) {
    g -= stride, s -= stride, grad -= stride;  // the last row is nearest
    over_row<A>(columns, [&](int64_t i, auto which) {
      put(grad + i, Kind<A>::gradient(load(g + i, which), load(s + i, which), load(sums + i, which)), which, stream);
    });
  }
}

// g, s, grad: (N, D, M), s being the output
template <template <class> class Kind, class T, class A = Accumulator<T>>
void backward_tiles(const T* g, const T* s, const Tiles& tiles, T* grad) {
  const bool stream = stream_tiles(tiles, grad);
  over_tiles(tiles, [&](int64_t begin, int64_t end) {
    const int64_t values = tiles.within() ? 0 : TileReader<T>::scratch_values(tiles);
    const Scratch<A> scratch(2 * values + tiles.pitch);
    A* const sums = scratch.get() + 2 * values;  // (W)
    if (tiles.within()) {
      for (int64_t index = begin; index < end; ++index) {
        const auto [start, column, count] = tiles.block(index);
        backward_in_place<Kind>(g + start, s + start, tiles, count, stream, grad + start, sums);
      }
      return;
    }
    TileReader<T> g_reader(g, tiles, begin, end, scratch.get()), s_reader(s, tiles, begin, end, scratch.get() + values);
    for (int64_t index = begin; index < end; ++index) {
      const Block block = tiles.block(index);
      A* const g_tile = g_reader.take(nullptr);
      const A* const s_tile = s_reader.take(nullptr);
      for (int64_t i = 0; i < block.count; i += lanes<A>) {
        Vector<A> sum = {};
        for (int64_t at = i; at < tiles.values(); at += tiles.pitch)
          sum += Kind<A>::term(load(g_tile + at, Whole{}), load(s_tile + at, Whole{}));
        store(sums + i, sum, Whole{});
      }
      write_tile(g_tile, tiles, block, false, grad, [&](int64_t d, int64_t i, Vector<A> of, auto which) -> Vector<A> {
        return Kind<A>::gradient(of, load(s_tile + d * tiles.pitch + i, which), load(sums + i, which));
      });
    }
  });
}

Slices slices_of(const Tensor& tensor, int64_t dim) {
  const int64_t dimensions = std::max<int64_t>(tensor.dim(), 1);
  STD_TORCH_CHECK(-dimensions <= dim && dim < dimensions, "softmax runs along one dimension of its input");
  return Slices(sizes_of(tensor), dim < 0 ? dim + dimensions : dim);
}

template <template <class> class Kind>
Tensor forward(const Tensor& input, int64_t dim) {
  const Slices slices = slices_of(input, dim);
  const int64_t size = slices.size;
  const Tensor x = contiguous_as(input, input.scalar_type());
  const Tensor y = new_tensor(sizes_of(input), input.scalar_type());
  if (slices.values() == 0) return y;

  with_type(input.scalar_type(), [&](auto type) {
    using T = decltype(type);
    using A = Accumulator<T>;
    const T* from = static_cast<const T*>(x.const_data_ptr());  // (N, D, M)
    T* to = static_cast<T*>(y.mutable_data_ptr());              // (N, D, M)
    const bool stream = slices.stream_rows(to);
    if (slices.in_tiles())
      forward_tiles<Kind>(from, Tiles(slices), to);
    else
      slices.over_rows<A>(size, [&](int64_t first, int64_t rows, int64_t last, A* scratch) {
        forward_rows<Kind>(from, first, rows, last, size, stream, to, scratch);
      });
  });
  return y;
}

// needs: the gradient of input, the only one, is asked for
template <template <class> class Kind>
Tensor backward(const Tensor& grad_output, const Tensor& output, int64_t dim, const std::vector<bool>& needs) {
  const Slices slices = slices_of(output, dim);
  const int64_t size = slices.size;
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
    if (slices.in_tiles())
      backward_tiles<Kind>(g_from, s_from, Tiles(slices), to);
    else
      slices.over_rows<A>(0, [&](int64_t first, int64_t rows, int64_t last, A*) {
        for (int64_t row = first; row < first + rows; ++row) {
          const int64_t start = row * size, ahead = row < last ? size : 0;
          backward_row<Kind>(g_from + start, s_from + start, ahead, size, stream, to + start);
        }
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
