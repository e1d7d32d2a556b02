// The arguments of attention's two operators, checked, and the matrices of the heads in them.
#pragma once

#include "nacre/layers/attention/kernel_cpu_forward.h"

#include <array>
#include <optional>

namespace nacre {

using OptionalTensor = std::optional<Tensor>;

// The arguments of a call. Where key and value are missing, query is the packed projection of self-attention,
// (L, N, 3 H E) of `packed_heads` heads, and the output is (L, N, H E).
struct Arguments {
  const Tensor& query;
  const OptionalTensor &key, &value, &mask, &key_mask, &seed;
  double dropout_p;
  bool is_causal;
  double scale;
  bool enable_gqa, need_weights, average_weights;
  int64_t packed_heads;

  bool is_packed() const { return !key; }
};

inline void check(const Tensor& tensor, ScalarType dtype, const Sizes& sizes) {
  STD_TORCH_CHECK(tensor.is_cpu() && tensor.scalar_type() == dtype, "attention: tensors of one dtype on the CPU");
  STD_TORCH_CHECK(sizes_of(tensor) == sizes, "attention: queries, keys, values and gradients of sizes that fit");
}

inline Shape packed_shape(const Arguments& given) {
  const Tensor& packed = given.query;
  const int64_t heads = given.packed_heads;
  STD_TORCH_CHECK(!given.value && packed.dim() == 3 && heads > 0 && packed.size(2) % (3 * heads) == 0,
                  "attention: a packed projection (L, N, 3 H E), or queries, keys and values");
  Shape shape;
  shape.leading = {packed.size(1), heads}, shape.heads = packed.size(1) * heads;
  shape.queries = shape.keys = packed.size(0), shape.features = shape.value_features = packed.size(2) / (3 * heads);
  return shape;
}

inline Shape shape_of_three(const Arguments& given) {
  const Tensor &query = given.query, &key = *given.key;
  STD_TORCH_CHECK(given.value && query.dim() >= 2 + given.enable_gqa && key.dim() == query.dim() &&
                      given.value->dim() == query.dim(),
                  "attention: queries, keys and values of one number of dimensions, at least two");
  Shape shape;
  const size_t last = static_cast<size_t>(query.dim()) - 2;
  Sizes shared = sizes_of(query);
  shape.queries = shared[last], shape.features = shared[last + 1];
  shape.keys = key.size(-2), shape.value_features = given.value->size(-1);
  shared.resize(last);
  shape.leading = shared;
  if (given.enable_gqa) {
    shared[last - 1] = key.size(-3);
    STD_TORCH_CHECK(shared[last - 1] > 0 && shape.leading[last - 1] % shared[last - 1] == 0,
                    "attention: the heads of keys and values divide those of queries");
    shape.group = shape.leading[last - 1] / shared[last - 1];
  }
  for (const int64_t size : shape.leading) shape.heads *= size;
  shared.insert(shared.end(), {shape.keys, shape.features});
  check(key, query.scalar_type(), shared);
  shared[last + 1] = shape.value_features;
  check(*given.value, query.scalar_type(), shared);
  return shape;
}

inline Shape shape_of(const Arguments& given) {
  Shape shape = given.is_packed() ? packed_shape(given) : shape_of_three(given);
  STD_TORCH_CHECK(given.query.is_cpu() && given.query.numel() > 0 && shape.keys > 0 && shape.value_features > 0,
                  "attention: this kernel serves at least one query, key and feature");
  STD_TORCH_CHECK(!given.average_weights || (given.need_weights && !shape.leading.empty()),
                  "attention: only weights that are returned are averaged, over heads");
  shape.is_causal = given.is_causal, shape.scale = given.scale;
  return shape;
}

// (*, L, columns)
inline Sizes sizes_of_rows(const Shape& shape, int64_t rows, int64_t columns) {
  Sizes sizes = shape.leading;
  sizes.insert(sizes.end(), {rows, columns});
  return sizes;
}

// (*, L, S), or (*, L, S) without the heads where their mean is taken
inline Sizes sizes_of_weights(const Arguments& given, const Shape& shape) {
  Sizes sizes = sizes_of_rows(shape, shape.queries, shape.keys);
  if (given.average_weights) sizes.erase(sizes.end() - 3);
  return sizes;
}

// Weights averaged over heads, or their gradient: the heads share one place.
template <class T>
Heads<T> shared_heads(const Shape& shape, const Tensor& averaged) {
  Heads<T> heads(averaged);
  heads.places.sizes.push_back(shape.leading.back()), heads.places.strides.push_back(0);
  return heads;
}

// One part of the features of a tensor (L, N, parts H E), as matrices (L, E) of N H heads.
template <class T>
Heads<T> split_heads(const Tensor& rows, int64_t heads, int64_t features, int64_t part = 0) {
  const int64_t step = rows.stride(2);
  Heads<T> whole(rows);
  return {whole.values + part * heads * features * step,
          {{rows.size(1), heads}, {rows.stride(1), features * step}, rows.stride(0), step}};
}

// The output, or its gradient.
template <class T>
Heads<T> output_heads(const Arguments& given, const Shape& shape, const Tensor& output) {
  return given.is_packed() ? split_heads<T>(output, given.packed_heads, shape.value_features) : Heads<T>(output);
}

// Queries, keys and values, or their gradients.
template <class T>
std::array<Heads<T>, 3> three_heads(const Arguments& given, const Shape& shape, const Tensor* query, const Tensor* key,
                                    const Tensor* value) {
  const auto part = [&](const Tensor* tensor, int64_t index) {
    if (given.is_packed()) tensor = query;
    if (!tensor || !tensor->defined()) return Heads<T>();
    return given.is_packed() ? split_heads<T>(*tensor, given.packed_heads, shape.features, index) : Heads<T>(*tensor);
  };
  return {part(query, 0), part(key, 1), part(value, 2)};
}

template <class T>
Attention<T> attention_of(const Arguments& given, const Shape& shape) {
  const auto [query, key, value] = three_heads<const T>(given, shape, &given.query, given.key ? &*given.key : nullptr,
                                                        given.value ? &*given.value : nullptr);
  Attention<T> attention{shape, query, key, value, {}, std::nullopt, given.need_weights};
  for (const OptionalTensor* mask : {&given.mask, &given.key_mask})
    if (*mask) attention.masks.masks.emplace_back(**mask, shape.leading, shape.queries, shape.keys);
  if (given.seed) {
    const Tensor& seed = *given.seed;
    const double p = given.dropout_p;
    STD_TORCH_CHECK(seed.is_cpu() && seed.numel() == 1 && seed.scalar_type() == ScalarType::Long && 0 <= p && p <= 1,
                    "attention: the seed of the dropout is one int64 on the CPU, and its p a probability");
    attention.dropout.emplace(*static_cast<const int64_t*>(seed.const_data_ptr()), p, shape.queries, shape.keys);
  }
  return attention;
}

}  // namespace nacre
