// Dropout as a step of a kernel: what each element is multiplied by, in vectors that live in registers only.
#pragma once

#include "nacre/core/cpu_primitives.h"
#include "nacre/core/cpu_random.h"

#include <cstring>
#include <optional>

namespace nacre {

// 0 where an element is dropped, so that NaN and infinity show, else 1 / (1 - p).
template <class A>
class DropoutFactors {
 public:
  // Without a seed nothing is dropped: every factor is 1.
  DropoutFactors(const std::optional<Tensor>& seed, double p) {
    STD_TORCH_CHECK(0 <= p && p <= 1, "dropout: p is a probability, from 0 to 1");
    if (!seed) return;
    STD_TORCH_CHECK(seed->is_cpu() && seed->numel() == 1 && seed->scalar_type() == ScalarType::Long,
                    "dropout: the seed is one int64 on the CPU");
    mask_.emplace(*static_cast<const int64_t*>(seed->const_data_ptr()), p);
    kept_ += static_cast<A>(p < 1 ? 1 / (1 - p) : 0);
  }

  bool drops() const { return mask_.has_value(); }

  // Calls body(i, lanes, factors) for each vector of `count` elements, of which the first is number `position` of all.
  template <class Body>
  void over_row(int64_t position, int64_t count, Body body) const {
    if (!mask_)
      return nacre::over_row<A>(count, [&](int64_t i, auto which) { body(i, which, Vector<A>{} + A(1)); });
    int32_t masks[group_size + lanes<float>] = {};
    int64_t skipped = position % 4;  // masks begin at multiples of 4
    for (int64_t begin = 0; begin < count;) {
      const auto group = mask_->template from<group_vectors>(position + begin - skipped);
      std::memcpy(masks, &group, sizeof group);
      const int64_t here = std::min(group_size - skipped, count - begin);
      nacre::over_row<A>(here, [&](int64_t i, auto which) {
        body(begin + i, which, at(masks + skipped + i) ? kept_ : Vector<A>{});
      });
      begin += here;
      skipped = 0;
    }
  }

 private:
  static constexpr size_t group_vectors = 4;
  static constexpr int64_t group_size = group_vectors * lanes<float>;

  // The masks of a vector of A.
  static auto at(const int32_t* masks) {
    typename VectorOf<int32_t, lanes<A> * static_cast<int64_t>(sizeof(int32_t))>::type narrow;
    std::memcpy(&narrow, masks, sizeof narrow);
    if constexpr (sizeof(A) == sizeof(int32_t))
      return narrow;
    else
      return __builtin_convertvector(narrow, Vector<int64_t>);
  }

  std::optional<KeepMask> mask_;
  Vector<A> kept_ = {};
};

}  // namespace nacre
