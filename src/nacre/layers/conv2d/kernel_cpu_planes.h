// Depthwise convolution of planes: images whose rows lie one after another, a channel at a time.
//
// A plane is copied into scratch memory with its padding around it, and for a stride s cut into every s-th column, so
// that the windows of neighbouring outputs lie side by side: a vector of outputs is then a sum over taps of a tap's
// weight times one vector of the plane. The gradient of the input is the same sum over planes of the output's gradient,
// one for each phase of the input's rows and columns, whose taps are those that reach it.
#pragma once

#include "nacre/layers/conv2d/kernel_cpu.h"

namespace nacre::conv2d {

inline int64_t whole_vectors(int64_t count, int64_t of) { return (count + of - 1) / of * of; }

// Vectors made of two: the values at even and at odd places, and back.
template <class A, class Places>
inline Vector<A> picked(Vector<A> one, Vector<A> two, Places place) {
  typename VectorOf<std::conditional_t<sizeof(A) == 4, int32_t, int64_t>, vector_bytes>::type places;
  for (int64_t lane = 0; lane < lanes<A>; ++lane) places[lane] = place(lane);
#if defined(__clang__)
  Vector<A> result;
  for (int64_t lane = 0; lane < lanes<A>; ++lane)
    result[lane] = places[lane] < lanes<A> ? one[places[lane]] : two[places[lane] - lanes<A>];
  return result;
#else
  return __builtin_shuffle(one, two, places);
#endif
}

// even[i] = from[2 i], odd[i] = from[2 i + 1]; from: (count)
template <class A>
inline void split_row(const A* from, int64_t count, A* even, A* odd) {
  int64_t i = 0;
  for (; i + lanes<A> <= count / 2; i += lanes<A>) {
    const Vector<A> one = load(from + 2 * i, Whole{}), two = load(from + 2 * i + lanes<A>, Whole{});
    store(even + i, picked<A>(one, two, [](int64_t lane) { return 2 * lane; }), Whole{});
    store(odd + i, picked<A>(one, two, [](int64_t lane) { return 2 * lane + 1; }), Whole{});
  }
  for (; 2 * i < count; ++i) {
    even[i] = from[2 * i];
    if (2 * i + 1 < count) odd[i] = from[2 * i + 1];
  }
}

// to[2 i] = even[i], to[2 i + 1] = odd[i]; to: (count)
template <class A>
inline void weave_row(const A* even, const A* odd, int64_t count, A* to) {
  int64_t i = 0;
  for (; i + lanes<A> <= count / 2; i += lanes<A>) {
    const Vector<A> one = load(even + i, Whole{}), two = load(odd + i, Whole{});
    const auto from = [](int64_t lane) { return lane / 2 + lane % 2 * lanes<A>; };
    store(to + 2 * i, picked<A>(one, two, from), Whole{});
    store(to + 2 * i + lanes<A>, picked<A>(one, two, [&](int64_t lane) { return from(lane) + lanes<A> / 2; }), Whole{});
  }
  for (; 2 * i < count; ++i) {
    to[2 * i] = even[i];
    if (2 * i + 1 < count) to[2 * i + 1] = odd[i];
  }
}

// A plane in scratch memory: rows of `phases` parts, each of `columns` values.
struct Padded {
  int64_t rows, phases, columns, top, left;

  int64_t row_step() const { return phases * columns; }
  int64_t values() const { return rows * row_step(); }
  int64_t place(int64_t row, int64_t column) const {
    return row * row_step() + column % phases * columns + column / phases;
  }

  // Copies what lies within; the margins are zero and stay so. plane: (height, width)
  template <class A>
  void copy(const A* plane, int64_t height, int64_t width, A* padded) const {
    const int64_t inside = std::max<int64_t>(std::min(width, phases * columns - left), 0);
    for (int64_t row = 0; row < std::min(height, rows - top); ++row) {
      const A* from = plane + row * width;
      A* to = padded + (row + top) * row_step();
      if (phases == 1)
        std::copy(from, from + inside, to + left);
      else if (phases == 2)
        split_row(from, inside, to + left % 2 * columns + left / 2, to + (left + 1) % 2 * columns + (left + 1) / 2);
      else
        for (int64_t i = 0; i < inside; ++i) to[(left + i) % phases * columns + (left + i) / phases] = from[i];
    }
  }
};

// The sum over taps of weights[tap] * from[place[tap] + position], for a block of `rows` times `vectors` positions.
template <class A, int64_t rows, int64_t vectors>
inline void correlate_block(const A* from, int64_t row_step, const int64_t* places, const A* weights, int64_t taps,
                            A begin, A* out, int64_t out_step, int64_t columns) {
  Vector<A> sums[rows][vectors];
  for (auto& row : sums)
    for (auto& sum : row) sum = every(begin);
  for (int64_t tap = 0; tap < taps; ++tap) {
    const Vector<A> weight = every(weights[tap]);
    const A* at = from + places[tap];
    for (int64_t row = 0; row < rows; ++row)
      for (int64_t v = 0; v < vectors; ++v)
        sums[row][v] = multiply_add<A>(weight, load(at + row * row_step + v * lanes<A>, Whole{}), sums[row][v]);
  }
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t v = 0; v < vectors; ++v) {
      A* to = out + row * out_step + v * lanes<A>;
      const int64_t left = std::min(columns - v * lanes<A>, lanes<A>);
      if (left == lanes<A>)
        store(to, sums[row][v], Whole{});
      else
        store(to, sums[row][v], Part{left});
    }
}

