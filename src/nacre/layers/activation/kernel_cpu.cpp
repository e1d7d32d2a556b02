// Activations: formula.py, each tensor read once and the result written once.
#include "nacre/core/cpu_layout.h"
#include "nacre/core/cpu_math.h"
#include "nacre/core/cpu_memory.h"
#include "nacre/core/cpu_primitives.h"
#include "nacre/core/cpu_streams.h"

#include <algorithm>
#include <array>
#include <string>
#include <type_traits>
#include <vector>

namespace nacre {
namespace {

// ---- the functions y(x), and the gradient g dy/dx, which is told x or y as formula.py has it

constexpr double sqrt_half = 0.70710678118654752440, log2_e = 1.44269504088896340736;

// The probability that a standard normal value lies below x. In float it is 2^q(|x|) below 0, with the polynomial q
// that makes the error of the probability least: at most 1e-7, and less the smaller the probability is.
template <class A>
Vector<A> normal_probability(Vector<A> x) {
  if constexpr (sizeof(A) == 8) {
    return A(0.5) * (1 + erf<A>(x * A(sqrt_half)));
  } else {
    constexpr std::array<A, 9> q = {-1.0f,           -1.151106f,      -0.459198296f,   -0.0525336117f, 0.00712686498f,
                                    -0.000191703541f, -0.000161293836f, 3.37378151e-05f, -2.33494893e-06f};
    const Vector<A> tail = exp2_of_negative<A>(polynomial<A>(absolute<A>(x), q));
    return x > 0 ? 1 - tail : tail;
  }
}

// exp(-x^2 / 2) / sqrt(2 pi), as a power of 2.
template <class A>
Vector<A> normal_density(Vector<A> x) {
  constexpr A log2_of_density_at_0 = A(-1.32574806473615990417);
  return exp2_of_negative<A>(multiply_add<A>(x * x, every<A>(A(-0.5 * log2_e)), every<A>(log2_of_density_at_0)));
}

struct Gelu {
  template <class A>
  static Vector<A> value(Vector<A> x) {
    return x * normal_probability<A>(x);
  }
  template <class A>
  static Vector<A> gradient(Vector<A> g, Vector<A> x) {
    return g * multiply_add<A>(x, normal_density<A>(x), normal_probability<A>(x));
  }
};

// The sigmoid s of x and 1 - s, neither a difference of nearly equal numbers, from power = exp(-|x|).
template <class A>
struct Sigmoids {
  Vector<A> s, one_minus_s;
};

template <class A>
Sigmoids<A> sigmoids(Vector<A> x, Vector<A> power) {
  const Vector<A> larger = 1 / (1 + power), smaller = power * larger;
  return {x < 0 ? smaller : larger, x < 0 ? larger : smaller};
}

// (1 + tanh(u)) / 2 is the sigmoid of 2 u, and exp(-|2 u|) is 2^-|v|, where
//     v = x (inner + outer x^2)        d(2 u)/dx = ln(2) dv/dx
struct GeluTanh {
  static constexpr double inner = 2 * 0.79788456080286535588 * log2_e, outer = 0.044715 * inner;

  template <class A>
  static Sigmoids<A> gates(Vector<A> x) {
    const Vector<A> v = x * multiply_add<A>(x * x, every<A>(A(outer)), every<A>(A(inner)));
    return sigmoids<A>(v, exp2_of_negative<A>(-absolute<A>(v)));
  }
  template <class A>
  static Vector<A> value(Vector<A> x) {
    return x * gates<A>(x).s;
  }
  template <class A>
  static Vector<A> gradient(Vector<A> g, Vector<A> x) {
    const auto [s, one_minus_s] = gates<A>(x);
    const Vector<A> slope = multiply_add<A>(x * x, every<A>(A(3 * outer / log2_e)), every<A>(A(inner / log2_e)));
    return g * (s + x * slope * (s * one_minus_s));
  }
};

struct Relu {
  template <class A>
  static Vector<A> value(Vector<A> x) {
    return x <= 0 ? Vector<A>{} : x;  // so asked, NaN stays NaN
  }
  template <class A>
  static Vector<A> gradient(Vector<A> g, Vector<A> y) {
    return y <= 0 ? Vector<A>{} : g;
  }
};

struct Silu {
  template <class A>
  static Vector<A> value(Vector<A> x) {
    return x * sigmoid<A>(x);
  }
  template <class A>
  static Vector<A> gradient(Vector<A> g, Vector<A> x) {
    const auto [s, one_minus_s] = sigmoids<A>(x, exp<A>(-absolute<A>(x)));
    return g * s * (1 + x * one_minus_s);
  }
};

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
