// Cross-entropy with class indices: formula.py, the losses and gradients of kernel_cpu.h run side by side.
//
// x: (N, C, M): N outer positions, C classes, M places; N M tokens, each with a target y.
#include "nacre/layers/cross_entropy/kernel_cpu.h"

#include "nacre/core/cpu_memory.h"
#include "nacre/core/cpu_primitives.h"
#include "nacre/core/cpu_softmax.h"
#include "nacre/core/cpu_tiles.h"

#include <algorithm>
#include <array>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

namespace nacre {
namespace {

// The tensors of a call, checked, contiguous and in the dtypes that the kernel reads.
struct Arguments {
  Tensor x, y;
  std::optional<Tensor> weight;
  Sizes sizes, statistics;  // of the logits, and of them with one class
  bool mean, none;
  Slices slices;

  Arguments(const Tensor& input, const Tensor& target, const std::optional<Tensor>& given, const std::string& reduction)
      : x(contiguous_as(input, input.scalar_type())),
        y(contiguous_as(target, ScalarType::Long)),
        sizes(input.sizes().begin(), input.sizes().end()),
        statistics(sizes),
        mean(reduction == "mean"),
        none(reduction == "none"),
        slices(sizes, sizes.size() > 1) {
    STD_TORCH_CHECK(input.dim() > 0 && slices.size > 0, "cross_entropy: logits have a dimension of at least one class");
    STD_TORCH_CHECK(target.scalar_type() == ScalarType::Long, "cross_entropy: the kernel serves class indices");
    STD_TORCH_CHECK(target.numel() == tokens(), "cross_entropy: one target a token");
    STD_TORCH_CHECK(mean || none || reduction == "sum", "cross_entropy: the reduction is none, mean or sum");
    statistics[sizes.size() > 1] = 1;
    if (!given) return;
    STD_TORCH_CHECK(given->numel() == slices.size, "cross_entropy: one weight a class");
    weight = contiguous_as(*given, accumulator_dtype(input.scalar_type()));
  }

  int64_t tokens() const { return slices.outer * slices.inner; }

