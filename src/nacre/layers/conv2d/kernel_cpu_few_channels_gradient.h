// The gradients of the weight and the bias of a convolution of few input channels.
//
// A weight's gradient is the inner product of its output channel's gradients and the input under its tap. A block of
// output channels and taps is summed up in registers over the outputs of a band, in as many sums as a vector has lanes.
// The bands are cut into shares, whose sums are added in pairs: the shape alone decides them.
#pragma once

#include "nacre/core/cpu_matmul.h"
#include "nacre/layers/conv2d/kernel_cpu_few_channels.h"

namespace nacre::conv2d {

constexpr int64_t block_kernels = vector_bytes == 64 ? 6 : 4;  // 24 sums of 32 registers,
constexpr int64_t block_taps = vector_bytes == 64 ? 4 : 3;     // or 12 of 16
constexpr int64_t most_shares = 32;
constexpr int64_t multiply_adds_per_share = 1 << 22;

// sums[e, tap] += g[e] x[place[tap]] for `kernels` output channels and `taps` taps, over rows of whole vectors.
// g: (kernels, rows, columns), sums: (kernels, all taps, lanes)
template <class A, int64_t kernels, int64_t taps>
void weight_gradient_block(const A* g, int64_t g_step, const A* x, int64_t x_step, const int64_t* places, int64_t rows,
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
class WeightGradient {
 public:
  explicit WeightGradient(const Shape& shape)
      : shape_(shape), bands_(shape), columns_(whole_vectors(shape.columns.outputs, lanes<A>)),
        taps_(shape.channels * shape.taps()) {}

  const Bands<A>& bands() const { return bands_; }
  int64_t sums() const { return shape_.kernels * (taps_ + 1); }  // of the weights, then of the biases
  int64_t packed_values() const { return block_kernels * Bands<A>::most_rows * columns_; }

  // Adds those of a band. g: (N, E, P, Q); padded: the input under the band; packed: scratch whose margins are zero;
  // sums: (sums, lanes)
  void operator()(int64_t band, const A* g, const A* padded, A* packed, A* sums) const {
    const Parts blocks(shape_.kernels, block_kernels), tap_blocks(taps_, block_taps);
    for (int64_t block = 0; block < blocks.count; ++block) {
      const int64_t first = blocks.begin(block), kernels = blocks.begin(block + 1) - first;
      for (int64_t e = 0; e < kernels; ++e) {
        A* sum = sums + (weights() + first + e) * lanes<A>;
        pack(band, first + e, g, packed + e * Bands<A>::most_rows * columns_, sum);
      }
      for (int64_t part = 0; part < tap_blocks.count; ++part) {
        const int64_t tap = tap_blocks.begin(part), taps = tap_blocks.begin(part + 1) - tap;
        add(band, kernels, taps, packed, padded, bands_.places().data() + tap, sums + (first * taps_ + tap) * lanes<A>,
            std::make_index_sequence<block_kernels * block_taps>());
      }
    }
  }

  int64_t weights() const { return shape_.kernels * taps_; }

 private:
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
  void add(int64_t band, int64_t kernels, int64_t taps, const A* packed, const A* padded, const int64_t* places,
           A* sums, std::index_sequence<Sizes...>) const {
    const auto run = [&](auto size) {
      weight_gradient_block<A, size / block_taps + 1, size % block_taps + 1>(
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

// g: (N, E, P, Q), x: (N, C, H, W), grad_w: (E, C, I, J), grad_b: (E); a gradient that is not asked for is null
template <class A>
void parameter_gradients_of_few_channels(const Shape& shape, const Gradients<A>& at) {
  const WeightGradient<A> gradient(shape);
  const Bands<A>& bands = gradient.bands();
  const int64_t work = shape.samples * shape.output_plane() * gradient.weights();
  int64_t count = 1;  // a power of two, so that as many threads have equal shares
  while (2 * count <= std::min({most_shares, bands.count(), work / multiply_adds_per_share})) count *= 2;
  const auto first_of = [&](int64_t share) { return bands.count() * share / count; };
  const int64_t sums = gradient.sums();
  const Scratch<A> totals((count + 1) * sums);
  in_parallel(count, 1, [&](int64_t begin, int64_t end) {
    const Scratch<A> padded(bands.values()), packed(gradient.packed_values()), parts(sums * lanes<A>);
    std::fill_n(padded.get(), bands.values(), A(0));
    for (int64_t share = begin; share < end; ++share) {
      std::fill_n(parts.get(), sums * lanes<A>, A(0));
      for (int64_t band = first_of(share); band < first_of(share + 1); ++band) {
        bands.copy(band, at.x, padded.get());
        gradient(band, at.g, padded.get(), packed.get(), parts.get());
      }
      for (int64_t i = 0; i < sums; ++i)
        totals.get()[share * sums + i] = total<A>(load(parts.get() + i * lanes<A>, Whole{}));
    }
  });
  A* result = totals.get() + count * sums;
  add_blocks(totals.get(), result, count, sums);
  for (int64_t i = 0; at.grad_w && i < gradient.weights(); ++i)
    at.grad_w[i] = result[i] == result[i] ? result[i] : direct_weight_gradient(shape, at.g, at.x, i);
  if (at.grad_b) std::copy_n(result + gradient.weights(), shape.kernels, at.grad_b);
}

}  // namespace nacre::conv2d
