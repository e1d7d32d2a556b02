// Single sums of a convolution, product after product: for where a faster way met a value that is not finite, which
// would reach sums it is no part of, as infinity times the zero of a margin is not a number.
//
// Images lie as the shape says, weights and their gradients are (E, C / groups, I, J).
#pragma once

#include "nacre/layers/conv2d/kernel_cpu.h"

namespace nacre::conv2d {

template <class A>
bool all_finite(const A* values, int64_t count) {
  return std::all_of(values, values + count, [](A value) { return value - value == 0; });
}

// Output (n, e, p, q). b: (E) or null
template <class A>
A direct_output(const Shape& shape, int64_t groups, const A* x, const A* w, const A* b, const int64_t (&at)[4]) {
  const auto [n, e, p, q] = at;
  const Sizes steps = shape.strides(shape.input());
  const int64_t inner = shape.channels / groups, first = e / (shape.kernels / groups) * inner;
  A sum = b ? b[e] : A(0);
  for (int64_t tap = 0; tap < inner * shape.taps(); ++tap) {
    const int64_t row = shape.rows.read_at(p, tap % shape.taps() / shape.columns.taps);
    const int64_t column = shape.columns.read_at(q, tap % shape.columns.taps);
    if (!shape.rows.has(row) || !shape.columns.has(column)) continue;
    const A* from = x + n * steps[0] + (first + tap / shape.taps()) * steps[1] + row * steps[2] + column * steps[3];
    sum += w[e * inner * shape.taps() + tap] * *from;
  }
  return sum;
}

// The gradient of input (n, c, row, column).
template <class A>
A direct_input_gradient(const Shape& shape, int64_t groups, const A* g, const A* w, const int64_t (&at)[4]) {
  const auto [n, c, row, column] = at;
  const Sizes steps = shape.strides(shape.output());
  const int64_t inner = shape.channels / groups, outer = shape.kernels / groups, first = c / inner * outer;
  A sum = 0;
  for (int64_t e = first; e < first + outer; ++e)
    for (int64_t tap = 0; tap < shape.taps(); ++tap) {
      // where this tap is at the first output, it is a stride on at the next
      const int64_t down = row - shape.rows.read_at(0, tap / shape.columns.taps);
      const int64_t right = column - shape.columns.read_at(0, tap % shape.columns.taps);
      const int64_t p = down / shape.rows.stride, q = right / shape.columns.stride;
      if (down < 0 || right < 0 || down % shape.rows.stride > 0 || right % shape.columns.stride > 0) continue;
      if (p >= shape.rows.outputs || q >= shape.columns.outputs) continue;
      const A* grad = g + n * steps[0] + e * steps[1] + p * steps[2] + q * steps[3];
      sum += w[(e * inner + c % inner) * shape.taps() + tap] * *grad;
    }
  return sum;
}

// The gradient of weight number `weight`. g: (N, E, P, Q), x: (N, C, H, W)
template <class A>
A direct_weight_gradient(const Shape& shape, int64_t groups, const A* g, const A* x, int64_t weight) {
  const int64_t inner = shape.channels / groups, e = weight / (inner * shape.taps());
  const int64_t c = e / (shape.kernels / groups) * inner + weight / shape.taps() % inner;
  const int64_t i = weight % shape.taps() / shape.columns.taps, j = weight % shape.columns.taps;
  const Sizes g_steps = shape.strides(shape.output()), x_steps = shape.strides(shape.input());
  A sum = 0;
  for (int64_t n = 0; n < shape.samples; ++n)
    for (int64_t p = 0; p < shape.rows.outputs && sum == sum; ++p) {
      const int64_t row = shape.rows.read_at(p, i);
      if (!shape.rows.has(row)) continue;
      const A* grad = g + n * g_steps[0] + e * g_steps[1] + p * g_steps[2];
      const A* from = x + n * x_steps[0] + c * x_steps[1] + row * x_steps[2];
      for (int64_t q = 0; q < shape.columns.outputs; ++q) {
        const int64_t column = shape.columns.read_at(q, j);
        if (shape.columns.has(column)) sum += grad[q * g_steps[3]] * from[column * x_steps[3]];
      }
    }
  return sum;
}

// Computes again, by sum(place), what is not a number in values of these sizes, which lie as the shape says.
template <class A, class Sum>
void mend(const Shape& shape, const Sizes& sizes, A* values, const Sum& sum) {
  const Sizes steps = shape.strides(sizes);
  in_parallel(sizes[0] * sizes[1], 1, [&](int64_t begin, int64_t end) {
    for (int64_t plane = begin; plane < end; ++plane)
      for (int64_t i = 0; i < sizes[2]; ++i)
        for (int64_t j = 0; j < sizes[3]; ++j) {
          const int64_t at[4] = {plane / sizes[1], plane % sizes[1], i, j};
          A& value = values[at[0] * steps[0] + at[1] * steps[1] + i * steps[2] + j * steps[3]];
          if (value != value) value = sum(at);
        }
  });
}

}  // namespace nacre::conv2d
