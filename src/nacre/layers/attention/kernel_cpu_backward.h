// Attention backward: formula.py, five products for a block of queries and all the keys that they see.
#pragma once

#include "nacre/layers/attention/kernel_cpu_forward.h"

namespace nacre {

// The gradients that are asked for; the others hold nothing.
template <class T>
struct AttentionGradients {
  Heads<T> query, key, value;
  Heads<Accumulator<T>> scores;  // (B, L, S)
};

template <class T>
struct AttentionBackward {
  using A = Accumulator<T>;
  const Attention<T>& given;
  Heads<const T> grad_output, grad_weights;  // (B, L, V), (B, L, S), or nothing
  A weight_factor;                           // of the gradient of the weights
  const A *row_maximum, *row_sum;            // (B, L)
  AttentionGradients<T> to;

  const Shape& shape = given.shape;
  const Parts blocks = shape.blocks(2);
  const int64_t stride = shape.template row_stride<A>();
  const bool needs_scores = to.query || to.key || to.scores, needs_value = to.value && grad_output;
  const bool few = has_few_queries(shape);

  // A head of keys and values is one task, whose gradients of keys and values are added up in the order of its blocks
  // of queries. Few heads are cut into chunks, as the shape alone tells, whose sums are added in their order.
  const int64_t units = shape.group * blocks.count;
  const int64_t chunks = std::clamp<int64_t>((most_chunks + shape.key_heads() - 1) / shape.key_heads(), 1, units);
  const int64_t sums_size = shape.keys * (shape.features + shape.value_features);

  void run() const {
    const Scratch<A> sums(chunks > 1 ? shape.key_heads() * chunks * sums_size : 0);
    in_parallel(shape.key_heads() * chunks, given.blocks_per_thread(shape.queries * shape.group / chunks, 5),
                [&](int64_t from, int64_t to) {
                  Room room(*this);
                  for (int64_t task = from; task < to; ++task) {
                    const int64_t head = shape.key_head_at(task / chunks);
                    A* own = chunks > 1 ? sums.get() + task * sums_size : room.sums.get();
                    if (head != room.packed) pack(head, room);
                    run_chunk(head, task % chunks, own, room);
                    if (chunks == 1) write_sums(head, own);
                  }
                });
    if (chunks == 1) return;
    const int64_t heads_per_thread = std::max<int64_t>(values_per_thread / (chunks * sums_size), 1);
    in_parallel(shape.key_heads(), heads_per_thread, [&](int64_t from, int64_t to) {
      for (int64_t i = from; i < to; ++i) {
        A* first = sums.get() + i * chunks * sums_size;
        for (int64_t chunk = 1; chunk < chunks; ++chunk)
          over_row<A>(sums_size, [&](int64_t at, auto which) {
            store(first + at, load(first + at, which) + load(first + chunk * sums_size + at, which), which);
          });
        write_sums(shape.key_head_at(i), first);
      }
    });
  }

 private:
  struct Room {
    Scratch<A> key_columns, key_rows, value_columns;              // panels of K', K and V'
    Scratch<A> queries, query_panels, gradients, gradient_panels;  // c Q and G of a block, as rows and as panels
    Scratch<A> weights, scores, p, query_gradients, sums, copied;
    Scratch<int32_t> kept;
    int64_t packed = -1;

    explicit Room(const AttentionBackward& of)
        : Room(of.shape, of.blocks.largest(), of.stride, of.chunks > 1 ? 0 : of.sums_size) {}
    Room(const Shape& shape, int64_t rows, int64_t stride, int64_t sums_size)
        : key_columns(packed_size<A>(shape.features, shape.keys)), key_rows(packed_size<A>(shape.keys, shape.features)),
          value_columns(packed_size<A>(shape.value_features, shape.keys)), queries(rows * shape.features),
          query_panels(packed_size<A>(rows, shape.features)), gradients(rows * shape.value_features),
          gradient_panels(packed_size<A>(rows, shape.value_features)), weights(rows * stride), scores(rows * stride),
          p(stride), query_gradients(rows * shape.features), sums(sums_size),
          copied(few_keys * shape.features), kept(WeightDropout<A>::buffer_size(shape.keys)) {}
  };

  void pack(int64_t head, Room& room) const {
    if (!few) pack_panels(given.key.of(head).transposed(), shape.features, shape.keys, room.key_columns.get());
    if (to.query) pack_panels(given.key.of(head), shape.keys, shape.features, room.key_rows.get());
    if (grad_output)
      pack_panels(given.value.of(head).transposed(), shape.value_features, shape.keys, room.value_columns.get());
    room.packed = head;
  }

  // key_sums: (S, E), and after it the sums of the values, (S, V)
  void run_chunk(int64_t key_head, int64_t chunk, A* key_sums, Room& room) const {
    std::fill(key_sums, key_sums + sums_size, A(0));
    for (int64_t unit = units * chunk / chunks; unit < units * (chunk + 1) / chunks; ++unit) {
      const int64_t head = key_head * shape.group + unit / blocks.count;
      const int64_t block = Shape::block_at(unit % blocks.count, blocks.count);
      run_block(head, blocks.begin(block), blocks.begin(block + 1), key_sums, room);
    }
  }

