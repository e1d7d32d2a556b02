// Attention: formula.py in tiles, so that no matrix of queries by keys is ever held but for results that are one.
#include "nacre/layers/attention/kernel_cpu_arguments.h"
#include "nacre/layers/attention/kernel_cpu_backward.h"

#include <tuple>

namespace nacre {
namespace {

// A new tensor like another with its dimensions in the same order in memory (layout.py: ordered_as).
Tensor ordered_as(const Tensor& like, const Sizes& sizes) {
  const ScalarType dtype = like.scalar_type();
  const Sizes strides = strides_of(like);
  if (sizes.size() != 4 || sizes != sizes_of(like) || strides[3] != 1 || std::count(strides.begin(), strides.end(), 0))
    return new_tensor(sizes, dtype);
  Sizes order = {2, 1, 0};
  std::stable_sort(order.begin(), order.end(), [&](int64_t i, int64_t j) {
    return strides[i] != strides[j] ? strides[i] < strides[j] : i > j;
  });
  order.insert(order.begin(), 3);
  return new_tensor(sizes, packed(sizes, order), dtype);
}

// The gradient of a packed projection, in the order in memory of the projection (packed.py: packed_as).
Tensor packed_as(const Tensor& like) {
  const Sizes sizes = sizes_of(like);
  return new_tensor(sizes, packed(sizes, like.stride(0) < like.stride(1) ? Sizes{2, 0, 1} : Sizes{2, 1, 0}),
                    like.scalar_type());
}

Sizes output_sizes(const Arguments& given, const Shape& shape) {
  if (given.is_packed()) return {shape.queries, given.query.size(1), given.query.size(2) / 3};
  return sizes_of_rows(shape, shape.queries, shape.value_features);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> forward(const Tensor& query, const OptionalTensor& key,
                                                   const OptionalTensor& value, const OptionalTensor& mask,
                                                   const OptionalTensor& key_mask, const OptionalTensor& seed,
                                                   double dropout_p, bool is_causal, double scale, bool enable_gqa,
                                                   bool need_weights, bool average_weights, int64_t packed_heads) {
  const Arguments given{query,     key,   value,      mask,         key_mask,        seed,        dropout_p,
                        is_causal, scale, enable_gqa, need_weights, average_weights, packed_heads};
  const Shape shape = shape_of(given);
  const ScalarType dtype = query.scalar_type();
  const Sizes sizes = output_sizes(given, shape), row_sizes = sizes_of_rows(shape, shape.queries, 1);
  Tensor output = given.is_packed() ? new_tensor(sizes, dtype) : ordered_as(query, sizes);
  Tensor weights = new_tensor(need_weights ? sizes_of_weights(given, shape) : Sizes{0}, dtype);
  Tensor mean = weights;  // in the dtype that sums
  const bool rounds = average_weights && accumulator_dtype(dtype) != dtype;
  if (rounds) mean = new_tensor(sizes_of(weights), accumulator_dtype(dtype));
  Tensor row_maximum = new_tensor(row_sizes, accumulator_dtype(dtype));
  Tensor row_sum = new_tensor(row_sizes, accumulator_dtype(dtype));
  with_type(dtype, [&](auto type) {
    using T = decltype(type);
    using A = Accumulator<T>;
    const Attention<T> attention = attention_of<T>(given, shape);
    AttentionForward<T>{attention,
                        output_heads<T>(given, shape, output),
                        need_weights && !average_weights ? Heads<T>(weights) : Heads<T>(),
                        average_weights ? shared_heads<A>(shape, mean) : Heads<A>(),
                        static_cast<A*>(row_maximum.mutable_data_ptr()),
                        static_cast<A*>(row_sum.mutable_data_ptr())}
        .run();
  });
  if (rounds) torch::stable::copy_(weights, mean);
  return {output, weights, row_maximum, row_sum};
}

// ---- backward

// The gradients of the masks: dA summed over what each of them was repeated along.
struct MaskGradients {
  Tensor scores, mask, key_mask;  // dA (*, L, S), and what was asked for

  MaskGradients(const Shape& shape, ScalarType dtype, bool needs_mask, bool needs_key_mask)
      : needs_mask_(needs_mask), needs_key_mask_(needs_key_mask) {
    if (needs_mask || needs_key_mask)
      scores = new_tensor(sizes_of_rows(shape, shape.queries, shape.keys), accumulator_dtype(dtype));
  }

  bool needed() const { return needs_mask_ || needs_key_mask_; }

  void gather(const Arguments& given) {
    if (needs_mask_) mask = gathered(*given.mask);
    if (needs_key_mask_) key_mask = gathered(*given.key_mask);
  }

 private:
  bool needs_mask_, needs_key_mask_;

  Tensor gathered(const Tensor& of) const {
    std::vector<int64_t> dimensions;
    const int64_t missing = scores.dim() - of.dim();
    for (int64_t i = 0; i < scores.dim(); ++i)
      if (i < missing || of.size(i - missing) == 1) dimensions.push_back(i);
    const Tensor sum = dimensions.empty() ? scores : torch::stable::sum(scores, dimensions, true);
    Tensor gradient = new_tensor(sizes_of(of), of.scalar_type());
    torch::stable::copy_(gradient, torch::stable::view(sum, sizes_of(of)));
    return gradient;
  }
};

template <class A>
const A* row_values(const Tensor& rows, const Shape& shape) {
  constexpr ScalarType dtype = std::is_same_v<A, double> ? ScalarType::Double : ScalarType::Float;
  STD_TORCH_CHECK(rows.is_cpu() && rows.is_contiguous() && rows.numel() == shape.heads * shape.queries &&
                      rows.scalar_type() == dtype,
                  "attention: the largest score and the sum of every row");
  return static_cast<const A*>(rows.const_data_ptr());
}

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

Gradients backward(const OptionalTensor& grad_output, const OptionalTensor& grad_weights, const Tensor& query,
                   const OptionalTensor& key, const OptionalTensor& value, const OptionalTensor& mask,
                   const OptionalTensor& key_mask, const OptionalTensor& seed, double dropout_p, bool is_causal,
                   double scale, bool enable_gqa, bool need_weights, bool average_weights, int64_t packed_heads,
                   const Tensor& row_maximum, const Tensor& row_sum, const std::vector<bool>& needs) {
  const Arguments given{query,     key,   value,      mask,         key_mask,        seed,        dropout_p,
                        is_causal, scale, enable_gqa, need_weights, average_weights, packed_heads};
  const Shape shape = shape_of(given);
  const ScalarType dtype = query.scalar_type();
  STD_TORCH_CHECK(needs.size() == 5 && (mask || !needs[3]) && (key_mask || !needs[4]),
                  "attention: five gradients are asked for or not");
  if (grad_output) check(*grad_output, dtype, output_sizes(given, shape));
  const bool weighted = grad_weights && need_weights;
  if (weighted) check(*grad_weights, dtype, sizes_of_weights(given, shape));
  Tensor dq, dk, dv;
  if (needs[0]) dq = given.is_packed() ? packed_as(query) : ordered_as(query, sizes_of(query));
  if (needs[1] && key) dk = ordered_as(*key, sizes_of(*key));
  if (needs[2] && value && grad_output) dv = ordered_as(*value, sizes_of(*value));
  MaskGradients masks(shape, dtype, needs[3], needs[4]);
  with_type(dtype, [&](auto type) {
    using T = decltype(type);
    using A = Accumulator<T>;
    const Attention<T> attention = attention_of<T>(given, shape);
    const auto [to_query, to_key, to_value] = three_heads<T>(given, shape, &dq, &dk, &dv);
    Heads<const T> to_weights;
    if (weighted)
      to_weights = average_weights ? shared_heads<const T>(shape, *grad_weights) : Heads<const T>(*grad_weights);
    AttentionBackward<T>{
        attention, grad_output ? output_heads<const T>(given, shape, *grad_output) : Heads<const T>(), to_weights,
        average_weights ? A(1) / static_cast<A>(shape.leading.back()) : A(1), row_values<A>(row_maximum, shape),
        row_values<A>(row_sum, shape),
        AttentionGradients<T>{to_query, to_key, to_value, masks.needed() ? Heads<A>(masks.scores) : Heads<A>()}}
        .run();
  });
  masks.gather(given);
  return {dq, dk, dv, masks.mask, masks.key_mask};
}

}  // namespace
}  // namespace nacre

STABLE_TORCH_LIBRARY_IMPL(nacre, CPU, m) {
  m.impl("attention.kernel", TORCH_BOX(&nacre::forward));
  m.impl("attention_backward.kernel", TORCH_BOX(&nacre::backward));
}
