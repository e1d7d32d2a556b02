// The way of LSTM and GRU through time, and which thread does which part of the work.
//
// T steps, B sequences, N rows in all (a row is one step of one sequence).
#pragma once

#include "nacre/layers/recurrent/kernel_cpu_weights.h"

namespace nacre {

// Sequences do not read each other, so each thread walks through time with sequences of its own and waits for nobody.
// Few sequences with large weights share the columns of every step's product among the threads instead.
struct Shares {
  int64_t sequences;      // per thread, at the least
  bool columns;           // threads share columns
  int64_t steps_at_once;  // whose sums of the inputs are computed before the first of them is walked through

  // weights: that a step's state is multiplied with, of which a row of sums has this many
  template <class A>
  Shares(const Steps& steps, int64_t weights, int64_t sums, A) {
    constexpr int64_t fewest = 4;  // of fewer rows a product waits for the weights to come from the second cache
    const int64_t work = std::max<int64_t>(steps.count * weights, 1);
    sequences = std::max(fewest, Parts(multiply_adds_per_thread, work).count);
    // threads that meet at every step gain by it with weights as large; where one would walk alone, with smaller ones
    const int64_t fewest_bytes = int64_t{steps.batch > fewest ? 4 : 1} << 20;
    columns = steps.batch <= 2 * fewest && weights * static_cast<int64_t>(sizeof(A)) >= fewest_bytes;
    columns = columns || (has_few_rows(steps) && weights >= 2 * few_rows_values_per_thread);
    const int64_t step_bytes = std::max<int64_t>(steps.batch * sums * static_cast<int64_t>(sizeof(A)), 1);
    steps_at_once = std::max<int64_t>((int64_t{1} << 20) / step_bytes, 4);
  }
};

// Calls body(panel, panel_end) for all panels of columns at once, or shares them among the threads.
template <class Body>
void over_panels(int64_t panels, bool shared, const Body& body) {
  if (shared)
    in_parallel(panels, 1, body);
  else
    body(0, panels);
}

// One step's sequences from b to before b_end: cell.add_states(t, b, b_end, panel, panel_end) completes the sums,
// cell.activate(t, b, b_end) has what follows from them; a projected state comes in panels again.
template <class Cell>
void step_forward(const Cell& cell, int64_t t, int64_t b, int64_t b_end, bool shared) {
  over_panels(cell.state_panels(), shared, [&](int64_t from, int64_t to) { cell.add_states(t, b, b_end, from, to); });
  cell.activate(t, b, b_end);
  if constexpr (Cell::projects) {
    if (cell.projection_panels() == 0) return;
    over_panels(cell.projection_panels(), shared, [&](int64_t from, int64_t to) { cell.project(b, b_end, from, to); });
    cell.take_projected(t, b, b_end);
  }
}

// cell.differentiate(t, b, b_end) has the gradients of a step's sums, cell.pass_on(t, b, b_end, panel, panel_end) the
// gradient of the state before it; that of a projected state is brought to what was projected before all.
template <class Cell>
void step_backward(const Cell& cell, int64_t t, int64_t b, int64_t b_end, bool shared, bool passes_on) {
  if constexpr (Cell::projects) {
    if (cell.projection_panels() > 0) {
      cell.take_gradient(t, b, b_end);
      over_panels(cell.projection_panels(), shared,
                  [&](int64_t from, int64_t to) { cell.project(t, b, b_end, from, to); });
    }
  }
  cell.differentiate(t, b, b_end);
  if (passes_on)
    over_panels(cell.state_panels(), shared, [&](int64_t from, int64_t to) { cell.pass_on(t, b, b_end, from, to); });
}

// Walks from the first step to the last. cell.add_inputs(i, i_end, b, b_end, panel, panel_end) begins steps' sums.
template <class Cell>
void walk_forward(const Steps& steps, const Shares& shares, const Cell& cell) {
  if (shares.columns) {
    in_parallel(cell.input_panels(), 1,
                [&](int64_t from, int64_t to) { cell.add_inputs(0, steps.count, 0, steps.batch, from, to); });
    for (int64_t i = 0; i < steps.count; ++i) {
      const int64_t t = steps.walked(i);
      step_forward(cell, t, 0, steps.rows(t), true);
    }
    return;
  }
  in_parallel(steps.batch, shares.sequences, [&](int64_t b, int64_t b_end) {
    for (int64_t i = 0; i < steps.count; i += shares.steps_at_once) {
      const int64_t i_end = std::min(i + shares.steps_at_once, steps.count);
      cell.add_inputs(i, i_end, b, b_end, 0, cell.input_panels());
      for (int64_t j = i; j < i_end; ++j) {
        const int64_t t = steps.walked(j), end = std::min(b_end, steps.rows(t));
        if (b < end) step_forward(cell, t, b, end, false);
      }
    }
  });
}

// Walks from the last step to the first.
template <class Cell>
void walk_backward(const Steps& steps, const Shares& shares, bool to_first_state, const Cell& cell) {
  const int64_t last = to_first_state ? 0 : 1;  // the last step walked to that has a state to pass a gradient to
  if (shares.columns) {
    for (int64_t i = steps.count - 1; i >= 0; --i) {
      const int64_t t = steps.walked(i);
      step_backward(cell, t, 0, steps.rows(t), true, i >= last);
    }
    return;
  }
  in_parallel(steps.batch, shares.sequences, [&](int64_t b, int64_t b_end) {
    for (int64_t i = steps.count - 1; i >= 0; --i) {
      const int64_t t = steps.walked(i), end = std::min(b_end, steps.rows(t));
      if (b < end) step_backward(cell, t, b, end, false, i >= last);
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
