// LSTM: formula_lstm.py, with every step's gates and cells computed where its sums have just been completed.
//
// T steps, B sequences, N rows in all, D features of the input, H of the cell, R of the state: R = H but with a
// projection.
#pragma once

#include <memory>
#include <tuple>

#include "nacre/core/cpu_math.h"
#include "nacre/layers/recurrent/kernel_cpu_walk.h"

namespace nacre::lstm {

template <class A>
struct Forward {
  static constexpr bool projects = true;
  const Steps& steps;
  int64_t hidden, width;      // H, R
  StepRows<A> x;              // (N, D)
  const Weights<A>&ih, &hh;   // (D, 4 H), (R, 4 H)
  const Weights<A>* hr;       // (H, R) or null
  const A* bias;              // (4 H) or null
  A *gates, *cells, *output;  // (N, 4 H), (N, H), (N, R)
  A* states;                  // (N, R), what is kept of projected ones, or null
  A *h, *c;                   // (B, R), (B, H), the states before and then after each step
  A* m;                       // (B, H), what is projected, or the state itself

  int64_t input_panels() const { return ih.panels(); }
  int64_t state_panels() const { return hh.panels(); }
  int64_t projection_panels() const { return hr ? hr->panels() : 0; }  // none where nothing is projected

  void add_inputs(int64_t i, int64_t i_end, int64_t b, int64_t b_end, int64_t panel, int64_t panel_end) const {
    multiply_inputs(steps, x, ih, i, i_end, b, b_end, panel, panel_end, gates, 4 * hidden);
  }

  void add_states(int64_t t, int64_t b, int64_t b_end, int64_t panel, int64_t panel_end) const {
    hh.multiply({h + b * width, width, 1}, b_end - b, panel, panel_end, true,
                gates + (steps.begins[t] + b) * 4 * hidden, 4 * hidden);
  }

  void activate(int64_t t, int64_t b, int64_t b_end) const {
    for (; b < b_end; ++b) {
      const int64_t row = steps.begins[t] + b;
      activate_row(gates + row * 4 * hidden, cells + row * hidden, hr ? nullptr : output + row * width, m + b * hidden,
                   c + b * hidden);
    }
  }

  void project(int64_t b, int64_t b_end, int64_t panel, int64_t panel_end) const {
    hr->multiply({m + b * hidden, hidden, 1}, b_end - b, panel, panel_end, false, h + b * width, width);
  }

  void take_projected(int64_t t, int64_t b, int64_t b_end) const {
    for (A* to : {output, states}) std::copy(h + b * width, h + b_end * width, to + (steps.begins[t] + b) * width);
  }

  // sums: (4 H), the gates' sums without their biases, then the gates; cell, m, c: (H); out: (H) or null
  void activate_row(A* sums, A* cell, A* out, A* m, A* c) const {
    over_row<A>(hidden, [&](int64_t j, auto which) {
      const auto sum = [&](int64_t gate) -> Vector<A> {
        const Vector<A> value = load(sums + gate * hidden + j, which);
        return bias ? value + load(bias + gate * hidden + j, which) : value;
      };
      const Vector<A> i = sigmoid<A>(sum(0)), f = sigmoid<A>(sum(1)), g = tanh<A>(sum(2)), o = sigmoid<A>(sum(3));
      const Vector<A> c_t = multiply_add<A>(f, load(c + j, which), i * g), m_t = o * tanh<A>(c_t);
      store(sums + j, i, which);
      store(sums + hidden + j, f, which);
      store(sums + 2 * hidden + j, g, which);
      store(sums + 3 * hidden + j, o, which);
      store(cell + j, c_t, which);
      store(c + j, c_t, which);
      store(m + j, m_t, which);
      if (out) store(out + j, m_t, which);
    });
  }
};

// What the backward has for a projection.
template <class A>
struct Projection {
  Weights<A> weights;            // (R, H)
  Scratch<A> grad_states, m, dm;  // (N, R), (N, H), (B, H)

  Projection(const Steps& steps, const A* weight_hr, int64_t hidden, int64_t width)
      : weights(steps, Matrix<A>{weight_hr, hidden, 1}, width, hidden), grad_states(steps.total() * width),
        m(steps.total() * hidden), dm(steps.batch * hidden) {}
};

template <class A>
struct Backward {
  static constexpr bool projects = true;
  const Steps& steps;
  int64_t hidden, width;                  // H, R
  StepRows<A> gates, cells, grad_output;  // (N, 4 H), (N, H), (N, R) or nothing
  StepRows<A> states;                     // (N, R), projected ones, or nothing
  const A *h0, *c0;                       // (B, R), (B, H)
  const Weights<A>& hh;                   // (4 H, R)
  const Projection<A>* projection;        // or null
  A* grad_sums;                           // (N, 4 H), rows `distance` apart
  int64_t distance;
  const StepsRead<A>& read;
  A *dh, *dc;                             // (B, R), (B, H), the gradients of the states after and then before each step

  int64_t state_panels() const { return hh.panels(); }
  int64_t projection_panels() const { return projection ? projection->weights.panels() : 0; }

