// LayerNorm, and LayerNorm of a residual and what dropout leaves of a branch. N rows of D features each.
#include "nacre/core/cpu_dropout.h"
#include "nacre/core/cpu_rows.h"
#include "nacre/layers/layer_norm/kernel_cpu.h"

#include <tuple>

namespace nacre::layer_norm {
namespace {

std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& input, const std::vector<int64_t>& normalized_shape,
                                           const std::optional<Tensor>& weight, const std::optional<Tensor>& bias,
                                           double eps) {
  const Shape shape(input, normalized_shape);
  const ScalarType dtype = input.scalar_type(), computed = accumulator_dtype(dtype);
  const Tensor x = contiguous_as(input, dtype);
  const auto w = parameter(weight, computed, shape.features), b = parameter(bias, computed, shape.features);
  const Tensor y = new_tensor(shape.sizes, dtype);
  const Tensor mean = new_tensor(shape.statistics, computed), rstd = new_tensor(shape.statistics, computed);

  with_type(dtype, [&](auto type) {
    using T = decltype(type);
    using A = Accumulator<T>;
    const T* x_rows = static_cast<const T*>(x.const_data_ptr());  // (N, D)
    T* y_rows = static_cast<T*>(y.mutable_data_ptr());            // (N, D)
    A* means = static_cast<A*>(mean.mutable_data_ptr());          // (N)
    A* rstds = static_cast<A*>(rstd.mutable_data_ptr());          // (N)
    const A *w_values = values<A>(w), *b_values = values<A>(b);   // (D) or null
    const int64_t features = shape.features;
    const bool stream = streams_rows(y_rows, shape.rows, features);
    in_parallel(shape.rows, shape.rows_per_thread(), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        const T* x_row = x_rows + row * features;
        const auto of = statistics_of<T>(x_row, static_cast<A>(eps), features);
        normalise_row<T>(x_row, w_values, b_values, of, features, y_rows + row * features, stream);
        means[row] = of.mean;
        rstds[row] = of.rstd;
      }
      if (stream) finish_past_caches();
    });
  });
  return {y, mean, rstd};
}

// needs: whether the gradients of input, weight and bias are asked for; the others are undefined, None in Python
std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad_output, const Tensor& input,
                                            const std::vector<int64_t>& normalized_shape,
                                            const std::optional<Tensor>& weight, const Tensor& mean,
                                            const Tensor& rstd, const std::vector<bool>& needs) {
  const Shape shape(input, normalized_shape);
  const ScalarType dtype = input.scalar_type(), computed = accumulator_dtype(dtype);
  STD_TORCH_CHECK(needs.size() == 3, "layer_norm: three gradients are asked for or not");
  STD_TORCH_CHECK(grad_output.numel() == input.numel(), "layer_norm: the gradient has the shape of the output");
  STD_TORCH_CHECK(mean.numel() == shape.rows && rstd.numel() == shape.rows, "layer_norm: one mean and rstd a row");
  const Tensor x = contiguous_as(input, dtype), g = contiguous_as(grad_output, dtype);
  const Tensor m = contiguous_as(mean, computed), r = contiguous_as(rstd, computed);
  const auto w = parameter(weight, computed, shape.features);
  const Tensor grad_x = needs[0] ? new_tensor(shape.sizes, dtype) : Tensor();
  ParameterGradients parameters(shape, normalized_shape, computed, needs[1], needs[2]);

  with_type(dtype, [&](auto type) {
    using T = decltype(type);
    using A = Accumulator<T>;
    const int64_t features = shape.features;
    const T* g_rows = static_cast<const T*>(g.const_data_ptr());                     // (N, D)
    const T* x_rows = static_cast<const T*>(x.const_data_ptr());                     // (N, D)
    const A* means = static_cast<const A*>(m.const_data_ptr());                      // (N)
    const A* rstds = static_cast<const A*>(r.const_data_ptr());                      // (N)
    T* grad_rows = needs[0] ? static_cast<T*>(grad_x.mutable_data_ptr()) : nullptr;  // (N, D) or null
    const bool stream = grad_rows && streams_rows(grad_rows, shape.rows, features);
    const auto differentiate = [&](int64_t row, A* grad_weight, A* grad_bias) {
      const int64_t at = row * features;
      RowGradient<T> gradient{g_rows + at, x_rows + at, values<A>(w), {means[row], rstds[row]}};
      gradient.reduce(features, grad_weight, grad_bias);
      if (!grad_rows) return;
      over_row<A>(features, [&](int64_t i, auto which) {
        put(grad_rows + at + i, gradient.at(i, which), which, stream);
      });
    };
    parameters.over_rows<A>(differentiate, [&] { if (stream) finish_past_caches(); });
  });
  parameters.convert(weight ? weight->scalar_type() : grad_output.scalar_type());
  return {grad_x, parameters.weight, parameters.bias};
}

