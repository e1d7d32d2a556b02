// The way of LSTM and GRU through time, and which thread does which part of the work.
//
// T steps, B sequences, N rows in all (a row is one step of one sequence).
#pragma once

#include "nacre/layers/recurrent/kernel_cpu.h"

namespace nacre {

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
    // threads that meet at every step gain by it with weights as large; where one would walk alone, with smaller ones
    const int64_t fewest_bytes = int64_t{steps.batch > fewest ? 4 : 1} << 20;
    columns = steps.batch <= 2 * fewest && hidden * sums * static_cast<int64_t>(sizeof(A)) >= fewest_bytes;
    const int64_t step_bytes = std::max<int64_t>(steps.batch * sums * static_cast<int64_t>(sizeof(A)), 1);
    steps_at_once = std::max<int64_t>((int64_t{1} << 20) / step_bytes, 4);
  }
};

// Walks from the first step to the last. cell.add_inputs(i, i_end, b, b_end, panel, panel_end) begins steps' sums,
// cell.add_states(t, b, b_end, panel, panel_end) completes those of a step, cell.activate(t, b, b_end) does the rest.
template <class Cell>
void walk_forward(const Steps& steps, const Shares& shares, const Cell& cell) {
  if (shares.columns) {
    in_parallel(cell.input_panels(), 1,
                [&](int64_t from, int64_t to) { cell.add_inputs(0, steps.count, 0, steps.batch, from, to); });
    for (int64_t i = 0; i < steps.count; ++i) {
      const int64_t t = steps.walked(i), rows = steps.rows(t);
      in_parallel(cell.state_panels(), 1,
                  [&](int64_t from, int64_t to) { cell.add_states(t, 0, rows, from, to); });
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

}  // namespace nacre