  // The whole gradient of the projected states.
  void take_gradient(int64_t t, int64_t b, int64_t b_end) const {
    for (; b < b_end; ++b) {
      const A *grad = grad_output.given() ? grad_output.row(t, b) : nullptr, *passed = dh + b * width;
      A* to = projection->grad_states.get() + (steps.begins[t] + b) * width;
      over_row<A>(width, [&](int64_t j, auto which) {
        store(to + j, grad ? load(grad + j, which) + load(passed + j, which) : load(passed + j, which), which);
      });
    }
  }

  void project(int64_t t, int64_t b, int64_t b_end, int64_t panel, int64_t panel_end) const {
    projection->weights.multiply({projection->grad_states.get() + (steps.begins[t] + b) * width, width, 1}, b_end - b,
                                 panel, panel_end, false, projection->dm.get() + b * hidden, hidden);
  }

  void differentiate(int64_t t, int64_t b, int64_t b_end) const {
    const int64_t before = steps.before(t), after = steps.after(t), rows_before = steps.rows_before(t);
    const int64_t rows_after = steps.is_step(after) ? steps.rows(after) : 0;
    for (; b < b_end; ++b) {
      const int64_t row = steps.begins[t] + b;
      const A* c_before = b < rows_before ? cells.row(before, b) : c0 + b * hidden;
      const A* grad = grad_output.given() && !projection ? grad_output.row(t, b) : nullptr;
      const A* dm = projection ? projection->dm.get() + b * hidden : dh + b * hidden;
      A* m = projection ? projection->m.get() + row * hidden : b < rows_after ? read.state(after, b) : nullptr;
      differentiate_row(gates.row(t, b), cells.row(t, b), c_before, grad, grad_sums + row * distance, m, dm,
                        dc + b * hidden);
      if (b >= rows_before || states.given())
        read.keep_state(t, b, b < rows_before ? states.row(before, b) : h0 + b * width);
      read.keep_input(t, b);
    }
  }

  // gate, sums: (4 H); cell, c_before, dm, dc: (H); grad, m: (H) or null
  void differentiate_row(const A* gate, const A* cell, const A* c_before, const A* grad, A* sums, A* m, const A* dm,
                         A* dc) const {
    over_row<A>(hidden, [&](int64_t j, auto which) {
      const Vector<A> i = load(gate + j, which), f = load(gate + hidden + j, which);
      const Vector<A> g = load(gate + 2 * hidden + j, which), o = load(gate + 3 * hidden + j, which);
      const Vector<A> tanh_c = tanh<A>(load(cell + j, which)), m_t = o * tanh_c;
      const Vector<A> dm_t = grad ? load(grad + j, which) + load(dm + j, which) : load(dm + j, which);
      const Vector<A> dc_t = load(dc + j, which) + dm_t * (o * (1 - tanh_c * tanh_c));
      store(sums + j, dc_t * (g * i * (1 - i)), which);
      store(sums + hidden + j, dc_t * (load(c_before + j, which) * f * (1 - f)), which);
      store(sums + 2 * hidden + j, dc_t * (i * (1 - g * g)), which);
      store(sums + 3 * hidden + j, dm_t * (m_t * (1 - o)), which);
      store(dc + j, dc_t * f, which);
      if (m) store(m + j, m_t, which);
    });
  }

