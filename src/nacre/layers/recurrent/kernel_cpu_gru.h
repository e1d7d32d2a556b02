// GRU: formula_gru.py, with every step's gates and state computed where its sums have just been completed.
//
// T steps, B sequences, N rows in all, D features of the input, H of the state.
#pragma once

#include <tuple>

#include "nacre/core/cpu_math.h"
#include "nacre/layers/recurrent/kernel_cpu_walk.h"

namespace nacre::gru {

template <class A>
struct Forward {
  static constexpr bool projects = false;
  const Steps& steps;
  int64_t hidden;
  StepRows<A> x;                                // (N, D)
  const Weights<A>&ih, &hh_gates, &hh_new;      // (D, 3 H), (H, 2 H) of r and z, (H, H) of n
  const A *bias_ih, *bias_hh;                   // (3 H) or null
  A *gates, *states, *output;                   // (N, 4 H), (N, H), (N, H)
  A* h;                                         // (B, H), the state before and then after each step

  int64_t input_panels() const { return ih.panels(); }
  int64_t state_panels() const { return hh_gates.panels() + hh_new.panels(); }

  // The sums a of the inputs go where r, z and n will stand.
  void add_inputs(int64_t i, int64_t i_end, int64_t b, int64_t b_end, int64_t panel, int64_t panel_end) const {
    multiply_inputs(steps, x, ih, i, i_end, b, b_end, panel, panel_end, gates, 4 * hidden);
  }

  // The sums b of the states are added to those of r and z; b_n has a place of its own.
  void add_states(int64_t t, int64_t b, int64_t b_end, int64_t panel, int64_t panel_end) const {
    const Matrix<A> state{h + b * hidden, hidden, 1};
    A* sums = gates + (steps.begins[t] + b) * 4 * hidden;
    const int64_t gate_panels = hh_gates.panels();
    hh_gates.multiply(state, b_end - b, panel, std::min(panel_end, gate_panels), true, sums, 4 * hidden);
    hh_new.multiply(state, b_end - b, std::max(panel, gate_panels) - gate_panels, panel_end - gate_panels, false,
                    sums + 3 * hidden, 4 * hidden);
  }

  void activate(int64_t t, int64_t b, int64_t b_end) const {
    for (; b < b_end; ++b) {
      const int64_t row = steps.begins[t] + b;
      activate_row(gates + row * 4 * hidden, states + row * hidden, output + row * hidden, h + b * hidden);
    }
  }

  // sums: (4 H), a_r + b_r, a_z + b_z, a_n and b_n without their biases, then r, z, n and b_n; state, out, h: (H)
  void activate_row(A* sums, A* state, A* out, A* h) const {
    over_row<A>(hidden, [&](int64_t j, auto which) {
      const auto bias = [&](const A* biases, int64_t gate) -> Vector<A> {
        return biases ? load(biases + gate * hidden + j, which) : Vector<A>{};
      };
      const auto sum = [&](int64_t gate) -> Vector<A> { return load(sums + gate * hidden + j, which); };
      const Vector<A> r = sigmoid<A>(sum(0) + (bias(bias_ih, 0) + bias(bias_hh, 0)));
      const Vector<A> z = sigmoid<A>(sum(1) + (bias(bias_ih, 1) + bias(bias_hh, 1)));
      const Vector<A> b_n = sum(3) + bias(bias_hh, 2);
      const Vector<A> n = tanh<A>(multiply_add<A>(r, b_n, sum(2) + bias(bias_ih, 2)));
      const Vector<A> h_t = multiply_add<A>(z, load(h + j, which) - n, n);
      store(sums + j, r, which);
      store(sums + hidden + j, z, which);
      store(sums + 2 * hidden + j, n, which);
      store(sums + 3 * hidden + j, b_n, which);
      store(state + j, h_t, which);
      store(out + j, h_t, which);
      store(h + j, h_t, which);
    });
  }
};

template <class A>
struct Backward {
  static constexpr bool projects = false;
  const Steps& steps;
  int64_t hidden;
  StepRows<A> gates, states, grad_output;  // (N, 4 H), (N, H), (N, H) or nothing
  const A* h0;                             // (B, H)
  const Weights<A>& hh;                    // (3 H, H)
  A* grad_sums;                            // (N, 4 H), of a_n, of r and z in both, of b_n; rows `distance` apart
  int64_t distance;
  const StepsRead<A>& read;
  A* dh;                                   // (B, H), the gradient of the state after and then before each step

