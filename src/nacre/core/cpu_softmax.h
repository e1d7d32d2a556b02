// What softmax and cross-entropy share: a tensor seen along one of its dimensions, and the largest value of a row.
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
    for (int64_t side = 0; side < 4; ++side)
      maxima[side] = larger(load(x + i + side * lanes<A>, Whole{}), maxima[side]);
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

constexpr int64_t short_row = 8;

// A tensor of N x D x M values, which is cut into rows, or into tiles (cpu_tiles.h).
struct Slices {
  int64_t outer = 1, size = 1, inner = 1;

  Slices(const Sizes& sizes, int64_t dim) {
    for (int64_t i = 0; i < static_cast<int64_t>(sizes.size()); ++i)
      (i < dim ? outer : i == dim ? size : inner) *= sizes[i];
  }

  int64_t values() const { return outer * size * inner; }

  // Whether rows written to `to` go past the cache: they are many, and all are aligned.
  template <class T>
  bool stream_rows(const T* to) const {
    return streams_rows(to, outer * inner, size);
  }

  // Whether columns are worked on side by side: a short row would leave most lanes of a vector empty.
  bool in_tiles() const { return inner != 1 || (size <= short_row && outer >= 2 * short_row); }

  // Calls body(first, rows, last, scratch) for rows which stay in cache together, up to as many as a vector has lanes,
  // so that what a row needs once is computed for all of them at once. `last` is the last row that the thread reads,
  // and scratch has room for `scratch_values` a row.
  template <class A, class Body>
  void over_rows(int64_t scratch_values, const Body& body) const {
    const int64_t per_thread = std::max<int64_t>(values_per_thread / std::max<int64_t>(size, 1), 1);
    const int64_t together = size <= 256 ? lanes<A> : 1;
    in_parallel(outer, per_thread, [&](int64_t begin, int64_t end) {
      const Scratch<A> scratch(together * scratch_values);
      for (int64_t row = begin; row < end; row += together)
        body(row, std::min(together, end - row), end - 1, scratch.get());
      finish_past_caches();
    });
  }
};

}  // namespace nacre
