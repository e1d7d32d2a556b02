// Attention's tensors as its kernel sees them: a matrix for each head, wherever it lies, and how the work is cut.
//
// B heads of queries in all, of which `group` consecutive ones share a head of keys and values; L queries, S keys,
// E features of queries and keys, V of values.
#pragma once

#include "nacre/core/cpu_layout.h"
#include "nacre/core/cpu_matmul.h"

#include <algorithm>
#include <array>
#include <cstring>

namespace nacre {

// Leading dimensions, flattened to one index, and where a matrix (rows, columns) lies for each value of it.
struct Places {
  Sizes sizes, strides;
  int64_t row_stride = 0, column_stride = 0;

  int64_t offset(int64_t index) const {
    int64_t offset = 0;
    for (size_t i = sizes.size(); i-- > 0; index /= sizes[i]) offset += index % sizes[i] * strides[i];
    return offset;
  }
};

template <class T>
struct Heads {
  T* values = nullptr;
  Places places;

  Heads() = default;
  Heads(T* values, Places places) : values(values), places(std::move(places)) {}
  // A tensor (*, rows, columns).
  explicit Heads(const Tensor& tensor) {
    const size_t leading = static_cast<size_t>(tensor.dim()) - 2;
    places.sizes = sizes_of(tensor), places.strides = strides_of(tensor);
    places.row_stride = places.strides[leading], places.column_stride = places.strides[leading + 1];
    places.sizes.resize(leading), places.strides.resize(leading);
    if constexpr (std::is_const_v<T>)
      values = static_cast<T*>(tensor.const_data_ptr());
    else
      values = static_cast<T*>(tensor.mutable_data_ptr());
  }

  explicit operator bool() const { return values != nullptr; }
  T* at(int64_t head, int64_t row = 0) const { return values + places.offset(head) + row * places.row_stride; }
  Matrix<std::remove_const_t<T>> of(int64_t head, int64_t row = 0) const {
    return {at(head, row), places.row_stride, places.column_stride};
  }
};

// Keys from `begin` to `end`.
struct Span {
  int64_t begin, end;
  int64_t size() const { return end - begin; }
};

// The first true of values `from` to `to`, or `to`.
inline int64_t first_true(const bool* values, int64_t from, int64_t to) {
  for (uint64_t eight = 0; from + 8 <= to; from += 8) {
    std::memcpy(&eight, values + from, sizeof eight);
    if (eight) break;
  }
  while (from < to && !values[from]) ++from;
  return from;
}

// One beyond the last true of values `from` to `to`, or `from`.
inline int64_t after_last_true(const bool* values, int64_t from, int64_t to) {
  for (uint64_t eight = 0; from + 8 <= to; to -= 8) {
    std::memcpy(&eight, values + to - 8, sizeof eight);
    if (eight) break;
  }
  while (from < to && !values[to - 1]) --to;
  return to;
}

// What broadcasts to the scores (B, L, S): numbers which are added to them, or bools, where a key takes part or not.
struct Mask {
  const char* values;
  ScalarType dtype;
  int64_t itemsize;
  Places places;

  Mask(const Tensor& mask, const Sizes& leading, int64_t queries, int64_t keys)
      : values(static_cast<const char*>(mask.const_data_ptr())), dtype(mask.scalar_type()) {
    Sizes scores = leading;
    scores.insert(scores.end(), {queries, keys});
    const int64_t missing = static_cast<int64_t>(scores.size()) - mask.dim();
    STD_TORCH_CHECK(mask.is_cpu() && missing >= 0, "attention: a mask on the CPU that broadcasts to the scores");
    Sizes strides(scores.size(), 0);
    for (int64_t i = 0; i < mask.dim(); ++i) {
      STD_TORCH_CHECK(mask.size(i) == 1 || mask.size(i) == scores[i + missing],
                      "attention: a mask that broadcasts to the scores");
      if (mask.size(i) > 1) strides[i + missing] = mask.stride(i);
    }
    places = {leading, Sizes(strides.begin(), strides.end() - 2), strides[leading.size()], strides[leading.size() + 1]};
    itemsize = dtype == ScalarType::Bool ? 1 : dtype == ScalarType::Double ? 8 : dtype == ScalarType::Float ? 4 : 2;
    STD_TORCH_CHECK(dtype == ScalarType::Bool || dtype == ScalarType::Double || dtype == ScalarType::Float ||
                        dtype == ScalarType::BFloat16 || dtype == ScalarType::Half,
                    "attention: a mask of bools or of floating-point numbers");
  }

  // Of these keys those between which all lie that queries `first` to `last` may see.
  Span visible(int64_t head, int64_t first, int64_t last, Span keys) const {
    if (dtype != ScalarType::Bool || places.column_stride != 1) return keys;
    Span found{keys.end, keys.begin};  // nothing yet
    for (int64_t query = first; query < (places.row_stride ? last : first + 1); ++query) {
      const bool* seen = row<bool>(head, query);
      found.begin = first_true(seen, keys.begin, found.begin);
      found.end = after_last_true(seen, found.end, keys.end);
    }
    return found.begin < found.end ? found : Span{keys.begin, keys.begin};
  }