// ---- of residual + dropout(branch)

// output, sum: (N, D), both contiguous
std::tuple<Tensor, Tensor> residual_values(const Tensor& residual, const Tensor& branch, const Shape& shape,
                                           const std::optional<Tensor>& seed, double p,
                                           const std::optional<Tensor>& weight, const std::optional<Tensor>& bias,
                                           double eps) {
  const ScalarType dtype = residual.scalar_type(), computed = accumulator_dtype(dtype);
  const int64_t features = shape.features;
  const RowReader residual_rows(residual, dtype, features), branch_rows(branch, dtype, features);
  const auto w = parameter(weight, computed, features), b = parameter(bias, computed, features);
  const Tensor output = new_tensor(shape.sizes, dtype), sum = new_tensor(shape.sizes, dtype);

  with_type(dtype, [&](auto type) {
    using T = decltype(type);
    using A = Accumulator<T>;
    const DropoutFactors<A> factors(seed, p);
    T* y_rows = static_cast<T*>(output.mutable_data_ptr());  // (N, D)
    T* s_rows = static_cast<T*>(sum.mutable_data_ptr());     // (N, D)
    const bool stream = streams_rows(y_rows, shape.rows, features) && streams_rows(s_rows, shape.rows, features);
    in_parallel(shape.rows, shape.rows_per_thread(), [&](int64_t begin, int64_t end) {
      const Scratch<T> in_cache(stream ? features : 0);  // what is written past the caches is read from here
      for (int64_t row = begin; row < end; ++row) {
        const T *r = residual_rows.row<T>(row), *x = branch_rows.row<T>(row);
        T *s_row = s_rows + row * features, *s = stream ? in_cache.get() : s_row;
        factors.over_row(row * features, features, [&](int64_t i, auto which, Vector<A> factor) {
          store(s + i, load(r + i, which) + load(x + i, which) * factor, which);
        });
        const auto of = statistics_of<T>(s, static_cast<A>(eps), features);
        normalise_row<T>(s, values<A>(w), values<A>(b), of, features, y_rows + row * features, stream);
        if (!stream) continue;
        over_row<A>(features, [&](int64_t i, auto which) { store_past_caches(s_row + i, load(s + i, which), which); });
      }
      if (stream) finish_past_caches();
    });
  });
  return {output, sum};
}

std::tuple<Tensor, Tensor> residual_forward(const Tensor& residual, const Tensor& branch,
                                            const std::optional<Tensor>& seed, double p,
                                            const std::vector<int64_t>& normalized_shape,
                                            const std::optional<Tensor>& weight, const std::optional<Tensor>& bias,
                                            double eps) {
  const Shape shape(residual, normalized_shape);
  STD_TORCH_CHECK(sizes_of(residual) == sizes_of(branch), "layer_norm: residual and branch have one shape");
  auto [output, sum] = residual_values(residual, branch, shape, seed, p, weight, bias, eps);
  if (residual.is_contiguous() && branch.is_contiguous()) return {output, sum};
  return {output, laid_out(sum, result_strides(residual, torch::stable::empty_like(branch)))};
}

