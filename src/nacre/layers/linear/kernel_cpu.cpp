// Linear: formula.py, each of its products in tiles that stay in registers. N rows of D features in and E features out.
#include "nacre/core/cpu_activation.h"
#include "nacre/core/cpu_dropout.h"
#include "nacre/core/cpu_product.h"

#include <string>
#include <tuple>
#include <vector>

namespace nacre {
namespace {

struct Shape {
  Sizes leading;
  int64_t rows = 1, in_features, out_features;

  Shape(const Tensor& input, const Tensor& weight) {
    STD_TORCH_CHECK(weight.dim() == 2 && input.dim() > 0, "linear: a weight of 2 dimensions and an input of 1 or more");
    out_features = weight.size(0), in_features = weight.size(1);
    STD_TORCH_CHECK(input.size(-1) == in_features, "linear: the input's last dimension has the weight's features");
    STD_TORCH_CHECK(input.scalar_type() == weight.scalar_type(), "linear: input and weight have one dtype");
    for (int64_t i = 0; i + 1 < input.dim(); ++i) {
      leading.push_back(input.size(i));
      rows *= input.size(i);
    }
  }

  Sizes with_last(int64_t features) const {
    Sizes sizes = leading;
    sizes.push_back(features);
    return sizes;
  }
};

// The rows of a tensor, where they lie if its strides allow; `kept` holds the copy that they lie in otherwise.
template <class A>
Matrix<A> rows_of(const Tensor& tensor, int64_t features, Tensor& kept) {
  STD_TORCH_CHECK(tensor.is_cpu(), "linear: a CPU kernel takes tensors on the CPU");
  if (tensor.dim() == 2) return {static_cast<const A*>(tensor.const_data_ptr()), tensor.stride(0), tensor.stride(1)};
  kept = torch::stable::contiguous(tensor);
  return {static_cast<const A*>(kept.const_data_ptr()), features, 1};
}

template <class A>
void forward_as(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias, const Shape& shape,
                Tensor& output) {
  Tensor kept_input, kept_weight;
  const Matrix<A> x = rows_of<A>(input, shape.in_features, kept_input);     // (N, D)
  const Matrix<A> w = rows_of<A>(weight, shape.in_features, kept_weight);   // (E, D)
  const A* b = values<A>(bias);                                             // (E) or null
  A* y = static_cast<A*>(output.mutable_data_ptr());                        // (N, E)
  const int64_t features = shape.out_features;
  product<A>(x, w.transposed(), shape.rows, features, shape.in_features, y, features,
             [&](int64_t row, int64_t row_end, int64_t column, int64_t column_end) {
               if (!b) return;
               for (; row < row_end; ++row) {
                 A* to = y + row * features + column;
                 over_row<A>(column_end - column, [&](int64_t i, auto which) {
                   store(to + i, load(to + i, which) + load(b + column + i, which), which);
                 });
               }
             });
}

template <class Body>
void with_product_type(ScalarType dtype, Body body) {
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double,
                  "linear: this kernel serves float32 and float64");
  dtype == ScalarType::Float ? body(float()) : body(double());
}

Tensor forward(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias) {
  const Shape shape(input, weight);
  std::optional<Tensor> b;
  if (bias) {
    STD_TORCH_CHECK(bias->dim() == 1 && bias->size(0) == shape.out_features, "linear: one bias an output feature");
    STD_TORCH_CHECK(bias->scalar_type() == weight.scalar_type(), "linear: bias and weight have one dtype");
    b = contiguous_as(*bias, bias->scalar_type());
  }
  Tensor output = new_tensor(shape.with_last(shape.out_features), input.scalar_type());
  with_product_type(input.scalar_type(), [&](auto type) {
    forward_as<decltype(type)>(input, weight, b, shape, output);
  });
  return output;
}

// dx = g W, dW = g' x, db = sums of the columns of g
template <class A>
void backward_as(const Tensor& grad_output, const Tensor& input, const Tensor& weight, const Shape& shape,
                 Tensor* grad_input, Tensor* grad_weight, Tensor* grad_bias) {
  const auto [rows, in_features, out_features] = std::tuple(shape.rows, shape.in_features, shape.out_features);
  const auto nothing_more = [](int64_t, int64_t, int64_t, int64_t) {};
  Tensor kept_grad, kept_input, kept_weight;
  const Matrix<A> g = rows_of<A>(grad_output, out_features, kept_grad);  // (N, E)
  if (grad_input) {
    const Matrix<A> w = rows_of<A>(weight, in_features, kept_weight);  // (E, D)
    product<A>(g, w, rows, in_features, out_features, static_cast<A*>(grad_input->mutable_data_ptr()), in_features,
               nothing_more);
  }
  A* bias_sums = grad_bias ? static_cast<A*>(grad_bias->mutable_data_ptr()) : nullptr;  // (E) or null
  if (grad_weight) {
    const Matrix<A> x = rows_of<A>(input, in_features, kept_input);  // (N, D)
    product<A>(g.transposed(), x, out_features, in_features, rows, static_cast<A*>(grad_weight->mutable_data_ptr()),
               in_features, nothing_more, bias_sums);
  } else if (bias_sums) {
    sum_rows(g.transposed(), out_features, rows, bias_sums);
  }
}

// needs: whether the gradients of input, weight and bias are asked for; the others are undefined, None in Python
std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad_output, const Tensor& input, const Tensor& weight,
                                            const std::vector<bool>& needs) {
  const Shape shape(input, weight);
  STD_TORCH_CHECK(needs.size() == 3, "linear: three gradients are asked for or not");
  STD_TORCH_CHECK(grad_output.dim() == input.dim() && grad_output.numel() == shape.rows * shape.out_features &&
                      grad_output.size(-1) == shape.out_features && grad_output.scalar_type() == input.scalar_type(),
                  "linear: the gradient has the shape and dtype of the output");
  const ScalarType dtype = input.scalar_type();
  Tensor grad_input, grad_weight, grad_bias;
  if (needs[0]) grad_input = new_tensor(shape.with_last(shape.in_features), dtype);
  if (needs[1]) grad_weight = new_tensor({shape.out_features, shape.in_features}, dtype);
  if (needs[2]) grad_bias = new_tensor({shape.out_features}, dtype);
  with_product_type(dtype, [&](auto type) {
    backward_as<decltype(type)>(grad_output, input, weight, shape, needs[0] ? &grad_input : nullptr,
                                needs[1] ? &grad_weight : nullptr, needs[2] ? &grad_bias : nullptr);
  });
  return {grad_input, grad_weight, grad_bias};
}

