// What the kernels of LSTM and GRU share: the steps of a sequence, weights that are packed once for all steps, and who
// does which part of the work.
//
// T steps, B sequences, N rows in all (a row is one step of one sequence), D features of the input, H of the state.
#pragma once

#include <vector>

#include "nacre/core/cpu_matmul.h"

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
  // Whether the rows of the steps follow each other at one distance.
  bool even() const { return steps_.packed || steps_.count == 1 || step_stride_ == steps_.batch * row_stride_; }

 private:
  const Steps& steps_;
  Tensor kept_;
  const A* values_ = nullptr;
  int64_t row_stride_ = 0, step_stride_ = 0;
};

// ---- weights

// The right factor (K, N) of products with the rows of one step after another.
template <class A>
class Weights {
 public:
  Weights(Matrix<A> matrix, int64_t depth, int64_t columns)
      : depths_(depth, depth_block), columns_(columns), panels_(columns), packed_(panels_.vectors * lanes<A> * depth) {
    const int64_t per_thread = Parts(values_per_thread, std::max<int64_t>(depth * panel_vectors * lanes<A>, 1)).count;
    in_parallel(panels_.count, per_thread, [&](int64_t from, int64_t to) {
      pack_panels(matrix, depth, columns, from, to, packed_.get() + panels_.begin(from) * depth);
    });
  }

  int64_t panels() const { return panels_.count; }

  // Writes left W into panels `from` to `to` of the columns of out, or adds it. left: (rows, K), out: (rows, N)
  void multiply(Matrix<A> left, int64_t rows, int64_t from, int64_t to, bool add, A* out, int64_t out_stride) const {
    for (int64_t panel = from; panel < to; ++panel) {
      const int64_t begin = panels_.begin(panel), size = panels_.size(panel);
      const A* packed = packed_.get() + begin * depths_.size;
      for (int64_t part = 0; part < depths_.count; ++part) {
        const int64_t k = depths_.begin(part), steps = depths_.begin(part + 1) - k;
        multiply_panel(Rows<A>(left.at(0, k)), rows, steps, packed + k * size, std::min(size, columns_ - begin),
                       add || part > 0, out + begin, out_stride);
      }
    }
  }

 private:
  Parts depths_;
  int64_t columns_;
  Panels<A> panels_;
  Scratch<A> packed_;
};

// ---- who does what

// Sequences do not read each other, so each thread walks through time with sequences of its own and waits for nobody.
// Few sequences with large weights share the columns of every step's product among the threads instead.
struct Shares {
  int64_t sequences;      // per thread, at the least
  bool columns;           // threads share columns
  int64_t steps_at_once;  // whose sums of the inputs are computed before the first of them is walked through

  template <class A>
  Shares(const Steps& steps, int64_t hidden, int64_t sums, A) {
    constexpr int64_t fewest = 4;  // of fewer rows a product waits for the weights to come from the second cache
    const int64_t work = std::max<int64_t>(steps.count * hidden * sums, 1);
    sequences = std::max(fewest, Parts(multiply_adds_per_thread, work).count);
    columns = steps.batch <= 2 * fewest && hidden * sums * static_cast<int64_t>(sizeof(A)) >= (int64_t{4} << 20);
    const int64_t step_bytes = std::max<int64_t>(steps.batch * sums * static_cast<int64_t>(sizeof(A)), 1);
    steps_at_once = std::max<int64_t>((int64_t{1} << 20) / step_bytes, 4);
  }
};

// Walks from the first step to the last. cell.add_inputs(i, i_end, b, b_end, panel, panel_end) begins the sums of steps,
// cell.add_states(t, b, b_end, panel, panel_end) completes those of a step, cell.activate(t, b, b_end) does the rest.
template <class Cell>
void walk_forward(const Steps& steps, const Shares& shares, const Cell& cell) {
  if (shares.columns) {
    in_parallel(cell.input_panels(), 1,
                [&](int64_t from, int64_t to) { cell.add_inputs(0, steps.count, 0, steps.batch, from, to); });
    for (int64_t i = 0; i < steps.count; ++i) {
      const int64_t t = steps.walked(i), rows = steps.rows(t);
      in_parallel(cell.state_panels(), 1, [&](int64_t from, int64_t to) { cell.add_states(t, 0, rows, from, to); });
      cell.activate(t, 0, rows);
    }
    return;
  }
  in_parallel(steps.batch, shares.sequences, [&](int64_t b, int64_t b_end) {
    for (int64_t i = 0; i < steps.count; i += shares.steps_at_once) {
      const int64_t i_end = std::min(i + shares.steps_at_once, steps.count);
      cell.add_inputs(i, i_end, b, b_end, 0, cell.input_panels());
      for (int64_t j = i; j < i_end; ++j) {
        const int64_t t = steps.walked(j), end = std::min(b_end, steps.rows(t));
        if (b >= end) continue;
        cell.add_states(t, b, end, 0, cell.state_panels());
        cell.activate(t, b, end);
      }
    }
  });
}

