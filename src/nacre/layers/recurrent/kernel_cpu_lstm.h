// LSTM: formula_lstm.py, with every step's gates and cells computed where its sums have just been completed.
//
// T steps, B sequences, N rows in all, D features of the input, H of the state.
#pragma once

#include <tuple>

#include "nacre/core/cpu_math.h"
#include "nacre/layers/recurrent/kernel_cpu_walk.h"

namespace nacre::lstm {

template <class A>
struct Forward {
  const Steps& steps;
  int64_t hidden;
  StepRows<A> x;              // (N, D)
  const Weights<A>&ih, &hh;   // (D, 4 H), (H, 4 H)
  const A* bias;              // (4 H) or null
  A *gates, *cells, *output;  // (N, 4 H), (N, H), (N, H)
  A *h, *c;                   // (B, H), the states before and then after each step

  int64_t input_panels() const { return ih.panels(); }
  int64_t state_panels() const { return hh.panels(); }

  void add_inputs(int64_t i, int64_t i_end, int64_t b, int64_t b_end, int64_t panel, int64_t panel_end) const {
    multiply_inputs(steps, x, ih, i, i_end, b, b_end, panel, panel_end, gates, 4 * hidden);
  }

  void add_states(int64_t t, int64_t b, int64_t b_end, int64_t panel, int64_t panel_end) const {
    hh.multiply({h + b * hidden, hidden, 1}, b_end - b, panel, panel_end, true,
                gates + (steps.begins[t] + b) * 4 * hidden, 4 * hidden);
  }

  void activate(int64_t t, int64_t b, int64_t b_end) const {
    for (; b < b_end; ++b) {
      const int64_t row = steps.begins[t] + b;
      activate_row(gates + row * 4 * hidden, cells + row * hidden, output + row * hidden, h + b * hidden,
                   c + b * hidden);
    }
  }

  // sums: (4 H), the gates' sums without their biases, then the gates; cell, out, h, c: (H)
  void activate_row(A* sums, A* cell, A* out, A* h, A* c) const {
    over_row<A>(hidden, [&](int64_t j, auto which) {
      const auto sum = [&](int64_t gate) -> Vector<A> {
        const Vector<A> value = load(sums + gate * hidden + j, which);
        return bias ? value + load(bias + gate * hidden + j, which) : value;
      };
      const Vector<A> i = sigmoid<A>(sum(0)), f = sigmoid<A>(sum(1)), g = tanh<A>(sum(2)), o = sigmoid<A>(sum(3));
      const Vector<A> c_t = multiply_add<A>(f, load(c + j, which), i * g), h_t = o * tanh<A>(c_t);
      store(sums + j, i, which);
      store(sums + hidden + j, f, which);
      store(sums + 2 * hidden + j, g, which);
      store(sums + 3 * hidden + j, o, which);
      store(cell + j, c_t, which);
      store(c + j, c_t, which);
      store(out + j, h_t, which);
      store(h + j, h_t, which);
    });
  }
};

template <class A>
struct Backward {
  const Steps& steps;
  int64_t hidden;
  StepRows<A> gates, cells, grad_output;  // (N, 4 H), (N, H), (N, H) or nothing
  const A *h0, *c0;                       // (B, H)
  const Weights<A>& hh;                   // (4 H, H)
  A* grad_sums;                           // (N, 4 H), rows `distance` apart
  int64_t distance;
  const StepsRead<A>& read;
  A *dh, *dc;                             // (B, H), the gradients of the states after and then before each step

  int64_t state_panels() const { return hh.panels(); }

  void differentiate(int64_t t, int64_t b, int64_t b_end) const {
    const int64_t before = steps.before(t), after = steps.after(t), rows_before = steps.rows_before(t);
    const int64_t rows_after = steps.is_step(after) ? steps.rows(after) : 0;
    for (; b < b_end; ++b) {
      const A* c_before = b < rows_before ? cells.row(before, b) : c0 + b * hidden;
      const A* grad = grad_output.given() ? grad_output.row(t, b) : nullptr;
      A* h_t = b < rows_after ? read.state(after, b) : nullptr;
      differentiate_row(gates.row(t, b), cells.row(t, b), c_before, grad, grad_sums + (steps.begins[t] + b) * distance,
                        h_t, dh + b * hidden, dc + b * hidden);
      if (b >= rows_before) read.keep_state(t, b, h0 + b * hidden);
      read.keep_input(t, b);
    }
  }

  // gate, sums: (4 H); cell, c_before, dh, dc: (H); grad, h: (H) or null
  void differentiate_row(const A* gate, const A* cell, const A* c_before, const A* grad, A* sums, A* h, const A* dh,
                         A* dc) const {
    over_row<A>(hidden, [&](int64_t j, auto which) {
      const Vector<A> i = load(gate + j, which), f = load(gate + hidden + j, which);
      const Vector<A> g = load(gate + 2 * hidden + j, which), o = load(gate + 3 * hidden + j, which);
      const Vector<A> tanh_c = tanh<A>(load(cell + j, which)), m = o * tanh_c;
      const Vector<A> dm = grad ? load(grad + j, which) + load(dh + j, which) : load(dh + j, which);
      const Vector<A> dc_t = load(dc + j, which) + dm * (o * (1 - tanh_c * tanh_c));
      store(sums + j, dc_t * (g * i * (1 - i)), which);
      store(sums + hidden + j, dc_t * (load(c_before + j, which) * f * (1 - f)), which);
      store(sums + 2 * hidden + j, dc_t * (i * (1 - g * g)), which);
      store(sums + 3 * hidden + j, dm * (m * (1 - o)), which);
      store(dc + j, dc_t * f, which);
      if (h) store(h + j, m, which);
    });
  }

