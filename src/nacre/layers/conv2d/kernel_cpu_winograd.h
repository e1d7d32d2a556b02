// Convolution with kernels of 3 x 3 and stride 1 by Winograd's algorithm F(2 x 2, 3 x 3): 16 products instead of 36.
//
// A tile is 2 x 2 outputs and the 4 x 4 inputs d under their windows. With the transforms
//
//     B' = 1  0 -1  0     G = 1    0    0      A' = 1  1  1  0
//          0  1  1  0         1/2  1/2  1/2         0  1 -1 -1
//          0 -1  1  0         1/2 -1/2  1/2
//          0  1  0 -1         0    0    1
//
// the outputs are A' [(G w G') * (B' d B)] A, the product * of each of the 16 places by itself. Summed over the
// channels, each place is a matrix product: (E, C) (C, tiles). The gradient of the input is the same convolution of the
// outputs' gradients with the flipped kernels.
// Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks", CVPR 2016.
//
// T tiles: row after row, sample after sample. A thread takes groups of tiles, whose transforms stay in the caches.
#pragma once

#include "nacre/layers/conv2d/kernel_cpu_winograd_tiles.h"

namespace nacre::conv2d {

constexpr int64_t short_sum = 64;
constexpr int64_t winograd_kernels = 11 * tile_rows;  // whose products are held at once

// G w G' of a kernel, whose taps lie one after another, or backwards.
template <class A>
inline void transform_kernel(const A* w, bool flipped, A* to, int64_t step) {
  A half[4][3];
  for (int64_t j = 0; j < 3; ++j) {
    const A w0 = w[flipped ? 8 - j : j], w1 = w[flipped ? 5 - j : 3 + j], w2 = w[flipped ? 2 - j : 6 + j];
    const A both = (w0 + w2) * A(0.5), middle = w1 * A(0.5);
    half[0][j] = w0, half[1][j] = both + middle, half[2][j] = both - middle, half[3][j] = w2;
  }
  for (int64_t i = 0; i < 4; ++i, to += 4 * step) {
    const A both = (half[i][0] + half[i][2]) * A(0.5), middle = half[i][1] * A(0.5);
    to[0] = half[i][0], to[step] = both + middle, to[2 * step] = both - middle, to[3 * step] = half[i][2];
  }
}

template <class A>
class Winograd {
 public:
  // w: of output channel e and channel c at e `kernel_step` + c `channel_step`
  Winograd(const Tiling& tiling, const A* w, int64_t kernel_step, int64_t channel_step, bool flipped)
      : tiling_(tiling), inputs_(tiling), w_(w), kernel_step_(kernel_step), channel_step_(channel_step),
        flipped_(flipped),
        place_((tiling.kernels + tile_rows - 1) / tile_rows * tile_rows * tiling.channels + cache_line),
        weights_(tile_places * place_) {
    const int64_t tiles = (tiling.kernels + tile_rows - 1) / tile_rows, channels = tiling.channels;
    in_parallel(tiles, 1 + (1 << 10) / channels, [&](int64_t begin, int64_t end) {
      for (int64_t tile = begin; tile < end; ++tile)
        for (int64_t r = 0; r < std::min(tile_rows, tiling.kernels - tile * tile_rows); ++r)
          for (int64_t c = 0; c < channels; ++c)
            transform_kernel(w + (tile * tile_rows + r) * kernel_step + c * channel_step, flipped,
                             weights_.get() + (tile * channels + c) * tile_rows + r, place_);
    });
  }

  // x: (N, C, H, W), b: (E) or null, y: (N, E, P, Q)
  void operator()(const A* x, const A* b, A* y) const {
    const Parts groups(tiling_.tiles(), group_tiles);
    in_parallel(groups.count, 1, [&](int64_t begin, int64_t end) {
      const Scratch<A> scratch(inputs_.scratch_values()), panels(inputs_.values());
      const Scratch<A> products(tile_places * product_ + cache_line);
      std::fill_n(scratch.get(), inputs_.scratch_values(), A(0));
      for (int64_t group = begin; group < end; ++group) {
        const std::vector<Run> in = runs(tiling_, groups.begin(group), groups.begin(group + 1));
        inputs_(in, x, scratch.get(), panels.get());
        for (int64_t e = 0; e < tiling_.kernels; e += winograd_kernels) {
          const int64_t kernels = std::min(winograd_kernels, tiling_.kernels - e);
          for (int64_t place = 0; place < tile_places; ++place)
            multiply(weights_.get() + place * place_ + e * tiling_.channels, kernels,
                     inputs_.at(panels.get(), place), groups.begin(group + 1) - groups.begin(group),
                     products.get() + place * product_);
          write(in, products.get(), e, kernels, x, b, y);
        }
      }
    });
  }

 private:
  // The products of one place, (kernels, tiles), which are added up in short sums: long ones would have larger rounding
  // errors than a direct convolution.
  void multiply(const A* weights, int64_t kernels, const A* panels, int64_t tiles, A* products) const {
    const Panels<A> cut(tiles);
    const int64_t channels = tiling_.channels;
    const Parts depths(channels, short_sum);
    for (int64_t panel = 0; panel < cut.count; ++panel)
      for (int64_t part = 0; part < depths.count; ++part) {
        const int64_t begin = cut.begin(panel), c = depths.begin(part);
        Rows<A> left(weights, channels);
        left.values += c * tile_rows;
        multiply_panel(left, kernels, depths.begin(part + 1) - c, panels + begin * channels + c * cut.size(panel),
                       std::min(cut.size(panel), tiles - begin), part > 0, products + begin, group_tiles);
      }
  }

