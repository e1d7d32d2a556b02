// Cross entropy of linear logits: linear_formula.py. The logits of a chunk of rows are made, reduced and turned into
// their own gradient in one piece of memory, which the two products of the backward read.
//
// x: (N, D) rows, w: (C, D) the linear map, z: (R, C) the logits of a chunk; each row has one target y.
#include "nacre/core/cpu_product.h"
#include "nacre/layers/cross_entropy/kernel_cpu.h"

#include <optional>
#include <string>
#include <tuple>
#include <vector>

namespace nacre {
namespace {

template <class A>
Matrix<A> matrix(const Tensor& tensor) {
  return {static_cast<const A*>(tensor.const_data_ptr()), tensor.stride(0), tensor.stride(1)};
}

template <class A>
A* values_or_null(const Tensor* tensor) {
  return tensor ? static_cast<A*>(tensor->mutable_data_ptr()) : nullptr;
}

// The tensors and settings of a call, checked.
struct Arguments {
  const Tensor &input, &linear_weight;
  std::optional<Tensor> bias, weight;
  Tensor target;
  bool mean, none;
  int64_t ignore_index;
  double smoothing;
  int64_t rows, features, classes, chunk;
  ScalarType dtype;

  Arguments(const Tensor& x, const Tensor& w, const std::optional<Tensor>& linear_bias, const Tensor& y,
            const std::optional<Tensor>& class_weight, const std::string& reduction, int64_t ignored,
            double label_smoothing, std::optional<int64_t> chunk_size)
      : input(x), linear_weight(w), mean(reduction == "mean"), none(reduction == "none"), ignore_index(ignored),
        smoothing(label_smoothing), dtype(x.scalar_type()) {
    STD_TORCH_CHECK(x.is_cpu() && w.is_cpu(), "linear_cross_entropy: a CPU kernel takes tensors on the CPU");
    STD_TORCH_CHECK(x.dim() == 2 && w.dim() == 2 && x.size(1) == w.size(1),
                    "linear_cross_entropy: input (N, D) and linear_weight (C, D)");
    STD_TORCH_CHECK((dtype == ScalarType::Float || dtype == ScalarType::Double) && w.scalar_type() == dtype,
                    "linear_cross_entropy: this kernel serves float32 or float64, one of them");
    rows = x.size(0), features = x.size(1), classes = w.size(0);
    STD_TORCH_CHECK(classes > 0, "linear_cross_entropy: at least one class");
    STD_TORCH_CHECK(y.scalar_type() == ScalarType::Long && y.numel() == rows,
                    "linear_cross_entropy: one class index a row");
    STD_TORCH_CHECK(mean || none || reduction == "sum", "linear_cross_entropy: the reduction is none, mean or sum");
    STD_TORCH_CHECK(!chunk_size || *chunk_size > 0, "linear_cross_entropy: a chunk has a row at least");
    target = contiguous_as(y, ScalarType::Long);
    bias = by_class(linear_bias);
    weight = by_class(class_weight);
    chunk = chunk_size ? *chunk_size : std::max<int64_t>(256, Parts(rows * features, classes).count);
  }

  std::optional<Tensor> by_class(const std::optional<Tensor>& given) const {
    if (!given) return std::nullopt;
    STD_TORCH_CHECK(given->numel() == classes, "linear_cross_entropy: one bias, and one weight, a class");
    return contiguous_as(*given, dtype);
  }

  template <class A>
  Targets<A> targets() const {
    Targets<A> found = {static_cast<const int64_t*>(target.const_data_ptr()), rows, classes, ignore_index,
                        values<A>(weight), A(smoothing), A(smoothing / static_cast<double>(classes))};
    found.check();
    return found;
  }
};

// Where the results lie; the gradients are null where they are not asked for.
template <class A>
struct Results {
  A *losses, *maximum, *log_sum;                   // (N)
  A *grad_input, *grad_linear_weight, *grad_bias;  // (N, D), (C, D), (C)

