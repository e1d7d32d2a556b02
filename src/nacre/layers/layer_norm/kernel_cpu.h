// LayerNorm of one row and its derivative: formula.py, with the row kept in cache between its passes. N rows of D
// features each.
#pragma once

#include "nacre/core/cpu_memory.h"
#include "nacre/core/cpu_primitives.h"
#include "nacre/core/cpu_streams.h"

#include <array>
#include <cmath>
#include <optional>
#include <vector>

namespace nacre::layer_norm {

template <class A, size_t N>
using Vectors = std::array<Vector<A>, N>;

template <class A>
struct Statistics {
  A mean, rstd;
};

// The rounding of the first mean shows in the mean distance from it: that corrects both mean and variance.
// x: (D)
template <class T, class A = Accumulator<T>>
Statistics<A> statistics_of(const T* x, A eps, int64_t features) {
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
  return {center + correction, A(1) / std::sqrt((variance < 0 ? A(0) : variance) + eps)};
}

// x, y: (D); weight, bias: (D) or null
template <class T, class A = Accumulator<T>>
void normalise_row(const T* x, const A* weight, const A* bias, Statistics<A> of, int64_t features, T* y, bool stream) {
  over_row<A>(features, [&](int64_t i, auto which) {
    Vector<A> value = (load(x + i, which) - of.mean) * of.rstd;
    if (weight) value *= load(weight + i, which);
    if (bias) value += load(bias + i, which);
    put(y + i, value, which, stream);
  });
}

// The gradient of one row of the input. g, x: (D); weight: (D) or null
template <class T, class A = Accumulator<T>>
struct RowGradient {
  const T *g, *x;
  const A* weight;
  Statistics<A> of;
  A mean_h = 0, mean_hn = 0;

  template <class Lanes>
  Vector<A> n(int64_t i, Lanes which) const {
    return (load(x + i, which) - of.mean) * of.rstd;
  }
  template <class Lanes>
  Vector<A> h(int64_t i, Lanes which) const {
    return weight ? load(g + i, which) * load(weight + i, which) : load(g + i, which);
  }
  template <class Lanes>
  Vector<A> at(int64_t i, Lanes which) const {
    return of.rstd * (h(i, which) - mean_h - n(i, which) * mean_hn);
  }

  // Finds the means, and adds the row's share to the sums grad_weight and grad_bias, (D) or null.
  void reduce(int64_t features, A* grad_weight, A* grad_bias) {
    const auto [sum_h, sum_hn] = sums_over_row<A, 2>(features, [&](int64_t i, auto which) {
      const Vector<A> normalised = n(i, which), weighted = h(i, which), grad = load(g + i, which);
      if (grad_weight) store(grad_weight + i, load(grad_weight + i, which) + grad * normalised, which);
      if (grad_bias) store(grad_bias + i, load(grad_bias + i, which) + grad, which);
      return Vectors<A, 2>{weighted, weighted * normalised};
    });
    mean_h = sum_h / static_cast<A>(features);
    mean_hn = sum_hn / static_cast<A>(features);
  }
};

struct Shape {
  int64_t rows = 1, features = 1;
  Sizes sizes;
  Sizes statistics;  // (..., 1, ...): the shape of mean and rstd

  Shape(const Tensor& input, const std::vector<int64_t>& normalized_shape) {
    const auto given = input.sizes();
    const auto leading = static_cast<int64_t>(given.size()) - static_cast<int64_t>(normalized_shape.size());
    STD_TORCH_CHECK(leading >= 0, "layer_norm: the input has fewer dimensions than normalized_shape");
    for (int64_t i = 0; i < static_cast<int64_t>(given.size()); ++i) {
      STD_TORCH_CHECK(i < leading || given[i] == normalized_shape[i - leading],
                      "layer_norm: the input's last dimensions are not normalized_shape");
      (i < leading ? rows : features) *= given[i];
      sizes.push_back(given[i]);
      statistics.push_back(i < leading ? given[i] : 1);
    }
  }

  int64_t rows_per_thread() const { return std::max<int64_t>(values_per_thread / std::max<int64_t>(features, 1), 1); }
};

// A weight or bias in the accumulator's dtype.
inline std::optional<Tensor> parameter(const std::optional<Tensor>& given, ScalarType dtype, int64_t features) {
  if (!given) return std::nullopt;
  STD_TORCH_CHECK(given->numel() == features, "layer_norm: weight and bias have the shape normalized_shape");
  return contiguous_as(*given, dtype);
}

// The gradients of weight and bias, where they are asked for: sums over rows, in blocks whose sums are added in pairs.
class ParameterGradients {
 public:
  ParameterGradients(const Shape& shape, const Sizes& sizes, ScalarType computed, bool of_weight, bool of_bias)
      : features_(shape.features), blocks_(shape.rows, shape.features) {
    if (of_weight) weight = new_tensor(sizes, computed);
    if (of_bias) bias = new_tensor(sizes, computed);
  }

  // Calls body(row, grad_weight, grad_bias) for each row, with the sums, (D) or null, that it adds its share to, and
  // finish() at the end of each thread's part.
  template <class A, class Body, class Finish>
  void over_rows(const Body& body, const Finish& finish) {
    const int64_t count = blocks_.count;
    const Scratch<A> weight_sums(weight.defined() ? count * features_ : 0);
    const Scratch<A> bias_sums(bias.defined() ? count * features_ : 0);
    in_parallel(count, blocks_.per_thread, [&](int64_t begin, int64_t end) {
      for (int64_t block = begin; block < end; ++block) {
        A* weight_sum = sum_of(block, weight, weight_sums);
        A* bias_sum = sum_of(block, bias, bias_sums);
        for (int64_t row = blocks_.begin(block); row < blocks_.end(block); ++row) body(row, weight_sum, bias_sum);
      }
      finish();
    });
    for (const auto& [gradient, sums] : {std::pair(&weight, &weight_sums), std::pair(&bias, &bias_sums)})
      if (gradient->defined()) add_blocks(sums->get(), static_cast<A*>(gradient->mutable_data_ptr()), count, features_);
  }

  void convert(ScalarType dtype) {
    if (weight.defined()) weight = contiguous_as(weight, dtype);
    if (bias.defined()) bias = contiguous_as(bias, dtype);
  }

  Tensor weight, bias;  // undefined, None in Python, where not asked for

 private:
  template <class A>
  A* sum_of(int64_t block, const Tensor& gradient, const Scratch<A>& sums) const {
    if (!gradient.defined()) return nullptr;
    A* sum = sums.get() + block * features_;  // (D) of (B, D)
    std::fill(sum, sum + features_, A(0));
    return sum;
  }

  int64_t features_;
  RowBlocks blocks_;
};

}  // namespace nacre::layer_norm
