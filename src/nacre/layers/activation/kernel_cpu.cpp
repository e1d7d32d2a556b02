// Activations: formula.py, each tensor read once and the result written once.
#include "nacre/core/cpu_memory.h"
#include "nacre/core/cpu_primitives.h"
#include "nacre/core/cpu_streams.h"
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

bool is_channels_last(const Sizes& sizes, const Sizes& strides) {
  return sizes.size() == 4 && same_places(sizes, strides, packed(sizes, {1, 3, 2, 0}));
}

// The dimensions in the order of their strides, the innermost first, as torch sorts them: the first tensor decides, and
// the second where that one repeats elements.
Sizes inner_to_outer(const Sizes& sizes, const Sizes& first, const Sizes& second) {
  const auto lies_within = [&](int64_t i, int64_t j) {
    for (const Sizes* strides : {&first, &second}) {
      const int64_t one = (*strides)[i], other = (*strides)[j];
      if (one == 0 || other == 0) continue;
      if (one != other) return one < other ? 1 : -1;
      if (sizes[i] < sizes[j]) return 1;
    }
    return 0;
  };
  Sizes order(sizes.size());
  std::iota(order.rbegin(), order.rend(), 0);
  for (size_t i = 1; i < order.size(); ++i)
    for (size_t at = i, before = i; before-- > 0;) {
      const int found = lies_within(order[at], order[before]);
      if (found < 0) break;
      if (found > 0) std::swap(order[at], order[before]), at = before;
    }
  return order;
}

// The strides of torch's result for two tensors of one shape: without gaps, and like theirs where they agree.
Sizes result_strides(const Tensor& one, const Tensor& other) {
  const Sizes sizes = sizes_of(one);
  if (one.is_contiguous() && other.is_contiguous()) {
    Sizes last_innermost(sizes.size());
    std::iota(last_innermost.rbegin(), last_innermost.rend(), 0);
    return packed(sizes, last_innermost);
  }
  const Sizes first = strides_of(one), second = strides_of(other);
  if (is_channels_last(sizes, first) && is_channels_last(sizes, second)) return packed(sizes, {1, 3, 2, 0});
  const Sizes dense = packed(sizes, inner_to_outer(sizes, first, second));
  return first == second && same_places(sizes, first, dense) ? first : dense;
}

// The tensor itself if its elements lie at these strides, else a copy.
Tensor laid_out(const Tensor& tensor, const Sizes& strides) {
  const Sizes sizes = sizes_of(tensor);
  if (same_places(sizes, strides_of(tensor), strides)) return tensor;
  Tensor copy = new_tensor(sizes, strides, tensor.scalar_type());
  torch::stable::copy_(copy, tensor);
  return copy;
}

// ---- elements

// y[i] = function(x[i], ...), in the order in which the elements lie in memory. y, x: (count)
template <class T, class Function, class... Inputs>
void over_elements(int64_t count, T* y, Function function, const Inputs*... x) {
  // whole cache lines for every thread
  constexpr int64_t block = 4096;
  const bool stream = streams(y, count);
  in_parallel((count + block - 1) / block, values_per_thread / block, [&](int64_t first, int64_t last) {
    const int64_t begin = first * block, end = std::min(last * block, count);
    if (stream)
      over_row<Accumulator<T>>(end - begin, [&](int64_t i, auto which) {
        store_past_caches(y + begin + i, function(load(x + begin + i, which)...), which);
      });
    else
      over_row<Accumulator<T>>(end - begin, [&](int64_t i, auto which) {
        store(y + begin + i, function(load(x + begin + i, which)...), which);
      });
    if (stream) finish_past_caches();
  });
}

template <class Function>
Tensor forward(const Tensor& input) {
  STD_TORCH_CHECK(input.is_cpu(), "a CPU kernel takes tensors on the CPU");
  const Sizes strides = result_strides(input, input);
  const Tensor x = laid_out(input, strides), y = new_tensor(sizes_of(x), strides, x.scalar_type());
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
  // in torch the gradient's layout comes before what was saved, but for ReLU
  constexpr bool saved_first = std::is_same_v<Function, Relu>;
  const Sizes strides = saved_first ? result_strides(saved, grad_output) : result_strides(grad_output, saved);
  const Tensor g = laid_out(grad_output, strides), x = laid_out(saved, strides);
  const Tensor grad_x = new_tensor(sizes_of(x), strides, x.scalar_type());
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
  const bool tanh = approximate == "tanh";
  return tanh ? backward<GeluTanh>(grad_output, input, needs) : backward<Gelu>(grad_output, input, needs);
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