  void pass_on(int64_t t, int64_t b, int64_t b_end, int64_t panel, int64_t panel_end) const {
    Ahead ahead = gates.ahead(steps.before(t), b, b_end);
    hh.multiply({grad_sums + (steps.begins[t] + b) * distance, distance, 1}, b_end - b, panel, panel_end, false,
                dh + b * hidden, hidden, &ahead);
  }
};

template <class A>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> forward(const Tensor& input, const Steps& steps, const Tensor& h0,
                                                           const Tensor& c0, const Tensor& weight_ih,
                                                           const Tensor& weight_hh,
                                                           const std::optional<Tensor>& bias_ih,
                                                           const std::optional<Tensor>& bias_hh) {
  const int64_t features = weight_ih.size(1), hidden = h0.size(1), sums = 4 * hidden;
  const Tensor w_ih = dense<A>(weight_ih, {sums, features}), w_hh = dense<A>(weight_hh, {sums, hidden});
  const auto b_ih = dense<A>(bias_ih, {sums}), b_hh = dense<A>(bias_hh, {sums});
  const Weights<A> ih(Matrix<A>{values<A>(w_ih), 1, features}, features, sums);
  const Weights<A> hh(Matrix<A>{values<A>(w_hh), 1, hidden}, hidden, sums);
  const Scratch<A> bias(b_ih ? sums : 0);  // (4 H)
  for (int64_t j = 0; b_ih && j < sums; ++j) bias.get()[j] = values<A>(b_ih)[j] + values<A>(b_hh)[j];

  const ScalarType dtype = dtype_of<A>;
  const Tensor h = copied<A>(h0, {steps.batch, hidden}), c = copied<A>(c0, {steps.batch, hidden});
  const Tensor output = new_tensor(steps.shape(hidden), dtype), cells = new_tensor(steps.shape(hidden), dtype);
  const Tensor gates = new_tensor(steps.shape(sums), dtype);
  const Forward<A> cell{steps, hidden, StepRows<A>(steps, input, features), ih, hh, b_ih ? bias.get() : nullptr,
                        data<A>(gates), data<A>(cells), data<A>(output), data<A>(h), data<A>(c)};
  walk_forward(steps, Shares(steps, hidden, sums, A()), cell);
  return {output, h, c, gates, cells};
}

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// needs: whether the gradients of input, h0, c0, weight_ih, weight_hh, bias_ih, bias_hh and weight_hr are asked for
template <class A>
Gradients backward(const std::optional<Tensor>& grad_output, const std::optional<Tensor>& grad_h,
                             const std::optional<Tensor>& grad_c, const Tensor& input, const Steps& steps,
                             const Tensor& h0, const Tensor& c0, const Tensor& weight_ih, const Tensor& weight_hh,
                             const Tensor& gates, const Tensor& cells, const std::vector<bool>& needs) {
  const int64_t features = weight_ih.size(1), hidden = h0.size(1), sums = 4 * hidden;
  const Sizes states{steps.batch, hidden};
  const Tensor w_ih = dense<A>(weight_ih, {sums, features}), w_hh = dense<A>(weight_hh, {sums, hidden});
  const Tensor h_first = dense<A>(h0, states), c_first = dense<A>(c0, states);
  const Tensor dh = copied<A>(grad_h, states), dc = copied<A>(grad_c, states);
  const Weights<A> hh(Matrix<A>{values<A>(w_hh), hidden, 1}, sums, hidden);
  const int64_t distance = distance_of_rows<A>(sums);
  const Scratch<A> grad_sums(steps.total() * distance);
  const StepsRead<A> read(steps, input, features, hidden, needs[3], needs[4]);
  const Backward<A> cell{steps, hidden, StepRows<A>(steps, gates, sums), StepRows<A>(steps, cells, hidden),
                         StepRows<A>(steps, grad_output, hidden), values<A>(h_first), values<A>(c_first), hh,
                         grad_sums.get(), distance, read, data<A>(dh), data<A>(dc)};
  walk_backward(steps, Shares(steps, hidden, sums, A()), needs[1], cell);

  const Matrix<A> g{grad_sums.get(), distance, 1};  // (N, 4 H)
  const int64_t rows = steps.total();
  Tensor grad_input, grad_ih, grad_hh, grad_bias;
  if (needs[0]) {
    grad_input = new_tensor(steps.shape(features), dtype_of<A>);
    multiply_whole(g, Matrix<A>{values<A>(w_ih), features, 1}, rows, features, sums, data<A>(grad_input));
  }
  if (needs[5] || needs[6]) grad_bias = new_tensor({sums}, dtype_of<A>);
  if (needs[3]) grad_ih = new_tensor({sums, features}, dtype_of<A>);
  if (needs[4]) grad_hh = new_tensor({sums, hidden}, dtype_of<A>);
  read.multiply(g, sums, needs[3] ? data<A>(grad_ih) : nullptr, needs[4] ? data<A>(grad_hh) : nullptr,
                needs[5] || needs[6] ? data<A>(grad_bias) : nullptr);
  return {grad_input, needs[1] ? dh : Tensor(), needs[2] ? dc : Tensor(), grad_ih, grad_hh,
          needs[5] ? grad_bias : Tensor(), needs[6] ? needs[5] ? copied<A>(grad_bias, {sums}) : grad_bias : Tensor(),
          Tensor()};
}

}  // namespace nacre::lstm
