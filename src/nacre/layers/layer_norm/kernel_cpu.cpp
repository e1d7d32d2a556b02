// LayerNorm: formula.py, with a row kept in cache between its passes. N rows of D features each.
#include "nacre/core/cpu_memory.h"
#include "nacre/core/cpu_primitives.h"
#include "nacre/core/cpu_streams.h"

#include <array>
#include <cmath>
#include <tuple>
#include <vector>

namespace nacre {
namespace {

template <class A, size_t N>
using Vectors = std::array<Vector<A>, N>;

// The rounding of the first mean shows in the mean distance from it: that corrects both mean and variance.
// x, y: (D); weight, bias: (D) or null
template <class T, class A = Accumulator<T>>
void normalise_row(const T* x, const A* weight, const A* bias, A eps, int64_t features, T* y, bool stream, A* mean,
                   A* rstd) {
  const A size = static_cast<A>(features);
  const auto [sum] = sums_over_row<A, 1>(features, [&](int64_t i, auto which) {
    return Vectors<A, 1>{load(x + i, which)};
  });
  const A center = sum / size;
  const auto [distances, squares] = sums_over_row<A, 2>(features, [&](int64_t i, auto which) {
    const Vector<A> distance = load(x + i, which) - center;
    return Vectors<A, 2>{distance, distance * distance};
  });
  const A correction = distances / size;
  const A variance = squares / size - correction * correction;
  *mean = center + correction;
  *rstd = A(1) / std::sqrt((variance < 0 ? A(0) : variance) + eps);
  over_row<A>(features, [&, m = *mean, r = *rstd](int64_t i, auto which) {
    Vector<A> value = (load(x + i, which) - m) * r;
    if (weight) value *= load(weight + i, which);
    if (bias) value += load(bias + i, which);
    put(y + i, value, which, stream);
  });
}

// Adds the row's share to the sums grad_weight and grad_bias, (D) or null, and writes grad_x, (D) or null.
// g, x: (D); weight: (D) or null
template <class T, class A = Accumulator<T>>
void differentiate_row(const T* g, const T* x, const A* weight, A mean, A rstd, int64_t features, T* grad_x,
                       bool stream, A* grad_weight, A* grad_bias) {
  const A size = static_cast<A>(features);
  const auto n_at = [&](int64_t i, auto which) -> Vector<A> { return (load(x + i, which) - mean) * rstd; };
  const auto h_at = [&](int64_t i, auto which) -> Vector<A> {
    return weight ? load(g + i, which) * load(weight + i, which) : load(g + i, which);
  };
  const auto [sum_h, sum_hn] = sums_over_row<A, 2>(features, [&](int64_t i, auto which) {
    const Vector<A> n = n_at(i, which), h = h_at(i, which), grad = load(g + i, which);
    if (grad_weight) store(grad_weight + i, load(grad_weight + i, which) + grad * n, which);
    if (grad_bias) store(grad_bias + i, load(grad_bias + i, which) + grad, which);
    return Vectors<A, 2>{h, h * n};
  });
  if (!grad_x) return;
  over_row<A>(features, [&, mean_h = sum_h / size, mean_hn = sum_hn / size](int64_t i, auto which) {
    put(grad_x + i, rstd * (h_at(i, which) - mean_h - n_at(i, which) * mean_hn), which, stream);
  });
}

struct Shape {
  int64_t rows = 1, features = 1;
  Sizes sizes;
  Sizes statistics;  // (..., 1, ...): the shape of mean and rstd
};

Shape shape_of(const Tensor& input, const std::vector<int64_t>& normalized_shape) {
  Shape shape;
  const auto sizes = input.sizes();
  const auto leading = static_cast<int64_t>(sizes.size()) - static_cast<int64_t>(normalized_shape.size());
  STD_TORCH_CHECK(leading >= 0, "layer_norm: the input has fewer dimensions than normalized_shape");
  for (int64_t i = 0; i < static_cast<int64_t>(sizes.size()); ++i) {
    STD_TORCH_CHECK(i < leading || sizes[i] == normalized_shape[i - leading],
                    "layer_norm: the input's last dimensions are not normalized_shape");
    (i < leading ? shape.rows : shape.features) *= sizes[i];
    shape.sizes.push_back(sizes[i]);
    shape.statistics.push_back(i < leading ? sizes[i] : 1);
  }
  return shape;
}

// A weight or bias in the accumulator's dtype.
std::optional<Tensor> parameter(const std::optional<Tensor>& given, ScalarType dtype, int64_t features) {
  if (!given) return std::nullopt;
  STD_TORCH_CHECK(given->numel() == features, "layer_norm: weight and bias have the shape normalized_shape");
  return contiguous_as(*given, dtype);
}

std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& input, const std::vector<int64_t>& normalized_shape,
                                           const std::optional<Tensor>& weight, const std::optional<Tensor>& bias,
                                           double eps) {
  const Shape shape = shape_of(input, normalized_shape);
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
    const int64_t rows_per_thread = std::max<int64_t>(values_per_thread / std::max<int64_t>(features, 1), 1);
    const bool stream = streams_rows(y_rows, shape.rows, features);
    in_parallel(shape.rows, rows_per_thread, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row)
        normalise_row<T>(x_rows + row * features, w_values, b_values, static_cast<A>(eps), features,
                         y_rows + row * features, stream, means + row, rstds + row);
      if (stream) finish_past_caches();
    });
  });
  return {y, mean, rstd};
}

