// Attention of few queries: keys and values are read once, where they lie, by all the queries that share them.
#pragma once

#include "nacre/layers/attention/kernel_cpu_rows.h"

namespace nacre {

constexpr int64_t few_queries = 8;  // of a head of keys; with more of them packing pays
constexpr int64_t few_keys = 64;    // in the first cache at a time

inline bool has_few_queries(const Shape& shape) { return shape.queries * shape.group <= few_queries; }

// Rows of a matrix in the type that computes, where they lie if they can be read there, or copied.
template <class T, class A>
Matrix<A> readable_rows(Matrix<T> rows, int64_t count, int64_t columns, A* copied) {
  if constexpr (std::is_same_v<T, A>)
    if (rows.column_stride == 1) return rows;
  read_rows<T, A>(rows, count, columns, A(1), copied);
  return {copied, columns, 1};
}

// The scores (rows, S), their rows `stride` apart, of queries (rows, E) and keys (S, E). Both directions of attention
// compute them here: of large scores the backward must find the very bits that the forward found.
template <class T, class A>
void multiply_few(const A* queries, int64_t rows, Matrix<T> keys, const Shape& shape, A* copied, A* scores,
                  int64_t stride) {
  for (int64_t begin = 0; begin < shape.keys; begin += few_keys) {
    const int64_t count = std::min(few_keys, shape.keys - begin);
    const Matrix<A> block = readable_rows<T, A>(keys.at(begin, 0), count, shape.features, copied);
    for (int64_t row = 0; row < rows; ++row)
      for (int64_t j = 0; j < count; ++j) {
        const A *query = queries + row * shape.features, *key = block.at(j, 0).values;
        scores[row * stride + begin + j] = sums_over_row<A, 1>(shape.features, [&](int64_t i, auto which) {
          return std::array<Vector<A>, 1>{load(query + i, which) * load(key + i, which)};
        })[0];
      }
  }
}

// sums += weights rows, for weights (count) and rows (count, columns). sums: (columns)
template <class A>
void add_weighted(const A* weights, Matrix<A> rows, int64_t count, int64_t columns, A* sums) {
  const auto add = [&](int64_t column, auto vectors, auto which) {
    Vector<A> totals[vectors];
    for (int64_t v = 0; v < vectors; ++v) totals[v] = load(sums + column + v * lanes<A>, which);
    for (int64_t j = 0; j < count; ++j) {
      const Vector<A> weight = every(weights[j]);
      const A* row = rows.at(j, column).values;
      for (int64_t v = 0; v < vectors; ++v)
        totals[v] = multiply_add<A>(weight, load(row + v * lanes<A>, which), totals[v]);
    }
    for (int64_t v = 0; v < vectors; ++v) store(sums + column + v * lanes<A>, totals[v], which);
  };
  int64_t column = 0;
  for (; column + 4 * lanes<A> <= columns; column += 4 * lanes<A>)
    add(column, std::integral_constant<int64_t, 4>(), Whole{});
  over_row<A>(columns - column,
              [&](int64_t i, auto which) { add(column + i, std::integral_constant<int64_t, 1>(), which); });
}

// What a thread needs for the rows of queries, L of each head of a group, that share a head of keys.
template <class A>
struct FewRoom {
  const Shape& shape;
  const int64_t stride, rows = shape.queries * shape.group;
  Scratch<A> queries, scores, outputs, factors, copied;  // (rows, E), (rows, S), (rows, V), (rows)
  Scratch<int32_t> kept;

  FewRoom(const Shape& shape, int64_t stride)
      : shape(shape), stride(stride), queries(rows * shape.features), scores(rows * stride),
        outputs(rows * shape.value_features), factors(rows),
        copied(few_keys * std::max(shape.features, shape.value_features)),
        kept(WeightDropout<A>::buffer_size(shape.keys)) {}

  // The outputs: sums of the values of the keys that each query sees, with its scores as weights.
  template <class T>
  void gather(Matrix<T> values) const {
    const int64_t columns = shape.value_features;
    std::fill(outputs.get(), outputs.get() + rows * columns, A(0));
    for (int64_t begin = 0; begin < shape.keys; begin += few_keys) {
      const int64_t count = std::min(few_keys, shape.keys - begin);
      const Matrix<A> block = readable_rows<T, A>(values.at(begin, 0), count, columns, copied.get());
      for (int64_t row = 0; row < rows; ++row)
        add_weighted<A>(scores.get() + row * stride + begin, block,
                        std::min(count, shape.seen(row % shape.queries + 1) - begin), columns,
                        outputs.get() + row * columns);
    }
  }
};

}  // namespace nacre
