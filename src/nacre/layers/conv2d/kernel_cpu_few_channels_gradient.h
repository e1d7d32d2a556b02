// The gradients of the weight and the bias of a convolution of few input channels.
//
// They are sums over bands of outputs, with the kernels or neighbouring outputs in the lanes of vectors, whichever fill
// them better. The bands are cut into shares, whose sums are added in pairs: the shape alone decides them.
#pragma once

#include "nacre/layers/conv2d/kernel_cpu_across_kernels.h"
#include "nacre/layers/conv2d/kernel_cpu_across_outputs.h"
#include "nacre/layers/conv2d/kernel_cpu_direct.h"

namespace nacre::conv2d {

constexpr int64_t most_shares = 32;
constexpr int64_t multiply_adds_per_share = 1 << 22;
constexpr int64_t values_of_shares = 1 << 21;

// Whether the kernels fill the lanes of vectors at least three quarters as well as the outputs of a row do, where both
// ways were measured equal.
template <class A>
bool kernels_fill_lanes(const Shape& shape) {
  const int64_t kernels = shape.kernels, outputs = shape.columns.outputs;
  return 4 * kernels * whole_vectors(outputs, lanes<A>) >= 3 * outputs * whole_vectors(kernels, lanes<A>);
}

// g: (N, E, P, Q), x: (N, C, H, W), grad_w: (E, C, I, J), grad_b: (E); a gradient that is not asked for is null
template <class A, class Gradient>
void sum_parameter_gradients(const Shape& shape, const Gradients<A>& at) {
  const Gradient gradient(shape);
  const int64_t bands = gradient.bands(), sums = gradient.sums(), taps = shape.channels * shape.taps();
  const int64_t work = shape.samples * shape.output_plane() * shape.kernels * taps;
  int64_t count = 1;  // a power of two, so that as many threads have equal shares
  const int64_t most = std::clamp<int64_t>(values_of_shares / sums, 4, most_shares);
  while (2 * count <= std::min({most, bands, work / multiply_adds_per_share})) count *= 2;
  const Scratch<A> totals((count + 1) * sums);
  in_parallel(count, 1, [&](int64_t begin, int64_t end) {
    typename Gradient::Room room(gradient);
    for (int64_t share = begin; share < end; ++share) {
      room.start(totals.get() + share * sums);
      for (int64_t band = bands * share / count; band < bands * (share + 1) / count; ++band) room.add(band, at.g, at.x);
      room.finish();
    }
  });
  A* result = totals.get() + count * sums;
  add_blocks(totals.get(), result, count, sums);
  for (int64_t i = 0; at.grad_w && i < shape.kernels * taps; ++i) {
    const A sum = gradient.weight(result, i / taps, i % taps);
    at.grad_w[i] = sum == sum ? sum : direct_weight_gradient(shape, 1, at.g, at.x, i);
  }
  if (at.grad_b) std::copy_n(gradient.biases(result), shape.kernels, at.grad_b);
}

template <class A>
void parameter_gradients_of_few_channels(const Shape& shape, const Gradients<A>& at) {
  if (shape.channels_last || kernels_fill_lanes<A>(shape))
    sum_parameter_gradients<A, GradientAcrossKernels<A>>(shape, at);
  else
    sum_parameter_gradients<A, GradientAcrossOutputs<A>>(shape, at);
}

}  // namespace nacre::conv2d
