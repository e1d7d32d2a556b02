// The gradient of an input of few channels.
//
// With a stride of 1 it is a convolution itself: of the outputs' gradients, with every kernel turned round, and the
// channels of the input as the kernels.
#pragma once

#include "nacre/layers/conv2d/kernel_cpu_few_channels.h"
#include "nacre/layers/conv2d/kernel_cpu_scatter.h"

namespace nacre::conv2d {

// turned: (C, E, I, J) from w: (E, C, I, J)
template <class A>
void turn_kernels(const Shape& shape, const A* w, A* turned) {
  const int64_t taps = shape.taps();
  for (int64_t c = 0; c < shape.channels; ++c)
    for (int64_t e = 0; e < shape.kernels; ++e, turned += taps) {
      const A* kernel = w + (e * shape.channels + c) * taps;
      std::reverse_copy(kernel, kernel + taps, turned);
    }
}

// g: (N, E, P, Q), w: (E, C, I, J), grad_x: (N, C, H, W), the first and the last in channels-last memory where the
// shape says so
template <class A>
void input_gradient_of_few_channels(const Shape& shape, const A* g, const A* w, A* grad_x) {
  const Axis rows = shape.rows.turned(), columns = shape.columns.turned();
  const bool convolves = shape.rows.stride == 1 && shape.columns.stride == 1 && rows.before >= 0 && columns.before >= 0;
  if (!convolves || shape.channels_last) return scatter_gradients(shape, g, w, grad_x);
  const Scratch<A> turned(shape.kernels * shape.channels * shape.taps());
  turn_kernels(shape, w, turned.get());
  const Shape of_gradients{shape.samples, shape.kernels, shape.channels, rows, columns, false};
  forward_few_channels<A>(of_gradients, g, turned.get(), nullptr, grad_x);
}

}  // namespace nacre::conv2d
