// The gradients of the weight and the bias of a convolution of few input channels, with the kernels in the lanes of
// vectors.
//
// The gradients of a band's outputs are packed so that those of one position lie together, a vector for some kernels.
// Each is multiplied with the input under every tap, a value spread over a vector. A block of taps and kernels is
// summed up in registers over the positions of the band.
#pragma once

#include "nacre/core/cpu_matmul.h"
#include "nacre/layers/conv2d/kernel_cpu_few_channels.h"

namespace nacre::conv2d {

constexpr int64_t spread_taps = vector_bytes == 64 ? 12 : 6;  // with two vectors each: 24 sums of 32 registers,
                                                              // or 12 of 16

// Positions of outputs, and how far apart the input under them lies.
struct Positions {
  int64_t rows, columns, row_step, column_step;

  int64_t count() const { return rows * columns; }
};

// sums[tap] += g[position] x[place[tap] + position] over all positions. g: (positions, `step`), sums: (taps, `step`)
template <class A, int64_t taps, int64_t vectors>
void across_kernels_block(const A* g, const A* x, const Positions& positions, const int64_t* places, A* sums,
                          int64_t step) {
  Vector<A> parts[taps][vectors] = {};
  for (int64_t row = 0; row < positions.rows; ++row) {
    const A* at = x + row * positions.row_step;
    for (int64_t column = 0; column < positions.columns; ++column, at += positions.column_step, g += step) {
      Vector<A> grads[vectors];
      for (int64_t v = 0; v < vectors; ++v) grads[v] = in_register(load(g + v * lanes<A>, Whole{}));
#pragma GCC unroll 12
      for (int64_t tap = 0; tap < taps; ++tap) {
        const Vector<A> value = every(at[places[tap]]);
        for (int64_t v = 0; v < vectors; ++v) parts[tap][v] = multiply_add<A>(grads[v], value, parts[tap][v]);
      }
    }
  }
#pragma GCC unroll 12
  for (int64_t tap = 0; tap < taps; ++tap)
    for (int64_t v = 0; v < vectors; ++v) {
      A* to = sums + tap * step + v * lanes<A>;
      store(to, load(to, Whole{}) + parts[tap][v], Whole{});
    }
}

// The input under a band of outputs: where it lies, or copied where it has padding.
template <class A>
class InputUnder {
 public:
  explicit InputUnder(const Shape& shape) : shape_(shape) {
    const Axis &rows = shape.rows, &columns = shape.columns;
    const auto has_padding = [](const Axis& axis) { return axis.before > 0 || axis.under(axis.outputs) > axis.size; };
    in_place_ = !has_padding(rows) && !has_padding(columns);
    const int64_t width = in_place_ ? columns.size : columns.under(columns.outputs);
    const bool last = in_place_ && shape.channels_last;
    column_step_ = last ? shape.channels : 1, row_step_ = width * column_step_;
    channel_step_ = last ? 1 : in_place_ ? shape.input_plane() : rows.under(most_rows) * row_step_;
    for (int64_t c = 0; c < shape.channels; ++c)
      for (int64_t i = 0; i < rows.taps; ++i)
        for (int64_t j = 0; j < columns.taps; ++j)
          places_.push_back(c * channel_step_ + i * rows.dilation * row_step_ + j * columns.dilation * column_step_);
  }

  static constexpr int64_t most_rows = 8;  // of outputs

  const Numbers& places() const { return places_; }  // of the taps (C, I, J) of the first output
  int64_t copied_values() const { return in_place_ ? 0 : shape_.channels * channel_step_; }
  Positions positions(int64_t rows) const {
    return {rows, shape_.columns.outputs, shape_.rows.stride * row_step_, shape_.columns.stride * column_step_};
  }

  // From row p of the outputs of a sample on. x: (N, C, H, W), copied: scratch whose margins are zero
  const A* of(int64_t sample, int64_t p, int64_t rows, const A* x, A* copied) const {
    x += sample * shape_.channels * shape_.input_plane();
    const int64_t top = p * shape_.rows.stride - shape_.rows.before;
    if (in_place_) return x + top * row_step_;
    for (int64_t c = 0; c < shape_.channels; ++c)
      for (int64_t row = 0; row < shape_.rows.under(rows); ++row)
        copy(x, c, top + row, copied + c * channel_step_ + row * row_step_);
    return copied;
  }

 private:
  // Row `row` of a channel, or zeros outside of the input.
  void copy(const A* x, int64_t c, int64_t row, A* to) const {
    const int64_t left = shape_.columns.before, width = shape_.columns.size;
    const int64_t inside = std::max<int64_t>(std::min(width, row_step_ - left), 0);
    if (row < 0 || row >= shape_.rows.size) {
      std::fill_n(to, row_step_, A(0));
    } else if (shape_.channels_last) {
      const A* from = x + row * width * shape_.channels + c;
      for (int64_t i = 0; i < inside; ++i) to[left + i] = from[i * shape_.channels];
    } else {
      std::copy_n(x + (c * shape_.rows.size + row) * width, inside, to + left);
    }
  }

