// The arithmetic of the cross-entropy kernel: what a token's target says, and the losses and gradients of a row of
// logits or of a tile of columns, which stays in cache between the passes over it.
//
// x: (N, C, M): N outer positions, C classes, M places; N M tokens, each with a target y.
#pragma once

#include "nacre/core/cpu_math.h"
#include "nacre/core/cpu_memory.h"
#include "nacre/core/cpu_primitives.h"
#include "nacre/core/cpu_softmax.h"
#include "nacre/core/cpu_tiles.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <numeric>
#include <stdexcept>
#include <string>
#include <type_traits>

namespace nacre {

// An integer as wide as a value, so that comparing both gives masks alike.
template <class A>
using Index = std::conditional_t<std::is_same_v<A, double>, int64_t, int32_t>;

template <class A>
struct Targets {
  const int64_t* classes;  // (N M)
  int64_t count, num_classes, ignore_index;
  const A* weight;  // (C) or null
  A smoothing, share;  // what each class gets of the smoothed target is share = smoothing / C
  int64_t counted = 0;  // tokens which are not ignored

  bool ignored(int64_t token) const { return classes[token] == ignore_index; }
  bool outside(int64_t y) const {
    return (static_cast<uint64_t>(y) >= static_cast<uint64_t>(num_classes)) & (y != ignore_index);
  }
  int64_t valid_class(int64_t token) const { return ignored(token) ? 0 : classes[token]; }
  A weight_of(int64_t y) const { return weight ? weight[y] : A(1); }
  // What the target's own class has more than its share: w_y (1 - smoothing).
  A hit(int64_t y) const { return (1 - smoothing) * weight_of(y); }

  // Every target is looked at before any is used as an index.
  void check() {
    std::atomic<int64_t> bad{0}, good{0};
    in_parallel(count, values_per_thread, [&](int64_t begin, int64_t end) {
      int64_t out = 0, in = 0;
      for (int64_t token = begin; token < end; ++token) out += outside(classes[token]), in += !ignored(token);
      bad += out;
      good += in;
    });
    counted = good;
    if (bad == 0) return;
    const auto first = std::to_string(*std::find_if(classes, classes + count, [&](int64_t y) { return outside(y); }));
    throw std::out_of_range("Target " + first + " is out of bounds: a target is the index of a class, or " +
                            "ignore_index; got " + first + " where the classes are 0 to " +
                            std::to_string(num_classes - 1) + ".");
  }

  // The sum of w_y over the tokens which are not ignored.
  double divisor() const {
    if (!weight) return static_cast<double>(counted);
    double sum = 0;
    for (int64_t token = 0; token < count; ++token)
      if (!ignored(token)) sum += weight[classes[token]];
    return sum;
  }

  // sum_c w_c t_c without what the target's own class has more
  A spread() const {
    if (smoothing == 0) return 0;
    if (!weight) return smoothing;
    return share * sums_over_row<A, 1>(num_classes, [&](int64_t c, auto which) {
             return std::array<Vector<A>, 1>{load(weight + c, which)};
           })[0];
  }