  template <class A>
  Targets<A> targets(int64_t ignore_index, double smoothing) const {
    const auto* classes = static_cast<const int64_t*>(y.const_data_ptr());
    Targets<A> found = {classes,      tokens(), slices.size, ignore_index, values<A>(weight),
                        A(smoothing), A(smoothing / static_cast<double>(slices.size))};
    found.check();
    return found;
  }
};

// x: (N, C, M); maximum, log_sum, losses: (N M)
template <class T, class A = Accumulator<T>>
void losses_of_tiles(const T* x, const Tiles& tiles, const Targets<A>& targets, A* maximum, A* log_sum, A* losses) {
  over_tiles(tiles, [&](int64_t begin, int64_t end) {
    const Scratch<A> scratch(TileReader<T>::scratch_values(tiles));
    TileReader<T> reader(x, tiles, begin, end, scratch.get());
    for (int64_t index = begin; index < end; ++index) {
      const Block block = tiles.block(index);
      const int64_t token = block.column;
      tile_losses(reader.take(nullptr), tiles, block.count, targets, token, maximum + token, log_sum + token,
                  losses + token, [&] { reader.step(); });
    }
  });
}

// x, grad: (N, C, M); maximum, log_sum: (N M); each: (N M), the gradients of the losses, or null where all are g
template <class T, class A = Accumulator<T>>
void gradients_of_tiles(const T* x, const Tiles& tiles, const Targets<A>& targets, const A* maximum, const A* log_sum,
                        const A* each, A g, A spread, T* grad) {
  const bool stream = stream_tiles(tiles, grad);
  over_tiles(tiles, [&](int64_t begin, int64_t end) {
    const int64_t values = tiles.within() ? 0 : TileReader<T>::scratch_values(tiles);
    const Scratch<A> scratch(values + TileGradients<A>::scratch_values(tiles));
    TileGradients<A> gradients(targets, tiles, scratch.get() + values);
    if (!tiles.within()) {
      TileReader<T> reader(x, tiles, begin, end, scratch.get());
      for (int64_t index = begin; index < end; ++index) {
        const Block block = tiles.block(index);
        gradients.take(block, maximum, log_sum, each, g, spread);
        const auto gradient = [&](int64_t c, int64_t i, Vector<A> logits, auto which) {
          return gradients.at(c, i, logits, which);
        };
        write_tile(reader.take(nullptr), tiles, block, false, grad, gradient);
      }
      return;
    }
    for (int64_t index = begin; index < end; ++index) {
      const Block block = tiles.block(index);
      gradients.take(block, maximum, log_sum, each, g, spread);
      for (int64_t c = 0; c < tiles.size; ++c) {
        const int64_t row = block.start + c * tiles.inner;
        over_row<A>(block.count, [&](int64_t i, auto which) {
          __builtin_prefetch(x + row + i + tiles.inner);
          if (!stream) __builtin_prefetch(grad + row + i + tiles.inner, 1);
          put(grad + row + i, gradients.at(c, i, load(x + row + i, which), which), which, stream);
        });
      }
    }
  });
}

std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& input, const Tensor& target,
                                           const std::optional<Tensor>& weight, const std::string& reduction,
                                           int64_t ignore_index, double label_smoothing) {
  const Arguments arguments(input, target, weight, reduction);
  const Slices& slices = arguments.slices;
  const int64_t size = slices.size;
  const ScalarType dtype = input.scalar_type(), computed = accumulator_dtype(dtype);
  const Sizes shape = arguments.none ? Sizes(target.sizes().begin(), target.sizes().end()) : Sizes();
  const Tensor loss = new_tensor(shape, dtype);
  const Tensor maximum = new_tensor(arguments.statistics, computed);
  const Tensor log_sum = new_tensor(arguments.statistics, computed);

  with_type(dtype, [&](auto type) {
    using T = decltype(type);
    using A = Accumulator<T>;
    const Targets<A> targets = arguments.targets<A>(ignore_index, label_smoothing);
    const Scratch<A> losses(targets.count);                            // (N M)
    const T* x = static_cast<const T*>(arguments.x.const_data_ptr());  // (N, C, M)
    A* m = static_cast<A*>(maximum.mutable_data_ptr());                // (N M)
    A* l = static_cast<A*>(log_sum.mutable_data_ptr());                // (N M)
    if (slices.in_tiles())
      losses_of_tiles(x, Tiles(slices), targets, m, l, losses.get());
    else
      slices.over_rows<A>(0, [&](int64_t first, int64_t rows, int64_t last, A*) {
        row_losses(x + first * size, first, rows, first + rows <= last, targets, m, l, losses.get());
      });
    reduce(losses.get(), targets, arguments.mean, arguments.none, static_cast<T*>(loss.mutable_data_ptr()));
  });
  return {loss, maximum, log_sum};
}

// needs: whether the gradients of input, target and weight are asked for; class indices have none, and weights beside
// them are the formula's
std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad_loss, const Tensor& input, const Tensor& target,
                                            const std::optional<Tensor>& weight, const std::string& reduction,
                                            int64_t ignore_index, double label_smoothing, const Tensor& maximum,
                                            const Tensor& log_sum, const std::vector<bool>& needs) {
  const Arguments arguments(input, target, weight, reduction);
  const Slices& slices = arguments.slices;
  const int64_t size = slices.size, tokens = arguments.tokens();
  const ScalarType dtype = input.scalar_type(), computed = accumulator_dtype(dtype);
  STD_TORCH_CHECK(needs.size() == 3 && !needs[2], "cross_entropy: the kernel serves the gradient of the logits");
  STD_TORCH_CHECK(grad_loss.numel() == (arguments.none ? tokens : 1), "cross_entropy: one gradient a loss");
  STD_TORCH_CHECK(maximum.numel() == tokens && log_sum.numel() == tokens, "cross_entropy: two statistics a token");
  if (!needs[0]) return {Tensor(), Tensor(), Tensor()};
  const Tensor given = contiguous_as(grad_loss, computed);
  const Tensor maxima = contiguous_as(maximum, computed), log_sums = contiguous_as(log_sum, computed);
  const Tensor grad = new_tensor(arguments.sizes, dtype);

  with_type(dtype, [&](auto type) {
    using T = decltype(type);
    using A = Accumulator<T>;
    const Targets<A> targets = arguments.targets<A>(ignore_index, label_smoothing);
    const A* grads = static_cast<const A*>(given.const_data_ptr());    // (N M) or one number
    const A* m = static_cast<const A*>(maxima.const_data_ptr());       // (N M)
    const A* l = static_cast<const A*>(log_sums.const_data_ptr());     // (N M)
    const T* x = static_cast<const T*>(arguments.x.const_data_ptr());  // (N, C, M)
    T* to = static_cast<T*>(grad.mutable_data_ptr());                  // (N, C, M)
    const A divisor = arguments.mean ? static_cast<A>(targets.divisor()) : A(1), spread = targets.spread();
    const A* each = arguments.none ? grads : nullptr;
    const A one = arguments.none ? A(0) : grads[0] / divisor;
    const auto gradient_of = [&](int64_t token) { return targets.ignored(token) ? A(0) : each ? each[token] : one; };
    const bool stream = slices.stream_rows(to);
    if (slices.in_tiles())
      gradients_of_tiles(x, Tiles(slices), targets, m, l, each, one, spread, to);
    else
      slices.over_rows<A>(0, [&](int64_t first, int64_t rows, int64_t, A*) {
        for (int64_t row = first; row < first + rows; ++row)
          row_gradient(x + row * size, targets, row, m[row], l[row], gradient_of(row), spread, stream, to + row * size);
      });
  });
  return {grad, Tensor(), Tensor()};
}

}  // namespace
}  // namespace nacre

STABLE_TORCH_LIBRARY_IMPL(nacre, CPU, m) {
  m.impl("cross_entropy.kernel", TORCH_BOX(&nacre::forward));
  m.impl("cross_entropy_backward.kernel", TORCH_BOX(&nacre::backward));
}
