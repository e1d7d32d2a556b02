// Depthwise convolution, forward and backward, where channels are planes: each thread takes whole planes.
#pragma once

#include "nacre/layers/conv2d/kernel_cpu_planes.h"

namespace nacre::conv2d {

inline int64_t planes_per_thread(const Shape& shape) {
  return std::max<int64_t>(values_per_thread / std::max(shape.input_plane(), shape.output_plane()), 1);
}

// x: (N, C, H, W), w: (E, taps), b: (E) or null, y: (N, E, P, Q)
template <class A>
void forward_planes(const Shape& shape, const A* x, const A* w, const A* b, A* y) {
  const PaddedInput<A> input(shape);
  in_parallel(shape.samples * shape.channels, planes_per_thread(shape), [&](int64_t begin, int64_t end) {
    const Scratch<A> padded(input.form.values());
    std::fill_n(padded.get(), input.form.values(), A(0));
    for (int64_t plane = begin; plane < end; ++plane) {
      input.form.copy(x + plane * shape.input_plane(), shape.rows.size, shape.columns.size, padded.get());
      for (int64_t k = 0; k < shape.multiplier(); ++k) {
        const int64_t out = plane * shape.multiplier() + k, kernel = out % shape.kernels;
        correlate(padded.get(), input.row_step(shape), input.places.data(), w + kernel * shape.taps(), shape.taps(),
                  b ? b[kernel] : A(0), y + out * shape.output_plane(), shape.columns.outputs, shape.rows.outputs,
                  shape.columns.outputs);
      }
    }
  });
}

// The gradient of the input, plane by plane.
template <class A>
class InputGradient {
 public:
  explicit InputGradient(const Shape& shape) : shape_(shape), form_(padded_gradient<A>(shape)) {
    for (int64_t phase = 0; phase < shape.columns.stride; ++phase) columns_.emplace_back(shape.columns, phase);
    for (int64_t phase = 0; phase < shape.rows.stride; ++phase) rows_.emplace_back(shape.rows, phase);
    for (const Phase& rows : rows_)
      for (const Phase& columns : columns_) sums_.push_back(sum_of(rows, columns));
    woven_row_ = (shape.columns.size - 1) / shape.columns.stride + 1;
  }

  const Padded& form() const { return form_; }
  int64_t padded_values() const { return shape_.multiplier() * form_.values(); }
  int64_t scratch_values() const { return woven_values() + shape_.multiplier() * shape_.taps(); }

  // padded: the gradients of the channel's outputs; w: (multiplier, taps); scratch: woven and, behind it, weights;
  // grad_x: (H, W)
  void operator()(const A* padded, const A* w, A* scratch, A* grad_x) const {
    A *woven = scratch, *weights = scratch + woven_values();
    const Sum* next = sums_.data();
    for (const Phase& rows : rows_) {
      A* to = grad_x + rows.begin * shape_.columns.size;
      const int64_t step = shape_.rows.stride * shape_.columns.size, part = rows.count * woven_row_;
      if (shape_.columns.stride == 1) {
        run(*next++, padded, w, weights, to, step, rows, columns_[0]);
        continue;
      }
      for (size_t phase = 0; phase < columns_.size(); ++phase)
        run(*next++, padded, w, weights, woven + static_cast<int64_t>(phase) * part, woven_row_, rows, columns_[phase]);
      for (int64_t row = 0; row < rows.count; ++row) weave(woven + row * woven_row_, part, to + row * step);
    }
  }

 private:
  // Where the taps of a phase lie in the padded gradients, and which of the (multiplier, taps) weights they have.
  struct Sum {
    Numbers places, taps;
  };

  int64_t woven_values() const {
    if (shape_.columns.stride == 1) return 0;
    return shape_.columns.stride * woven_row_ * ((shape_.rows.size - 1) / shape_.rows.stride + 1);
  }