  // A' m A of the places' products m. products: (places, kernels, tiles)
  void write(const std::vector<Run>& runs, const A* products, int64_t first, int64_t kernels, const A* x, const A* b,
             A* y) const {
    for (int64_t e = first; e < first + kernels; ++e, products += group_tiles)
      for (const Run& run : runs) {
        const int64_t rows = std::min<int64_t>(tiling_.rows - 2 * run.row, 2);
        const int64_t columns = std::min(2 * run.count, tiling_.columns - 2 * run.column);
        const int64_t row = (run.sample * tiling_.kernels + e) * tiling_.rows + 2 * run.row;
        A* to = y + row * tiling_.columns + 2 * run.column;
        bool finite = true;
        for (int64_t i = 0; i < run.count; i += lanes<A>)
          finite &= write(products + run.at + i, every(b ? b[e] : A(0)), rows, columns - 2 * i, to + 2 * i);
        for (int64_t k = 0; !finite && k < rows * columns; ++k) {
          A& value = to[k / columns * tiling_.columns + k % columns];
          if (!(value - value == 0)) value = direct(run, k / columns, k % columns, e, x, b ? b[e] : A(0));
        }
      }
  }

  // Whether all are finite.
  bool write(const A* products, Vector<A> bias, int64_t rows, int64_t columns, A* to) const {
    Vector<A> half[2][4], differences = {};
    for (int64_t c = 0; c < 4; ++c) {
      const auto m = [&](int64_t r) { return load(products + (4 * r + c) * product_, Whole{}); };
      const Vector<A> one = m(1), two = m(2);
      half[0][c] = m(0) + one + two, half[1][c] = one - two - m(3);
    }
    for (int64_t r = 0; r < rows; ++r, to += tiling_.columns) {
      const Vector<A> even = half[r][0] + half[r][1] + half[r][2] + bias;
      const Vector<A> odd = half[r][1] - half[r][2] - half[r][3] + bias;
      differences += (even - even) + (odd - odd);
      const auto from = [](int64_t lane) { return lane / 2 + lane % 2 * lanes<A>; };
      const Vector<A> low = picked<A>(even, odd, from);
      const Vector<A> high = picked<A>(even, odd, [&](int64_t lane) { return from(lane) + lanes<A> / 2; });
      columns >= lanes<A> ? store(to, low, Whole{}) : store(to, low, Part{columns});
      if (columns >= 2 * lanes<A>)
        store(to + lanes<A>, high, Whole{});
      else if (columns > lanes<A>)
        store(to + lanes<A>, high, Part{columns - lanes<A>});
    }
    return total<A>(differences) == 0;
  }

  // One output of a run where a transform met a value that is not finite: it reaches all outputs of its tiles there.
  A direct(const Run& run, int64_t row, int64_t column, int64_t e, const A* x, A sum) const {
    const int64_t top = 2 * run.row + row - tiling_.top, left = 2 * run.column + column - tiling_.left;
    const A* plane = x + run.sample * tiling_.channels * tiling_.height * tiling_.width;
    for (int64_t c = 0; c < tiling_.channels && sum == sum; ++c, plane += tiling_.height * tiling_.width) {
      const A* taps = w_ + e * kernel_step_ + c * channel_step_;
      for (int64_t tap = 0; tap < 9; ++tap) {
        const int64_t a = top + tap / 3, b = left + tap % 3;
        if (a >= 0 && a < tiling_.height && b >= 0 && b < tiling_.width)
          sum += taps[flipped_ ? 8 - tap : tap] * plane[a * tiling_.width + b];
      }
    }
    return sum;
  }

  static constexpr int64_t product_ = winograd_kernels * group_tiles + 16;  // not all places in one set of the cache
  const Tiling& tiling_;
  TileInputs<A> inputs_;
  const A* w_;
  int64_t kernel_step_, channel_step_;
  bool flipped_;
  int64_t place_;
  Scratch<A> weights_;  // (places, E in tiles, C, tile rows)
};

inline Tiling winograd_tiling(const Shape& shape) {
  return {shape.samples, shape.channels, shape.kernels, shape.rows.size, shape.columns.size,
          shape.rows.outputs, shape.columns.outputs, shape.rows.before, shape.columns.before};
}

// x: (N, C, H, W), w: (E, C, 3, 3), b: (E) or null, y: (N, E, P, Q)
template <class A>
void forward_winograd(const Shape& shape, const A* x, const A* w, const A* b, A* y) {
  const Tiling tiling = winograd_tiling(shape);
  Winograd<A>(tiling, w, 9 * shape.channels, 9, false)(x, b, y);
}

// g: (N, E, P, Q), grad_x: (N, C, H, W)
template <class A>
void input_gradient_winograd(const Shape& shape, const A* g, const A* w, A* grad_x) {
  const Tiling tiling{shape.samples, shape.kernels, shape.channels, shape.rows.outputs, shape.columns.outputs,
                      shape.rows.size, shape.columns.size, 2 - shape.rows.before, 2 - shape.columns.before};
  Winograd<A>(tiling, w, 9, 9 * shape.channels, true)(g, nullptr, grad_x);
}

}  // namespace nacre::conv2d
