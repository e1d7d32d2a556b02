// What the kernels of LSTM and GRU share: the steps of a sequence, the gradients of the weights, tensors.
// kernel_cpu_weights.h has the products with weights, kernel_cpu_walk.h the way through the steps.
//
// T steps, B sequences, N rows in all (a row is one step of one sequence), D features of the input, H of the state.
#pragma once

#include <vector>

#include "nacre/core/cpu_product.h"

namespace nacre {

// ---- steps

// The steps of a plain batch (T, B, features) or of a packed one (N, features), in which they stand one after another
// and a step has a row for each sequence that lasts as long, the longest sequences first.
struct Steps {
  int64_t count, batch;
  bool reverse, packed;
  std::vector<int64_t> begins;  // (T + 1): where each step's rows begin

  Steps(const Tensor& input, const std::optional<Tensor>& batch_sizes, const Tensor& h0, bool reverse)
      : reverse(reverse), packed(batch_sizes.has_value()), begins{0} {
    STD_TORCH_CHECK(h0.dim() == 2 && input.dim() == (packed ? 2 : 3), "recurrence: states of 2 dimensions, a packed "
                    "input of 2 or a plain one of 3");
    batch = h0.size(0);
    if (packed) {
      const Tensor sizes = contiguous_as(*batch_sizes, ScalarType::Long);
      const auto* rows = static_cast<const int64_t*>(sizes.const_data_ptr());
      count = sizes.numel();
      for (int64_t t = 0; t < count; ++t) {
        STD_TORCH_CHECK(rows[t] >= 0 && rows[t] <= (t > 0 ? rows[t - 1] : batch),
                        "recurrence: batch_sizes never grow, from at most the number of states");
        begins.push_back(begins.back() + rows[t]);
      }
    } else {
      count = input.size(0);
      STD_TORCH_CHECK(input.size(1) == batch, "recurrence: one initial state for each sequence");
      for (int64_t t = 0; t < count; ++t) begins.push_back((t + 1) * batch);
    }
    STD_TORCH_CHECK(count > 0 && (!packed || input.size(0) == total()), "recurrence: the rows that batch_sizes tell");
  }

  int64_t total() const { return begins.back(); }
  int64_t rows(int64_t t) const { return begins[t + 1] - begins[t]; }
  // The i-th step that the recurrence walks through, and how many rows the step walked before or after step t has.
  int64_t walked(int64_t i) const { return reverse ? count - 1 - i : i; }
  int64_t before(int64_t t) const { return reverse ? t + 1 : t - 1; }
  int64_t after(int64_t t) const { return reverse ? t - 1 : t + 1; }
  bool is_step(int64_t t) const { return t >= 0 && t < count; }
  int64_t rows_before(int64_t t) const { return is_step(before(t)) ? rows(before(t)) : 0; }

  // The shape of values with this many features for every row.
  Sizes shape(int64_t features) const {
    return packed ? Sizes{total(), features} : Sizes{count, batch, features};
  }
};

template <class A>
constexpr ScalarType dtype_of = std::is_same_v<A, double> ? ScalarType::Double : ScalarType::Float;

// The rows of a tensor with these features for every step of every sequence, where they lie; or nothing.
template <class A>
class StepRows {
 public:
  StepRows(const Steps& steps, const std::optional<Tensor>& tensor, int64_t features) : steps_(steps) {
    if (!tensor) return;
    const int64_t last = tensor->dim() - 1;
    STD_TORCH_CHECK(last == (steps.packed ? 1 : 2) && tensor->size(0) == (steps.packed ? steps.total() : steps.count) &&
                        (steps.packed || tensor->size(1) == steps.batch) && tensor->size(last) == features,
                    "recurrence: a row of features for each step of each sequence");
    STD_TORCH_CHECK(tensor->is_cpu() && tensor->scalar_type() == dtype_of<A>, "recurrence: tensors of one dtype");
    kept_ = features > 1 && tensor->stride(last) != 1 ? torch::stable::contiguous(*tensor) : *tensor;
    values_ = static_cast<const A*>(kept_.const_data_ptr());
    row_stride_ = kept_.stride(last - 1);
    step_stride_ = steps.packed ? 0 : kept_.stride(0);
  }

  const Tensor& tensor() const { return kept_; }
  bool given() const { return values_; }
  int64_t row_stride() const { return row_stride_; }
  const A* row(int64_t t, int64_t b) const {
    return values_ + (steps_.packed ? steps_.begins[t] * row_stride_ : t * step_stride_) + b * row_stride_;
  }
  // The rows of a step, if there is one and its rows lie close together, to be read next.
  Ahead ahead(int64_t t, int64_t b, int64_t b_end) const {
    if (!steps_.is_step(t) || row_stride_ >= 2 * kept_.size(kept_.dim() - 1)) return {nullptr, 0};
    return {row(t, b), (std::min(b_end, steps_.rows(t)) - b) * row_stride_ * static_cast<int64_t>(sizeof(A))};
  }
  // Whether the rows of the steps follow each other at one distance.
  bool even() const { return steps_.packed || steps_.count == 1 || step_stride_ == steps_.batch * row_stride_; }