  void pass_on(int64_t t, int64_t b, int64_t b_end, int64_t panel, int64_t panel_end) const {
    Ahead ahead = gates.ahead(steps.before(t), b, b_end);
    hh.multiply({grad_sums + (steps.begins[t] + b) * distance, distance, 1}, b_end - b, panel, panel_end, false,
                dh + b * width, width, &ahead);
  }
};

template <class A>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> forward(
    const Tensor& input, const Steps& steps, const Tensor& h0, const Tensor& c0, const Tensor& weight_ih,
    const Tensor& weight_hh, const std::optional<Tensor>& bias_ih, const std::optional<Tensor>& bias_hh,
    const std::optional<Tensor>& weight_hr) {
  const int64_t features = weight_ih.size(1), hidden = c0.size(1), width = h0.size(1), sums = 4 * hidden;
  const Tensor w_ih = dense<A>(weight_ih, {sums, features}), w_hh = dense<A>(weight_hh, {sums, width});
  const auto b_ih = dense<A>(bias_ih, {sums}), b_hh = dense<A>(bias_hh, {sums});
  const auto w_hr = dense<A>(weight_hr, {width, hidden});
  const Weights<A> ih(steps, Matrix<A>{values<A>(w_ih), 1, features}, features, sums);
  const Weights<A> hh(steps, Matrix<A>{values<A>(w_hh), 1, width}, width, sums);
  const Matrix<A> projection{w_hr ? values<A>(*w_hr) : nullptr, 1, hidden};
  const auto hr = w_hr ? std::make_unique<Weights<A>>(steps, projection, hidden, width) : nullptr;
  const Scratch<A> bias(b_ih ? sums : 0);  // (4 H)
  for (int64_t j = 0; b_ih && j < sums; ++j) bias.get()[j] = values<A>(b_ih)[j] + values<A>(b_hh)[j];

  const ScalarType dtype = dtype_of<A>;
  const Tensor h = copied<A>(h0, {steps.batch, width}), c = copied<A>(c0, {steps.batch, hidden});
  const Tensor output = new_tensor(steps.shape(width), dtype), cells = new_tensor(steps.shape(hidden), dtype);
  const Tensor gates = new_tensor(steps.shape(sums), dtype);
  const Tensor states = new_tensor(hr ? steps.shape(width) : Sizes{0}, dtype);
  const Scratch<A> m(hr ? steps.batch * hidden : 0);
  const Forward<A> cell{steps, hidden, width, StepRows<A>(steps, input, features), ih, hh, hr.get(),
                        b_ih ? bias.get() : nullptr, data<A>(gates), data<A>(cells), data<A>(output),
                        hr ? data<A>(states) : nullptr, data<A>(h), data<A>(c), hr ? m.get() : data<A>(h)};
  walk_forward(steps, Shares(steps, width * sums + (hr ? width * hidden : 0), sums, A()), cell);
  return {output, h, c, gates, cells, states};
}

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// needs: whether the gradients of input, h0, c0, weight_ih, weight_hh, bias_ih, bias_hh and weight_hr are asked for
template <class A>
Gradients backward(const std::optional<Tensor>& grad_output, const std::optional<Tensor>& grad_h,
                   const std::optional<Tensor>& grad_c, const Tensor& input, const Steps& steps, const Tensor& h0,
                   const Tensor& c0, const Tensor& weight_ih, const Tensor& weight_hh,
                   const std::optional<Tensor>& weight_hr, const Tensor& gates, const Tensor& cells,
                   const Tensor& states, const std::vector<bool>& needs) {
  const int64_t features = weight_ih.size(1), hidden = c0.size(1), width = h0.size(1), sums = 4 * hidden;
  const Tensor w_ih = dense<A>(weight_ih, {sums, features}), w_hh = dense<A>(weight_hh, {sums, width});
  const auto w_hr = dense<A>(weight_hr, {width, hidden});
  const Tensor h_first = dense<A>(h0, {steps.batch, width}), c_first = dense<A>(c0, {steps.batch, hidden});
  const Tensor dh = copied<A>(grad_h, {steps.batch, width}), dc = copied<A>(grad_c, {steps.batch, hidden});
  const Weights<A> hh(steps, Matrix<A>{values<A>(w_hh), width, 1}, sums, width);
  const auto projection = w_hr ? std::make_unique<Projection<A>>(steps, values<A>(*w_hr), hidden, width) : nullptr;
  const int64_t distance = distance_of_rows<A>(sums);
  const Scratch<A> grad_sums(steps.total() * distance);
  const StepsRead<A> read(steps, input, features, width, needs[3], needs[4]);
  const Backward<A> cell{steps, hidden, width, StepRows<A>(steps, gates, sums), StepRows<A>(steps, cells, hidden),
                         StepRows<A>(steps, grad_output, width),
                         StepRows<A>(steps, w_hr ? std::optional(states) : std::nullopt, width),
                         values<A>(h_first), values<A>(c_first), hh,
                         projection.get(), grad_sums.get(), distance, read, data<A>(dh), data<A>(dc)};
  walk_backward(steps, Shares(steps, width * sums + (w_hr ? width * hidden : 0), sums, A()), needs[1], cell);

  const Matrix<A> g{grad_sums.get(), distance, 1};  // (N, 4 H)
  const int64_t rows = steps.total();
  Tensor grad_input, grad_ih, grad_hh, grad_bias, grad_hr;
  if (needs[0]) {
    grad_input = new_tensor(steps.shape(features), dtype_of<A>);
    multiply_whole(g, Matrix<A>{values<A>(w_ih), features, 1}, rows, features, sums, data<A>(grad_input));
  }
  if (needs[5] || needs[6]) grad_bias = new_tensor({sums}, dtype_of<A>);
  if (needs[3]) grad_ih = new_tensor({sums, features}, dtype_of<A>);
  if (needs[4]) grad_hh = new_tensor({sums, width}, dtype_of<A>);
  read.multiply(g, sums, needs[3] ? data<A>(grad_ih) : nullptr, needs[4] ? data<A>(grad_hh) : nullptr,
                needs[5] || needs[6] ? data<A>(grad_bias) : nullptr);
  if (needs[7] && projection) {
    grad_hr = new_tensor({width, hidden}, dtype_of<A>);
    multiply_whole(Matrix<A>{projection->grad_states.get(), width, 1}.transposed(),
                   Matrix<A>{projection->m.get(), hidden, 1}, width, hidden, rows, data<A>(grad_hr));
  }
  return {grad_input, needs[1] ? dh : Tensor(), needs[2] ? dc : Tensor(), grad_ih, grad_hh,
          needs[5] ? grad_bias : Tensor(), needs[6] ? needs[5] ? copied<A>(grad_bias, {sums}) : grad_bias : Tensor(),
          grad_hr};
}

}  // namespace nacre::lstm
