// Activations: formula.py, each tensor read once and the result written once. N elements, in the order they lie in memory.
#include "nacre/core/cpu_memory.h"
#include "nacre/core/cpu_primitives.h"
#include "nacre/layers/activation/functions.h"

#include <algorithm>
#include <numeric>
#include <string>
#include <vector>

namespace nacre {
namespace {

// ---- layouts: results lie in memory as torch's do

Sizes sizes_of(const Tensor& tensor) { return Sizes(tensor.sizes().begin(), tensor.sizes().end()); }
Sizes strides_of(const Tensor& tensor) { return Sizes(tensor.strides().begin(), tensor.strides().end()); }

// The strides of a tensor whose dimensions follow each other in memory in this order, the innermost first.
Sizes packed(const Sizes& sizes, const Sizes& order) {
  Sizes strides(sizes.size());
  int64_t stride = 1;
  for (const int64_t i : order) {
    strides[i] = stride;
    stride *= std::max<int64_t>(sizes[i], 1);
  }
  return strides;
}

// A dimension of size 1 may have any stride.
bool same_places(const Sizes& sizes, const Sizes& strides, const Sizes& others) {
  for (size_t i = 0; i < sizes.size(); ++i)
    if (sizes[i] > 1 && strides[i] != others[i]) return false;
  return true;
}

// Whether the elements lie without gaps or overlaps, in any order.
bool is_dense(const Tensor& tensor) {
  if (tensor.is_contiguous()) return true;
  const Sizes sizes = sizes_of(tensor), strides = strides_of(tensor);
  Sizes order(sizes.size());
  std::iota(order.begin(), order.end(), 0);
  std::sort(order.begin(), order.end(), [&](int64_t i, int64_t j) {
    return sizes[j] < 2 ? sizes[i] >= 2 : sizes[i] >= 2 && strides[i] < strides[j];
  });
  return same_places(sizes, strides, packed(sizes, order));
}

// The tensor itself or, where there are gaps or overlaps, a copy without them, its dimensions in the same order.
Tensor dense(const Tensor& tensor) { return is_dense(tensor) ? tensor : torch::stable::clone(tensor); }

// An uninitialised tensor laid out as torch lays out a function of `dense` alone.
Tensor new_like(const Tensor& dense) {
  const Sizes sizes = sizes_of(dense), strides = strides_of(dense);
  if (dense.is_contiguous()) return new_tensor(sizes, dense.scalar_type());
  const Sizes channels_last = sizes.size() == 4 ? packed(sizes, {1, 3, 2, 0}) : strides;
  return new_tensor(sizes, same_places(sizes, strides, channels_last) ? channels_last : strides, dense.scalar_type());
}

// The tensor's values where those of `like` lie.
Tensor laid_out_as(const Tensor& tensor, const Tensor& like) {
  if (same_places(sizes_of(tensor), strides_of(tensor), strides_of(like))) return tensor;
  Tensor copy = new_like(like);
  torch::stable::copy_(copy, tensor);
  return copy;
}

bool is_expanded(const Tensor& tensor) {
  for (int64_t i = 0; i < tensor.dim(); ++i)
    if (tensor.size(i) > 1 && tensor.stride(i) == 0) return true;
  return false;
}

// ---- elements

// y[i] = function(x[i], ...) for N elements
template <class T, class Function, class... Inputs>
void over_elements(int64_t count, T* y, Function function, const Inputs*... x) {
  // whole cache lines for every thread
  constexpr int64_t block = 4096;
  const bool stream = streams(y, count);
  in_parallel((count + block - 1) / block, values_per_thread / block, [&](int64_t first, int64_t last) {
    const int64_t begin = first * block, end = std::min(last * block, count);
    if (stream)
      over_row<Accumulator<T>>(end - begin, [&](int64_t i, auto which) {
        store_past_cache(y + begin + i, function(load(x + begin + i, which)...), which);
      });
    else
      over_row<Accumulator<T>>(end - begin, [&](int64_t i, auto which) {
        store(y + begin + i, function(load(x + begin + i, which)...), which);
      });
    if (stream) finish_past_cache();
  });
}

template <class Function>
Tensor forward(const Tensor& input) {
  STD_TORCH_CHECK(input.is_cpu(), "a CPU kernel takes tensors on the CPU");
  const Tensor x = dense(input), y = new_like(x);
  with_type(x.scalar_type(), [&](auto type) {
    using T = decltype(type);
    over_elements(x.numel(), static_cast<T*>(y.mutable_data_ptr()), Function::template value<Accumulator<T>>,
                  static_cast<const T*>(x.const_data_ptr()));
  });
  return y;
}

// saved: the input or the output of the forward
template <class Function>
Tensor backward(const Tensor& grad_output, const Tensor& saved, const std::vector<bool>& needs) {
  STD_TORCH_CHECK(needs.size() == 1, "an activation has one gradient");
  STD_TORCH_CHECK(grad_output.is_cpu() && saved.is_cpu(), "a CPU kernel takes tensors on the CPU");
  STD_TORCH_CHECK(sizes_of(grad_output) == sizes_of(saved), "the gradient has the shape of the output");
  STD_TORCH_CHECK(grad_output.scalar_type() == saved.scalar_type(), "the gradient has the dtype of the output");
  // as in torch, the gradient's layout decides unless it repeats elements, for ReLU the output's
  const Tensor like = dense(std::is_same_v<Function, Relu> || is_expanded(grad_output) ? saved : grad_output);
  const Tensor g = laid_out_as(grad_output, like), x = laid_out_as(saved, like), grad_x = new_like(like);
  with_type(x.scalar_type(), [&](auto type) {
    using T = decltype(type);
    over_elements(x.numel(), static_cast<T*>(grad_x.mutable_data_ptr()), Function::template gradient<Accumulator<T>>,
                  static_cast<const T*>(g.const_data_ptr()), static_cast<const T*>(x.const_data_ptr()));
  });
  return grad_x;
}

Tensor gelu_forward(const Tensor& input, const std::string& approximate) {
  return approximate == "tanh" ? forward<GeluTanh>(input) : forward<Gelu>(input);
}

Tensor gelu_backward(const Tensor& grad_output, const Tensor& input, const std::string& approximate,
                     const std::vector<bool>& needs) {
  return approximate == "tanh" ? backward<GeluTanh>(grad_output, input, needs) : backward<Gelu>(grad_output, input, needs);
}

}  // namespace
}  // namespace nacre

STABLE_TORCH_LIBRARY_IMPL(nacre, CPU, m) {
  m.impl("gelu.kernel", TORCH_BOX(&nacre::gelu_forward));
  m.impl("gelu_backward.kernel", TORCH_BOX(&nacre::gelu_backward));
  m.impl("relu.kernel", TORCH_BOX(&nacre::forward<nacre::Relu>));
  m.impl("relu_backward.kernel", TORCH_BOX(&nacre::backward<nacre::Relu>));
  m.impl("silu.kernel", TORCH_BOX(&nacre::forward<nacre::Silu>));
  m.impl("silu_backward.kernel", TORCH_BOX(&nacre::backward<nacre::Silu>));
  m.impl("tanh.kernel", TORCH_BOX(&nacre::forward<nacre::Tanh>));
  m.impl("tanh_backward.kernel", TORCH_BOX(&nacre::backward<nacre::Tanh>));
  m.impl("sigmoid.kernel", TORCH_BOX(&nacre::forward<nacre::Sigmoid>));
  m.impl("sigmoid_backward.kernel", TORCH_BOX(&nacre::backward<nacre::Sigmoid>));
}