  template <class M>
  const M* row(int64_t head, int64_t row) const {
    return reinterpret_cast<const M*>(values + (places.offset(head) + row * places.row_stride) * itemsize);
  }
};

constexpr int64_t strip_values = int64_t{1} << 17;  // scores of a block of queries: half the second cache
constexpr int64_t most_chunks = 16;                 // tasks that are enough for every thread

struct Shape {
  Sizes leading;  // of the scores, the heads last
  int64_t heads = 1, group = 1, queries, keys, features, value_features;
  bool is_causal;
  double scale;

  int64_t key_heads() const { return heads / group; }

  // The i-th head of keys in the order of work: sequences by turns, of which masks may leave one thread's all short.
  int64_t key_head_at(int64_t i) const {
    const int64_t heads_each = leading.empty() ? 1 : leading.back() / group, sequences = key_heads() / heads_each;
    return i % sequences * heads_each + i / sequences;
  }

  // How many keys the first `count` queries may see.
  int64_t seen(int64_t count) const { return is_causal ? std::min(count, keys) : keys; }

  // Between rows of scores: never a power of two, with which all rows would lie in the same few places of the cache.
  template <class A>
  int64_t row_stride() const {
    return (keys + 2 * lanes<A> - 1) / lanes<A> * lanes<A>;
  }

  // Blocks of queries whose scores with all keys, `strips` times, stay in the second cache.
  Parts blocks(int64_t strips) const {
    const int64_t fitting = strip_values / (strips * keys) / tile_rows * tile_rows;
    return Parts(queries, std::clamp<int64_t>(fitting, tile_rows, is_causal ? 48 : 96));
  }

  // The i-th block in the order of work: of a causal mask's blocks, small and large ones by turns.
  static int64_t block_at(int64_t i, int64_t blocks) { return i % 2 ? blocks - 1 - i / 2 : i / 2; }
};

// ---- blocks of matrices

// Copies rows that lie anywhere, multiplied by a factor. to: (rows, columns)
template <class T, class A>
void read_rows(Matrix<T> from, int64_t rows, int64_t columns, A factor, A* to) {
  for (int64_t r = 0; r < rows; ++r, to += columns) {
    if (from.column_stride == 1)
      over_row<A>(columns, [&](int64_t i, auto which) {
        store(to + i, load(from.at(r, i).values, which) * factor, which);
      });
    else
      for (int64_t i = 0; i < columns; ++i) to[i] = static_cast<A>(*from.at(r, i).values) * factor;
  }
}

// The way back. factors: one a row, or null.
template <class T, class A>
void write_rows(const A* from, int64_t rows, int64_t columns, A factor, const A* factors, T* to, int64_t row_stride,
                int64_t column_stride) {
  for (int64_t r = 0; r < rows; ++r, from += columns, to += row_stride) {
    const A by = factors ? factor * factors[r] : factor;
    if (column_stride == 1)
      over_row<A>(columns, [&](int64_t i, auto which) { store(to + i, load(from + i, which) * by, which); });
    else
      for (int64_t i = 0; i < columns; ++i) to[i * column_stride] = static_cast<T>(from[i] * by);
  }
}

// The columns of a span, or a few more, of the product of left (rows, depth) with packed panels of (depth, all).
template <class A>
void multiply_columns(Matrix<A> left, int64_t rows, int64_t depth, const A* packed, int64_t all, Span columns, A* out,
                      int64_t out_stride) {
  const Panels<A> panels(all);
  for (int64_t panel = 0; panel < panels.count && panels.begin(panel) < columns.end; ++panel) {
    const int64_t begin = panels.begin(panel);
    if (panels.begin(panel + 1) > columns.begin)
      multiply_panel(Rows<A>(left), rows, depth, packed + begin * depth, std::min(panels.size(panel), all - begin),
                     false, out + begin, out_stride);
  }
}

// The product of the columns of a span of left (rows, all) with the same rows of packed panels of (all, columns).
// out: (rows, columns)
template <class A>
void multiply_depth(Matrix<A> left, int64_t rows, Span depth, const A* packed, int64_t all, int64_t columns, A* out) {
  const Panels<A> panels(columns);
  const Parts depths(depth.size(), depth_block);
  for (int64_t panel = 0; panel < panels.count; ++panel)
    for (int64_t part = 0; part < depths.count; ++part) {
      const int64_t begin = panels.begin(panel), size = panels.size(panel), k = depth.begin + depths.begin(part);
      multiply_panel(Rows<A>(left.at(0, k)), rows, depths.begin(part + 1) - depths.begin(part),
                     packed + begin * all + k * size, std::min(size, columns - begin), part > 0, out + begin, columns);
    }
}

// What panels of (depth, columns) take.
template <class A>
int64_t packed_size(int64_t depth, int64_t columns) {
  return depth * Panels<A>(columns).vectors * lanes<A>;
}

}  // namespace nacre