 private:
  const Steps& steps_;
  Tensor kept_;
  const A* values_ = nullptr;
  int64_t row_stride_ = 0, step_stride_ = 0;
};

// ---- gradients of the weights

// What the steps read, for the gradients of the weights: their inputs, and the states before them, side by side.
template <class A>
class StepsRead {
 public:
  StepsRead(const Steps& steps, const Tensor& input, int64_t features, int64_t hidden, bool inputs, bool states)
      : steps_(steps), x_(steps, input, features), features_(inputs ? features : 0), hidden_(states ? hidden : 0),
        values_(steps.total() * width()) {}

  void keep_input(int64_t t, int64_t b) const {
    if (features_) std::copy_n(x_.row(t, b), features_, values_.get() + (steps_.begins[t] + b) * width());
  }
  void keep_state(int64_t t, int64_t b, const A* state) const {
    if (hidden_) std::copy_n(state, hidden_, this->state(t, b));
  }
  // Where the state before a step belongs, or null.
  A* state(int64_t t, int64_t b) const {
    return hidden_ ? values_.get() + (steps_.begins[t] + b) * width() + features_ : nullptr;
  }

  // Of so few rows the gradients take longer to copy from side by side to their places than to be computed apart.
  static constexpr int64_t few_sums = 64;

  // The gradients of M rows of the weights, of_inputs (M, D) and of_states (M, H), and of as many biases, sums (M),
  // each where it is asked for; grad_sums: (N, M).
  void multiply(Matrix<A> grad_sums, int64_t rows, A* of_inputs, A* of_states, A* sums) const {
    const int64_t first = of_inputs ? 0 : features_, columns = (of_states ? width() : features_) - first;
    if (columns == 0) {
      if (sums) sum_rows(grad_sums.transposed(), rows, steps_.total(), sums);
      return;
    }
    const bool both = of_inputs && of_states;
    if (both && steps_.total() <= few_sums) {
      multiply(grad_sums, rows, of_inputs, nullptr, sums);
      return multiply(grad_sums, rows, nullptr, of_states, nullptr);
    }
    const Scratch<A> side_by_side(both ? rows * columns : 0);
    A* out = both ? side_by_side.get() : of_inputs ? of_inputs : of_states;
    const auto part = [&](int64_t m, int64_t m_end, int64_t n, int64_t n_end) {
      for (; both && m < m_end; ++m) {
        const A* row = out + m * columns;
        if (n < features_) std::copy(row + n, row + std::min(n_end, features_), of_inputs + m * features_ + n);
        if (const int64_t from = std::max(n, features_); from < n_end)
          std::copy(row + from, row + n_end, of_states + m * hidden_ + from - features_);
      }
    };
    product(grad_sums.transposed(), Matrix<A>{values_.get() + first, width(), 1}, rows, columns, steps_.total(), out,
            columns, part, sums);
  }

 private:
  const Steps& steps_;
  StepRows<A> x_;
  int64_t features_, hidden_;
  Scratch<A> values_;  // (N, D + H), without those that no gradient is asked for of

  int64_t width() const { return features_ + hidden_; }
};

// ---- tensors

template <class A>
A* data(const Tensor& tensor) {
  return static_cast<A*>(tensor.mutable_data_ptr());
}

// out = left right, (M, N) = (M, K) (K, N).
template <class A>
void multiply_whole(Matrix<A> left, Matrix<A> right, int64_t rows, int64_t columns, int64_t depth, A* out) {
  product(left, right, rows, columns, depth, out, columns, [](int64_t, int64_t, int64_t, int64_t) {});
}

// The distance at which rows of scratch memory are laid out: at a multiple of 1 KiB a column's values would share a few
// sets of the caches.
template <class A>
int64_t distance_of_rows(int64_t features) {
  return features * static_cast<int64_t>(sizeof(A)) % 1024 == 0 ? features + lanes<A> : features;
}

// A tensor in dense memory, whose shape and dtype are checked.
template <class A>
Tensor dense(const Tensor& given, const Sizes& shape) {
  bool fits = given.scalar_type() == dtype_of<A> && given.dim() == static_cast<int64_t>(shape.size());
  for (size_t i = 0; fits && i < shape.size(); ++i) fits = given.size(static_cast<int64_t>(i)) == shape[i];
  STD_TORCH_CHECK(fits, "recurrence: states, weights and biases of the layer's shapes and of the input's dtype");
  return contiguous_as(given, dtype_of<A>);
}

template <class A>
std::optional<Tensor> dense(const std::optional<Tensor>& given, const Sizes& shape) {
  return given ? std::optional<Tensor>(dense<A>(*given, shape)) : std::nullopt;
}

// A copy of a state in memory of its own; zeros where nothing is given.
template <class A>
Tensor copied(const std::optional<Tensor>& state, const Sizes& shape) {
  const Tensor copy = new_tensor(shape, dtype_of<A>);
  if (state)
    std::copy_n(values<A>(dense<A>(state, shape)), copy.numel(), data<A>(copy));
  else
    std::fill_n(data<A>(copy), copy.numel(), A(0));
  return copy;
}

}  // namespace nacre