// needs: whether the gradients of input, weight and bias are asked for; the others are undefined tensors, None in Python
std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad_output, const Tensor& input,
                                            const std::vector<int64_t>& normalized_shape,
                                            const std::optional<Tensor>& weight, const Tensor& mean,
                                            const Tensor& rstd, const std::vector<bool>& needs) {
  const Shape shape = shape_of(input, normalized_shape);
  const RowBlocks blocks(shape.rows, shape.features);
  const ScalarType dtype = input.scalar_type(), computed = accumulator_dtype(dtype);
  STD_TORCH_CHECK(needs.size() == 3, "layer_norm: three gradients are asked for or not");
  STD_TORCH_CHECK(grad_output.numel() == input.numel(), "layer_norm: the gradient has the shape of the output");
  STD_TORCH_CHECK(mean.numel() == shape.rows && rstd.numel() == shape.rows, "layer_norm: one mean and rstd a row");
  const Tensor x = contiguous_as(input, dtype), g = contiguous_as(grad_output, dtype);
  const Tensor m = contiguous_as(mean, computed), r = contiguous_as(rstd, computed);
  const auto w = parameter(weight, computed, shape.features);

  Tensor grad_x, grad_weight, grad_bias;
  if (needs[0]) grad_x = new_tensor(shape.sizes, dtype);
  if (needs[1]) grad_weight = new_tensor(normalized_shape, computed);
  if (needs[2]) grad_bias = new_tensor(normalized_shape, computed);

  with_type(dtype, [&](auto type) {
    using T = decltype(type);
    using A = Accumulator<T>;
    const int64_t features = shape.features;
    const T* g_rows = static_cast<const T*>(g.const_data_ptr());                                   // (N, D)
    const T* x_rows = static_cast<const T*>(x.const_data_ptr());                                   // (N, D)
    const A* w_values = values<A>(w);                                                              // (D) or null
    const A* means = static_cast<const A*>(m.const_data_ptr());                                    // (N)
    const A* rstds = static_cast<const A*>(r.const_data_ptr());                                    // (N)
    T* grad_rows = needs[0] ? static_cast<T*>(grad_x.mutable_data_ptr()) : nullptr;                // (N, D) or null
    const Scratch<A> weight_sums(needs[1] ? blocks.count * features : 0);
    const Scratch<A> bias_sums(needs[2] ? blocks.count * features : 0);
    A* weight_blocks = needs[1] ? weight_sums.get() : nullptr;                                     // (B, D) or null
    A* bias_blocks = needs[2] ? bias_sums.get() : nullptr;                                         // (B, D) or null
    const bool stream = grad_rows && streams_rows(grad_rows, shape.rows, features);
    in_parallel(blocks.count, blocks.per_thread, [&](int64_t begin, int64_t end) {
      for (int64_t block = begin; block < end; ++block) {
        A* weight_sum = weight_blocks ? weight_blocks + block * features : nullptr;
        A* bias_sum = bias_blocks ? bias_blocks + block * features : nullptr;
        if (weight_sum) std::fill(weight_sum, weight_sum + features, A(0));
        if (bias_sum) std::fill(bias_sum, bias_sum + features, A(0));
        for (int64_t row = blocks.begin(block); row < blocks.end(block); ++row)
          differentiate_row<T>(g_rows + row * features, x_rows + row * features, w_values, means[row], rstds[row],
                               features, grad_rows ? grad_rows + row * features : nullptr, stream, weight_sum, bias_sum);
      }
      if (stream) finish_past_caches();
    });
    if (needs[1])
      add_blocks(weight_blocks, static_cast<A*>(grad_weight.mutable_data_ptr()), blocks.count, features);
    if (needs[2]) add_blocks(bias_blocks, static_cast<A*>(grad_bias.mutable_data_ptr()), blocks.count, features);
  });

  const ScalarType parameters = weight ? weight->scalar_type() : grad_output.scalar_type();
  if (needs[1]) grad_weight = contiguous_as(grad_weight, parameters);
  if (needs[2]) grad_bias = contiguous_as(grad_bias, parameters);
  return {grad_x, grad_weight, grad_bias};
}

}  // namespace
}  // namespace nacre

STABLE_TORCH_LIBRARY_IMPL(nacre, CPU, m) {
  m.impl("layer_norm.kernel", TORCH_BOX(&nacre::forward));
  m.impl("layer_norm_backward.kernel", TORCH_BOX(&nacre::backward));
}
