// What the CPU kernels of conv2d share: the sizes of a call, and where its windows lie.
//
// N samples, C input and E output channels, H x W input, P x Q output, I x J taps; s stride, d dilation.
#pragma once

#include "nacre/core/cpu_layout.h"
#include "nacre/core/cpu_math.h"
#include "nacre/core/cpu_memory.h"
#include "nacre/core/cpu_primitives.h"

#include <algorithm>
#include <cstdint>
#include <optional>
#include <vector>

namespace nacre::conv2d {

// Rows or columns. Tap i of output p reads the input at p s + i d - before, where that is no padding.
struct Axis {
  int64_t size, taps, stride, dilation, before, outputs;

  // The input lies cut into `stride` phases in a kernel's scratch memory: value b, padding counted, at b / s of b % s.
  int64_t phase(int64_t tap) const { return tap * dilation % stride; }
  int64_t shift(int64_t tap) const { return tap * dilation / stride; }
  int64_t most_shift() const { return shift(taps - 1); }

  // The values of the input, padding counted, from the first tap of an output to the last tap of the `count`-th.
  int64_t under(int64_t count) const { return (count - 1) * stride + (taps - 1) * dilation + 1; }

  // Where tap i of output p reads, or no place of the input.
  int64_t read_at(int64_t p, int64_t i) const { return p * stride + i * dilation - before; }
  bool has(int64_t place) const { return place >= 0 && place < size; }

  // Of the gradient of the input for a stride of 1: a convolution of the outputs' gradients with kernels turned round.
  Axis turned() const { return {outputs, taps, 1, dilation, dilation * (taps - 1) - before, size}; }
};

struct Shape {
  int64_t samples, channels, kernels;
  Axis rows, columns;
  bool channels_last;

  int64_t taps() const { return rows.taps * columns.taps; }
  int64_t multiplier() const { return kernels / channels; }
  int64_t input_plane() const { return rows.size * columns.size; }
  int64_t output_plane() const { return rows.outputs * columns.outputs; }
  Sizes input() const { return {samples, channels, rows.size, columns.size}; }
  Sizes output() const { return {samples, kernels, rows.outputs, columns.outputs}; }
  Sizes strides(const Sizes& sizes) const {
    return channels_last ? packed(sizes, {1, 3, 2, 0}) : packed(sizes, {3, 2, 1, 0});
  }
};

// Torch's rule, also where sizes of 1 leave both readings open.
inline bool suggests_channels_last(const Tensor& tensor) {
  const Sizes sizes = sizes_of(tensor), strides = strides_of(tensor);
  int64_t least = 0;
  for (const int64_t axis : {1, 3, 2, 0}) {
    const bool ambiguous = axis == 0 && least == strides[1];
    if (sizes[axis] == 0 || strides[axis] == 0 || strides[axis] < least || ambiguous) return false;
    least = strides[axis] * std::max<int64_t>(sizes[axis], 1);
  }
  return true;
}

using Numbers = std::vector<int64_t>;

inline Axis axis_of(int64_t size, int64_t taps, int64_t stride, int64_t dilation, int64_t before, int64_t after) {
  constexpr int64_t most = int64_t{1} << 31;
  const auto among = [](int64_t value, int64_t least) { return value >= least && value < most; };
  STD_TORCH_CHECK(among(size, 1) && among(taps, 1) && among(stride, 1) && among(dilation, 1) && among(before, 0) &&
                      among(after, 0), "conv2d: a size, stride, dilation or padding is out of range");
  const int64_t beyond = size + before + after - dilation * (taps - 1) - 1;
  STD_TORCH_CHECK(beyond >= 0, "conv2d: the kernel does not fit into the padded input");
  return {size, taps, stride, dilation, before, beyond / stride + 1};
}

inline Shape shape_of(const Tensor& input, const Tensor& weight, const Numbers& stride, const Numbers& padding,
                      const Numbers& dilation, int64_t groups) {
  STD_TORCH_CHECK(input.is_cpu() && weight.is_cpu(), "conv2d: this kernel takes tensors on the CPU");
  STD_TORCH_CHECK(input.dim() == 4 && weight.dim() == 4, "conv2d: the input and the weight have four dimensions");
  STD_TORCH_CHECK(stride.size() == 2 && padding.size() == 4 && dilation.size() == 2,
                  "conv2d: two strides, four paddings and two dilations are given");
  STD_TORCH_CHECK(input.scalar_type() == weight.scalar_type(), "conv2d: the input and the weight have one dtype");
  const Sizes x = sizes_of(input), w = sizes_of(weight);
  STD_TORCH_CHECK(x[0] > 0 && w[0] > 0 && w[1] > 0, "conv2d: there is at least one image, one kernel and one channel");
  STD_TORCH_CHECK(groups > 0 && x[1] % groups == 0 && x[1] / groups == w[1] && w[0] % groups == 0,
                  "conv2d: groups divides the channels of the input and of the output");
  return {x[0], x[1], w[0],
          axis_of(x[2], w[2], stride[0], dilation[0], padding[2], padding[3]),
          axis_of(x[3], w[3], stride[1], dilation[1], padding[0], padding[1]),
          suggests_channels_last(input) || suggests_channels_last(weight)};
}

inline bool is_depthwise(const Shape& shape, int64_t groups) { return groups == shape.channels; }

// What a backward reads and writes; a gradient that is not asked for is null. Weights and their gradients: (E, taps).
template <class A>
struct Gradients {
  const A *g, *x, *w;
  A *grad_x, *grad_w, *grad_b;
};

}  // namespace nacre::conv2d
