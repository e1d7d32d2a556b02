// Attention forward: formula.py, a block of queries at a time with all the keys that they see.
#pragma once

#include "nacre/layers/attention/kernel_cpu_few.h"

namespace nacre {

// What both directions are told.
template <class T>
struct Attention {
  using A = Accumulator<T>;
  Shape shape;
  Heads<const T> query, key, value;  // (B, L, E), (B / group, S, E), (B / group, S, V)
  Masks masks;
  std::optional<WeightDropout<A>> dropout;
  bool need_weights;

  // Outside of these keys queries `first` to `last` of a head see none. Weights that are returned ask for all keys.
  Span seen(int64_t head, int64_t first, int64_t last) const {
    const Span keys{0, shape.seen(last)};
    return need_weights ? keys : masks.visible(head, first, last, keys);
  }

  const WeightDropout<A>* dropped() const { return dropout ? &*dropout : nullptr; }

  // At least as many blocks a thread as make it worth its start; `products`: how many a block has.
  int64_t blocks_per_thread(int64_t rows, int64_t products) const {
    const int64_t multiply_adds = rows * shape.keys * shape.features * products;
    return std::max<int64_t>(multiply_adds_per_thread / std::max<int64_t>(multiply_adds, 1), 1);
  }
};

template <class T>
struct AttentionForward {
  using A = Accumulator<T>;
  const Attention<T>& given;
  Heads<T> output;           // (B, L, V)
  Heads<T> weights;          // (B, L, S), or nothing
  Heads<A> mean;             // of the weights over the heads, which share one place, or nothing
  A *row_maximum, *row_sum;  // (B, L)

  const Shape& shape = given.shape;
  const Parts blocks = shape.blocks(1);
  const int64_t stride = shape.template row_stride<A>();
  const int64_t together = mean ? shape.leading.back() : 1;  // heads that one thread takes in turn, as it adds them up

  void run() const {
    if (has_few_queries(shape)) return run_few();
    const int64_t tasks = shape.heads / together * blocks.count;
    const int64_t per_thread = given.blocks_per_thread(blocks.size / blocks.count * together, 2);
    in_parallel(tasks, per_thread, [&](int64_t from, int64_t to) {
      Room room(*this);
      for (int64_t task = from, end; task < to; task = end) {
        const int64_t i = task / blocks.count;
        end = std::min((i + 1) * blocks.count, to);
        for (int64_t head = 0; head < together; ++head)
          attend_blocks(mean ? i * together + head : head_at(i), task % blocks.count, end - i * blocks.count, room);
      }
    });
  }

 private:
  struct Room {
    Scratch<A> keys, values, queries, scores, outputs, factors;
    Scratch<int32_t> kept;
    int64_t packed = -1;

    explicit Room(const AttentionForward& of)
        : keys(packed_size<A>(of.shape.features, of.shape.keys)),
          values(packed_size<A>(of.shape.keys, of.shape.value_features)),
          queries(of.blocks.largest() * of.shape.features), scores(of.blocks.largest() * of.stride),
          outputs(of.blocks.largest() * of.shape.value_features), factors(of.blocks.largest()),
          kept(WeightDropout<A>::buffer_size(of.shape.keys)) {}
  };

  void pack(int64_t head, Room& room) const {
    pack_panels(given.key.of(head).transposed(), shape.features, shape.keys, room.keys.get());
    pack_panels(given.value.of(head), shape.keys, shape.value_features, room.values.get());
    room.packed = head;
  }

  // The i-th head in the order of work, in which those that share keys follow each other.
  int64_t head_at(int64_t i) const { return shape.key_head_at(i / shape.group) * shape.group + i % shape.group; }

  void attend_blocks(int64_t head, int64_t from, int64_t to, Room& room) const {
    if (head / shape.group != room.packed) pack(head / shape.group, room);
    for (int64_t i = from; i < to; ++i) {
      const int64_t block = Shape::block_at(i, blocks.count);
      attend(head, blocks.begin(block), blocks.begin(block + 1), room);
    }
  }

