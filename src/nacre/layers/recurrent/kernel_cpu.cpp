// LSTM and GRU: what comes in is checked, and their kernels are chosen by dtype.
#include "nacre/layers/recurrent/kernel_cpu_gru.h"
#include "nacre/layers/recurrent/kernel_cpu_lstm.h"

namespace nacre {
namespace {

template <class Body>
auto with_recurrence_type(const Tensor& input, Body body) {
  STD_TORCH_CHECK(input.scalar_type() == ScalarType::Float || input.scalar_type() == ScalarType::Double,
                  "recurrence: this kernel serves float32 and float64");
  return input.scalar_type() == ScalarType::Float ? body(float()) : body(double());
}

void check_lstm(const Tensor& h0, const Tensor& c0, const Tensor& weight_ih, const std::optional<Tensor>& bias_ih,
                const std::optional<Tensor>& bias_hh, const std::optional<Tensor>& weight_hr) {
  STD_TORCH_CHECK(weight_ih.dim() == 2 && bias_ih.has_value() == bias_hh.has_value(),
                  "lstm: weights of 2 dimensions, and both biases or none");
  STD_TORCH_CHECK(h0.dim() == 2 && c0.dim() == 2 && (weight_hr || h0.size(1) == c0.size(1)),
                  "lstm: states of 2 dimensions, of one size without a projection");
}

auto lstm_forward(const Tensor& input, const std::optional<Tensor>& batch_sizes, const Tensor& h0, const Tensor& c0,
                  const Tensor& weight_ih, const Tensor& weight_hh, const std::optional<Tensor>& bias_ih,
                  const std::optional<Tensor>& bias_hh, const std::optional<Tensor>& weight_hr, bool reverse) {
  check_lstm(h0, c0, weight_ih, bias_ih, bias_hh, weight_hr);
  const Steps steps(input, batch_sizes, h0, reverse);
  return with_recurrence_type(input, [&](auto type) {
    return lstm::forward<decltype(type)>(input, steps, h0, c0, weight_ih, weight_hh, bias_ih, bias_hh, weight_hr);
  });
}

auto lstm_backward(const std::optional<Tensor>& grad_output, const std::optional<Tensor>& grad_h,
                   const std::optional<Tensor>& grad_c, const Tensor& input, const Tensor& h0, const Tensor& c0,
                   const Tensor& weight_ih, const Tensor& weight_hh, const std::optional<Tensor>& bias_ih,
                   const std::optional<Tensor>& bias_hh, const std::optional<Tensor>& weight_hr,
                   const std::optional<Tensor>& batch_sizes, bool reverse, const Tensor& gates, const Tensor& cells,
                   const Tensor& states, const std::vector<bool>& needs) {
  check_lstm(h0, c0, weight_ih, bias_ih, bias_hh, weight_hr);
  STD_TORCH_CHECK(needs.size() == 8, "lstm: eight gradients are asked for or not");
  const Steps steps(input, batch_sizes, h0, reverse);
  return with_recurrence_type(input, [&](auto type) {
    return lstm::backward<decltype(type)>(grad_output, grad_h, grad_c, input, steps, h0, c0, weight_ih, weight_hh,
                                          weight_hr, gates, cells, states, needs);
  });
}

auto gru_forward(const Tensor& input, const std::optional<Tensor>& batch_sizes, const Tensor& h0,
                 const Tensor& weight_ih, const Tensor& weight_hh, const std::optional<Tensor>& bias_ih,
                 const std::optional<Tensor>& bias_hh, bool reverse) {
  STD_TORCH_CHECK(weight_ih.dim() == 2 && bias_ih.has_value() == bias_hh.has_value(),
                  "gru: weights of 2 dimensions, and both biases or none");
  const Steps steps(input, batch_sizes, h0, reverse);
  return with_recurrence_type(input, [&](auto type) {
    return gru::forward<decltype(type)>(input, steps, h0, weight_ih, weight_hh, bias_ih, bias_hh);
  });
}

auto gru_backward(const std::optional<Tensor>& grad_output, const std::optional<Tensor>& grad_h, const Tensor& input,
                  const Tensor& h0, const Tensor& weight_ih, const Tensor& weight_hh,
                  const std::optional<Tensor>& bias_ih, const std::optional<Tensor>& bias_hh,
                  const std::optional<Tensor>& batch_sizes, bool reverse, const Tensor& gates, const Tensor& states,
                  const std::vector<bool>& needs) {
  STD_TORCH_CHECK(weight_ih.dim() == 2 && bias_ih.has_value() == bias_hh.has_value(),
                  "gru: weights of 2 dimensions, and both biases or none");
  STD_TORCH_CHECK(needs.size() == 6, "gru: six gradients are asked for or not");
  const Steps steps(input, batch_sizes, h0, reverse);
  return with_recurrence_type(input, [&](auto type) {
    return gru::backward<decltype(type)>(grad_output, grad_h, input, steps, h0, weight_ih, weight_hh, gates, states,
                                         needs);
  });
}

}  // namespace
}  // namespace nacre

STABLE_TORCH_LIBRARY_IMPL(nacre, CPU, m) {
  m.impl("lstm.kernel", TORCH_BOX(&nacre::lstm_forward));
  m.impl("lstm_backward.kernel", TORCH_BOX(&nacre::lstm_backward));
  m.impl("gru.kernel", TORCH_BOX(&nacre::gru_forward));
  m.impl("gru_backward.kernel", TORCH_BOX(&nacre::gru_backward));
}
