// Dropout: formula.py, with a mask that lives in registers only. N elements.
#include "nacre/core/cpu_memory.h"
#include "nacre/core/cpu_primitives.h"
#include "nacre/core/cpu_random.h"
#include "nacre/core/cpu_streams.h"

#include <array>
#include <vector>

namespace nacre {
namespace {

constexpr size_t group_vectors = 4;
constexpr int64_t group_size = group_vectors * lanes<float>;  // a multiple of 4, as the positions of masks have to be

using Masks = std::array<Vector<int32_t>, group_vectors>;

// The mask of the elements from `i` on, for vectors of A.
template <class A>
auto mask_at(const Masks& masks, int64_t i) {
  if constexpr (sizeof(A) == sizeof(int32_t)) {
    return masks[i / lanes<A>];
  } else {
    typename VectorOf<int32_t, vector_bytes / 2>::type narrow;
    std::memcpy(&narrow, reinterpret_cast<const int32_t*>(&masks) + i, sizeof narrow);
    return __builtin_convertvector(narrow, Vector<int64_t>);
  }
}

// The elements from begin, a multiple of 4, to end. A dropped element is multiplied by 0, so that NaN and infinity show.
// x, y: (N)
template <class T, class A = Accumulator<T>>
void mask_elements(const T* x, T* y, int64_t begin, int64_t end, const KeepMask& mask, A scale, bool stream) {
  const Vector<A> kept = Vector<A>{} + scale, dropped = {};
  const auto mask_group = [&](int64_t position, int64_t count) {
    const Masks masks = mask.from<group_vectors>(position);
    over_row<A>(count, [&](int64_t i, auto which) {
      const Vector<A> factor = mask_at<A>(masks, i) ? kept : dropped;
      put(y + position + i, load(x + position + i, which) * factor, which, stream);
    });
  };
  int64_t position = begin;
  for (; position + group_size <= end; position += group_size) mask_group(position, group_size);
  if (position < end) mask_group(position, end - position);
}

// The same values in memory laid out as the formula lays it out for such an input.
Tensor in_format_of(const Tensor& input, const Tensor& values, const Sizes& sizes) {
  const Tensor like = torch::stable::empty_like(input);
  Tensor formatted = new_tensor(sizes, Sizes(like.strides().begin(), like.strides().end()), input.scalar_type());
  return torch::stable::copy_(formatted, values);
}

Tensor masked(const Tensor& input, const Tensor& seed, double p) {
  STD_TORCH_CHECK(0 <= p && p <= 1, "dropout: p is a probability, from 0 to 1");
  STD_TORCH_CHECK(seed.is_cpu() && seed.numel() == 1 && seed.scalar_type() == ScalarType::Long,
                  "dropout: the seed is one int64 on the CPU");
  const ScalarType dtype = input.scalar_type();
  const Tensor x = contiguous_as(input, dtype);
  const Sizes sizes(x.sizes().begin(), x.sizes().end());
  const Tensor y = new_tensor(sizes, dtype);
  const KeepMask mask(*static_cast<const int64_t*>(seed.const_data_ptr()), p);
  const double scale = p < 1 ? 1 / (1 - p) : 0;

  with_type(dtype, [&](auto type) {
    using T = decltype(type);
    const T* from = static_cast<const T*>(x.const_data_ptr());
    T* to = static_cast<T*>(y.mutable_data_ptr());
    const int64_t count = x.numel(), groups = (count + group_size - 1) / group_size;
    const bool stream = streams(to, count);
    in_parallel(groups, values_per_thread / group_size, [&](int64_t begin, int64_t end) {
      mask_elements<T>(from, to, begin * group_size, std::min(end * group_size, count), mask,
                       static_cast<Accumulator<T>>(scale), stream);
      if (stream) finish_past_caches();
    });
  });
  return input.is_contiguous() ? y : in_format_of(input, y, sizes);
}

Tensor backward(const Tensor& grad_output, const Tensor& seed, double p, const std::vector<bool>& needs) {
  STD_TORCH_CHECK(needs.size() == 1, "dropout: one gradient is asked for or not");
  return needs[0] ? masked(grad_output, seed, p) : Tensor();
}

}  // namespace
}  // namespace nacre

STABLE_TORCH_LIBRARY_IMPL(nacre, CPU, m) {
  m.impl("dropout.kernel", TORCH_BOX(&nacre::masked));
  m.impl("dropout_backward.kernel", TORCH_BOX(&nacre::backward));
}
