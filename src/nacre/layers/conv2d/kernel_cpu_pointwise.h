// Convolution with kernels of one value: a matrix product over the values of the images, where they lie.
//
// Channels-last images are one matrix (N H W, C), multiplied with the weight (E, C) as Linear's. Others are a matrix
// (C, H W) a sample; each thread takes whole samples, or part of one where they are few.
#pragma once

#include "nacre/core/cpu_product.h"
#include "nacre/layers/conv2d/kernel_cpu.h"

namespace nacre::conv2d {

constexpr int64_t many_samples = 8;  // from here on threads share the samples; below, the product of each one
constexpr int64_t sample_blocks = 8;  // whose shares of the weight's gradient are added apart

inline bool is_pointwise(const Shape& shape, int64_t groups) {
  return groups == 1 && shape.taps() == 1 && shape.rows.stride == 1 && shape.columns.stride == 1 &&
         shape.input_plane() == shape.output_plane() && shape.rows.before == 0 && shape.columns.before == 0;
}

constexpr auto nothing_more = [](int64_t, int64_t, int64_t, int64_t) {};

template <class Body>
void over_samples(int64_t count, const Body& body) {
  in_parallel(count, count < many_samples ? count : 1, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) body(n);
  });
}

// x: (N, C, H, W), w: (E, C), b: (E) or null, y: (N, E, H, W)
template <class A>
void forward_pointwise(const Shape& shape, const A* x, const A* w, const A* b, A* y) {
  const int64_t channels = shape.channels, kernels = shape.kernels, plane = shape.input_plane();
  const Matrix<A> weight{w, channels, 1};
  if (shape.channels_last) {
    const auto add_bias = [&](int64_t row, int64_t row_end, int64_t column, int64_t column_end) {
      for (A* to = y + row * kernels + column; b && row < row_end; ++row, to += kernels)
        over_row<A>(column_end - column, [&](int64_t i, auto which) {
          store(to + i, load(to + i, which) + load(b + column + i, which), which);
        });
    };
    return product<A>({x, channels, 1}, weight.transposed(), shape.samples * plane, kernels, channels, y, kernels,
                      add_bias);
  }
  over_samples(shape.samples, [&](int64_t n) {
    A* out = y + n * kernels * plane;
    product<A>(weight, {x + n * channels * plane, plane, 1}, kernels, plane, channels, out, plane,
               [&](int64_t row, int64_t row_end, int64_t column, int64_t column_end) {
                 for (; b && row < row_end; ++row)
                   over_row<A>(column_end - column, [&](int64_t i, auto which) {
                     A* to = out + row * plane + column + i;
                     store(to, load(to, which) + b[row], which);
                   });
               });
  });
}

// The gradients of weight and bias, a block of samples at a time, and the blocks in pairs.
template <class A>
void parameter_gradients_of_samples(const Shape& shape, const Gradients<A>& at) {
  const int64_t channels = shape.channels, kernels = shape.kernels, plane = shape.input_plane();
  const int64_t weights = at.grad_w ? kernels * channels : 0, sums = weights + kernels;
  const Parts blocks(shape.samples, Parts(shape.samples, sample_blocks).count);
  const Scratch<A> totals(blocks.count * sums);  // (blocks, E C + E)
  over_samples(blocks.count, [&](int64_t block) {
    const Scratch<A> share(sums);
    A* total = totals.get() + block * sums;
    std::fill_n(total, sums, A(0));
    for (int64_t n = blocks.begin(block); n < blocks.begin(block + 1); ++n) {
      const Matrix<A> g{at.g + n * kernels * plane, plane, 1};
      if (at.grad_w)
        product<A>(g, Matrix<A>{at.x + n * channels * plane, plane, 1}.transposed(), kernels, channels, plane,
                   share.get(), channels, nothing_more, share.get() + weights);
      else
        sum_rows(g, kernels, plane, share.get());
      over_row<A>(sums, [&](int64_t i, auto which) {
        store(total + i, load(total + i, which) + load(share.get() + i, which), which);
      });
    }
  });
  const Scratch<A> result(sums);
  add_blocks(totals.get(), result.get(), blocks.count, sums);
  if (at.grad_w) std::copy_n(result.get(), weights, at.grad_w);
  if (at.grad_b) std::copy_n(result.get() + weights, kernels, at.grad_b);
}

template <class A>
void backward_pointwise(const Shape& shape, const Gradients<A>& at) {
  const int64_t channels = shape.channels, kernels = shape.kernels, plane = shape.input_plane();
  const int64_t rows = shape.samples * plane;
  const Matrix<A> weight{at.w, channels, 1};
  if (shape.channels_last) {
    const Matrix<A> g{at.g, kernels, 1};
    if (at.grad_x) product<A>(g, weight, rows, channels, kernels, at.grad_x, channels, nothing_more);
    if (at.grad_w)
      product<A>(g.transposed(), {at.x, channels, 1}, kernels, channels, rows, at.grad_w, channels, nothing_more,
                 at.grad_b);
    else if (at.grad_b)
      sum_rows(g.transposed(), kernels, rows, at.grad_b);
    return;
  }
  if (at.grad_x)
    over_samples(shape.samples, [&](int64_t n) {
      product<A>(weight.transposed(), {at.g + n * kernels * plane, plane, 1}, channels, plane, kernels,
                 at.grad_x + n * channels * plane, plane, nothing_more);
    });
  if (at.grad_w || at.grad_b) parameter_gradients_of_samples(shape, at);
}

}  // namespace nacre::conv2d
