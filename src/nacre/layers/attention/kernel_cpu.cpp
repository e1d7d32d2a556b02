// Attention: formula.py in tiles, so that no matrix of queries by keys is ever held but for results that are one.
#include "nacre/layers/attention/kernel_cpu_backward.h"

#include <numeric>
#include <tuple>

namespace nacre {
namespace {

using OptionalTensor = std::optional<Tensor>;

// The arguments of a call that are no queries, keys or values.
struct Settings {
  const OptionalTensor &mask, &key_mask, &seed;
  double dropout_p;
  bool is_causal;
  double scale;
  bool need_weights;
};

void check(const Tensor& tensor, ScalarType dtype, const Sizes& sizes) {
  STD_TORCH_CHECK(tensor.is_cpu() && tensor.scalar_type() == dtype, "attention: tensors of one dtype on the CPU");
  STD_TORCH_CHECK(sizes_of(tensor) == sizes, "attention: queries, keys, values and gradients of sizes that fit");
}

Shape shape_of(const Tensor& query, const Tensor& key, const Tensor& value, const Settings& settings, bool enable_gqa) {
  STD_TORCH_CHECK(query.dim() >= 2 + enable_gqa && key.dim() == query.dim() && value.dim() == query.dim(),
                  "attention: queries, keys and values of one number of dimensions, at least two");
  Shape shape;
  const size_t last = static_cast<size_t>(query.dim()) - 2;
  Sizes shared = sizes_of(query);
  shape.queries = shared[last], shape.features = shared[last + 1];
  shape.keys = key.size(-2), shape.value_features = value.size(-1);
  shared.resize(last);
  shape.leading = shared;
  if (enable_gqa) {
    shared[last - 1] = key.size(-3);
    STD_TORCH_CHECK(shared[last - 1] > 0 && shape.leading[last - 1] % shared[last - 1] == 0,
                    "attention: the heads of keys and values divide those of queries");
    shape.group = shape.leading[last - 1] / shared[last - 1];
  }
  for (const int64_t size : shape.leading) shape.heads *= size;
  Sizes sizes = shared;
  sizes.insert(sizes.end(), {shape.keys, shape.features});
  check(key, query.scalar_type(), sizes);
  sizes[last + 1] = shape.value_features;
  check(value, query.scalar_type(), sizes);
  STD_TORCH_CHECK(query.is_cpu() && query.numel() > 0 && shape.keys > 0 && shape.value_features > 0,
                  "attention: this kernel serves at least one query, key and feature");
  shape.is_causal = settings.is_causal, shape.scale = settings.scale;
  return shape;
}

// (*, L, columns)
Sizes sizes_of_rows(const Shape& shape, int64_t rows, int64_t columns) {
  Sizes sizes = shape.leading;
  sizes.insert(sizes.end(), {rows, columns});
  return sizes;
}

template <class T>
Attention<T> attention_of(const Shape& shape, Heads<const T> query, Heads<const T> key, Heads<const T> value,
                          const Settings& settings) {
  Attention<T> attention{shape, query, key, value, {}, std::nullopt, settings.need_weights};
  for (const OptionalTensor* mask : {&settings.mask, &settings.key_mask})
    if (*mask) attention.masks.masks.emplace_back(**mask, shape.leading, shape.queries, shape.keys);
  if (settings.seed) {
    const Tensor& seed = *settings.seed;
    const double p = settings.dropout_p;
    STD_TORCH_CHECK(seed.is_cpu() && seed.numel() == 1 && seed.scalar_type() == ScalarType::Long && 0 <= p && p <= 1,
                    "attention: the seed of the dropout is one int64 on the CPU, and its p a probability");
    attention.dropout.emplace(*static_cast<const int64_t*>(seed.const_data_ptr()), p, shape.queries, shape.keys);
  }
  return attention;
}

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

struct Results {
  Tensor weights, row_maximum, row_sum;

  Results(const Shape& shape, ScalarType dtype, bool need_weights)
      : weights(new_tensor(need_weights ? sizes_of_rows(shape, shape.queries, shape.keys) : Sizes{0}, dtype)),
        row_maximum(new_tensor(sizes_of_rows(shape, shape.queries, 1), accumulator_dtype(dtype))),
        row_sum(new_tensor(sizes_of_rows(shape, shape.queries, 1), accumulator_dtype(dtype))) {}