  // log_p: of the target's class; weighted: sum_c w_c log_p_c where targets are smoothed
  A loss(int64_t token, A log_p, A weighted) const {
    if (ignored(token)) return 0;
    const A loss = -(1 - smoothing) * (log_p * weight_of(valid_class(token)));
    return smoothing > 0 ? loss - weighted * share : loss;
  }
};

// While the exponentials are computed, the next row comes from memory, the last one's where `more` follow.
// x: (rows, C), the logits of the tokens from `first` on; maximum, log_sum, losses: (N M)
template <class T, class A = Accumulator<T>>
void row_losses(const T* x, int64_t first, int64_t rows, bool more, const Targets<A>& targets, A* maximum, A* log_sum,
                A* losses) {
  const int64_t size = targets.num_classes;
  for (int64_t row = first; row < first + rows; ++row) {
    const T *from = x + (row - first) * size, *next = more || row + 1 < first + rows ? from + size : from;
    const A m = maximum_of_row(from, size);
    maximum[row] = m;
    log_sum[row] = sums_over_row<A, 1>(size, [&](int64_t c, auto which) {
      __builtin_prefetch(next + c);
      return std::array<Vector<A>, 1>{exp<A>(load(from + c, which) - m)};
    })[0];
  }
  over_row<A>(rows, [&](int64_t i, auto which) {
    store(log_sum + first + i, log<A>(load(log_sum + first + i, which)), which);
  });
  for (int64_t row = first; row < first + rows; ++row) {
    const T* from = x + (row - first) * size;
    const A m = maximum[row], l = log_sum[row];
    A weighted = 0;
    if (targets.smoothing > 0)
      weighted = sums_over_row<A, 1>(size, [&](int64_t c, auto which) {
        const Vector<A> log_p = load(from + c, which) - m - l;
        return std::array<Vector<A>, 1>{targets.weight ? log_p * load(targets.weight + c, which) : log_p};
      })[0];
    losses[row] = targets.loss(row, static_cast<A>(from[targets.valid_class(row)]) - m - l, weighted);
  }
}

// tile: (C, W); maximum, log_sum, losses: (W) of the tokens from `token` on. meanwhile() is called once a vector.
template <class A, class Meanwhile>
void tile_losses(const A* tile, const Tiles& tiles, int64_t columns, const Targets<A>& targets, int64_t token,
                 A* maximum, A* log_sum, A* losses, Meanwhile meanwhile) {
  const int64_t size = tiles.size, pitch = tiles.pitch;
  over_row<A>(columns, [&](int64_t i, auto which) {
    const A* column = tile + i;
    Vector<A> m = Vector<A>{} - infinity<A>, sum = {}, weighted = {};
    for (int64_t c = 0; c < size; ++c) m = larger(load(column + c * pitch, Whole{}), m);
    for (int64_t c = 0; c < size; ++c) {
      sum += exp<A>(load(column + c * pitch, Whole{}) - m);
      meanwhile();
    }
    const Vector<A> l = log<A>(sum);
    if (targets.smoothing > 0)
      for (int64_t c = 0; c < size; ++c)
        weighted += (load(column + c * pitch, Whole{}) - m - l) * targets.weight_of(c);
    store(maximum + i, m, which);
    store(log_sum + i, l, which);
    const int64_t here = std::min(lanes<A>, columns - i);
    A hit[lanes<A>] = {}, weights[lanes<A>] = {}, ignored[lanes<A>] = {};
    for (int64_t lane = 0; lane < here; ++lane) {
      const int64_t y = targets.valid_class(token + i + lane);
      hit[lane] = column[y * pitch + lane];
      weights[lane] = targets.weight_of(y);
      ignored[lane] = targets.ignored(token + i + lane);
    }
    const Vector<A> log_p = load(hit, Whole{}) - m - l;
    const Vector<A> of_class = (targets.smoothing - 1) * (log_p * load(weights, Whole{}));
    const Vector<A> loss = targets.smoothing > 0 ? of_class - weighted * targets.share : of_class;
    store(losses + i, load(ignored, Whole{}) > 0 ? Vector<A>{} : loss, which);
  });
}

// x, grad: (C); g: the token's gradient; spread: as of Targets
template <class T, class A = Accumulator<T>>
void row_gradient(const T* x, const Targets<A>& targets, int64_t token, A maximum, A log_sum, A g, A spread,
                  bool stream, T* grad) {
  const int64_t y = targets.valid_class(token);
  const A hit = targets.hit(y), sum = hit + spread;
  if (g == 0 && std::isfinite(sum) && std::isfinite(log_sum)) {
    std::fill(grad, grad + targets.num_classes, T(0));
    return;
  }
  write_row(grad, targets.num_classes, stream, [&](int64_t c, auto which) -> Vector<A> {
    Vector<A> value = exp<A>(load(x + c, which) - maximum - log_sum) * sum;
    if (targets.smoothing > 0)
      value -= targets.weight ? load(targets.weight + c, which) * targets.share : every<A>(targets.share);
    if (c <= y && y < c + lanes<A>) value[y - c] -= hit;
    return value * g;
  });
}

// What the gradients of a tile's columns have in common down each column. All: (W), whole vectors.
template <class A>
struct TileGradients {
  const Targets<A>& targets;
  A *maximum, *log_sum, *g, *hits, *sums;
  Index<A>* classes;

