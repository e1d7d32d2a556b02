// What softmax and cross-entropy share: a tensor seen along one of its dimensions, the largest value of a row, and tiles
// of columns which stay in cache between the passes over them.
//
// x: (N, D, M): N outer positions, D values along the dimension, M inner positions. Where M is 1 a slice is a row.
#pragma once

#include "nacre/core/cpu_memory.h"
#include "nacre/core/cpu_primitives.h"
#include "nacre/core/cpu_streams.h"

#include <algorithm>
#include <limits>

namespace nacre {

template <class A>
constexpr A infinity = std::numeric_limits<A>::infinity();

// NaN is never larger: it shows in what is computed from the values.
template <class V>
inline V larger(V one, V other) {
  return one > other ? one : other;
}

// The largest of all lanes.
template <class A, int64_t bytes = vector_bytes>
inline A largest(typename VectorOf<A, bytes>::type values) {
  if constexpr (bytes == sizeof(A)) {
    return values[0];
  } else {
    typename VectorOf<A, bytes / 2>::type halves[2];
    std::memcpy(&halves, &values, sizeof values);
    return largest<A, bytes / 2>(larger(halves[0], halves[1]));
  }
}

// x: (D). A comparison waits for the one before it, so four run side by side.
template <class T, class A = Accumulator<T>>
inline A maximum_of_row(const T* x, int64_t size) {
  const Vector<A> lowest = Vector<A>{} - infinity<A>;
  Vector<A> maxima[4] = {lowest, lowest, lowest, lowest};
  int64_t i = 0;
  for (; i + 4 * lanes<A> <= size; i += 4 * lanes<A>)
    for (int64_t side = 0; side < 4; ++side) maxima[side] = larger(load(x + i + side * lanes<A>, Whole{}), maxima[side]);
  over_row<A>(size - i, [&](int64_t rest, auto which) {
    maxima[0] = larger(keep<A>(load(x + i + rest, which), which, -infinity<A>), maxima[0]);
  });
  return largest<A>(larger(larger(maxima[0], maxima[1]), larger(maxima[2], maxima[3])));
}

// Stores the vectors that value(i, lanes) gives for a row, past the cache if asked to. to: (D)
template <class T, class Value>
inline void write_row(T* to, int64_t size, bool stream, Value value) {
  using A = Accumulator<T>;
  if (stream)
    over_row<A>(size, [&](int64_t i, auto which) { store_past_caches(to + i, value(i, which), which); });
  else
    over_row<A>(size, [&](int64_t i, auto which) { store(to + i, value(i, which), which); });
}

// A tensor of N x D x M values, and how it is cut: into rows where M is 1, else into tiles of up to `width` columns.
struct Slices {
  int64_t outer = 1, size = 1, inner = 1;

  Slices(const Sizes& sizes, int64_t dim) {
    for (int64_t i = 0; i < static_cast<int64_t>(sizes.size()); ++i) (i < dim ? outer : i == dim ? size : inner) *= sizes[i];
  }

  int64_t values() const { return outer * size * inner; }

  // Whether rows written to `to` go past the cache: they are many, and all are aligned.
  template <class T>
  bool stream_rows(const T* to) const {
    return streams_rows(to, outer * inner, size);
  }

  // D rows of a tile take no more than 256 KiB where D allows it, and each is as long a run of memory as it can be.
  int64_t width() const {
    const int64_t fitting = std::clamp<int64_t>(65536 / std::max<int64_t>(size, 1) / 32 * 32, 32, 1024);
    return std::clamp<int64_t>(inner, 1, fitting);
  }

  // Calls body(row, following, scratch) for each row, `following` being the row after it, or itself at the end, and
  // scratch having room for `scratch_values`.
  template <class A, class Body>
  void over_rows(int64_t scratch_values, const Body& body) const {
    const int64_t per_thread = std::max<int64_t>(values_per_thread / std::max<int64_t>(size, 1), 1);
    in_parallel(outer, per_thread, [&](int64_t begin, int64_t end) {
      const Scratch<A> scratch(scratch_values);
      for (int64_t row = begin; row < end; ++row) body(row, std::min(row + 1, end - 1), scratch.get());
      finish_past_caches();
    });
  }

  // Calls body(outer position, first column, columns, scratch) for each tile.
  template <class A, class Body>
  void over_tiles(int64_t scratch_values, const Body& body) const {
    const int64_t columns = width(), tiles = (inner + columns - 1) / columns;
    const int64_t per_thread = std::max<int64_t>(values_per_thread / std::max<int64_t>(size * columns, 1), 1);
    in_parallel(outer * tiles, per_thread, [&](int64_t begin, int64_t end) {
      const Scratch<A> scratch(scratch_values);
      for (int64_t tile = begin; tile < end; ++tile) {
        const int64_t first = tile % tiles * columns;
        body(tile / tiles, first, std::min(columns, inner - first), scratch.get());
      }
    });
  }
};

// Calls body(d, i, at, lanes) for each vector of each row of a tile: d is the row, i the column, and at the place in the
// tensor, where rows lie `stride` apart.
template <class A, class Body>
inline void over_tile(int64_t size, int64_t stride, int64_t columns, Body body) {
  for (int64_t d = 0; d < size; ++d)
    over_row<A>(columns, [&](int64_t i, auto which) { body(d, i, d * stride + i, which); });
}

// Copies a tile, whose rows in the tensor may all fall into the same few places of the cache, and finds the largest value
// of each column. x: (D, M), tile: (D, W), maximum: (W)
template <class T, class A>
inline void read_tile(const T* x, int64_t size, int64_t stride, int64_t columns, A* tile, A* maximum) {
  std::fill(maximum, maximum + columns, -infinity<A>);
  over_tile<A>(size, stride, columns, [&](int64_t d, int64_t i, int64_t at, auto which) {
    __builtin_prefetch(x + at + stride);
    const Vector<A> values = load(x + at, which);
    store(tile + d * columns + i, values, which);
    store(maximum + i, larger(values, load(maximum + i, which)), which);
  });
}

}  // namespace nacre