  int64_t state_panels() const { return hh.panels(); }

  void differentiate(int64_t t, int64_t b, int64_t b_end) const {
    const int64_t before = steps.before(t), rows_before = steps.rows_before(t);
    for (; b < b_end; ++b) {
      const int64_t row = steps.begins[t] + b;
      const A* state = b < rows_before ? states.row(before, b) : h0 + b * hidden;
      const A* grad = grad_output.given() ? grad_output.row(t, b) : nullptr;
      differentiate_row(gates.row(t, b), state, grad, grad_sums + row * distance,
                        read.state(t, b), dh + b * hidden);
      read.keep_input(t, b);
    }
  }

  // gate, sums: (4 H); state, dh: (H); grad, kept: (H) or null
  void differentiate_row(const A* gate, const A* state, const A* grad, A* sums, A* kept, A* dh) const {
    over_row<A>(hidden, [&](int64_t j, auto which) {
      const Vector<A> r = load(gate + j, which), z = load(gate + hidden + j, which);
      const Vector<A> n = load(gate + 2 * hidden + j, which), b_n = load(gate + 3 * hidden + j, which);
      const Vector<A> h_s = load(state + j, which);
      const Vector<A> dh_t = grad ? load(grad + j, which) + load(dh + j, which) : load(dh + j, which);
      const Vector<A> slope_n = (1 - z) * (1 - n * n);
      store(sums + j, dh_t * slope_n, which);
      store(sums + hidden + j, dh_t * (slope_n * b_n * r * (1 - r)), which);
      store(sums + 2 * hidden + j, dh_t * ((h_s - n) * z * (1 - z)), which);
      store(sums + 3 * hidden + j, dh_t * (slope_n * r), which);
      if (kept) store(kept + j, h_s, which);
      store(dh + j, dh_t * z, which);
    });
  }