  Sum sum_of(const Phase& rows, const Phase& columns) const {
    Sum sum;
    for (int64_t k = 0; k < shape_.multiplier(); ++k)
      for (const int64_t i : rows.taps)
        for (const int64_t j : columns.taps) {
          const int64_t row = rows.first + form_.top - shape_.rows.shift(i);
          const int64_t column = columns.first + form_.left - shape_.columns.shift(j);
          sum.places.push_back(k * form_.values() + form_.place(row, column));
          sum.taps.push_back(k * shape_.taps() + i * shape_.columns.taps + j);
        }
    return sum;
  }

  void run(const Sum& sum, const A* padded, const A* w, A* weights, A* to, int64_t step, const Phase& rows,
           const Phase& columns) const {
    const int64_t taps = static_cast<int64_t>(sum.taps.size());
    for (int64_t tap = 0; tap < taps; ++tap) weights[tap] = w[sum.taps[tap]];
    correlate(padded, form_.row_step(), sum.places.data(), weights, taps, A(0), to, step, rows.count, columns.count);
  }

  // One row of the input's gradient from those of its phases, `part` values apart.
  void weave(const A* row, int64_t part, A* to) const {
    const int64_t width = shape_.columns.size, stride = shape_.columns.stride;
    if (stride == 2) return weave_row(row + columns_[0].begin * part, row + columns_[1].begin * part, width, to);
    for (size_t phase = 0; phase < columns_.size(); ++phase)
      for (int64_t i = 0; i < columns_[phase].count; ++i)
        to[columns_[phase].begin + stride * i] = row[static_cast<int64_t>(phase) * part + i];
  }

  const Shape& shape_;
  Padded form_;
  int64_t woven_row_;
  std::vector<Phase> rows_, columns_;
  std::vector<Sum> sums_;
};

// The gradients of weight and bias are summed plane by plane, and over the samples at the end.
template <class A>
void backward_planes(const Shape& shape, const Gradients<A>& at) {
  const PaddedInput<A> input(shape);
  const InputGradient<A> gradient(shape);
  const int64_t m = shape.multiplier(), taps = shape.taps(), outputs = shape.output_plane();
  const Scratch<A> weight_parts(at.grad_w ? shape.samples * shape.kernels * taps : 0);  // (N, E, taps)
  const Scratch<A> bias_parts(at.grad_b ? shape.samples * shape.kernels : 0);           // (N, E)
  in_parallel(shape.samples * shape.channels, planes_per_thread(shape), [&](int64_t begin, int64_t end) {
    const Scratch<A> x(at.grad_w ? input.form.values() : 0), g(at.grad_x ? gradient.padded_values() : 0);
    const Scratch<A> scratch(at.grad_x ? gradient.scratch_values() : 0);
    if (at.grad_w) std::fill_n(x.get(), input.form.values(), A(0));
    if (at.grad_x) std::fill_n(g.get(), gradient.padded_values(), A(0));
    for (int64_t plane = begin; plane < end; ++plane) {
      if (at.grad_w) input.form.copy(at.x + plane * shape.input_plane(), shape.rows.size, shape.columns.size, x.get());
      for (int64_t k = 0; k < m; ++k) {
        const int64_t out = plane * m + k;
        const A* grad = at.g + out * outputs;
        if (at.grad_x)
          gradient.form().copy(grad, shape.rows.outputs, shape.columns.outputs, g.get() + k * gradient.form().values());
        if (at.grad_w)
          weight_sums(x.get(), input.row_step(shape), input.places.data(), taps, grad, shape.rows.outputs,
                      shape.columns.outputs, weight_parts.get() + out * taps);
        if (at.grad_b)
          bias_parts.get()[out] = sums_over_row<A, 1>(outputs, [&](int64_t i, auto which) {
            return std::array<Vector<A>, 1>{load(grad + i, which)};
          })[0];
      }
      if (at.grad_x)
        gradient(g.get(), at.w + plane % shape.channels * m * taps, scratch.get(),
                 at.grad_x + plane * shape.input_plane());
    }
  });
  if (at.grad_w) add_blocks(weight_parts.get(), at.grad_w, shape.samples, shape.kernels * taps);
  if (at.grad_b) add_blocks(bias_parts.get(), at.grad_b, shape.samples, shape.kernels);
}

}  // namespace nacre::conv2d
