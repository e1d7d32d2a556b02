// Depthwise convolution, forward and backward, where channels are planes: each thread takes whole planes.
#pragma once

#include "nacre/layers/conv2d/kernel_cpu_direct.h"
#include "nacre/layers/conv2d/kernel_cpu_plane_gradients.h"

namespace nacre::conv2d {

inline int64_t planes_per_thread(const Shape& shape) {
  return std::max<int64_t>(values_per_thread / std::max(shape.input_plane(), shape.output_plane()), 1);
}

// x: (N, C, H, W), w: (E, taps), b: (E) or null, y: (N, E, P, Q)
template <class A>
void forward_planes(const Shape& shape, const A* x, const A* w, const A* b, A* y) {
  const PaddedInput<A> input(shape);
  in_parallel(shape.samples * shape.channels, planes_per_thread(shape), [&](int64_t begin, int64_t end) {
    const Scratch<A> padded(input.form.values());
    std::fill_n(padded.get(), input.form.values(), A(0));
    for (int64_t plane = begin; plane < end; ++plane) {
      input.form.copy(x + plane * shape.input_plane(), shape.rows.size, shape.columns.size, padded.get());
      for (int64_t k = 0; k < shape.multiplier(); ++k) {
        const int64_t out = plane * shape.multiplier() + k, kernel = out % shape.kernels;
        Correlation<A> sum{padded.get(), input.row_step(shape), input.places.data(), shape.taps(),
                           w + kernel * shape.taps(), b ? b[kernel] : A(0)};
        A* to = y + out * shape.output_plane();
        const auto run = [&](auto shared) {
          sum.taps /= shared;
          correlate<shared>(sum, to, shape.columns.outputs, shape.rows.outputs, shape.columns.outputs);
        };
        const int64_t shared = shape.rows.dilation == shape.rows.stride ? shape.rows.taps : 1;
        if (shared == 3)
          run(std::integral_constant<int64_t, 3>());
        else if (shared == 5)
          run(std::integral_constant<int64_t, 5>());
        else if (shared == 7)
          run(std::integral_constant<int64_t, 7>());
        else
          run(std::integral_constant<int64_t, 1>());
      }
    }
  });
}

// The gradients of the input and the weight are summed plane by plane, the weight's over the samples at the end.
template <class A>
void backward_planes(const Shape& shape, const Gradients<A>& at) {
  const PlaneGradients<A> gradients(shape, at.grad_x, at.grad_w);
  const int64_t m = shape.multiplier(), taps = shape.taps(), outputs = shape.output_plane();
  const Scratch<A> weight_parts(at.grad_w ? shape.samples * shape.kernels * taps : 0);  // (N, E, taps)
  const Scratch<A> bias_parts(at.grad_b ? shape.samples * shape.kernels : 0);           // (N, E)
  in_parallel(shape.samples * shape.channels, planes_per_thread(shape), [&](int64_t begin, int64_t end) {
    const Scratch<A> g(gradients.padded_values()), scratch(gradients.scratch_values());
    std::fill_n(g.get(), gradients.padded_values(), A(0));
    for (int64_t plane = begin; plane < end; ++plane) {
      for (int64_t k = 0; k < m; ++k) {
        const int64_t out = plane * m + k;
        const A* grad = at.g + out * outputs;
        if (at.grad_x || at.grad_w)
          gradients.form().copy(grad, shape.rows.outputs, shape.columns.outputs,
                                g.get() + k * gradients.form().values());
        if (at.grad_b)
          bias_parts.get()[out] = sums_over_row<A, 1>(outputs, [&](int64_t i, auto which) {
            return std::array<Vector<A>, 1>{load(grad + i, which)};
          })[0];
      }
      if (at.grad_x || at.grad_w)
        gradients(g.get(), at.w + plane % shape.channels * m * taps, at.x + plane * shape.input_plane(), scratch.get(),
                  at.grad_x ? at.grad_x + plane * shape.input_plane() : nullptr, weight_parts.get() + plane * m * taps);
    }
  });
  if (at.grad_w) add_blocks(weight_parts.get(), at.grad_w, shape.samples, shape.kernels * taps);
  for (int64_t i = 0; at.grad_w && i < shape.kernels * taps; ++i)
    if (at.grad_w[i] != at.grad_w[i]) at.grad_w[i] = direct_weight_gradient(shape, shape.channels, at.g, at.x, i);
  if (at.grad_b) add_blocks(bias_parts.get(), at.grad_b, shape.samples, shape.kernels);
}

}  // namespace nacre::conv2d
