// What attention does to one row of scores, in the first cache: masks, exponential, dropout, and their derivatives.
#pragma once

#include "nacre/core/cpu_math.h"
#include "nacre/core/cpu_random.h"
#include "nacre/core/cpu_softmax.h"
#include "nacre/layers/attention/kernel_cpu_heads.h"

#include <optional>
#include <vector>

namespace nacre {

// ---- masks

template <class A, class M>
inline void mask_row(const M* __restrict mask, int64_t stride, int64_t count, A* __restrict scores) {
  const auto put = [&](int64_t j, M value) {
    if constexpr (std::is_same_v<M, bool>)
      scores[j] = value ? scores[j] : -infinity<A>;
    else
      scores[j] += static_cast<A>(value);
  };
  if (stride == 1)
    for (int64_t j = 0; j < count; ++j) put(j, mask[j]);
  else
    for (int64_t j = 0; j < count; ++j) put(j, mask[j * stride]);
}

struct Masks {
  std::vector<Mask> masks;

  // scores: of the keys of the span
  template <class A>
  void apply(int64_t head, int64_t query, Span keys, A* scores) const {
    for (const Mask& mask : masks) {
      const int64_t stride = mask.places.column_stride;
      const auto put = [&](const auto* row) { mask_row(row + keys.begin * stride, stride, keys.size(), scores); };
      if (mask.dtype == ScalarType::Bool)
        put(mask.row<bool>(head, query));
      else
        with_type(mask.dtype, [&](auto type) { put(mask.row<decltype(type)>(head, query)); });
    }
  }

  // Of these keys those between which all lie that queries `first` to `last` may see.
  Span visible(int64_t head, int64_t first, int64_t last, Span keys) const {
    for (const Mask& mask : masks) keys = mask.visible(head, first, last, keys);
    return keys;
  }
};

// ---- dropout

// Which weights are kept: element (head, query, key) of (B, L, S) has the word of its flat position.
template <class A>
class WeightDropout {
 public:
  WeightDropout(int64_t seed, double p, int64_t queries, int64_t keys)
      : mask_(seed, p), kept_(p < 1 ? static_cast<A>(1 / (1 - p)) : A(0)), queries_(queries), keys_(keys) {}

  // What `draw` may write to.
  static int64_t buffer_size(int64_t keys) { return keys + 8 * lanes<float>; }

  // Draws the masks of the keys of a span; returns where the first one lies.
  const int32_t* draw(int64_t head, int64_t query, Span keys, int32_t* buffer) const {
    const int64_t position = (head * queries_ + query) * keys_ + keys.begin, before = position % 4;
    const int64_t count = keys.size();
    for (int64_t i = 0; i < before + count;) {
      const auto write = [&](const auto& masks) {
        std::memcpy(buffer + i, &masks, sizeof masks);
        i += static_cast<int64_t>(sizeof masks / sizeof(int32_t));
      };
      if (before + count - i > 2 * lanes<float>)
        write(mask_.template from<4>(position - before + i));
      else
        write(mask_.template from<2>(position - before + i));
    }
    return buffer + before;
  }

  // 1 / (1 - p) where a weight is kept, else 0.
  Vector<A> factors(const int32_t* masks) const {
    typename VectorOf<int32_t, lanes<A> * 4>::type bits;
    std::memcpy(&bits, masks, sizeof bits);
    using Wide = typename VectorOf<std::conditional_t<sizeof(A) == 4, int32_t, int64_t>, vector_bytes>::type;
    return (Vector<A>)(__builtin_convertvector(bits, Wide) & (Wide)every<A>(kept_));
  }

 private:
  KeepMask mask_;
  A kept_;
  int64_t queries_, keys_;
};

// ---- softmax

// Turns scores into exp(score - maximum), with dropout; returns their sum without it.
template <class A>
inline A soften_row(A* scores, int64_t count, A maximum, const WeightDropout<A>* dropout, const int32_t* kept) {
  if (dropout)
    return sums_over_row<A, 1>(count, [&](int64_t i, auto which) {
      const Vector<A> p = exp<A>(load(scores + i, which) - maximum);
      store(scores + i, p * dropout->factors(kept + i), which);
      return std::array<Vector<A>, 1>{p};
    })[0];
  return sums_over_row<A, 1>(count, [&](int64_t i, auto which) {
    const Vector<A> p = exp<A>(load(scores + i, which) - maximum);
    store(scores + i, p, which);
    return std::array<Vector<A>, 1>{p};
  })[0];
}

// What the backward knows of a row of the softmax.
template <class A>
struct RowStatistics {
  A maximum, sum;
};

// From scores and dW: W = D o P in place of the scores, and dA = P o (D o dW - r) in place of dW. p: room for the row
template <class A>
inline void row_gradient(A* scores, A* gradient, int64_t count, RowStatistics<A> row, const WeightDropout<A>* dropout,
                         const int32_t* kept, A* p) {
  const A inverse = 1 / row.sum;
  const auto factors = [&](int64_t i) { return dropout->factors(kept + i); };
  if (!dropout) {
    const A r = sums_over_row<A, 1>(count, [&](int64_t i, auto which) {
      const Vector<A> weights = exp<A>(load(scores + i, which) - row.maximum) * inverse;
      store(scores + i, weights, which);
      return std::array<Vector<A>, 1>{weights * load(gradient + i, which)};
    })[0];
    over_row<A>(count, [&](int64_t i, auto which) {
      store(gradient + i, load(scores + i, which) * (load(gradient + i, which) - r), which);
    });
    return;
  }
  const A r = sums_over_row<A, 1>(count, [&](int64_t i, auto which) {
    const Vector<A> probabilities = exp<A>(load(scores + i, which) - row.maximum) * inverse;
    const Vector<A> weights = probabilities * factors(i);
    store(p + i, probabilities, which);
    store(scores + i, weights, which);
    return std::array<Vector<A>, 1>{weights * load(gradient + i, which)};
  })[0];
  over_row<A>(count, [&](int64_t i, auto which) {
    store(gradient + i, load(p + i, which) * (load(gradient + i, which) * factors(i) - r), which);
  });
}

}  // namespace nacre