  bool gradients() const { return grad_input || grad_linear_weight || grad_bias; }
};

// z = x w' + b for the rows from `begin`. z: (rows, C)
template <class A>
void logits_of(const Arguments& of, int64_t begin, int64_t rows, A* z) {
  const A* b = values<A>(of.bias);
  product<A>(matrix<A>(of.input).at(begin, 0), matrix<A>(of.linear_weight).transposed(), rows, of.classes, of.features,
             z, of.classes, [&](int64_t row, int64_t row_end, int64_t column, int64_t column_end) {
               if (!b) return;
               for (; row < row_end; ++row) {
                 A* to = z + row * of.classes + column;
                 over_row<A>(column_end - column, [&](int64_t i, auto which) {
                   store(to + i, load(to + i, which) + load(b + column + i, which), which);
                 });
               }
             });
}

// From dz of the rows from `begin`: dx = dz w, dw += dz' x, db += sums of the columns of dz. dz: (rows, C)
template <class A>
void differentiate(const Arguments& of, int64_t begin, int64_t rows, const A* dz, const Results<A>& to) {
  const auto nothing_more = [](int64_t, int64_t, int64_t, int64_t) {};
  const Matrix<A> g = {dz, of.classes, 1};
  const bool add = begin > 0;
  if (to.grad_input)
    product<A>(g, matrix<A>(of.linear_weight), rows, of.features, of.classes, to.grad_input + begin * of.features,
               of.features, nothing_more);
  if (to.grad_linear_weight)
    product<A>(g.transposed(), matrix<A>(of.input).at(begin, 0), of.classes, of.features, rows, to.grad_linear_weight,
               of.features, nothing_more, to.grad_bias, add);
  else if (to.grad_bias)
    sum_rows(g.transposed(), of.classes, rows, to.grad_bias, add);
}

// gradient_of(row): dL/dloss of a row
template <class A, class Gradient>
void over_chunks(const Arguments& of, const Targets<A>& targets, const Results<A>& to, const Gradient& gradient_of) {
  const Parts chunks(of.rows, of.chunk);
  const Scratch<A> scratch(chunks.largest() * of.classes);
  const A spread = targets.spread();
  for (int64_t chunk = 0; chunk < chunks.count; ++chunk) {
    const int64_t begin = chunks.begin(chunk), rows = chunks.begin(chunk + 1) - begin;
    A* z = scratch.get();  // (rows, C), and then dz
    logits_of(of, begin, rows, z);
    in_parallel(rows, std::max<int64_t>(values_per_thread / of.classes, 1), [&](int64_t from, int64_t end) {
      for (int64_t i = from; i < end; ++i) {
        const int64_t row = begin + i;
        A* values = z + i * of.classes;
        row_losses(values, row, 1, i + 1 < end, targets, to.maximum, to.log_sum, to.losses);
        if (to.gradients())
          row_gradient(values, targets, row, to.maximum[row], to.log_sum[row],
                       targets.ignored(row) ? A(0) : gradient_of(row), spread, false, values);
      }
    });
    if (to.gradients()) differentiate(of, begin, rows, z, to);
  }
}

template <class Body>
void with_product_type(ScalarType dtype, Body body) {
  dtype == ScalarType::Float ? body(float()) : body(double());
}

// A gradient where it is asked for, and no elements where not.
Tensor gradient(bool asked_for, const Sizes& sizes, ScalarType dtype) {
  return new_tensor(asked_for ? sizes : Sizes{0}, dtype);
}

// formed: the gradients of input, linear_weight and linear_bias to form on the way, for a gradient of the loss of 1
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> forward(
    const Tensor& input, const Tensor& linear_weight, const std::optional<Tensor>& linear_bias, const Tensor& target,
    const std::optional<Tensor>& weight, const std::string& reduction, int64_t ignore_index, double label_smoothing,
    std::optional<int64_t> chunk, const std::vector<bool>& formed) {
  const Arguments of(input, linear_weight, linear_bias, target, weight, reduction, ignore_index, label_smoothing,
                     chunk);
  STD_TORCH_CHECK(formed.size() == 3 && (linear_bias || !formed[2]),
                  "linear_cross_entropy: three gradients to form or not");
  STD_TORCH_CHECK(!of.none || !(formed[0] || formed[1] || formed[2]),
                  "linear_cross_entropy: gradients are formed of a sum or mean");
  const Tensor loss = new_tensor(of.none ? Sizes{of.rows} : Sizes(), of.dtype);
  const Tensor maximum = new_tensor({of.rows, 1}, of.dtype), log_sum = new_tensor({of.rows, 1}, of.dtype);
  const Tensor grad_input = gradient(formed[0], {of.rows, of.features}, of.dtype);
  const Tensor grad_linear_weight = gradient(formed[1], {of.classes, of.features}, of.dtype);
  const Tensor grad_bias = gradient(formed[2], {of.classes}, of.dtype);
  with_product_type(of.dtype, [&](auto type) {
    using A = decltype(type);
    const Targets<A> targets = of.targets<A>();
    const Scratch<A> losses(of.rows);
    const A g = of.mean ? static_cast<A>(1 / targets.divisor()) : A(1);
    over_chunks<A>(of, targets,
                   {losses.get(), values_or_null<A>(&maximum), values_or_null<A>(&log_sum),
                    values_or_null<A>(formed[0] ? &grad_input : nullptr),
                    values_or_null<A>(formed[1] ? &grad_linear_weight : nullptr),
                    values_or_null<A>(formed[2] ? &grad_bias : nullptr)},
                   [&](int64_t) { return g; });
    reduce(losses.get(), targets, of.mean, of.none, static_cast<A*>(loss.mutable_data_ptr()));
  });
  return {loss, maximum, log_sum, grad_input, grad_linear_weight, grad_bias};
}

// A gradient that the forward formed, times that of the loss.
Tensor scaled(const Tensor& formed, const Tensor& grad_loss, const Sizes& sizes, ScalarType dtype) {
  const Tensor given = contiguous_as(formed, dtype), factor = contiguous_as(grad_loss, dtype);
  const Tensor result = new_tensor(sizes, dtype);
  STD_TORCH_CHECK(given.numel() == result.numel(), "linear_cross_entropy: a formed gradient has its argument's shape");
  STD_TORCH_CHECK(factor.numel() == 1, "linear_cross_entropy: one gradient of one loss");
  with_product_type(dtype, [&](auto type) {
    using A = decltype(type);
    const A g = *static_cast<const A*>(factor.const_data_ptr());
    const A* from = static_cast<const A*>(given.const_data_ptr());
    A* to = static_cast<A*>(result.mutable_data_ptr());
    in_parallel(result.numel(), values_per_thread, [&](int64_t begin, int64_t end) {
      over_row<A>(end - begin, [&](int64_t i, auto which) {
        store(to + begin + i, load(from + begin + i, which) * g, which);
      });
    });
  });
  return result;
}

// needs: whether the gradients of input, linear_weight, linear_bias, target and weight are asked for
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> backward(
    const Tensor& grad_loss, const Tensor& input, const Tensor& linear_weight, const std::optional<Tensor>& linear_bias,
    const Tensor& target, const std::optional<Tensor>& weight, const std::string& reduction, int64_t ignore_index,
    double label_smoothing, std::optional<int64_t> chunk, const std::vector<bool>& formed, const Tensor&, const Tensor&,
    const Tensor& formed_input, const Tensor& formed_linear_weight, const Tensor& formed_bias,
    const std::vector<bool>& needs) {
  const Arguments of(input, linear_weight, linear_bias, target, weight, reduction, ignore_index, label_smoothing,
                     chunk);
  STD_TORCH_CHECK(needs.size() == 5 && !needs[3] && !needs[4] && (linear_bias || !needs[2]) && formed.size() == 3,
                  "linear_cross_entropy: the kernel serves the gradients of input, linear_weight and linear_bias");
  STD_TORCH_CHECK(grad_loss.numel() == (of.none ? of.rows : 1), "linear_cross_entropy: one gradient a loss");
  const Sizes shapes[] = {{of.rows, of.features}, {of.classes, of.features}, {of.classes}};
  Tensor found[3];
  const bool any = formed[0] || formed[1] || formed[2];
  if (any && formed[0] >= needs[0] && formed[1] >= needs[1] && formed[2] >= needs[2]) {
    const Tensor* given[] = {&formed_input, &formed_linear_weight, &formed_bias};
    for (int64_t i = 0; i < 3; ++i)
      if (needs[i]) found[i] = scaled(*given[i], grad_loss, shapes[i], of.dtype);
    return {found[0], found[1], found[2], Tensor(), Tensor()};
  }
  for (int64_t i = 0; i < 3; ++i)
    if (needs[i]) found[i] = new_tensor(shapes[i], of.dtype);
  const Tensor given = contiguous_as(grad_loss, of.dtype);
  with_product_type(of.dtype, [&](auto type) {
    using A = decltype(type);
    const Targets<A> targets = of.targets<A>();
    const A* grads = static_cast<const A*>(given.const_data_ptr());  // (N) or one number
    const A divisor = of.mean ? static_cast<A>(targets.divisor()) : A(1);
    const Scratch<A> losses(of.rows);
    const Scratch<A> maximum(of.rows), log_sum(of.rows);
    over_chunks<A>(of, targets,
                   {losses.get(), maximum.get(), log_sum.get(), values_or_null<A>(needs[0] ? &found[0] : nullptr),
                    values_or_null<A>(needs[1] ? &found[1] : nullptr),
                    values_or_null<A>(needs[2] ? &found[2] : nullptr)},
                   [&](int64_t row) { return grads[of.none ? row : 0] / divisor; });
  });
  return {found[0], found[1], found[2], Tensor(), Tensor()};
}

}  // namespace
}  // namespace nacre

STABLE_TORCH_LIBRARY_IMPL(nacre, CPU, m) {
  m.impl("linear_cross_entropy.kernel", TORCH_BOX(&nacre::forward));
  m.impl("linear_cross_entropy_backward.kernel", TORCH_BOX(&nacre::backward));
}
