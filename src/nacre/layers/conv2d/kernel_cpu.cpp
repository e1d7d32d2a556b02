// conv2d on the CPU: what nacre computes itself. Torch's own kernels serve the rest (by_torch.py).
#include "nacre/layers/conv2d/kernel_cpu_depthwise.h"
#include "nacre/layers/conv2d/kernel_cpu_few_channels_gradient.h"
#include "nacre/layers/conv2d/kernel_cpu_few_channels_input.h"
#include "nacre/layers/conv2d/kernel_cpu_pointwise.h"
#include "nacre/layers/conv2d/kernel_cpu_winograd_gradient.h"

#include <tuple>

namespace nacre::conv2d {
namespace {

using ThreeGradients = std::tuple<Tensor, Tensor, Tensor>;

// Calls body with a value of the C++ type of float32 or float64.
template <class Body>
void with_exact_type(ScalarType dtype, Body body) {
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double,
                  "conv2d: this kernel serves float32 and float64");
  dtype == ScalarType::Float ? body(float()) : body(double());
}

constexpr int64_t few_channels = 31, few_kernels = 24;  // served.py: _FEW, _FEW_KERNELS

// Few of the input, or of the output where it is no smaller.
bool has_few_channels(const Shape& shape) {
  const bool strided = shape.rows.stride > 1 || shape.columns.stride > 1;
  return shape.channels <= few_channels || (shape.kernels <= few_kernels && !strided);
}

// One input channel, which is a group of its own and few channels too: then these gradients are the faster ones.
bool sums_across_kernels(const Shape& shape, int64_t groups, ScalarType dtype) {
  if (groups > 1 || shape.taps() == 1) return false;
  return dtype == ScalarType::Float ? kernels_fill_lanes<float>(shape) : kernels_fill_lanes<double>(shape);
}

void check_served(const Shape& shape, int64_t groups) {
  STD_TORCH_CHECK(is_depthwise(shape, groups) || is_pointwise(shape, groups) ||
                      (groups == 1 && (has_few_channels(shape) || is_three_by_three(shape))),
                  "conv2d: this kernel serves one channel a group, kernels of one value, few channels, or kernels of "
                  "3 x 3 and stride 1");
}

template <class A>
const A* read_only(const Tensor& tensor) {
  return static_cast<const A*>(tensor.const_data_ptr());
}

template <class A>
A* writable(const Tensor& tensor, bool wanted = true) {
  return wanted ? static_cast<A*>(tensor.mutable_data_ptr()) : nullptr;
}

// A new tensor which lies as `shape` says, or as `other` says where those are the same places: of dimensions of size 1
// the strides differ then, and torch's are those of `other`.
Tensor result_like(const Sizes& sizes, const Shape& shape, const Shape& other, ScalarType dtype) {
  const Sizes strides = shape.strides(sizes), others = other.strides(sizes);
  return new_tensor(sizes, same_places(sizes, strides, others) ? others : strides, dtype);
}

Tensor forward(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias, const Numbers& stride,
               const Numbers& padding, const Numbers& dilation, int64_t groups) {
  const Shape shape = shape_of(input, weight, stride, padding, dilation, groups);
  check_served(shape, groups);
  const ScalarType dtype = input.scalar_type();
  STD_TORCH_CHECK(!bias || (bias->numel() == shape.kernels && bias->scalar_type() == dtype),
                  "conv2d: the bias has one value a kernel, in the input's dtype");
  const Tensor w = contiguous_as(weight, dtype);
  std::optional<Tensor> b;
  if (bias) b = contiguous_as(*bias, dtype);
  const bool pointwise = is_pointwise(shape, groups);
  Shape lies = shape;
  lies.channels_last = pointwise && shape.channels_last;
  const Tensor x = laid_out(input, lies.strides(shape.input()));
  const Tensor y = result_like(shape.output(), lies, shape, dtype);
  with_exact_type(dtype, [&](auto type) {
    using A = decltype(type);
    const auto run = pointwise                                 ? forward_pointwise<A>
                     : groups == 1 && has_few_channels(shape) ? forward_few_channels<A>
                     : is_depthwise(shape, groups)            ? forward_planes<A>
                                                              : forward_winograd<A>;
    run(shape, read_only<A>(x), read_only<A>(w), values<A>(b), writable<A>(y));
    if (!all_finite(read_only<A>(w), w.numel()))
      mend(lies, shape.output(), writable<A>(y), [&](const int64_t(&at)[4]) {
        return direct_output(lies, groups, read_only<A>(x), read_only<A>(w), values<A>(b), at);
      });
  });
  return laid_out(y, shape.strides(shape.output()));
}

// All gradients that are asked for, in memory which lies as the kernel has it.
template <class Run>
ThreeGradients every_gradient(const Shape& shape, const Tensor& g, const Tensor& x, const Tensor& weight,
                              const std::vector<bool>& needs, const Shape& lies, const Run& run) {
  const ScalarType dtype = x.scalar_type();
  const Tensor w = contiguous_as(weight, dtype);
  const Sizes weight_sizes = sizes_of(weight);
  Shape planes = shape;
  planes.channels_last = false;
  Tensor grad_input, grad_weight, grad_bias;
  if (needs[0]) grad_input = result_like(shape.input(), lies, shape, dtype);
  if (needs[1]) grad_weight = result_like(weight_sizes, planes, shape, dtype);
  if (needs[2]) grad_bias = new_tensor({shape.kernels}, dtype);
  with_exact_type(dtype, [&](auto type) {
    using A = decltype(type);
    const Gradients<A> at{read_only<A>(g), read_only<A>(x), read_only<A>(w), writable<A>(grad_input, needs[0]),
                          writable<A>(grad_weight, needs[1]), writable<A>(grad_bias, needs[2])};
    run(at);
    if (needs[0] && !all_finite(at.w, w.numel()))
      mend(lies, lies.input(), at.grad_x, [&](const int64_t(&place)[4]) {
        return direct_input_gradient(lies, lies.channels / weight.size(1), at.g, at.w, place);
      });
  });
  if (needs[0]) grad_input = laid_out(grad_input, shape.strides(shape.input()));
  if (needs[1]) grad_weight = laid_out(grad_weight, shape.strides(weight_sizes));
  return {grad_input, grad_weight, grad_bias};
}

// needs: whether the gradients of input, weight and bias are asked for; the others are undefined tensors, None in
// Python
ThreeGradients backward(const Tensor& grad, const Tensor& input, const Tensor& weight, const Numbers& stride,
                        const Numbers& padding, const Numbers& dilation, int64_t groups,
                        const std::vector<bool>& needs) {
  const Shape shape = shape_of(input, weight, stride, padding, dilation, groups);
  const ScalarType dtype = input.scalar_type();
  check_served(shape, groups);
  STD_TORCH_CHECK(needs.size() == 3, "conv2d: three gradients are asked for or not");
  STD_TORCH_CHECK(grad.is_cpu() && grad.scalar_type() == dtype && sizes_of(grad) == shape.output(),
                  "conv2d: the gradient has the shape and dtype of the output");
  const bool parameters = needs[1] || needs[2];
  if (is_depthwise(shape, groups) && !(parameters && sums_across_kernels(shape, groups, dtype))) {
    Shape planes = shape;
    planes.channels_last = false;
    const Tensor g = contiguous_as(grad, dtype), x = contiguous_as(input, dtype);
    return every_gradient(shape, g, x, weight, needs, planes, [&](const auto& at) { backward_planes(planes, at); });
  }
  if (is_pointwise(shape, groups)) {
    const Tensor g = laid_out(grad, shape.strides(shape.output())), x = laid_out(input, shape.strides(shape.input()));
    return every_gradient(shape, g, x, weight, needs, shape, [&](const auto& at) { backward_pointwise(shape, at); });
  }
  Shape lies = shape;
  lies.channels_last = shape.channels_last && has_few_channels(shape);
  const Tensor g = laid_out(grad, lies.strides(shape.output()));
  const Tensor x = parameters ? laid_out(input, lies.strides(shape.input())) : input;
  return every_gradient(shape, g, x, weight, needs, lies, [&](const auto& at) {
    if (!has_few_channels(shape)) return backward_winograd(lies, at);
    if (needs[0]) input_gradient_of_few_channels(lies, at.g, at.w, at.grad_x);
    if (parameters) parameter_gradients_of_few_channels(lies, at);
  });
}

}  // namespace
}  // namespace nacre::conv2d

STABLE_TORCH_LIBRARY_IMPL(nacre, CPU, m) {
  m.impl("conv2d.kernel", TORCH_BOX(&nacre::conv2d::forward));
  m.impl("conv2d_backward.kernel", TORCH_BOX(&nacre::conv2d::backward));
}
