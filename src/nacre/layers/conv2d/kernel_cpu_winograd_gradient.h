// The gradient of the weight of a convolution with kernels of 3 x 3 and stride 1 by Winograd's algorithm.
//
// A tile's outputs are A' [(G w G') * (B' d B)] A, hence with g, the gradients of its 2 x 2 outputs,
//
//     dL/dw = G' [(A g A') * (B' d B)] G
//
// summed over the tiles: each of the 16 places is a matrix product (E, tiles) (tiles, C). The tiles are cut into
// shares, whose sums are added in turn: the shape alone decides them.
#pragma once

#include "nacre/layers/conv2d/kernel_cpu_direct.h"
#include "nacre/layers/conv2d/kernel_cpu_winograd.h"

namespace nacre::conv2d {

constexpr int64_t winograd_shares = 8;
constexpr int64_t winograd_sums = int64_t{1} << 22;  // of all shares

// A g A' of the tiles of a vector: g of 2 x 2 vectors, to: (places, `step`)
template <class A>
inline void transform_gradients(const Vector<A> (&g)[2][2], A* to, int64_t step) {
  Vector<A> half[4][2];
  for (int64_t c = 0; c < 2; ++c)
    half[0][c] = g[0][c], half[1][c] = g[0][c] + g[1][c], half[2][c] = g[0][c] - g[1][c], half[3][c] = -g[1][c];
  for (int64_t r = 0; r < 4; ++r, to += 4 * step) {
    store(to, half[r][0], Whole{});
    store(to + step, half[r][0] + half[r][1], Whole{});
    store(to + 2 * step, half[r][0] - half[r][1], Whole{});
    store(to + 3 * step, -half[r][1], Whole{});
  }
}

template <class A>
class WinogradGradient {
 public:
  WinogradGradient(const Tiling& tiling, const A* g, const A* x)
      : tiling_(tiling), inputs_(tiling), g_(g), x_(x), place_(tiling.kernels * group_tiles + cache_line) {}

  int64_t sums() const { return tile_places * tiling_.kernels * tiling_.channels; }
  int64_t scratch_values() const {
    return inputs_.scratch_values() + inputs_.values() + tile_places * place_ +
           whole_vectors(tiling_.channels, lanes<A>) * group_tiles;
  }

  // Adds those of tiles [begin, end), group_tiles at most. scratch: zeros at first; sums: (places, E, C)
  void operator()(int64_t begin, int64_t end, A* scratch, A* sums) const {
    const std::vector<Run> in = runs(tiling_, begin, end);
    const int64_t channels = tiling_.channels, kernels = tiling_.kernels;
    A *rows = scratch, *values = rows + inputs_.scratch_values(), *grads = values + inputs_.values();
    A* packed = grads + tile_places * place_;
    inputs_(in, x_, rows, values, false);
    for (int64_t e = 0; e < kernels; ++e)
      for (const Run& run : in) transform(run, e, grads + e * group_tiles + run.at);
    for (int64_t place = 0; place < tile_places; ++place) {
      const Matrix<A> right{values + place * inputs_.place_step(), 1, group_tiles};
      pack_panels(right, end - begin, channels, 0, Panels<A>(channels).count, packed);
      multiply(Rows<A>(Matrix<A>{grads + place * place_, group_tiles, 1}), kernels, end - begin, packed, channels, true,
               sums + place * kernels * channels, channels);
    }
  }

 private:
  // The gradients of an output channel's tiles in a run. Beyond the outputs they are zero.
  void transform(const Run& run, int64_t e, A* to) const {
    const int64_t columns = std::min(2 * run.count, tiling_.columns - 2 * run.column);
    const int64_t row = (run.sample * tiling_.kernels + e) * tiling_.rows + 2 * run.row;
    const A* from = g_ + row * tiling_.columns + 2 * run.column;
    for (int64_t i = 0; i < run.count; i += lanes<A>) {
      Vector<A> g[2][2] = {};
      for (int64_t r = 0; r < std::min<int64_t>(tiling_.rows - 2 * run.row, 2); ++r) {
        const A* at = from + r * tiling_.columns + 2 * i;
        const Vector<A> low = some(at, columns - 2 * i), high = some(at + lanes<A>, columns - 2 * i - lanes<A>);
        g[r][0] = picked<A>(low, high, [](int64_t lane) { return 2 * lane; });
        g[r][1] = picked<A>(low, high, [](int64_t lane) { return 2 * lane + 1; });
      }
      transform_gradients<A>(g, to + i, place_);
    }
  }