  template <class T>
  void run(const Attention<T>& attention, Heads<T> output) {
    using A = Accumulator<T>;
    const Heads<T> to_weights = attention.need_weights ? Heads<T>(weights) : Heads<T>();
    AttentionForward<T>{attention, output, to_weights, static_cast<A*>(row_maximum.mutable_data_ptr()),
                        static_cast<A*>(row_sum.mutable_data_ptr())}
        .run();
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor> forward(const Tensor& query, const Tensor& key, const Tensor& value,
                                                   const OptionalTensor& mask, const OptionalTensor& key_mask,
                                                   const OptionalTensor& seed, double dropout_p, bool is_causal,
                                                   double scale, bool enable_gqa, bool need_weights) {
  const Settings settings{mask, key_mask, seed, dropout_p, is_causal, scale, need_weights};
  const Shape shape = shape_of(query, key, value, settings, enable_gqa);
  Tensor output = ordered_as(query, sizes_of_rows(shape, shape.queries, shape.value_features));
  Results results(shape, query.scalar_type(), need_weights);
  with_type(query.scalar_type(), [&](auto type) {
    using T = decltype(type);
    results.run(attention_of<T>(shape, Heads<const T>(query), Heads<const T>(key), Heads<const T>(value), settings),
                Heads<T>(output));
  });
  return {output, results.weights, results.row_maximum, results.row_sum};
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

  void gather(const Settings& settings) {
    if (needs_mask_) mask = gathered(*settings.mask);
    if (needs_key_mask_) key_mask = gathered(*settings.key_mask);
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

template <class T>
void run_backward(const Attention<T>& attention, const OptionalTensor& grad_output, const OptionalTensor& grad_weights,
                  Heads<const T> grads, const Tensor& row_maximum, const Tensor& row_sum, AttentionGradients<T> to) {
  using A = Accumulator<T>;
  const Shape& shape = attention.shape;
  constexpr ScalarType dtype = std::is_same_v<A, double> ? ScalarType::Double : ScalarType::Float;
  for (const Tensor* rows : {&row_maximum, &row_sum})
    STD_TORCH_CHECK(rows->is_cpu() && rows->is_contiguous() && rows->numel() == shape.heads * shape.queries &&
                        rows->scalar_type() == dtype,
                    "attention: the largest score and the sum of every row");
  if (!grad_output) grads = {};
  const bool weights = grad_weights && attention.need_weights;
  const auto values = [](const Tensor& rows) { return static_cast<const A*>(rows.const_data_ptr()); };
  AttentionBackward<T>{attention, grads, weights ? Heads<const T>(*grad_weights) : Heads<const T>(),
                       values(row_maximum), values(row_sum), to}
      .run();
}

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

Gradients backward(const OptionalTensor& grad_output, const OptionalTensor& grad_weights, const Tensor& query,
                   const Tensor& key, const Tensor& value, const OptionalTensor& mask, const OptionalTensor& key_mask,
                   const OptionalTensor& seed, double dropout_p, bool is_causal, double scale, bool enable_gqa,
                   bool need_weights, const Tensor& row_maximum, const Tensor& row_sum, const std::vector<bool>& needs) {
  const Settings settings{mask, key_mask, seed, dropout_p, is_causal, scale, need_weights};
  const Shape shape = shape_of(query, key, value, settings, enable_gqa);
  const ScalarType dtype = query.scalar_type();
  STD_TORCH_CHECK(needs.size() == 5 && (mask || !needs[3]) && (key_mask || !needs[4]),
                  "attention: five gradients are asked for or not");
  if (grad_output) check(*grad_output, dtype, sizes_of_rows(shape, shape.queries, shape.value_features));
  if (grad_weights && need_weights) check(*grad_weights, dtype, sizes_of_rows(shape, shape.queries, shape.keys));
  Tensor dq, dk, dv;
  if (needs[0]) dq = ordered_as(query, sizes_of(query));
  if (needs[1]) dk = ordered_as(key, sizes_of(key));
  if (needs[2] && grad_output) dv = ordered_as(value, sizes_of(value));
  MaskGradients masks(shape, dtype, needs[3], needs[4]);
  with_type(dtype, [&](auto type) {
    using T = decltype(type);
    using A = Accumulator<T>;
    const auto to = [&](Tensor& tensor) { return tensor.defined() ? Heads<T>(tensor) : Heads<T>(); };
    run_backward<T>(
        attention_of<T>(shape, Heads<const T>(query), Heads<const T>(key), Heads<const T>(value), settings), grad_output,
        grad_weights, grad_output ? Heads<const T>(*grad_output) : Heads<const T>(), row_maximum, row_sum,
        {to(dq), to(dk), to(dv), masks.needed() ? Heads<A>(masks.scores) : Heads<A>()});
  });
  masks.gather(settings);
  return {dq, dk, dv, masks.mask, masks.key_mask};
}

}  // namespace
}  // namespace nacre

STABLE_TORCH_LIBRARY_IMPL(nacre, CPU, m) {
  m.impl("attention.kernel", TORCH_BOX(&nacre::forward));
  m.impl("attention_backward.kernel", TORCH_BOX(&nacre::backward));
}