  const Shape& shape_;
  bool in_place_;
  int64_t channel_step_, row_step_, column_step_;
  Numbers places_;
};

template <class A>
class GradientAcrossKernels {
 public:
  explicit GradientAcrossKernels(const Shape& shape)
      : shape_(shape), input_(shape), panels_(shape.kernels), width_(panels_.vectors * lanes<A>),
        taps_(shape.channels * shape.taps()), each_((shape.rows.outputs + most_rows - 1) / most_rows) {}

  int64_t bands() const { return shape_.samples * each_; }
  int64_t sums() const { return width_ * (taps_ + 1); }  // of the weights, then of the biases

  A weight(const A* sums, int64_t e, int64_t tap) const {
    int64_t panel = 0;
    while (panels_.begin(panel + 1) <= e) ++panel;
    return sums[panels_.begin(panel) * taps_ + tap * panels_.size(panel) + e - panels_.begin(panel)];
  }
  const A* biases(const A* sums) const { return sums + width_ * taps_; }

  // What a thread needs.
  class Room {
   public:
    explicit Room(const GradientAcrossKernels& of)
        : of_(of), copied_(of.input_.copied_values()), packed_(of.width_ * most_rows * of.shape_.columns.outputs) {
      std::fill_n(copied_.get(), of.input_.copied_values(), A(0));
    }

    void start(A* sums) { std::fill_n(sums_ = sums, of_.sums(), A(0)); }
    void add(int64_t band, const A* g, const A* x) { of_.add(band, g, x, copied_.get(), packed_.get(), sums_); }
    void finish() {}

   private:
    const GradientAcrossKernels& of_;
    Scratch<A> copied_, packed_;
    A* sums_ = nullptr;
  };

 private:
  static constexpr int64_t most_rows = InputUnder<A>::most_rows;

  void add(int64_t band, const A* g, const A* x, A* copied, A* packed, A* sums) const {
    const int64_t sample = band / each_, p = band % each_ * most_rows;
    const int64_t rows = std::min(most_rows, shape_.rows.outputs - p), kernels = shape_.kernels;
    const Positions positions = input_.positions(rows);
    const A* from = input_.of(sample, p, rows, x, copied);
    g += sample * kernels * shape_.output_plane() + p * shape_.columns.outputs * (shape_.channels_last ? kernels : 1);
    const Matrix<A> grads = shape_.channels_last ? Matrix<A>{g, kernels, 1} : Matrix<A>{g, 1, shape_.output_plane()};
    pack_panels(grads, positions.count(), kernels, packed);
    for (int64_t panel = 0; panel < panels_.count; ++panel) {
      const int64_t begin = panels_.begin(panel), size = panels_.size(panel);
      const A* own = packed + begin * positions.count();
      for (int64_t first = 0; first < size; first += 2 * lanes<A>)
        add_weights(std::min(2 * lanes<A>, size - first), own + first, from, positions,
                    sums + begin * taps_ + first, size);
      add_rows(own, positions.count(), size, sums + width_ * taps_ + begin);
    }
  }

  void add_weights(int64_t kernels, const A* g, const A* x, const Positions& positions, A* sums, int64_t step) const {
    const Parts blocks(taps_, spread_taps);
    for (int64_t block = 0; block < blocks.count; ++block) {
      const int64_t tap = blocks.begin(block), taps = blocks.begin(block + 1) - tap;
      add_taps(kernels > lanes<A>, taps, g, x, positions, input_.places().data() + tap, sums + tap * step, step,
               std::make_index_sequence<spread_taps>());
    }
  }

  template <size_t... Counts>
  static void add_taps(bool two, int64_t taps, const A* g, const A* x, const Positions& positions,
                       const int64_t* places, A* sums, int64_t step, std::index_sequence<Counts...>) {
    const auto run = [&](auto count) {
      two ? across_kernels_block<A, count, 2>(g, x, positions, places, sums, step)
          : across_kernels_block<A, count, 1>(g, x, positions, places, sums, step);
    };
    ((taps == Counts + 1 ? run(std::integral_constant<int64_t, Counts + 1>()) : void()), ...);
  }

  // Their sum, in runs, since rounding errors grow with the length of a plain sum. values: (rows, columns)
  static void add_rows(const A* values, int64_t rows, int64_t columns, A* sums) {
    constexpr int64_t runs = 4;
    for (int64_t i = 0; i < columns; i += lanes<A>) {
      Vector<A> parts[runs] = {};
      for (int64_t row = 0; row < rows; ++row) parts[row % runs] += load(values + row * columns + i, Whole{});
      store(sums + i, load(sums + i, Whole{}) + ((parts[0] + parts[1]) + (parts[2] + parts[3])), Whole{});
    }
  }

  const Shape& shape_;
  InputUnder<A> input_;
  Panels<A> panels_;
  int64_t width_, taps_, each_;
};

}  // namespace nacre::conv2d
