// Convolution of few input channels: blocks of output channels, vectors of neighbouring outputs.
//
// A thread takes bands of output rows, and copies the input rows under a band, padded and cut into phases, where they
// stay in the caches. A block of outputs is summed up in registers over all C I J taps: each takes the vectors of the
// input under it and one weight an output channel, which lie side by side in memory.
#pragma once

#include "nacre/layers/conv2d/kernel_cpu_planes.h"

#include <utility>

namespace nacre::conv2d {

constexpr int64_t most_kernels = 12;                            // with two vectors each: 24 sums of 32 registers,
constexpr int64_t output_vectors = vector_bytes == 64 ? 2 : 1;  // or 12 of 16

// Bands of output rows, and the input rows under them: all channels, padded and cut into phases.
template <class A>
class Bands {
 public:
  explicit Bands(const Shape& shape)
      : shape_(shape), form_{shape.rows.under(most_rows), shape.columns.stride,
                             whole_vectors(shape.columns.outputs, lanes<A>) + shape.columns.most_shift() + 1, 0,
                             shape.columns.before},
        each_((shape.rows.outputs + most_rows - 1) / most_rows) {
    for (int64_t c = 0; c < shape.channels; ++c)
      for (int64_t i = 0; i < shape.rows.taps; ++i)
        for (int64_t j = 0; j < shape.columns.taps; ++j)
          places_.push_back(c * form_.values() + form_.place(i * shape.rows.dilation, j * shape.columns.dilation));
  }

  static constexpr int64_t most_rows = 8;

  int64_t count() const { return shape_.samples * each_; }
  int64_t sample(int64_t band) const { return band / each_; }
  int64_t begin(int64_t band) const { return band % each_ * most_rows; }
  int64_t end(int64_t band) const { return std::min(begin(band) + most_rows, shape_.rows.outputs); }

  const Numbers& places() const { return places_; }  // of the taps (C, I, J) of the first output
  int64_t row_step() const { return shape_.rows.stride * form_.row_step(); }
  int64_t values() const { return shape_.channels * form_.values(); }

  // The input under a band; zeros where there is none. x: (N, C, H, W); padded: scratch whose margins are zero
  void copy(int64_t band, const A* x, A* padded) const {
    const Axis& rows = shape_.rows;
    const int64_t top = begin(band) * rows.stride - rows.before;
    const int64_t count = rows.under(end(band) - begin(band));
    const int64_t from = std::clamp<int64_t>(-top, 0, count), until = std::clamp<int64_t>(rows.size - top, from, count);
    x += sample(band) * shape_.channels * shape_.input_plane();
    for (int64_t c = 0; c < shape_.channels; ++c, x += shape_.input_plane(), padded += form_.values()) {
      std::fill_n(padded, from * form_.row_step(), A(0));
      if (until > from)
        form_.copy(x + (top + from) * shape_.columns.size, until - from, shape_.columns.size,
                   padded + from * form_.row_step());
      std::fill(padded + until * form_.row_step(), padded + count * form_.row_step(), A(0));
    }
  }

