// The arithmetic of the cross-entropy kernel: what a token's target says, and the losses and gradients of a row of logits or
// of a tile of columns, which stays in cache between the passes over it.
//
// x: (N, C, M): N outer positions, C classes, M places; N M tokens, each with a target y.
#pragma once

#include "nacre/core/cpu_math.h"
#include "nacre/core/cpu_primitives.h"
#include "nacre/core/cpu_softmax.h"

#include <algorithm>
#include <array>
#include <cmath>
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

  bool ignored(int64_t token) const { return classes[token] == ignore_index; }
  bool outside(int64_t y) const {
    return (static_cast<uint64_t>(y) >= static_cast<uint64_t>(num_classes)) & (y != ignore_index);
  }
  int64_t valid_class(int64_t token) const { return ignored(token) ? 0 : classes[token]; }
  A weight_of(int64_t y) const { return weight ? weight[y] : A(1); }
  // What the target's own class has more than its share: w_y (1 - smoothing).
  A hit(int64_t y) const { return (1 - smoothing) * weight_of(y); }

  // Every target is looked at before any is used as an index.
  void check() const {
    int64_t found = 0;
    for (int64_t token = 0; token < count; ++token) found += outside(classes[token]);
    if (found == 0) return;
    const auto bad = std::to_string(*std::find_if(classes, classes + count, [&](int64_t y) { return outside(y); }));
    throw std::out_of_range("Target " + bad + " is out of bounds: a target is the index of a class, or ignore_index; got " +
                            bad + " where the classes are 0 to " + std::to_string(num_classes - 1) + ".");
  }

  // The sum of w_y over the tokens which are not ignored.
  double divisor() const {
    double sum = 0;
    int64_t counted = 0;
    for (int64_t token = 0; token < count; ++token) counted += !ignored(token);
    if (!weight) return static_cast<double>(counted);
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

// While the exponentials are computed, the next row comes from memory. x, next: (C)
template <class T, class A = Accumulator<T>>
double row_loss(const T* x, const T* next, const Targets<A>& targets, int64_t token, A* maximum, A* log_sum) {
  const int64_t size = targets.num_classes;
  const A m = maximum_of_row(x, size);
  const auto [sum] = sums_over_row<A, 1>(size, [&](int64_t c, auto which) {
    __builtin_prefetch(next + c);
    return std::array<Vector<A>, 1>{exp<A>(load(x + c, which) - m)};
  });
  const A l = std::log(sum);
  A weighted = 0;
  if (targets.smoothing > 0)
    weighted = sums_over_row<A, 1>(size, [&](int64_t c, auto which) {
      const Vector<A> log_p = load(x + c, which) - m - l;
      return std::array<Vector<A>, 1>{targets.weight ? log_p * load(targets.weight + c, which) : log_p};
    })[0];
  *maximum = m;
  *log_sum = l;
  return targets.loss(token, static_cast<A>(x[targets.valid_class(token)]) - m - l, weighted);
}

// x: (C, W), rows `stride` apart; maximum, log_sum, losses: (W); scratch: (C + 1, W); token: the first one
template <class T, class A = Accumulator<T>>
void tile_losses(const T* x, int64_t stride, int64_t columns, const Targets<A>& targets, int64_t token, A* maximum,
                 A* log_sum, double* losses, A* scratch) {
  const int64_t size = targets.num_classes;
  A *tile = scratch, *weighted = tile + size * columns;
  read_tile(x, size, stride, columns, tile, maximum);
  std::fill(log_sum, log_sum + columns, A(0));
  over_tile<A>(size, columns, columns, [&](int64_t, int64_t i, int64_t at, auto which) {
    const Vector<A> e = exp<A>(load(tile + at, which) - load(maximum + i, which));
    store(log_sum + i, load(log_sum + i, which) + e, which);
  });
  over_row<A>(columns, [&](int64_t i, auto which) { store(log_sum + i, log<A>(load(log_sum + i, which)), which); });
  std::fill(weighted, weighted + columns, A(0));
  if (targets.smoothing > 0)
    over_tile<A>(size, columns, columns, [&](int64_t c, int64_t i, int64_t at, auto which) {
      const Vector<A> log_p = load(tile + at, which) - load(maximum + i, which) - load(log_sum + i, which);
      store(weighted + i, load(weighted + i, which) + log_p * targets.weight_of(c), which);
    });
  for (int64_t i = 0; i < columns; ++i) {
    const A log_p = tile[targets.valid_class(token + i) * columns + i] - maximum[i] - log_sum[i];
    losses[i] = targets.loss(token + i, log_p, weighted[i]);
  }
}

// x, grad: (C); g: the token's gradient; spread: as of Targets
template <class T, class A = Accumulator<T>>
void row_gradient(const T* x, const Targets<A>& targets, int64_t token, A maximum, A log_sum, A g, A spread, bool stream,
                  T* grad) {
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

// x, grad: (C, W), rows `stride` apart; maximum, log_sum, g: (W); scratch: (3, W); token: the first one
template <class T, class A = Accumulator<T>>
void tile_gradients(const T* x, int64_t stride, int64_t columns, const Targets<A>& targets, int64_t token,
                    const A* maximum, const A* log_sum, const A* g, A spread, T* grad, A* scratch) {
  A *hits = scratch, *sums = hits + columns;
  auto* classes = reinterpret_cast<Index<A>*>(sums + columns);
  for (int64_t i = 0; i < columns; ++i) {
    classes[i] = static_cast<Index<A>>(targets.valid_class(token + i));
    hits[i] = targets.hit(classes[i]);
    sums[i] = hits[i] + spread;
  }
  over_tile<A>(targets.num_classes, stride, columns, [&](int64_t c, int64_t i, int64_t at, auto which) {
    const Vector<A> p = exp<A>(load(x + at, which) - load(maximum + i, which) - load(log_sum + i, which));
    const auto y = (Vector<Index<A>>)load(reinterpret_cast<const A*>(classes) + i, which);
    const Vector<A> hit = y == static_cast<Index<A>>(c) ? load(hits + i, which) : Vector<A>{};
    const A share = targets.share * targets.weight_of(c);
    store(grad + at, (p * load(sums + i, which) - share - hit) * load(g + i, which), which);
  });
}

// Writes the losses, or their sum or mean, added in double. losses: (N M); to: (N M) or one number
template <class T, class A = Accumulator<T>>
void reduce(const double* losses, const Targets<A>& targets, bool mean, bool none, T* to) {
  if (none) {
    std::transform(losses, losses + targets.count, to, [](double loss) { return static_cast<T>(static_cast<A>(loss)); });
    return;
  }
  const auto [sum] = sums_over_row<double, 1>(targets.count, [&](int64_t token, auto which) {
    return std::array<Vector<double>, 1>{load(losses + token, which)};
  });
  *to = static_cast<T>(static_cast<A>(mean ? sum / targets.divisor() : sum));
}

}  // namespace nacre
