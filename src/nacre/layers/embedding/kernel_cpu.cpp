// Embedding: formula.py, with the tokens sorted so that each row of the gradient is written once.
// N tokens, a table of V rows of D features.
#include "nacre/core/cpu_memory.h"
#include "nacre/core/cpu_primitives.h"
#include "nacre/core/cpu_streams.h"

#include <stdexcept>
#include <vector>

namespace nacre {
namespace {

// Calls body with a value of the C++ type of the indices.
template <class Body>
void with_index_type(const Tensor& indices, Body body) {
  switch (indices.scalar_type()) {
    case ScalarType::Long: return body(int64_t());
    case ScalarType::Int: return body(int32_t());
    default: STD_TORCH_CHECK(false, "embedding: indices are int32 or int64");
  }
}

// An IndexError in Python, which does not say which index: the formula does.
template <class Index>
void check_range(const Index* indices, int64_t tokens, int64_t rows) {
  bool outside = false;
  for (int64_t n = 0; n < tokens; ++n) outside |= indices[n] < 0 || indices[n] >= rows;
  if (outside) throw std::out_of_range("index out of range in self");
}

int64_t rows_per_thread(int64_t features) {
  return std::max<int64_t>(values_per_thread / std::max<int64_t>(features, 1), 1);
}

// ---- forward

Tensor forward(const Tensor& weight, const Tensor& indices, int64_t num_embeddings, int64_t, bool, bool) {
  const auto table = weight.sizes();
  STD_TORCH_CHECK(weight.is_cpu() && table.size() == 2 && table[0] == num_embeddings,
                  "embedding: the weight is a table of num_embeddings rows on the CPU");
  const Tensor index = contiguous_as(indices, indices.scalar_type());
  Sizes sizes(index.sizes().begin(), index.sizes().end());
  sizes.push_back(table[1]);
  const Tensor output = new_tensor(sizes, weight.scalar_type());

  const int64_t tokens = index.numel(), features = table[1];
  const auto bytes = static_cast<int64_t>(weight.element_size());
  const int64_t row_stride = weight.stride(0) * bytes, feature_stride = weight.stride(1) * bytes;
  const char* from = static_cast<const char*>(weight.const_data_ptr());  // (V, D)
  char* to = static_cast<char*>(output.mutable_data_ptr());              // (N, D)
  with_index_type(index, [&](auto type) {
    const auto* rows = static_cast<const decltype(type)*>(index.const_data_ptr());  // (N)
    check_range(rows, tokens, num_embeddings);
    if (features == 0) return;
    in_parallel(tokens, rows_per_thread(features), [&](int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; ++n) {
        const char* row = from + rows[n] * row_stride;
        char* copied = to + n * features * bytes;
        if (feature_stride == bytes)
          std::memcpy(copied, row, static_cast<size_t>(features * bytes));
        else
          for (int64_t i = 0; i < features; ++i)
            std::memcpy(copied + i * bytes, row + i * feature_stride, static_cast<size_t>(bytes));
      }
    });
  });
  return output;
}

// ---- backward

// The tokens row by row, in the order of n within a row; those of the padding row are left out.
class SortedTokens {
 public:
  template <class Index>
  SortedTokens(const Index* rows, int64_t tokens, int64_t num_embeddings, int64_t padding)
      : rows_(num_embeddings), starts_(num_embeddings + 2), order_(tokens) {
    // counts stand two places ahead, so their sums one place ahead, from where each moves to the next row's start
    std::fill(starts_.get(), starts_.get() + num_embeddings + 2, int64_t(0));
    int64_t* next = starts_.get() + 1;
    for (int64_t n = 0; n < tokens; ++n)
      if (rows[n] != padding) ++next[rows[n] + 1];
    for (int64_t row = 0; row < num_embeddings; ++row) next[row + 1] += next[row];
    for (int64_t n = 0; n < tokens; ++n)
      if (rows[n] != padding) order_.get()[next[rows[n]]++] = n;
  }

  int64_t count(int64_t row) const { return starts_.get()[row + 1] - starts_.get()[row]; }
  const int64_t* of(int64_t row) const { return order_.get() + starts_.get()[row]; }

  // A row costs one unit of work to write and one for each of its tokens to read.
  int64_t units() const { return units_before(rows_); }

  // The first row before which lie at least `units` units of work.
  int64_t row_at(int64_t units) const {
    int64_t low = 0, high = rows_;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      units_before(middle) < units ? low = middle + 1 : high = middle;
    }
    return low;
  }

  // A row with so much of the work that threads share it; fewer than eight rows are.
  bool shared(int64_t row) const { return count(row) * 8 > units(); }
  bool may_share() const { return (units() - rows_) * 8 > units(); }  // whether any row can be

 private:
  int64_t units_before(int64_t row) const { return row + starts_.get()[row]; }

  int64_t rows_;
  Scratch<int64_t> starts_;  // (V + 2)
  Scratch<int64_t> order_;   // (N)
};

template <class T>
class TableGradient {
 public:
  using A = Accumulator<T>;

