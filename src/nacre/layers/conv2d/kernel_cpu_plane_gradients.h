// The gradients of a depthwise convolution's input and weight, plane by plane, in one pass over the output's gradients.
//
// x[a] w[i] adds to y[p] where a = p s + i d - before. So for the rows and columns of the input in one phase, either
// gradient takes the same windows of g: that of x is the sum over taps of w times a window, and that of a tap's weight
// the sum of x times its window. Each vector of g is loaded once for both.
#pragma once

#include "nacre/layers/conv2d/kernel_cpu_plane_parts.h"

namespace nacre::conv2d {

template <class A>
class PlaneGradients {
 public:
  PlaneGradients(const Shape& shape, bool of_input, bool of_weight)
      : shape_(shape), form_(padded_gradient<A>(shape)), of_input_(of_input), of_weight_(of_weight) {
    for (int64_t phase = 0; phase < shape.columns.stride; ++phase) columns_.emplace_back(shape.columns, phase);
    for (int64_t phase = 0; phase < shape.rows.stride; ++phase) rows_.emplace_back(shape.rows, phase);
    for (const Phase& rows : rows_)
      for (const Phase& columns : columns_) add_taps(rows, columns);
    woven_row_ = (shape.columns.size - 1) / shape.columns.stride + 1;
  }

  const Padded& form() const { return form_; }
  int64_t padded_values() const { return of_input_ || of_weight_ ? shape_.multiplier() * form_.values() : 0; }
  int64_t scratch_values() const { return 2 * woven_values() + weights() * (1 + lanes<A>); }

  // padded: gradients (multiplier, P, Q) with margins; w, grad_w: (multiplier, taps); x, grad_x: (H, W); scratch: the
  // rows of x and of grad_x by phases, sums and weights
  void operator()(const A* padded, const A* w, const A* x, A* scratch, A* grad_x, A* grad_w) const {
    A *split = scratch, *woven = split + woven_values(), *sums = woven + woven_values();
    A* ordered = sums + weights() * lanes<A>;
    for (int64_t tap = 0; tap < weights(); ++tap) ordered[tap] = w[taps_[tap]];
    if (of_weight_) std::fill_n(sums, weights() * lanes<A>, A(0));
    int64_t first = 0, group = 0;
    for (const Phase& rows : rows_) {
      const int64_t begin = rows.begin * shape_.columns.size, step = shape_.rows.stride * shape_.columns.size;
      const int64_t part = rows.count * woven_row_;
      const bool apart = shape_.columns.stride > 1;
      for (int64_t row = 0; apart && of_weight_ && row < rows.count; ++row)
        cut(x + begin + row * step, part, split + row * woven_row_);
      for (size_t phase = 0; phase < columns_.size(); ++phase) {
        const int64_t shared = rows_shared(rows), taps = taps_of(rows, columns_[phase]);
        const int64_t place = static_cast<int64_t>(phase) * part;
        const Windows<A> windows{places_.data() + group, ordered + first, taps / shared, shared,
                                 sums + first * lanes<A>};
        first += taps;
        group += taps / shared;
        if (apart)
          run(windows, padded, split + place, woven + place, woven_row_, rows.count, columns_[phase].count);
        else
          run(windows, padded, x + begin, of_input_ ? grad_x + begin : nullptr, step, rows.count, shape_.columns.size);
      }
      for (int64_t row = 0; apart && of_input_ && row < rows.count; ++row)
        weave(woven + row * woven_row_, part, grad_x + begin + row * step);
    }
    for (int64_t tap = 0; of_weight_ && tap < weights(); ++tap)
      grad_w[taps_[tap]] = total<A>(load(sums + tap * lanes<A>, Whole{}));
  }

 private:
  int64_t weights() const { return shape_.multiplier() * shape_.taps(); }
  int64_t taps_of(const Phase& rows, const Phase& columns) const {
    return shape_.multiplier() * static_cast<int64_t>(rows.taps.size() * columns.taps.size());
  }

