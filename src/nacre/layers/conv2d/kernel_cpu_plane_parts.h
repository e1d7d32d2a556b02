// A part of a plane of a depthwise convolution: gradients of its values and of the weights of its taps, in registers.
#pragma once

#include "nacre/layers/conv2d/kernel_cpu_planes.h"

namespace nacre::conv2d {

constexpr int64_t most_shared = vector_bytes == 64 ? 7 : 3;

// Vectors of x, and as many sums; beside them the registers hold a weight and a sum for each shared row.
constexpr int64_t gradient_vectors(int64_t shared) { return vector_bytes < 64 ? 4 : shared <= 3 ? 12 : 8; }

// Where the taps of a phase lie in the padded gradients, and what they add up. Taps whose windows lie one row below the
// other share their rows, which are then read once for all of them.
template <class A>
struct Windows {
  const int64_t* places;  // of the uppermost window of each group
  const A* weights;       // (groups, shared), from the uppermost window down
  int64_t groups, shared;
  A* sums;  // (groups, shared, lanes)
};

// A part of a plane: its gradients begin at g, rows `g_step` apart, its values and their gradients have rows `step`
// apart. Which of the two gradients is asked for is known to the compiler.
template <class A, bool of_input, bool of_weight, int64_t shared>
struct PlanePart {
  const A* g;
  int64_t g_step;
  const A* x;
  A* grad_x;
  int64_t step;

  PlanePart at(int64_t row, int64_t column) const {
    return {g + row * g_step + column, g_step, of_weight ? x + row * step + column : x,
            of_input ? grad_x + row * step + column : grad_x, step};
  }

  // `rows` times `vectors` positions, of which the last vector holds `last`.
  template <int64_t rows, int64_t vectors, class Lanes>
  void block(const Windows<A>& windows, Lanes last) const {
    constexpr int64_t parts = shared == 1 ? 2 : 1;  // of a sum: each addition waits for the one before it
    Vector<A> values[rows][vectors], gradients[rows][vectors];
#pragma GCC unroll 8
    for (int64_t row = 0; row < rows; ++row)
#pragma GCC unroll 4
      for (int64_t v = 0; v < vectors; ++v) {
        gradients[row][v] = every(A(0));
        const A* from = x + row * step + v * lanes<A>;
        if constexpr (of_weight) values[row][v] = v + 1 < vectors ? load(from, Whole{}) : load(from, last);
      }
    for (int64_t group = 0; group < windows.groups; ++group) {
      const A* from = g + windows.places[group];
      A* to = windows.sums + group * shared * lanes<A>;
      Vector<A> weights[shared], sums[shared][parts];
#pragma GCC unroll 8
      for (int64_t tap = 0; tap < shared; ++tap) {
        weights[tap] = every(windows.weights[group * shared + tap]);
        sums[tap][parts - 1] = every(A(0));
        if constexpr (of_weight) sums[tap][0] = load(to + tap * lanes<A>, Whole{});
      }
#pragma GCC unroll 16
      for (int64_t line = 0; line < rows + shared - 1; ++line)
#pragma GCC unroll 4
        for (int64_t v = 0; v < vectors; ++v) {
          const Vector<A> grad = in_register(load(from + line * g_step + v * lanes<A>, Whole{}));
#pragma GCC unroll 8
          for (int64_t tap = std::max<int64_t>(line - rows + 1, 0); tap < shared && tap <= line; ++tap) {
            const int64_t row = line - tap;
            if constexpr (of_input) gradients[row][v] = multiply_add<A>(weights[tap], grad, gradients[row][v]);
            if constexpr (of_weight) {
              Vector<A>& sum = sums[tap][(row * vectors + v) % parts];
              sum = multiply_add<A>(values[row][v], grad, sum);
            }
          }
        }
      if constexpr (of_weight)
#pragma GCC unroll 8
        for (int64_t tap = 0; tap < shared; ++tap)
          store(to + tap * lanes<A>, parts == 1 ? sums[tap][0] : sums[tap][0] + sums[tap][parts - 1], Whole{});
    }
    if constexpr (of_input)
#pragma GCC unroll 8
      for (int64_t row = 0; row < rows; ++row)
#pragma GCC unroll 4
        for (int64_t v = 0; v < vectors; ++v) {
          A* to = grad_x + row * step + v * lanes<A>;
          v + 1 < vectors ? store(to, gradients[row][v], Whole{}) : store(to, gradients[row][v], last);
        }
  }

  // The same for `count` rows, as many at a time as the registers hold.
  template <int64_t vectors, int64_t together, class Lanes>
  void rows(const Windows<A>& windows, int64_t count, Lanes last) const {
    int64_t row = 0;
    for (; row + together <= count; row += together) at(row, 0).template block<together, vectors>(windows, last);
    if constexpr (together > 1)
      if (row < count) at(row, 0).template rows<vectors, together / 2>(windows, count - row, last);
  }

  void all(const Windows<A>& windows, int64_t count, int64_t columns) const {
    for (int64_t column = 0; column < columns; column += 4 * lanes<A>) {
      const int64_t left = std::min(columns - column, 4 * lanes<A>), vectors = (left + lanes<A> - 1) / lanes<A>;
      const PlanePart part = at(0, column);
      const auto run = [&](auto width) {
        constexpr int64_t whole = decltype(width)::value;
        constexpr int64_t together = std::min<int64_t>(gradient_vectors(shared) / whole, 8);
        if (left == whole * lanes<A>)
          part.template rows<whole, together>(windows, count, Whole{});
        else
          part.template rows<whole, together>(windows, count, Part{left - (whole - 1) * lanes<A>});
      };
      if (vectors == 4) run(std::integral_constant<int64_t, 4>());
      if (vectors == 3) run(std::integral_constant<int64_t, 3>());
      if (vectors == 2) run(std::integral_constant<int64_t, 2>());
      if (vectors == 1) run(std::integral_constant<int64_t, 1>());
    }
  }
};

}  // namespace nacre::conv2d
