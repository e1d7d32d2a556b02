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
        over_row<A>(inside, [&](int64_t i, auto which) { store(to + left + i, load(from + i, which), which); });
      else if (phases == 2)
        split_row(from, inside, to + left % 2 * columns + left / 2, to + (left + 1) % 2 * columns + (left + 1) / 2);
      else
        for (int64_t i = 0; i < inside; ++i) to[(left + i) % phases * columns + (left + i) / phases] = from[i];
    }
  }
};

// A sum over taps of a tap's weight times a plane's values. Where `shared` rows of taps lie as far apart as the rows of
// the sums do, a row of the plane is read once for all of them.
template <class A>
struct Correlation {
  const A* from;
  int64_t row_step;
  const int64_t* places;  // of the taps, or of those of the first shared row
  int64_t taps;           // as many
  const A* weights;       // (shared, taps)
  A begin;
};

// out[position] = begin + the sum over taps of weights[tap] * from[place[tap] + position], for a block of `rows` times
// `vectors` positions, of which the last vector holds `last`.
template <int64_t shared, int64_t rows, int64_t vectors, class A, class Lanes>
inline void correlate_block(const Correlation<A>& sum, A* out, int64_t out_step, Lanes last) {
  Vector<A> sums[rows][vectors];
#pragma GCC unroll 8
  for (int64_t row = 0; row < rows; ++row)
#pragma GCC unroll 4
    for (int64_t v = 0; v < vectors; ++v) sums[row][v] = every(sum.begin);
  for (int64_t tap = 0; tap < sum.taps; ++tap) {
    Vector<A> weights[shared];
    for (int64_t i = 0; i < shared; ++i) weights[i] = every(sum.weights[i * sum.taps + tap]);
    const A* at = sum.from + sum.places[tap];
#pragma GCC unroll 16
    for (int64_t line = 0; line < rows + shared - 1; ++line)
#pragma GCC unroll 4
      for (int64_t v = 0; v < vectors; ++v) {
        const Vector<A> values = in_register(load(at + line * sum.row_step + v * lanes<A>, Whole{}));
#pragma GCC unroll 8
        for (int64_t i = std::max<int64_t>(line - rows + 1, 0); i < shared && i <= line; ++i)
          sums[line - i][v] = multiply_add<A>(weights[i], values, sums[line - i][v]);
      }
  }
#pragma GCC unroll 8
  for (int64_t row = 0; row < rows; ++row) {
    A* to = out + row * out_step;
#pragma GCC unroll 4
    for (int64_t v = 0; v < vectors - 1; ++v) store(to + v * lanes<A>, sums[row][v], Whole{});
    store(to + (vectors - 1) * lanes<A>, sums[row][vectors - 1], last);
  }
}

constexpr int64_t most_sums = vector_bytes == 64 ? 16 : 8;  // vectors, half of the registers

// The same for any number of rows, in the largest blocks that fit. The last one may begin within the
// one before it.
template <int64_t shared, int64_t vectors, int64_t together, class A, class Lanes>
inline void correlate_columns(Correlation<A> sum, A* out, int64_t out_step, int64_t rows, Lanes last) {
  if constexpr (together > 1) {
    if (rows < together) return correlate_columns<shared, vectors, together / 2>(sum, out, out_step, rows, last);
  }
  const A* from = sum.from;
  for (int64_t row = 0; row < rows; row += together) {
    const int64_t first = std::min(row, rows - together);
    sum.from = from + first * sum.row_step;
    correlate_block<shared, together, vectors>(sum, out + first * out_step, out_step, last);
  }
}

template <int64_t shared, class A>
void correlate(Correlation<A> sum, A* out, int64_t out_step, int64_t rows, int64_t columns) {
  const auto run = [&](auto count, int64_t left) {
    constexpr int64_t width = decltype(count)::value;
    constexpr int64_t together = std::min<int64_t>(most_sums / (width == 3 ? 4 : width), 8);
    if (left >= width * lanes<A>)
      correlate_columns<shared, width, together>(sum, out, out_step, rows, Whole{});
    else
      correlate_columns<shared, width, together>(sum, out, out_step, rows, Part{left - (width - 1) * lanes<A>});
  };
  for (int64_t left = columns; left > 0; left -= 4 * lanes<A>) {
    const int64_t vectors = std::min<int64_t>((left + lanes<A> - 1) / lanes<A>, 4);
    if (vectors == 4) run(std::integral_constant<int64_t, 4>(), left);
    if (vectors == 3) run(std::integral_constant<int64_t, 3>(), left);
    if (vectors == 2) run(std::integral_constant<int64_t, 2>(), left);
    if (vectors == 1) run(std::integral_constant<int64_t, 1>(), left);
    sum.from += 4 * lanes<A>;
    out += 4 * lanes<A>;
  }
}

// The input of a channel, padded, and where each tap of the first output lies in it.
template <class A>
struct PaddedInput {
  Padded form;
  Numbers places;

  explicit PaddedInput(const Shape& shape)
      : form{shape.rows.under(shape.rows.outputs), shape.columns.stride,
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