  int64_t woven_values() const {
    if (shape_.columns.stride == 1) return 0;
    return shape_.columns.stride * woven_row_ * ((shape_.rows.size - 1) / shape_.rows.stride + 1);
  }

  // How many taps of a column share their rows: the first is read one row below the second, and so on.
  int64_t rows_shared(const Phase& rows) const {
    const Axis& axis = shape_.rows;
    const auto count = static_cast<int64_t>(rows.taps.size());
    if (count < 2 || axis.shift(rows.taps[1]) - axis.shift(rows.taps[0]) != 1) return 1;
    for (const int64_t shared : {7, 5, 3, 2})
      if (shared <= most_shared && count % shared == 0) return shared;
    return 1;
  }

  void add_taps(const Phase& rows, const Phase& columns) {
    const int64_t shared = rows_shared(rows);
    for (int64_t k = 0; k < shape_.multiplier(); ++k)
      for (const int64_t j : columns.taps)
        for (size_t end = rows.taps.size(); end > 0; end -= static_cast<size_t>(shared)) {
          const int64_t row = rows.first + form_.top - shape_.rows.shift(rows.taps[end - 1]);
          const int64_t column = columns.first + form_.left - shape_.columns.shift(j);
          places_.push_back(k * form_.values() + form_.place(row, column));
          for (size_t tap = 1; tap <= static_cast<size_t>(shared); ++tap)
            taps_.push_back(k * shape_.taps() + rows.taps[end - tap] * shape_.columns.taps + j);
        }
  }

  void run(const Windows<A>& windows, const A* padded, const A* x, A* grad_x, int64_t step, int64_t rows,
           int64_t columns) const {
    const auto parts = [&](auto shared) {
      constexpr int64_t count = decltype(shared)::value;
      const int64_t from = form_.row_step();
      if (of_input_ && of_weight_)
        PlanePart<A, true, true, count>{padded, from, x, grad_x, step}.all(windows, rows, columns);
      else if (of_input_)
        PlanePart<A, true, false, count>{padded, from, x, grad_x, step}.all(windows, rows, columns);
      else
        PlanePart<A, false, true, count>{padded, from, x, grad_x, step}.all(windows, rows, columns);
    };
    if (windows.shared == 1) return parts(std::integral_constant<int64_t, 1>());
    if (windows.shared == 2) return parts(std::integral_constant<int64_t, 2>());
    if (windows.shared == 3) return parts(std::integral_constant<int64_t, 3>());
    if constexpr (most_shared > 3) {
      if (windows.shared == 5) return parts(std::integral_constant<int64_t, 5>());
      if (windows.shared == 7) return parts(std::integral_constant<int64_t, 7>());
    }
  }

  // A row of the input into those of its phases, `part` values apart.
  void cut(const A* from, int64_t part, A* row) const {
    const int64_t width = shape_.columns.size, stride = shape_.columns.stride;
    if (stride == 2) return split_row(from, width, row + columns_[0].begin * part, row + columns_[1].begin * part);
    for (size_t phase = 0; phase < columns_.size(); ++phase)
      for (int64_t i = 0; i < columns_[phase].count; ++i)
        row[static_cast<int64_t>(phase) * part + i] = from[columns_[phase].begin + stride * i];
  }

  // One row of the input's gradient from those of its phases.
  void weave(const A* row, int64_t part, A* to) const {
    const int64_t width = shape_.columns.size, stride = shape_.columns.stride;
    if (stride == 2) return weave_row(row + columns_[0].begin * part, row + columns_[1].begin * part, width, to);
    for (size_t phase = 0; phase < columns_.size(); ++phase)
      for (int64_t i = 0; i < columns_[phase].count; ++i)
        to[columns_[phase].begin + stride * i] = row[static_cast<int64_t>(phase) * part + i];
  }

  const Shape& shape_;
  Padded form_;
  bool of_input_, of_weight_;
  int64_t woven_row_;
  std::vector<Phase> rows_, columns_;
  Numbers places_, taps_;  // phase by phase: where the groups of taps lie in the padded gradients, and which taps
};

}  // namespace nacre::conv2d