  // g: (N, D); result: (V, D)
  TableGradient(const T* g, T* result, int64_t rows, int64_t features, bool means, const SortedTokens& tokens)
      : g_(g), result_(result), rows_(rows), features_(features), means_(means), tokens_(tokens) {}

  void write() const {
    in_parallel(tokens_.units(), rows_per_thread(features_), [&](int64_t begin, int64_t end) {
      write_rows(tokens_.row_at(begin), tokens_.row_at(end));
    });
    if (!tokens_.may_share()) return;
    for (int64_t row = 0; row < rows_; ++row)
      if (tokens_.shared(row)) write_shared(row);
  }

 private:
  void write_rows(int64_t begin, int64_t end) const {
    const Scratch<A> sum(features_);
    const bool streams = rows_ * features_ * static_cast<int64_t>(sizeof(T)) > bytes_in_caches;
    for (int64_t row = begin; row < end;) {
      if (tokens_.count(row) > 0) {
        if (!tokens_.shared(row)) add_tokens(row, 0, features_, sum.get());
        ++row;
        continue;
      }
      int64_t next = row + 1;
      while (next < end && tokens_.count(next) == 0) ++next;
      T* const untouched = result_ + row * features_;
      const size_t bytes = static_cast<size_t>((next - row) * features_) * sizeof(T);
      streams ? zero_past_caches(untouched, bytes) : void(std::memset(untouched, 0, bytes));
      row = next;
    }
    if (streams) finish_past_caches();
  }

  // Threads share the features, so that each sum keeps its order.
  void write_shared(int64_t row) const {
    constexpr int64_t width = 64;
    const Scratch<A> sum(features_);
    in_parallel((features_ + width - 1) / width, rows_per_thread(tokens_.count(row) * width),
                [&](int64_t begin, int64_t end) {
      add_tokens(row, begin * width, std::min(end * width, features_), sum.get());
    });
  }

  // Writes the features from begin to end of a row that has tokens. sum: (D), scratch
  void add_tokens(int64_t row, int64_t begin, int64_t end, A* sum) const {
    const int64_t *tokens = tokens_.of(row), count = tokens_.count(row), strip = end - begin;
    const auto values_of = [&](int64_t token) { return g_ + token * features_ + begin; };
    sum += begin;
    if (count > 1) std::fill(sum, sum + strip, A(0));
    for (int64_t n = 0; n + 1 < count; ++n)
      over_row<A>(strip, [&, g = values_of(tokens[n])](int64_t i, auto which) {
        store(sum + i, load(sum + i, which) + load(g + i, which), which);
      });
    const A divisor = means_ ? static_cast<A>(count) : A(1);
    over_row<A>(strip, [&, g = values_of(tokens[count - 1])](int64_t i, auto which) {
      const Vector<A> before = count > 1 ? load(sum + i, which) : Vector<A>{};
      const Vector<A> total = before + load(g + i, which);
      store(result_ + row * features_ + begin + i, divisor == 1 ? total : total / divisor, which);
    });
  }

  const T* g_;
  T* result_;
  int64_t rows_, features_;
  bool means_;
  const SortedTokens& tokens_;
};

Tensor backward(const Tensor& grad_output, const Tensor& indices, int64_t num_embeddings, int64_t padding_idx,
                bool scale_grad_by_freq, bool sparse, const std::vector<bool>& needs) {
  STD_TORCH_CHECK(needs.size() == 1, "embedding: one gradient is asked for or not");
  STD_TORCH_CHECK(!sparse, "embedding: the kernel's gradient is dense");
  STD_TORCH_CHECK(grad_output.dim() == indices.dim() + 1 && num_embeddings >= 0,
                  "embedding: the gradient has a row for each index");
  if (!needs[0]) return Tensor();
  const ScalarType dtype = grad_output.scalar_type();
  const int64_t tokens = indices.numel(), features = grad_output.size(indices.dim());
  STD_TORCH_CHECK(grad_output.numel() == tokens * features, "embedding: the gradient has a row for each index");
  const Tensor g = contiguous_as(grad_output, dtype), index = contiguous_as(indices, indices.scalar_type());
  const Tensor grad_weight = new_tensor({num_embeddings, features}, dtype);

  with_index_type(index, [&](auto index_type) {
    const auto* rows = static_cast<const decltype(index_type)*>(index.const_data_ptr());  // (N)
    check_range(rows, tokens, num_embeddings);
    if (features == 0) return;
    const SortedTokens sorted(rows, tokens, num_embeddings, padding_idx);
    with_type(dtype, [&](auto type) {
      using T = decltype(type);
      TableGradient<T>(static_cast<const T*>(g.const_data_ptr()), static_cast<T*>(grad_weight.mutable_data_ptr()),
                       num_embeddings, features, scale_grad_by_freq, sorted)
          .write();
    });
  });
  return grad_weight;
}

}  // namespace
}  // namespace nacre

STABLE_TORCH_LIBRARY_IMPL(nacre, CPU, m) {
  m.impl("embedding.kernel", TORCH_BOX(&nacre::forward));
  m.impl("embedding_backward.kernel", TORCH_BOX(&nacre::backward));
}