// The same for `rows` rows of `columns` positions, in the largest blocks that fit. The last one may begin within the
// one before it.
template <class A, int64_t vectors, int64_t together = vectors == 1 ? 8 : vectors == 2 ? 4 : 2>
inline void correlate_columns(const A* from, int64_t row_step, const int64_t* places, const A* weights, int64_t taps,
                              A begin, A* out, int64_t out_step, int64_t rows, int64_t columns) {
  if constexpr (together > 1) {
    if (rows < together)
      return correlate_columns<A, vectors, together / 2>(from, row_step, places, weights, taps, begin, out, out_step,
                                                         rows, columns);
  }
  for (int64_t row = 0; row < rows; row += together) {
    const int64_t first = std::min(row, rows - together);
    correlate_block<A, together, vectors>(from + first * row_step, row_step, places, weights, taps, begin,
                                          out + first * out_step, out_step, columns);
  }
}

template <class A>
void correlate(const A* from, int64_t row_step, const int64_t* places, const A* weights, int64_t taps, A begin, A* out,
               int64_t out_step, int64_t rows, int64_t columns) {
  for (int64_t column = 0; column < columns;) {
    const int64_t left = columns - column, vectors = std::min<int64_t>((left + lanes<A> - 1) / lanes<A>, 4);
    const auto run = [&](auto count) {
      constexpr int64_t width = decltype(count)::value;
      correlate_columns<A, width>(from + column, row_step, places, weights, taps, begin, out + column, out_step, rows,
                                  std::min(left, width * lanes<A>));
    };
    if (vectors == 4) run(std::integral_constant<int64_t, 4>());
    if (vectors == 3) run(std::integral_constant<int64_t, 3>());
    if (vectors == 2) run(std::integral_constant<int64_t, 2>());
    if (vectors == 1) run(std::integral_constant<int64_t, 1>());
    column += vectors * lanes<A>;
  }
}

// sums[tap] = sum over outputs of g times the input under the tap, for `count` taps. x: padded; g: (P, Q)
template <class A, int64_t count>
inline void weight_sums_block(const A* x, int64_t row_step, const int64_t* places, const A* g, int64_t rows,
                              int64_t columns, A* sums) {
  Vector<A> parts[count] = {};
  for (int64_t row = 0; row < rows; ++row)
    over_row<A>(columns, [&](int64_t i, auto which) {
      const Vector<A> grad = load(g + row * columns + i, which);
      const A* at = x + row * row_step + i;
      for (int64_t tap = 0; tap < count; ++tap)
        parts[tap] = multiply_add<A>(grad, keep<A>(load(at + places[tap], Whole{}), which), parts[tap]);
    });
  for (int64_t tap = 0; tap < count; ++tap) sums[tap] = total<A>(parts[tap]);
}

template <class A>
void weight_sums(const A* x, int64_t row_step, const int64_t* places, int64_t taps, const A* g, int64_t rows,
                 int64_t columns, A* sums) {
  for (int64_t tap = 0; tap < taps;) {
    const auto run = [&](auto count) {
      weight_sums_block<A, decltype(count)::value>(x, row_step, places + tap, g, rows, columns, sums + tap);
      tap += decltype(count)::value;
    };
    if (taps - tap >= 9)
      run(std::integral_constant<int64_t, 9>());
    else if (taps - tap >= 4)
      run(std::integral_constant<int64_t, 4>());
    else
      run(std::integral_constant<int64_t, 1>());
  }
}

// The input of a channel, padded, and where each tap of the first output lies in it.
template <class A>
struct PaddedInput {
  Padded form;
  Numbers places;

  explicit PaddedInput(const Shape& shape)
      : form{(shape.rows.outputs - 1) * shape.rows.stride + (shape.rows.taps - 1) * shape.rows.dilation + 1,
             shape.columns.stride,
             whole_vectors(shape.columns.outputs, lanes<A>) + shape.columns.most_shift() + 1,
             shape.rows.before, shape.columns.before} {
    for (int64_t i = 0; i < shape.rows.taps; ++i)
      for (int64_t j = 0; j < shape.columns.taps; ++j)
        places.push_back(form.place(i * shape.rows.dilation, j * shape.columns.dilation));
  }
  int64_t row_step(const Shape& shape) const { return shape.rows.stride * form.row_step(); }
};

// The gradients of a channel's outputs, padded, one plane after another.
template <class A>
Padded padded_gradient(const Shape& shape) {
  const auto reached = [](const Axis& axis) {
    return axis.most_shift() + (axis.before + axis.size - 1) / axis.stride + 1;
  };
  return {reached(shape.rows), 1, reached(shape.columns) + 2 * lanes<A>, shape.rows.most_shift(),
          shape.columns.most_shift()};
}

// The rows (or columns) of the input that lie in one phase: `count` of them, the first at `begin`, which is the `first`
// of the padded phase; and the taps that reach them.
struct Phase {
  int64_t begin, first, count;
  Numbers taps;

  Phase(const Axis& axis, int64_t phase) {
    first = std::max<int64_t>((axis.before - phase + axis.stride - 1) / axis.stride, 0);
    begin = first * axis.stride + phase - axis.before;
    count = begin < axis.size ? (axis.size - 1 - begin) / axis.stride + 1 : 0;
    for (int64_t tap = 0; tap < axis.taps; ++tap)
      if (axis.phase(tap) == phase) taps.push_back(tap);
  }
};

}  // namespace nacre::conv2d