  static int64_t scratch_values(const Tiles& tiles) { return 6 * tiles.pitch; }

  TileGradients(const Targets<A>& targets, const Tiles& tiles, A* scratch)
      : targets(targets),
        maximum(scratch),
        log_sum(maximum + tiles.pitch),
        g(log_sum + tiles.pitch),
        hits(g + tiles.pitch),
        sums(hits + tiles.pitch),
        classes(reinterpret_cast<Index<A>*>(sums + tiles.pitch)) {
    std::fill(scratch, scratch + scratch_values(tiles), A(0));
  }

  // maxima, log_sums: (N M); the losses have gradients of their own, (N M) or null, or all one; spread: as of Targets
  void take(const Block& block, const A* maxima, const A* log_sums, const A* each, A gradient, A spread) {
    const A* gradients = each ? each + block.column : nullptr;
    std::copy_n(maxima + block.column, block.count, maximum);
    std::copy_n(log_sums + block.column, block.count, log_sum);
    const int64_t *of = targets.classes + block.column, none = targets.ignore_index;
    for (int64_t i = 0; i < block.count; ++i) classes[i] = static_cast<Index<A>>(of[i] == none ? 0 : of[i]);
    for (int64_t i = 0; i < block.count; ++i) g[i] = of[i] == none ? 0 : gradients ? gradients[i] : gradient;
    if (targets.weight)
      for (int64_t i = 0; i < block.count; ++i) hits[i] = targets.hit(classes[i]);
    else
      std::fill_n(hits, block.count, 1 - targets.smoothing);
    for (int64_t i = 0; i < block.count; ++i) sums[i] = hits[i] + spread;
  }

  // x: logits of class c, from column i on
  template <class Lanes>
  Vector<A> at(int64_t c, int64_t i, Vector<A> x, Lanes which) const {
    const Vector<A> p = exp<A>(x - load(maximum + i, which) - load(log_sum + i, which));
    const auto y = (Vector<Index<A>>)load(reinterpret_cast<const A*>(classes) + i, which);
    const Vector<A> hit = y == static_cast<Index<A>>(c) ? load(hits + i, which) : Vector<A>{};
    const A share = targets.share * targets.weight_of(c);
    return (p * load(sums + i, which) - share - hit) * load(g + i, which);
  }
};

// Writes the losses, or their sum or mean, added in double: in blocks, side by side, and then the blocks'.
// losses: (N M); to: (N M) or one number
template <class T, class A = Accumulator<T>>
void reduce(const A* losses, const Targets<A>& targets, bool mean, bool none, T* to) {
  if (none) {
    std::transform(losses, losses + targets.count, to, [](A loss) { return static_cast<T>(loss); });
    return;
  }
  constexpr int64_t block = 4096, sides = 8;
  const int64_t blocks = (targets.count + block - 1) / block;
  const Scratch<double> sums(blocks);
  in_parallel(blocks, values_per_thread / block, [&](int64_t begin, int64_t end) {
    for (int64_t index = begin; index < end; ++index) {
      const int64_t first = index * block, count = std::min(block, targets.count - first);
      std::array<double, sides> added = {};
      for (int64_t i = 0; i < count / sides * sides; i += sides)
        for (int64_t side = 0; side < sides; ++side) added[side] += losses[first + i + side];
      for (int64_t i = count / sides * sides; i < count; ++i) added[0] += losses[first + i];
      sums.get()[index] = std::accumulate(added.begin(), added.end(), 0.0);
    }
  });
  const double sum = std::accumulate(sums.get(), sums.get() + blocks, 0.0);
  *to = static_cast<T>(static_cast<A>(mean ? sum / targets.divisor() : sum));
}

}  // namespace nacre