// ---- feed_forward_formula.py: what is made of the H hidden features of a row is not kept, but made anew

// Calls body with a value of the type that computes, and of that of the activation.
template <class Body>
void with_activation(ScalarType dtype, const std::string& activation, const Body& body) {
  with_product_type(dtype, [&](auto type) {
    if (activation == "gelu") return body(type, Gelu());
    if (activation == "gelu_tanh") return body(type, GeluTanh());
    if (activation == "silu") return body(type, Silu());
    STD_TORCH_CHECK(activation == "relu", "feed_forward: its activation is gelu, gelu_tanh, relu or silu");
    body(type, Relu());
  });
}

std::tuple<Tensor, Tensor> feed_forward(const Tensor& input, const Tensor& weight1, const std::optional<Tensor>& bias1,
                                        const Tensor& weight2, const std::optional<Tensor>& bias2,
                                        const std::string& activation, const std::optional<Tensor>& seed, double p) {
  const Shape shape(input, weight1);
  const int64_t features = shape.out_features;
  STD_TORCH_CHECK(!bias1 || bias1->numel() == features, "feed_forward: one bias a hidden feature");
  const ScalarType dtype = input.scalar_type();
  const std::optional<Tensor> bias = bias1 ? std::optional(contiguous_as(*bias1, dtype)) : std::nullopt;
  const Tensor hidden = new_tensor(shape.with_last(features), dtype);
  const Tensor activated = new_tensor(shape.with_last(features), dtype);
  with_activation(dtype, activation, [&](auto type, auto function) {
    using A = decltype(type);
    using Function = decltype(function);
    Tensor kept_input, kept_weight;
    const Matrix<A> x = rows_of<A>(input, shape.in_features, kept_input);     // (N, D)
    const Matrix<A> w = rows_of<A>(weight1, shape.in_features, kept_weight);  // (H, D)
    const A* b = values<A>(bias);                                             // (H) or null
    A* h = static_cast<A*>(hidden.mutable_data_ptr());                        // (N, H)
    A* y = static_cast<A*>(activated.mutable_data_ptr());                     // (N, H)
    const DropoutFactors<A> factors(seed, p);
    product<A>(x, w.transposed(), shape.rows, features, shape.in_features, h, features,
               [&](int64_t row, int64_t row_end, int64_t column, int64_t column_end) {
                 for (; row < row_end; ++row) {
                   const int64_t at = row * features + column;
                   factors.over_row(at, column_end - column, [&](int64_t i, auto which, Vector<A> factor) {
                     Vector<A> value = load(h + at + i, which);
                     if (b) store(h + at + i, value += load(b + column + i, which), which);
                     store(y + at + i, Function::template value<A>(value) * factor, which);
                   });
                 }
               });
  });
  return {forward(activated, weight2, bias2), hidden};
}