  void pass_on(int64_t t, int64_t b, int64_t b_end, int64_t panel, int64_t panel_end) const {
    Ahead ahead = gates.ahead(steps.before(t), b, b_end);
    hh.multiply({grad_sums + (steps.begins[t] + b) * distance + hidden, distance, 1}, b_end - b, panel, panel_end, true,
                dh + b * hidden, hidden, &ahead);
  }
};

template <class A>
std::tuple<Tensor, Tensor, Tensor, Tensor> forward(const Tensor& input, const Steps& steps, const Tensor& h0,
                                                   const Tensor& weight_ih, const Tensor& weight_hh,
                                                   const std::optional<Tensor>& bias_ih,
                                                   const std::optional<Tensor>& bias_hh) {
  const int64_t features = weight_ih.size(1), hidden = h0.size(1), sums = 3 * hidden;
  const Tensor w_ih = dense<A>(weight_ih, {sums, features}), w_hh = dense<A>(weight_hh, {sums, hidden});
  const auto b_ih = dense<A>(bias_ih, {sums}), b_hh = dense<A>(bias_hh, {sums});
  const Matrix<A> recurrent{values<A>(w_hh), 1, hidden};  // (H, 3 H)
  const Weights<A> ih(steps, Matrix<A>{values<A>(w_ih), 1, features}, features, sums);
  const Weights<A> hh_gates(steps, recurrent, hidden, 2 * hidden);
  const Weights<A> hh_new(steps, recurrent.at(0, 2 * hidden), hidden, hidden);

  const Tensor h = copied<A>(h0, {steps.batch, hidden});
  const Tensor output = new_tensor(steps.shape(hidden), dtype_of<A>);
  const Tensor states = new_tensor(steps.shape(hidden), dtype_of<A>);
  const Tensor gates = new_tensor(steps.shape(4 * hidden), dtype_of<A>);
  const Forward<A> cell{steps, hidden, StepRows<A>(steps, input, features), ih, hh_gates, hh_new, values<A>(b_ih),
                        values<A>(b_hh), data<A>(gates), data<A>(states), data<A>(output), data<A>(h)};
  walk_forward(steps, Shares(steps, hidden * sums, sums, A()), cell);
  return {output, h, gates, states};
}

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// needs: whether the gradients of input, h0, weight_ih, weight_hh, bias_ih and bias_hh are asked for
template <class A>
Gradients backward(const std::optional<Tensor>& grad_output, const std::optional<Tensor>& grad_h, const Tensor& input,
                   const Steps& steps, const Tensor& h0, const Tensor& weight_ih, const Tensor& weight_hh,
                   const Tensor& gates, const Tensor& states, const std::vector<bool>& needs) {
  const int64_t features = weight_ih.size(1), hidden = h0.size(1), sums = 3 * hidden, rows = steps.total();
  const Tensor w_ih = dense<A>(weight_ih, {sums, features}), w_hh = dense<A>(weight_hh, {sums, hidden});
  const Tensor h_first = dense<A>(h0, {steps.batch, hidden}), dh = copied<A>(grad_h, {steps.batch, hidden});
  const Weights<A> hh(steps, Matrix<A>{values<A>(w_hh), hidden, 1}, sums, hidden);
  const int64_t distance = distance_of_rows<A>(4 * hidden);
  const Scratch<A> grad_sums(rows * distance);
  const StepsRead<A> read(steps, input, features, hidden, needs[2], needs[3]);
  const Backward<A> cell{steps, hidden, StepRows<A>(steps, gates, 4 * hidden), StepRows<A>(steps, states, hidden),
                         StepRows<A>(steps, grad_output, hidden), values<A>(h_first), hh, grad_sums.get(), distance,
                         read, data<A>(dh)};
  walk_backward(steps, Shares(steps, hidden * sums, sums, A()), needs[1], cell);

  const Matrix<A> da{grad_sums.get(), distance, 1};  // (N, 4 H) of a_n, a_r, a_z and b_n
  Tensor grad_input, grad_ih, grad_hh, grad_b_ih, grad_b_hh;
  if (needs[0]) {
    grad_input = new_tensor(steps.shape(features), dtype_of<A>);
    const Scratch<A> new_first(sums * features);
    std::copy_n(values<A>(w_ih) + 2 * hidden * features, hidden * features, new_first.get());
    std::copy_n(values<A>(w_ih), 2 * hidden * features, new_first.get() + hidden * features);
    multiply_whole(da, Matrix<A>{new_first.get(), features, 1}, rows, features, sums, data<A>(grad_input));
  }
  if (needs[2]) grad_ih = new_tensor({sums, features}, dtype_of<A>);
  if (needs[3]) grad_hh = new_tensor({sums, hidden}, dtype_of<A>);
  if (needs[4]) grad_b_ih = new_tensor({sums}, dtype_of<A>);
  if (needs[5]) grad_b_hh = new_tensor({sums}, dtype_of<A>);
  const Scratch<A> gate_sums(4 * hidden);  // of a_n, a_r, a_z and b_n
  const auto multiply = [&](int64_t first, int64_t gates, int64_t to, bool inputs, bool states) {
    read.multiply(da.at(0, first * hidden), gates * hidden,
                  inputs && needs[2] ? data<A>(grad_ih) + to * hidden * features : nullptr,
                  states && needs[3] ? data<A>(grad_hh) + to * hidden * hidden : nullptr,
                  needs[4] || needs[5] ? gate_sums.get() + first * hidden : nullptr);
  };
  multiply(0, 1, 2, true, false);
  multiply(1, 2, 0, true, true);
  multiply(3, 1, 2, false, true);
  for (const auto& [asked, bias, last] : {std::tuple(needs[4], &grad_b_ih, 0), std::tuple(needs[5], &grad_b_hh, 3)}) {
    if (!asked) continue;
    std::copy_n(gate_sums.get() + hidden, 2 * hidden, data<A>(*bias));
    std::copy_n(gate_sums.get() + last * hidden, hidden, data<A>(*bias) + 2 * hidden);
  }
  return {grad_input, needs[1] ? dh : Tensor(), grad_ih, grad_hh, grad_b_ih, grad_b_hh};
}

}  // namespace nacre::gru