  // The first `count` of a vector's values, and zeros.
  static Vector<A> some(const A* from, int64_t count) {
    if (count >= lanes<A>) return load(from, Whole{});
    return count > 0 ? load(from, Part{count}) : Vector<A>{};
  }

  const Tiling& tiling_;
  TileInputs<A> inputs_;
  const A *g_, *x_;
  int64_t place_;
};

// G' s G of a kernel's places, `step` apart. to: (3, 3)
template <class A>
inline void transform_sums(const A* s, int64_t step, A* to) {
  A half[3][4];
  for (int64_t c = 0; c < 4; ++c) {
    const A *at = s + c * step, one = at[4 * step], two = at[8 * step], both = (one + two) * A(0.5);
    half[0][c] = at[0] + both, half[1][c] = (one - two) * A(0.5), half[2][c] = both + at[12 * step];
  }
  for (int64_t r = 0; r < 3; ++r, to += 3) {
    const A both = (half[r][1] + half[r][2]) * A(0.5);
    to[0] = half[r][0] + both, to[1] = (half[r][1] - half[r][2]) * A(0.5), to[2] = both + half[r][3];
  }
}

// g: (N, E, P, Q), x: (N, C, H, W), grad_w: (E, C, 3, 3)
template <class A>
void weight_gradient_winograd(const Shape& shape, const A* g, const A* x, A* grad_w) {
  const Tiling tiling = winograd_tiling(shape);
  const WinogradGradient<A> gradient(tiling, g, x);
  const Parts groups(tiling.tiles(), group_tiles);
  const int64_t sums = gradient.sums();
  int64_t count = 2;  // a power of two, so that as many threads have equal shares
  while (count < winograd_shares && 2 * count * sums <= winograd_sums) count *= 2;
  const auto first_of = [&](int64_t share) { return groups.count * share / count; };
  const Scratch<A> totals(count * sums);
  in_parallel(count, 1, [&](int64_t begin, int64_t end) {
    const Scratch<A> scratch(gradient.scratch_values());
    std::fill_n(scratch.get(), gradient.scratch_values(), A(0));
    for (int64_t share = begin; share < end; ++share) {
      A* total = totals.get() + share * sums;
      std::fill_n(total, sums, A(0));
      for (int64_t group = first_of(share); group < first_of(share + 1); ++group)
        gradient(groups.begin(group), groups.begin(group + 1), scratch.get(), total);
    }
  });
  const int64_t kernels = tiling.kernels * tiling.channels;
  in_parallel(kernels, values_per_thread / tile_places, [&](int64_t begin, int64_t end) {
    for (int64_t share = 1; share < count; ++share)
      for (int64_t place = 0; place < tile_places; ++place) {
        A* to = totals.get() + place * kernels + begin;
        over_row<A>(end - begin, [&](int64_t i, auto which) {
          store(to + i, load(to + i, which) + load(to + share * sums + i, which), which);
        });
      }
    for (int64_t i = begin; i < end; ++i) {
      A* to = grad_w + 9 * i;
      transform_sums(totals.get() + i, kernels, to);
      for (int64_t tap = 0; tap < 9; ++tap)
        if (!(to[tap] - to[tap] == 0)) to[tap] = direct_weight_gradient(shape, 1, g, x, 9 * i + tap);
    }
  });
}

// The sums of the outputs' gradients of each channel. g: (N, E, P Q), grad_b: (E)
template <class A>
void bias_gradient(const Shape& shape, const A* g, A* grad_b) {
  const Scratch<A> sums(shape.samples * shape.kernels);  // (N, E)
  const int64_t plane = shape.output_plane();
  in_parallel(shape.samples * shape.kernels, values_per_thread / plane + 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      sums.get()[i] = sums_over_row<A, 1>(plane, [&](int64_t k, auto which) {
        return std::array<Vector<A>, 1>{load(g + i * plane + k, which)};
      })[0];
  });
  add_blocks(sums.get(), grad_b, shape.samples, shape.kernels);
}

inline bool is_three_by_three(const Shape& shape) {
  const auto suits = [](const Axis& axis) {
    return axis.taps == 3 && axis.stride == 1 && axis.dilation == 1;
  };
  return suits(shape.rows) && suits(shape.columns);
}

template <class A>
void backward_winograd(const Shape& shape, const Gradients<A>& at) {
  if (at.grad_x) input_gradient_winograd(shape, at.g, at.w, at.grad_x);
  if (at.grad_w) weight_gradient_winograd(shape, at.g, at.x, at.grad_w);
  if (at.grad_b) bias_gradient(shape, at.g, at.grad_b);
}

}  // namespace nacre::conv2d