// needs: whether the gradients of residual, branch, weight and bias are asked for. Without dropout residual and branch
// have one gradient, which core/op.py passes on.
std::tuple<Tensor, Tensor, Tensor, Tensor> residual_backward(
    const std::optional<Tensor>& grad_output, const std::optional<Tensor>& grad_sum, const Tensor& sum,
    const std::optional<Tensor>& seed, double p, const std::vector<int64_t>& normalized_shape,
    const std::optional<Tensor>& weight, double eps, const std::vector<bool>& needs) {
  const Shape shape(sum, normalized_shape);
  const ScalarType dtype = sum.scalar_type(), computed = accumulator_dtype(dtype);
  const int64_t features = shape.features;
  STD_TORCH_CHECK(needs.size() == 4, "layer_norm: four gradients are asked for or not");
  for (const auto& grad : {grad_output, grad_sum})
    STD_TORCH_CHECK(!grad || grad->numel() == sum.numel(), "layer_norm: gradients have the shape of the outputs");
  const Tensor s = contiguous_as(sum, dtype);
  const auto g = grad_output ? std::optional(contiguous_as(*grad_output, dtype)) : std::nullopt;
  const auto direct = grad_sum ? std::optional(contiguous_as(*grad_sum, dtype)) : std::nullopt;
  const auto w = parameter(weight, computed, features);
  const bool of_branch = needs[1] && (seed || !needs[0]);
  const Tensor grad_residual = needs[0] ? new_tensor(shape.sizes, dtype) : Tensor();
  const Tensor grad_branch = of_branch ? new_tensor(shape.sizes, dtype) : Tensor();
  ParameterGradients parameters(shape, normalized_shape, computed, g && needs[2], g && needs[3]);

  with_type(dtype, [&](auto type) {
    using T = decltype(type);
    using A = Accumulator<T>;
    const DropoutFactors<A> factors(seed, p);
    const T* s_rows = static_cast<const T*>(s.const_data_ptr());                                // (N, D)
    const T *g_rows = values<T>(g), *direct_rows = values<T>(direct);                           // (N, D) or null
    T* residual_rows = needs[0] ? static_cast<T*>(grad_residual.mutable_data_ptr()) : nullptr;  // (N, D) or null
    T* branch_rows = of_branch ? static_cast<T*>(grad_branch.mutable_data_ptr()) : nullptr;     // (N, D) or null
    const bool stream = (residual_rows || branch_rows) &&
                        (!residual_rows || streams_rows(residual_rows, shape.rows, features)) &&
                        (!branch_rows || streams_rows(branch_rows, shape.rows, features));
    const auto differentiate = [&](int64_t row, A* grad_weight, A* grad_bias) {
      const int64_t at = row * features;
      const T* s_row = s_rows + at;
      RowGradient<T> gradient{g_rows + at, s_row, values<A>(w), statistics_of<T>(s_row, static_cast<A>(eps), features)};
      if (g_rows) gradient.reduce(features, grad_weight, grad_bias);
      const auto write = [&](int64_t i, auto which, Vector<A> factor) {
        Vector<A> total = g_rows ? gradient.at(i, which) : Vector<A>{};
        if (direct_rows) total += load(direct_rows + at + i, which);
        if (residual_rows) put(residual_rows + at + i, total, which, stream);
        if (branch_rows) put(branch_rows + at + i, total * factor, which, stream);
      };
      if (branch_rows)
        factors.over_row(at, features, write);
      else if (residual_rows)
        over_row<A>(features, [&](int64_t i, auto which) { write(i, which, Vector<A>{}); });
    };
    parameters.over_rows<A>(differentiate, [&] { if (stream) finish_past_caches(); });
  });
  parameters.convert(weight ? weight->scalar_type() : dtype);
  return {grad_residual, grad_branch, parameters.weight, parameters.bias};
}

}  // namespace
}  // namespace nacre::layer_norm

STABLE_TORCH_LIBRARY_IMPL(nacre, CPU, m) {
  m.impl("layer_norm.kernel", TORCH_BOX(&nacre::layer_norm::forward));
  m.impl("layer_norm_backward.kernel", TORCH_BOX(&nacre::layer_norm::backward));
  m.impl("residual_dropout_layer_norm.kernel", TORCH_BOX(&nacre::layer_norm::residual_forward));
  m.impl("residual_dropout_layer_norm_backward.kernel", TORCH_BOX(&nacre::layer_norm::residual_backward));
}
