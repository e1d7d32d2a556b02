// The gradient of an input of few channels: what each output's gradient adds to the rows of the input under its window.
//
// For one row of outputs, the products over the E output channels are a matrix product (C J taps, E) (E, Q) for each
// tap row i, whose rows are then added to row p s + i d - before of the input, as far as the tap reaches to the right.
// A thread takes bands of input rows, and adds to each from the upper outputs to the lower ones.
#pragma once

#include "nacre/layers/conv2d/kernel_cpu_planes.h"

#include <utility>

namespace nacre::conv2d {

constexpr int64_t band_rows = 8;
constexpr int64_t most_taps = 12;                          // with two vectors each: 24 sums of 32 registers,
constexpr int64_t side_by_side = vector_bytes == 64 ? 2 : 1;  // or 12 of 16

// sums[tap, i] += sum over E of w[e, tap] g[e, i] for `taps` taps and `vectors` vectors.
// w: (E, `step`), g: (E, `columns`), sums: (taps, `columns`)
template <class A, int64_t taps, int64_t vectors>
inline void scatter_block(const A* w, int64_t step, const A* g, int64_t columns, int64_t depth, A* sums) {
  Vector<A> parts[taps][vectors] = {};
  for (int64_t e = 0; e < depth; ++e) {
    Vector<A> grads[vectors];
    for (int64_t v = 0; v < vectors; ++v) grads[v] = load(g + e * columns + v * lanes<A>, Whole{});
    for (int64_t tap = 0; tap < taps; ++tap) {
      const Vector<A> weight = every(w[e * step + tap]);
      for (int64_t v = 0; v < vectors; ++v) parts[tap][v] = multiply_add<A>(weight, grads[v], parts[tap][v]);
    }
  }
  for (int64_t tap = 0; tap < taps; ++tap)
    for (int64_t v = 0; v < vectors; ++v) {
      A* to = sums + tap * columns + v * lanes<A>;
      store(to, load(to, Whole{}) + parts[tap][v], Whole{});
    }
}

// The same for whole rows.
template <class A, int64_t taps>
void scatter_row(const A* w, int64_t step, const A* g, int64_t columns, int64_t depth, A* sums) {
  int64_t i = 0;
  for (; i + side_by_side * lanes<A> <= columns; i += side_by_side * lanes<A>)
    scatter_block<A, taps, side_by_side>(w, step, g + i, columns, depth, sums + i);
  for (; i < columns; i += lanes<A>) scatter_block<A, taps, 1>(w, step, g + i, columns, depth, sums + i);
}

template <class A, size_t... Counts>
void scatter_taps(int64_t taps, const A* w, int64_t step, const A* g, int64_t columns, int64_t depth, A* sums,
                  std::index_sequence<Counts...>) {
  ((taps == Counts + 1 ? scatter_row<A, Counts + 1>(w, step, g, columns, depth, sums) : void()), ...);
}

template <class A>
class Scatter {
 public:
  Scatter(const Shape& shape, const A* g, const A* weights)
      : shape_(shape), g_(g), weights_(weights), packed_columns_(whole_vectors(shape.columns.outputs, lanes<A>)),
        part_(std::max((shape.columns.before + shape.columns.size - 1) / shape.columns.stride + 1,
                       shape.columns.most_shift() + packed_columns_)) {}

  int64_t packed_values() const { return shape_.kernels * packed_columns_; }
  int64_t band_values() const { return band_rows * row_values() + shape_.columns.stride * part_; }

  // Rows [begin, end) of one sample. packed: scratch whose margins are zero; band: scratch
  void operator()(int64_t sample, int64_t begin, int64_t end, A* packed, A* band, A* grad_x) const {
    const Axis& rows = shape_.rows;
    std::fill_n(band, (end - begin) * row_values(), A(0));
    for (int64_t p = 0; p < rows.outputs; ++p) {
      const int64_t top = p * rows.stride - rows.before;
      if (top >= end || top + (rows.taps - 1) * rows.dilation < begin) continue;
      bool is_packed = false;
      for (int64_t i = 0; i < rows.taps; ++i) {
        const int64_t row = top + i * rows.dilation;
        if (row < begin || row >= end) continue;
        if (!std::exchange(is_packed, true)) pack(sample, p, packed);
        add(i, packed, band + (row - begin) * row_values());
      }
    }
    A* folded = band + band_rows * row_values();
    for (int64_t row = begin; row < end; ++row) write(band + (row - begin) * row_values(), folded, sample, row, grad_x);
  }