 private:
  const Shape& shape_;
  Padded form_;  // of a channel
  int64_t each_;
  Numbers places_;
};

// y[e, i] = b[e] + sum over taps of w[tap, e] x[place[tap] + i] for `kernels` output channels and `count` values.
template <class A, int64_t kernels, int64_t vectors>
inline void few_channels_block(const A* x, const Numbers& places, const A* w, const A* b, int64_t count, A* y,
                               int64_t y_step) {
  Vector<A> sums[kernels][vectors];
#pragma GCC unroll 12
  for (int64_t e = 0; e < kernels; ++e)
    for (int64_t v = 0; v < vectors; ++v) sums[e][v] = every(b ? b[e] : A(0));
  for (const int64_t place : places) {
    Vector<A> values[vectors];
    for (int64_t v = 0; v < vectors; ++v) values[v] = load(x + place + v * lanes<A>, Whole{});
#pragma GCC unroll 12
    for (int64_t e = 0; e < kernels; ++e) {
      const Vector<A> weight = every(w[e]);
      for (int64_t v = 0; v < vectors; ++v) sums[e][v] = multiply_add<A>(weight, values[v], sums[e][v]);
    }
    w += kernels;
  }
  const int64_t last = (vectors - 1) * lanes<A>;
#pragma GCC unroll 12
  for (int64_t e = 0; e < kernels; ++e, y += y_step) {
    for (int64_t v = 0; v < vectors - 1; ++v) store(y + v * lanes<A>, sums[e][v], Whole{});
    if (count == vectors * lanes<A>)
      store(y + last, sums[e][vectors - 1], Whole{});
    else
      store(y + last, sums[e][vectors - 1], Part{count - last});
  }
}

template <class A>
class FewChannels {
 public:
  FewChannels(const Shape& shape, const A* w, const A* b, A* y)
      : shape_(shape), bands_(shape), b_(b), y_(y), taps_(shape.channels * shape.taps()),
        blocks_((shape.kernels + most_kernels - 1) / most_kernels), weights_(shape.kernels * taps_) {
    A* to = weights_.get();
    for (int64_t block = 0; block < blocks_; ++block)
      for (int64_t tap = 0; tap < taps_; ++tap)
        for (int64_t e = first_kernel(block); e < first_kernel(block + 1); ++e) *to++ = w[e * taps_ + tap];
  }

  const Bands<A>& bands() const { return bands_; }

  // padded: the input under the band
  void operator()(int64_t band, const A* padded) const {
    const int64_t width = shape_.columns.outputs, plane = shape_.output_plane();
    for (int64_t block = 0; block < blocks_; ++block) {
      const int64_t first = first_kernel(block);
      for (int64_t p = bands_.begin(band); p < bands_.end(band); ++p) {
        const A* from = padded + (p - bands_.begin(band)) * bands_.row_step();
        A* to = y_ + (bands_.sample(band) * shape_.kernels + first) * plane + p * width;
        rows(first_kernel(block + 1) - first, from, weights_.get() + first * taps_, b_ ? b_ + first : nullptr, to,
             std::make_index_sequence<most_kernels>());
      }
    }
  }

 private:
  int64_t first_kernel(int64_t block) const { return shape_.kernels * block / blocks_; }

  template <size_t... Counts>
  void rows(int64_t kernels, const A* x, const A* w, const A* b, A* y, std::index_sequence<Counts...>) const {
    ((kernels == Counts + 1 ? rows_of<Counts + 1>(x, w, b, y) : void()), ...);
  }

  // One row of each of `kernels` output channels.
  template <int64_t kernels>
  void rows_of(const A* x, const A* w, const A* b, A* y) const {
    constexpr int64_t most = output_vectors * lanes<A>;
    const Numbers& places = bands_.places();
    const int64_t width = shape_.columns.outputs, plane = shape_.output_plane();
    int64_t q = 0;
    for (; width - q > most - lanes<A>; q += most)
      few_channels_block<A, kernels, output_vectors>(x + q, places, w, b, std::min(width - q, most), y + q, plane);
    if (q < width) few_channels_block<A, kernels, 1>(x + q, places, w, b, width - q, y + q, plane);
  }

  const Shape& shape_;
  Bands<A> bands_;
  const A* b_;
  A* y_;
  int64_t taps_, blocks_;
  Scratch<A> weights_;  // (blocks, C I J, kernels of a block)
};

// x: (N, C, H, W), w: (E, C, I, J), b: (E) or null, y: (N, E, P, Q)
template <class A>
void forward_few_channels(const Shape& shape, const A* x, const A* w, const A* b, A* y) {
  const FewChannels<A> convolution(shape, w, b, y);
  const Bands<A>& bands = convolution.bands();
  const int64_t work = Bands<A>::most_rows * shape.columns.outputs * shape.kernels * shape.channels * shape.taps();
  in_parallel(bands.count(), std::max<int64_t>((1 << 20) / work, 1), [&](int64_t begin, int64_t end) {
    const Scratch<A> padded(bands.values());
    std::fill_n(padded.get(), bands.values(), A(0));
    for (int64_t band = begin; band < end; ++band) {
      bands.copy(band, x, padded.get());
      convolution(band, padded.get());
    }
  });
}

}  // namespace nacre::conv2d
