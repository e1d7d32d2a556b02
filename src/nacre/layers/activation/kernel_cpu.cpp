// Activations: formula.py, each tensor read once and the result written once.
#include "nacre/core/cpu_activation.h"
#include "nacre/core/cpu_layout.h"
#include "nacre/core/cpu_memory.h"
#include "nacre/core/cpu_primitives.h"
#include "nacre/core/cpu_streams.h"

#include <algorithm>
#include <string>
#include <type_traits>
#include <vector>

namespace nacre {
namespace {

// ---- those functions which only this kernel needs, told x or y as formula.py has it

struct Tanh {
  template <class A>
  static Vector<A> value(Vector<A> x) {
    return tanh<A>(x);
  }
  template <class A>
  static Vector<A> gradient(Vector<A> g, Vector<A> y) {
    return g * (1 - y * y);
  }
};

struct Sigmoid {
  template <class A>
  static Vector<A> value(Vector<A> x) {
    return sigmoid<A>(x);
  }
  template <class A>
  static Vector<A> gradient(Vector<A> g, Vector<A> y) {
    return g * y * (1 - y);
  }
};

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
    using A = Accumulator<T>;
    const auto value = [](Vector<A> of) { return Function::template value<A>(of); };  // inlined, unlike a pointer to it
    over_elements(x.numel(), static_cast<T*>(y.mutable_data_ptr()), value, static_cast<const T*>(x.const_data_ptr()));
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
    using A = Accumulator<T>;
    const auto gradient = [](Vector<A> grad, Vector<A> of) { return Function::template gradient<A>(grad, of); };
    over_elements(x.numel(), static_cast<T*>(grad_x.mutable_data_ptr()), gradient,
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
