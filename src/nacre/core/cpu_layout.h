// Where the elements of a result lie: as torch's would, so that a kernel which treats each element alone reads and
// writes memory from end to end, whatever the order of the dimensions in it.
#pragma once

#include "nacre/core/cpu_memory.h"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <numeric>
#include <utility>

namespace nacre {

using torch::stable::Tensor;

inline Sizes sizes_of(const Tensor& tensor) { return Sizes(tensor.sizes().begin(), tensor.sizes().end()); }
inline Sizes strides_of(const Tensor& tensor) { return Sizes(tensor.strides().begin(), tensor.strides().end()); }

// The strides of a tensor whose dimensions follow each other in memory in this order, the innermost first.
inline Sizes packed(const Sizes& sizes, const Sizes& order) {
  Sizes strides(sizes.size());
  int64_t stride = 1;
  for (const int64_t i : order) {
    strides[i] = stride;
    stride *= std::max<int64_t>(sizes[i], 1);
  }
  return strides;
}

// A dimension of size 1 may have any stride.
inline bool same_places(const Sizes& sizes, const Sizes& strides, const Sizes& others) {
  for (size_t i = 0; i < sizes.size(); ++i)
    if (sizes[i] > 1 && strides[i] != others[i]) return false;
  return true;
}

inline bool is_channels_last(const Sizes& sizes, const Sizes& strides) {
  return sizes.size() == 4 && same_places(sizes, strides, packed(sizes, {1, 3, 2, 0}));
}

// The dimensions in the order of their strides, the innermost first, as torch sorts them: the first tensor decides, and
// the second where that one repeats elements.
inline Sizes inner_to_outer(const Sizes& sizes, const Sizes& first, const Sizes& second) {
  const auto lies_within = [&](int64_t i, int64_t j) {
    for (const Sizes* strides : {&first, &second}) {
      const int64_t one = (*strides)[i], other = (*strides)[j];
      if (one == 0 || other == 0) continue;
      if (one != other) return one < other ? 1 : -1;
      if (sizes[i] < sizes[j]) return 1;
    }
    return 0;
  };
  Sizes order(sizes.size());
  std::iota(order.rbegin(), order.rend(), 0);
  for (size_t i = 1; i < order.size(); ++i)
    for (size_t at = i, before = i; before-- > 0;) {
      const int found = lies_within(order[at], order[before]);
      if (found < 0) break;
      if (found > 0) std::swap(order[at], order[before]), at = before;
    }
  return order;
}

// The strides of torch's result for two tensors of one shape: without gaps, and like theirs where they agree.
inline Sizes result_strides(const Tensor& one, const Tensor& other) {
  const Sizes sizes = sizes_of(one);
  if (one.is_contiguous() && other.is_contiguous()) {
    Sizes last_innermost(sizes.size());
    std::iota(last_innermost.rbegin(), last_innermost.rend(), 0);
    return packed(sizes, last_innermost);
  }
  const Sizes first = strides_of(one), second = strides_of(other);
  if (is_channels_last(sizes, first) && is_channels_last(sizes, second)) return packed(sizes, {1, 3, 2, 0});
  const Sizes dense = packed(sizes, inner_to_outer(sizes, first, second));
  return first == second && same_places(sizes, first, dense) ? first : dense;
}

// The tensor itself if its elements lie at these strides, else a copy.
inline Tensor laid_out(const Tensor& tensor, const Sizes& strides) {
  const Sizes sizes = sizes_of(tensor);
  if (same_places(sizes, strides_of(tensor), strides)) return tensor;
  Tensor copy = new_tensor(sizes, strides, tensor.scalar_type());
  torch::stable::copy_(copy, tensor);
  return copy;
}

}  // namespace nacre