  void attend(int64_t head, int64_t first, int64_t last, Room& room) const {
    const int64_t rows = last - first;
    const Span seen = given.seen(head, first, last);
    A* scores = room.scores.get();
    read_rows<T, A>(given.query.of(head, first), rows, shape.features, static_cast<A>(shape.scale), room.queries.get());
    multiply_columns<A>({room.queries.get(), shape.features, 1}, rows, shape.features, room.keys.get(), shape.keys,
                        seen, scores, stride);
    for (int64_t r = 0; r < rows; ++r) {
      A* row = scores + r * stride;
      const Span keys{seen.begin, std::clamp(shape.seen(first + r + 1), seen.begin, seen.end)};
      room.factors.get()[r] = soften(head, first + r, keys, row + keys.begin, room.kept.get());
      std::fill(row + keys.end, row + seen.end, A(0));
    }
    multiply_depth<A>({scores, stride, 1}, rows, seen, room.values.get(), shape.keys, shape.value_features,
                      room.outputs.get());
    write_rows<T, A>(room.outputs.get(), rows, shape.value_features, A(1), room.factors.get(), output.at(head, first),
                     output.places.row_stride, output.places.column_stride);
  }

  // Few queries of a head of keys, as where a text is written token by token: packing would be most of the work.
  void run_few() const {
    const int64_t values = shape.keys * (shape.features + shape.value_features);
    const int64_t each = mean ? together / shape.group : 1;
    in_parallel(shape.key_heads() / each, std::max<int64_t>(values_per_thread / (values * each), 1),
                [&](int64_t from, int64_t to) {
                  FewRoom<A> room(shape, stride);
                  for (int64_t i = from * each; i < to * each; ++i) attend_few(mean ? i : shape.key_head_at(i), room);
                });
  }

  void attend_few(int64_t key_head, FewRoom<A>& room) const {
    const int64_t first = key_head * shape.group;
    for (int64_t i = 0; i < shape.group; ++i)
      read_rows<T, A>(given.query.of(first + i), shape.queries, shape.features, static_cast<A>(shape.scale),
                      room.queries.get() + i * shape.queries * shape.features);
    multiply_few<T, A>(room.queries.get(), room.rows, given.key.of(key_head), shape, room.copied.get(),
                       room.scores.get(), stride);
    for (int64_t row = 0; row < room.rows; ++row) {
      const int64_t query = row % shape.queries;
      room.factors.get()[row] = soften(first + row / shape.queries, query, Span{0, shape.seen(query + 1)},
                                       room.scores.get() + row * stride, room.kept.get());
    }
    room.gather(given.value.of(key_head));
    for (int64_t i = 0; i < shape.group; ++i)
      write_rows<T, A>(room.outputs.get() + i * shape.queries * shape.value_features, shape.queries,
                       shape.value_features, A(1), room.factors.get() + i * shape.queries, output.at(first + i),
                       output.places.row_stride, output.places.column_stride);
  }

  // Turns a row of scores into weights that lack a factor, which it returns.
  A soften(int64_t head, int64_t query, Span keys, A* row, int32_t* buffer) const {
    const int64_t count = keys.size();
    given.masks.apply(head, query, keys, row);
    const int32_t* kept = given.dropout ? given.dropout->draw(head, query, keys, buffer) : nullptr;
    A maximum = maximum_of_row(row, count);
    const bool empty = maximum == -infinity<A> && !given.need_weights;
    if (empty) maximum = 0;  // a finite one: exp(-inf - 0) is 0
    A sum = soften_row(row, count, maximum, given.dropped(), kept);
    if (empty && sum == 0) sum = 1;
    row_maximum[head * shape.queries + query] = maximum;
    row_sum[head * shape.queries + query] = sum;
    const A factor = 1 / sum;
    if (weights) {
      T* to = weights.at(head, query);
      over_row<A>(count, [&](int64_t i, auto which) { store(to + i, load(row + i, which) * factor, which); });
      std::fill(to + count, to + shape.keys, T(A(0)));
    }
    if (mean) add_to_mean(head, query, row, count, factor / static_cast<A>(together));
    return factor;
  }

  void add_to_mean(int64_t head, int64_t query, const A* row, int64_t count, A factor) const {
    A* to = mean.at(head, query);
    if (head % together == 0) std::fill(to, to + shape.keys, A(0));
    over_row<A>(count, [&](int64_t i, auto which) {
      store(to + i, load(to + i, which) + load(row + i, which) * factor, which);
    });
  }
};

}  // namespace nacre