  void run_block(int64_t head, int64_t first, int64_t last, A* key_sums, Room& room) const {
    const int64_t rows = last - first;
    const Span seen = few ? Span{0, shape.seen(last)} : given.seen(head, first, last);
    A *weights = room.weights.get(), *scores = room.scores.get();
    read_rows<T, A>(given.query.of(head, first), rows, shape.features, static_cast<A>(shape.scale), room.queries.get());
    if (few)
      multiply_few<T, A>(room.queries.get(), rows, given.key.of(head / shape.group), shape, room.copied.get(), weights,
                         stride);
    else
      multiply_columns<A>({room.queries.get(), shape.features, 1}, rows, shape.features, room.key_columns.get(),
                          shape.keys, seen, weights, stride);
    if (grad_output) {
      read_rows<T, A>(grad_output.of(head, first), rows, shape.value_features, A(1), room.gradients.get());
      if (needs_scores)
        multiply_columns<A>({room.gradients.get(), shape.value_features, 1}, rows, shape.value_features,
                            room.value_columns.get(), shape.keys, seen, scores, stride);
    }
    for (int64_t r = 0; r < rows; ++r)
      run_row(head, first + r, seen, weights + r * stride + seen.begin, scores + r * stride + seen.begin, room);
    if (needs_value)
      add_transposed(weights, rows, seen, room.gradients.get(), shape.value_features, room.gradient_panels.get(),
                     key_sums + shape.keys * shape.features);
    if (to.key)
      add_transposed(scores, rows, seen, room.queries.get(), shape.features, room.query_panels.get(), key_sums);
    if (to.query) {
      multiply_depth<A>({scores, stride, 1}, rows, seen, room.key_rows.get(), shape.keys, shape.features,
                        room.query_gradients.get());
      write_rows<T, A>(room.query_gradients.get(), rows, shape.features, static_cast<A>(shape.scale), nullptr,
                       to.query.at(head, first), to.query.places.row_stride, to.query.places.column_stride);
    }
  }

  // From scores and dW to W and dA, from the first seen key on; of the keys that this query does not see both are 0.
  void run_row(int64_t head, int64_t query, Span seen, A* weights, A* scores, Room& room) const {
    const Span keys{seen.begin, std::clamp(shape.seen(query + 1), seen.begin, seen.end)};
    const int64_t count = keys.size(), row = head * shape.queries + query;
    given.masks.apply(head, query, keys, weights);
    const int32_t* kept = given.dropout ? given.dropout->draw(head, query, keys, room.kept.get()) : nullptr;
    if (!grad_output || !needs_scores) std::fill(scores, scores + count, A(0));
    if (grad_weights) add_gradient_of_weights(grad_weights.of(head, query).at(0, keys.begin), count, scores);
    row_gradient<A>(weights, scores, count, {row_maximum[row], row_sum[row]}, given.dropped(), kept, room.p.get());
    std::fill(weights + count, weights + seen.size(), A(0));
    std::fill(scores + count, scores + seen.size(), A(0));
    if (to.scores) {
      A* at = to.scores.at(head, query);
      std::fill(at, at + keys.begin, A(0));
      std::fill(std::copy(scores, scores + count, at + keys.begin), at + shape.keys, A(0));
    }
  }

  void add_gradient_of_weights(Matrix<T> h, int64_t count, A* scores) const {
    if (h.column_stride == 1)
      over_row<A>(count, [&](int64_t j, auto which) {
        store(scores + j, load(scores + j, which) + load(h.values + j, which) * weight_factor, which);
      });
    else
      for (int64_t j = 0; j < count; ++j) scores[j] += static_cast<A>(*h.at(0, j).values) * weight_factor;
  }

  // sums += left' right, for the columns of a span of left (rows, S), and right (rows, columns). sums: (S, columns)
  void add_transposed(const A* left, int64_t rows, Span seen, const A* right, int64_t columns, A* panels,
                      A* sums) const {
    pack_panels(Matrix<A>{right, columns, 1}, rows, columns, panels);
    multiply(Rows<A>(Matrix<A>{left + seen.begin, 1, stride}), seen.size(), rows, panels, columns, true,
             sums + seen.begin * columns, columns);
  }

  void write_sums(int64_t head, const A* sums) const {
    const auto write = [&](const Heads<T>& gradient, const A* from, int64_t columns) {
      if (gradient)
        write_rows<T, A>(from, shape.keys, columns, A(1), nullptr, gradient.at(head), gradient.places.row_stride,
                         gradient.places.column_stride);
    };
    write(to.key, sums, shape.features);
    write(to.value, sums + shape.keys * shape.features, shape.value_features);
  }
};

}  // namespace nacre
