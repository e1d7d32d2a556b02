// Dropout as a step of a kernel: what each element is multiplied by, in vectors that live in registers only.
#pragma once

#include "nacre/core/cpu_primitives.h"
#include "nacre/core/cpu_random.h"

#include <array>
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
    const KeepMask mask = *mask_;  // copies, which no store of the body can change
    const Vector<A> kept = kept_;
    int64_t skipped = position % 4;  // masks begin at multiples of 4
    for (int64_t begin = 0; begin < count; skipped = 0) {
      const Group masks = mask.template from<group_vectors>(position + begin - skipped);
      const int64_t here = std::min(group_size - skipped, count - begin);
      if (here == group_size)
        for (int64_t i = 0; i < group_size; i += lanes<A>) body(begin + i, Whole{}, at(masks, i) ? kept : Vector<A>{});
      else
        over_part(masks, skipped, here, [&](int64_t i, auto which, auto keeps) {
          body(begin + i, which, keeps ? kept : Vector<A>{});
        });
      begin += here;
    }
  }

 private:
  static constexpr size_t group_vectors = 4;
  static constexpr int64_t group_size = group_vectors * lanes<float>;
  using Group = std::array<Vector<int32_t>, group_vectors>;

  // The masks of the vector of A that begins with element i of a group.
  static auto at(const Group& masks, int64_t i) {
    if constexpr (sizeof(A) == sizeof(int32_t)) return masks[i / lanes<A>];
    else return widened(reinterpret_cast<const int32_t*>(&masks) + i);
  }

  static auto widened(const int32_t* masks) {
    typename VectorOf<int32_t, lanes<A> * static_cast<int64_t>(sizeof(int32_t))>::type narrow;
    std::memcpy(&narrow, masks, sizeof narrow);
    if constexpr (sizeof(A) == sizeof(int32_t)) return narrow;
    else return __builtin_convertvector(narrow, Vector<int64_t>);
  }

  // Calls body(i, lanes, masks) for `count` elements of a group, whose first ones are skipped.
  template <class Body>
  static void over_part(const Group& group, int64_t skipped, int64_t count, Body body) {
    int32_t masks[group_size + lanes<float>] = {};
    std::memcpy(masks, &group, sizeof group);
    nacre::over_row<A>(count, [&](int64_t i, auto which) { body(i, which, widened(masks + skipped + i)); });
  }

  std::optional<KeepMask> mask_;
  Vector<A> kept_ = {};
};

}  // namespace nacre