// needs: whether the gradients of input, weight1, bias1, weight2 and bias2 are asked for
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> feed_forward_backward(
    const Tensor& grad_output, const Tensor& input, const Tensor& weight1, const std::optional<Tensor>&,
    const Tensor& weight2, const std::string& activation, const std::optional<Tensor>& seed, double p,
    const Tensor& hidden, const std::vector<bool>& needs) {
  const Shape shape(hidden, weight2);  // N rows of H features in and E out
  const ScalarType dtype = hidden.scalar_type();
  const int64_t features = shape.in_features;
  STD_TORCH_CHECK(needs.size() == 5, "feed_forward: five gradients are asked for or not");
  STD_TORCH_CHECK(hidden.is_contiguous(), "feed_forward: the hidden features as the forward gave them");
  STD_TORCH_CHECK(grad_output.dim() == hidden.dim() && grad_output.numel() == shape.rows * shape.out_features &&
                      grad_output.scalar_type() == dtype,
                  "feed_forward: the gradient has the shape and dtype of the output");
  const Tensor grad_hidden = new_tensor(shape.with_last(features), dtype);
  const Tensor activated = new_tensor(shape.with_last(features), dtype);
  with_activation(dtype, activation, [&](auto type, auto function) {
    using A = decltype(type);
    using Function = decltype(function);
    Tensor kept_grad, kept_weight;
    const Matrix<A> g = rows_of<A>(grad_output, shape.out_features, kept_grad);  // (N, E)
    const Matrix<A> w = rows_of<A>(weight2, features, kept_weight);              // (E, H)
    const A* h = static_cast<const A*>(hidden.const_data_ptr());                 // (N, H)
    A* y = static_cast<A*>(activated.mutable_data_ptr());                        // (N, H)
    A* grad_h = static_cast<A*>(grad_hidden.mutable_data_ptr());                 // (N, H)
    const DropoutFactors<A> factors(seed, p);
    product<A>(g, w, shape.rows, features, shape.out_features, grad_h, features,
               [&](int64_t row, int64_t row_end, int64_t column, int64_t column_end) {
                 for (; row < row_end; ++row) {
                   const int64_t at = row * features + column;
                   factors.over_row(at, column_end - column, [&](int64_t i, auto which, Vector<A> factor) {
                     const Vector<A> value = load(h + at + i, which), grad = load(grad_h + at + i, which) * factor;
                     store(y + at + i, Function::template value<A>(value) * factor, which);
                     store(grad_h + at + i, Function::template gradient<A>(grad, value), which);
                   });
                 }
               });
  });
  const auto second = backward(grad_output, activated, weight2, {false, needs[3], needs[4]});
  const auto first = backward(grad_hidden, input, weight1, {needs[0], needs[1], needs[2]});
  return {std::get<0>(first), std::get<1>(first), std::get<2>(first), std::get<1>(second), std::get<2>(second)};
}

}  // namespace
}  // namespace nacre

STABLE_TORCH_LIBRARY_IMPL(nacre, CPU, m) {
  m.impl("linear.kernel", TORCH_BOX(&nacre::forward));
  m.impl("linear_backward.kernel", TORCH_BOX(&nacre::backward));
  m.impl("feed_forward.kernel", TORCH_BOX(&nacre::feed_forward));
  m.impl("feed_forward_backward.kernel", TORCH_BOX(&nacre::feed_forward_backward));
}