  // weights: (I, E, C J) from w: (E, C, I, J)
  static void reorder(const Shape& shape, const A* w, A* weights) {
    for (int64_t i = 0; i < shape.rows.taps; ++i)
      for (int64_t e = 0; e < shape.kernels; ++e)
        for (int64_t c = 0; c < shape.channels; ++c) {
          const A* from = w + ((e * shape.channels + c) * shape.rows.taps + i) * shape.columns.taps;
          weights = std::copy(from, from + shape.columns.taps, weights);
        }
  }

 private:
  int64_t row_taps() const { return shape_.channels * shape_.columns.taps; }
  int64_t row_values() const { return row_taps() * packed_columns_; }

  // packed: (E, packed columns) of row p of the outputs' gradients
  void pack(int64_t sample, int64_t p, A* packed) const {
    const int64_t kernels = shape_.kernels, outputs = shape_.columns.outputs;
    if (!shape_.channels_last) {
      const A* from = g_ + (sample * kernels * shape_.rows.outputs + p) * outputs;
      for (int64_t e = 0; e < kernels; ++e, from += shape_.output_plane())
        std::copy(from, from + outputs, packed + e * packed_columns_);
      return;
    }
    const A* from = g_ + (sample * shape_.rows.outputs + p) * outputs * kernels;
    for (int64_t e = 0; e < kernels; ++e)
      for (int64_t q = 0; q < outputs; ++q) packed[e * packed_columns_ + q] = from[q * kernels + e];
  }

  // Adds the products of tap row i. row: (C J, packed columns)
  void add(int64_t i, const A* packed, A* row) const {
    const int64_t taps = row_taps(), blocks = (taps + most_taps - 1) / most_taps;
    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t first = taps * block / blocks, count = taps * (block + 1) / blocks - first;
      scatter_taps(count, weights_ + i * shape_.kernels * taps + first, taps, packed, packed_columns_, shape_.kernels,
                   row + first * packed_columns_, std::make_index_sequence<most_taps>());
    }
  }

  // Adds the taps of a channel. row: (J, packed columns), folded: (phases, part)
  void fold(const A* row, A* folded) const {
    std::fill_n(folded, shape_.columns.stride * part_, A(0));
    for (int64_t j = 0; j < shape_.columns.taps; ++j, row += packed_columns_) {
      A* to = folded + shape_.columns.phase(j) * part_ + shape_.columns.shift(j);
      over_row<A>(packed_columns_, [&](int64_t i, auto which) {
        store(to + i, load(to + i, which) + load(row + i, which), which);
      });
    }
  }

  void write(const A* row, A* folded, int64_t sample, int64_t a, A* grad_x) const {
    const int64_t width = shape_.columns.size, stride = shape_.columns.stride, left = shape_.columns.before;
    const auto at = [&](int64_t column) { return folded + column % stride * part_ + column / stride; };
    for (int64_t c = 0; c < shape_.channels; ++c, row += shape_.columns.taps * packed_columns_) {
      fold(row, folded);
      if (shape_.channels_last) {
        A* to = grad_x + (sample * shape_.rows.size + a) * width * shape_.channels + c;
        for (int64_t b = 0; b < width; ++b) to[b * shape_.channels] = *at(b + left);
        continue;
      }
      A* to = grad_x + ((sample * shape_.channels + c) * shape_.rows.size + a) * width;
      if (stride == 1)
        std::copy(folded + left, folded + left + width, to);
      else if (stride == 2)
        weave_row(at(left), at(left + 1), width, to);
      else
        for (int64_t b = 0; b < width; ++b) to[b] = *at(b + left);
    }
  }

  const Shape& shape_;
  const A *g_, *weights_;
  int64_t packed_columns_, part_;
};

// g: (N, E, P, Q), w: (E, C, I, J), grad_x: (N, C, H, W), the first and the last in channels-last memory where the
// shape says so
template <class A>
void scatter_gradients(const Shape& shape, const A* g, const A* w, A* grad_x) {
  const Scratch<A> weights(shape.kernels * shape.channels * shape.taps());
  Scatter<A>::reorder(shape, w, weights.get());
  const Scatter<A> scatter(shape, g, weights.get());
  const int64_t bands = (shape.rows.size + band_rows - 1) / band_rows;
  const int64_t work = band_rows * shape.columns.size * shape.channels * shape.taps() * shape.kernels;
  in_parallel(shape.samples * bands, std::max<int64_t>((1 << 20) / work, 1), [&](int64_t begin, int64_t end) {
    const Scratch<A> packed(scatter.packed_values()), band(scatter.band_values());
    std::fill_n(packed.get(), scatter.packed_values(), A(0));
    for (int64_t task = begin; task < end; ++task) {
      const int64_t first = task % bands * band_rows;
      scatter(task / bands, first, std::min(first + band_rows, shape.rows.size), packed.get(), band.get(), grad_x);
    }
  });
}

}  // namespace nacre::conv2d