// Walks from the last step to the first. cell.differentiate(t, b, b_end) has the gradients of a step's sums,
// cell.pass_on(t, b, b_end, panel, panel_end) the gradient of the state before it.
template <class Cell>
void walk_backward(const Steps& steps, const Shares& shares, bool to_first_state, const Cell& cell) {
  const int64_t last = to_first_state ? 0 : 1;  // the last step walked to that has a state to pass a gradient to
  if (shares.columns) {
    for (int64_t i = steps.count - 1; i >= 0; --i) {
      const int64_t t = steps.walked(i), rows = steps.rows(t);
      cell.differentiate(t, 0, rows);
      if (i >= last)
        in_parallel(cell.state_panels(), 1, [&](int64_t from, int64_t to) { cell.pass_on(t, 0, rows, from, to); });
    }
    return;
  }
  in_parallel(steps.batch, shares.sequences, [&](int64_t b, int64_t b_end) {
    for (int64_t i = steps.count - 1; i >= 0; --i) {
      const int64_t t = steps.walked(i), end = std::min(b_end, steps.rows(t));
      if (b >= end) continue;
      cell.differentiate(t, b, end);
      if (i >= last) cell.pass_on(t, b, end, 0, cell.state_panels());
    }
  });
}

// The sums of the inputs, x W, of the steps from the i-th to before the i_end-th; `out` has sums for each row of all
// steps, out_stride apart.
template <class A>
void multiply_inputs(const Steps& steps, const StepRows<A>& x, const Weights<A>& weights, int64_t i, int64_t i_end,
                     int64_t b, int64_t b_end, int64_t panel, int64_t panel_end, A* out, int64_t out_stride) {
  const auto matrix = [&](int64_t t, int64_t row) { return Matrix<A>{x.row(t, row), x.row_stride(), 1}; };
  const int64_t first = std::min(steps.walked(i), steps.walked(i_end - 1));
  if (b == 0 && b_end == steps.batch && x.even()) {
    const int64_t begin = steps.begins[first], rows = steps.begins[first + i_end - i] - begin;
    weights.multiply(matrix(first, 0), rows, panel, panel_end, false, out + begin * out_stride, out_stride);
    return;
  }
  for (; panel < panel_end; ++panel)
    for (int64_t t = first; t < first + i_end - i; ++t)
      if (const int64_t rows = std::min(b_end, steps.rows(t)) - b; rows > 0)
        weights.multiply(matrix(t, b), rows, panel, panel + 1, false, out + (steps.begins[t] + b) * out_stride,
                         out_stride);
}

// ---- tensors

template <class A>
A* data(const Tensor& tensor) {
  return static_cast<A*>(tensor.mutable_data_ptr());
}

// The rows of a sequence as a matrix (N, features); `kept` holds the copy that they lie in where their steps are uneven.
template <class A>
Matrix<A> even_rows(const Steps& steps, const Tensor& tensor, int64_t features, Tensor& kept) {
  const StepRows<A> rows(steps, tensor, features);
  kept = rows.even() ? rows.tensor() : torch::stable::contiguous(tensor);
  return {static_cast<const A*>(kept.const_data_ptr()), rows.even() ? rows.row_stride() : features, 1};
}

// out = left right, (M, N) = (M, K) (K, N), and the sums of the left factor's rows where they are asked for.
template <class A>
void multiply_whole(Matrix<A> left, Matrix<A> right, int64_t rows, int64_t columns, int64_t depth, A* out,
                    A* row_sums = nullptr) {
  product(left, right, rows, columns, depth, out, columns, [](int64_t, int64_t, int64_t, int64_t) {}, row_sums);
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
