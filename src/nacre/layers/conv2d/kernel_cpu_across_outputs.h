// The gradients of the weight and the bias of a convolution of few input channels, with neighbouring outputs in the
// lanes of vectors.
//
// A weight's gradient is the inner product of its kernel's gradients and the input under its tap. A block of kernels
// and taps is summed up in registers over the outputs of a band, in as many sums as a vector has lanes.
#pragma once

#include "nacre/core/cpu_matmul.h"
#include "nacre/layers/conv2d/kernel_cpu_few_channels.h"

namespace nacre::conv2d {

constexpr int64_t block_kernels = vector_bytes == 64 ? 6 : 4;  // 24 sums of 32 registers,
constexpr int64_t block_taps = vector_bytes == 64 ? 4 : 3;     // or 12 of 16

// sums[e, tap] += g[e] x[place[tap]] for `kernels` output channels and `taps` taps, over rows of whole vectors.
// g: (kernels, rows, columns), sums: (kernels, all taps, lanes)
template <class A, int64_t kernels, int64_t taps>
void across_outputs_block(const A* g, int64_t g_step, const A* x, int64_t x_step, const int64_t* places, int64_t rows,
                           int64_t columns, A* sums, int64_t sums_step) {
  Vector<A> parts[kernels][taps] = {};
  for (int64_t row = 0; row < rows; ++row, x += x_step, g += columns)
    for (int64_t i = 0; i < columns; i += lanes<A>) {
      Vector<A> grads[kernels];
      for (int64_t e = 0; e < kernels; ++e) grads[e] = load(g + e * g_step + i, Whole{});
#pragma GCC unroll 6
      for (int64_t tap = 0; tap < taps; ++tap) {
        const Vector<A> values = load(x + places[tap] + i, Whole{});
#pragma GCC unroll 6
        for (int64_t e = 0; e < kernels; ++e) parts[e][tap] = multiply_add<A>(grads[e], values, parts[e][tap]);
      }
    }
  for (int64_t e = 0; e < kernels; ++e)
    for (int64_t tap = 0; tap < taps; ++tap) {
      A* to = sums + e * sums_step + tap * lanes<A>;
      store(to, load(to, Whole{}) + parts[e][tap], Whole{});
    }
}

template <class A>
class GradientAcrossOutputs {
 public:
  explicit GradientAcrossOutputs(const Shape& shape)
      : shape_(shape), bands_(shape), columns_(whole_vectors(shape.columns.outputs, lanes<A>)),
        taps_(shape.channels * shape.taps()) {}

  int64_t bands() const { return bands_.count(); }
  int64_t sums() const { return shape_.kernels * (taps_ + 1); }  // of the weights, then of the biases

  A weight(const A* sums, int64_t e, int64_t tap) const { return sums[e * taps_ + tap]; }
  const A* biases(const A* sums) const { return sums + shape_.kernels * taps_; }

  // What a thread needs.
  class Room {
   public:
    explicit Room(const GradientAcrossOutputs& of)
        : of_(of), padded_(of.bands_.values()), packed_(block_kernels * Bands<A>::most_rows * of.columns_),
          parts_(of.sums() * lanes<A>) {
      std::fill_n(padded_.get(), of.bands_.values(), A(0));
    }

    void start(A* sums) {
      sums_ = sums;
      std::fill_n(parts_.get(), of_.sums() * lanes<A>, A(0));
    }
    void add(int64_t band, const A* g, const A* x) {
      of_.bands_.copy(band, x, padded_.get());
      of_.add(band, g, padded_.get(), packed_.get(), parts_.get());
    }
    void finish() {
      for (int64_t i = 0; i < of_.sums(); ++i) sums_[i] = total<A>(load(parts_.get() + i * lanes<A>, Whole{}));
    }

   private:
    const GradientAcrossOutputs& of_;
    Scratch<A> padded_, packed_, parts_;  // the input under a band, gradients of some kernels, sums in lanes
    A* sums_ = nullptr;
  };

 private:
  // sums: (sums, lanes)
  void add(int64_t band, const A* g, const A* padded, A* packed, A* sums) const {
    const Parts blocks(shape_.kernels, block_kernels), tap_blocks(taps_, block_taps);
    for (int64_t block = 0; block < blocks.count; ++block) {
      const int64_t first = blocks.begin(block), kernels = blocks.begin(block + 1) - first;
      for (int64_t e = 0; e < kernels; ++e)
        pack(band, first + e, g, packed + e * Bands<A>::most_rows * columns_,
             sums + (shape_.kernels * taps_ + first + e) * lanes<A>);
      for (int64_t part = 0; part < tap_blocks.count; ++part) {
        const int64_t tap = tap_blocks.begin(part), taps = tap_blocks.begin(part + 1) - tap;
        add_block(band, kernels, taps, packed, padded, bands_.places().data() + tap,
                  sums + (first * taps_ + tap) * lanes<A>, std::make_index_sequence<block_kernels * block_taps>());
      }
    }
  }

  // The gradients of an output channel in a band, their rows as long as whole vectors. sum: (lanes), theirs is added
  void pack(int64_t band, int64_t e, const A* g, A* packed, A* sum) const {
    const int64_t width = shape_.columns.outputs;
    const A* from = g + (bands_.sample(band) * shape_.kernels + e) * shape_.output_plane() + bands_.begin(band) * width;
    Vector<A> total = {};  // of the band: one sum over all would round each addition to the size of that
    for (int64_t p = bands_.begin(band); p < bands_.end(band); ++p, from += width, packed += columns_)
      over_row<A>(width, [&](int64_t i, auto which) {
        const Vector<A> grads = load(from + i, which);
        store(packed + i, grads, Whole{});
        total += grads;
      });
    store(sum, load(sum, Whole{}) + total, Whole{});
  }

  template <size_t... Sizes>
  void add_block(int64_t band, int64_t kernels, int64_t taps, const A* packed, const A* padded, const int64_t* places,
                 A* sums, std::index_sequence<Sizes...>) const {
    const auto run = [&](auto size) {
      across_outputs_block<A, size / block_taps + 1, size % block_taps + 1>(
          packed, Bands<A>::most_rows * columns_, padded, bands_.row_step(), places,
          bands_.end(band) - bands_.begin(band), columns_, sums, taps_ * lanes<A>);
    };
    const size_t wanted = static_cast<size_t>((kernels - 1) * block_taps + taps - 1);
    ((wanted == Sizes ? run(std::integral_constant<int64_t, Sizes>()) : void()), ...);
  }

  const Shape& shape_;
  Bands<A> bands_;
  int64_t columns_, taps_;
};

}  // namespace nacre::conv2d
