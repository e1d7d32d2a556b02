#include "nacre/core/cpu_matmul.h"

#include "nacre/core/cpu_math.h"

namespace nacre {

// ---- packing

// Transposes a square of vectors: each round interleaves the upper half of the rows with the lower half.
template <class A>
inline void transpose(Vector<A>* rows) {
  using Indices = typename VectorOf<std::conditional_t<sizeof(A) == 4, int32_t, int64_t>, vector_bytes>::type;
  Indices low, high;
  for (int64_t lane = 0; lane < lanes<A>; ++lane) {
    low[lane] = lane / 2 + (lane % 2) * lanes<A>;
    high[lane] = low[lane] + lanes<A> / 2;
  }
  Vector<A> next[lanes<A>];
  for (int64_t round = 1; round < lanes<A>; round *= 2) {
    for (int64_t i = 0; i < lanes<A> / 2; ++i) {
      next[2 * i] = __builtin_shuffle(rows[i], rows[i + lanes<A> / 2], low);
      next[2 * i + 1] = __builtin_shuffle(rows[i], rows[i + lanes<A> / 2], high);
    }
    std::copy(next, next + lanes<A>, rows);
  }
}

// Columns of the matrix (K, columns), which lie side by side: packed rows are `stride` apart. The rows may be pages
// apart, where the processor does not foresee the next one.
template <class T>
void pack_side_by_side(Matrix<T> matrix, int64_t depth, int64_t columns, Accumulator<T>* packed, int64_t stride) {
  using A = Accumulator<T>;
  constexpr int64_t ahead = 16, line_values = cache_line / sizeof(T);
  for (int64_t k = 0; k < depth; ++k) {
    const T* row = matrix.at(k, 0).values;
    for (int64_t n = 0; n < columns; n += line_values) __builtin_prefetch(row + ahead * matrix.row_stride + n);
    over_row<A>(columns, [&](int64_t n, auto which) { store(packed + k * stride + n, load(row + n, which), Whole{}); });
  }
}

// A vector of columns of the matrix (K, up to a vector), each of which lies together, or any.
template <class T>
void pack_vector(Matrix<T> matrix, int64_t depth, int64_t columns, Accumulator<T>* packed, int64_t stride) {
  using A = Accumulator<T>;
  int64_t k = 0;
  for (; matrix.row_stride == 1 && k + lanes<A> <= depth; k += lanes<A>) {
    Vector<A> square[lanes<A>] = {};
    for (int64_t n = 0; n < columns; ++n) square[n] = load(matrix.at(k, n).values, Whole{});
    transpose<A>(square);
    for (int64_t i = 0; i < lanes<A>; ++i) store(packed + (k + i) * stride, square[i], Whole{});
  }
  for (; k < depth; ++k)
    for (int64_t n = 0; n < lanes<A>; ++n)
      packed[k * stride + n] = n < columns ? static_cast<A>(*matrix.at(k, n).values) : A(0);
}

// Columns of the matrix (K, columns) as one panel or strip, whose rows are `stride` apart; zeros fill up the last
// vector.
template <class T>
void pack(Matrix<T> matrix, int64_t depth, int64_t columns, Accumulator<T>* packed, int64_t stride) {
  using A = Accumulator<T>;
  if (matrix.column_stride == 1) return pack_side_by_side(matrix, depth, columns, packed, stride);
  for (int64_t n = 0; n < columns; n += lanes<A>)
    pack_vector(matrix.at(0, n), depth, std::min(lanes<A>, columns - n), packed + n, stride);
}

template <class T>
void pack_panels(Matrix<T> matrix, int64_t depth, int64_t columns, int64_t from, int64_t to, Accumulator<T>* packed) {
  const Panels<Accumulator<T>> panels(columns);
  for (int64_t panel = from; panel < to; ++panel) {
    const int64_t begin = panels.begin(panel), size = panels.size(panel);
    pack(matrix.at(0, begin), depth, std::min(size, columns - begin), packed + (begin - panels.begin(from)) * depth,
         size);
  }
}

// Sums of a packed strip's rows: of short runs first, since rounding errors grow with the length of a plain sum.
template <class A>
void add_rows(const A* strip, int64_t depth, int64_t rows, bool add, A* sums) {
  constexpr int64_t runs = 8;
  over_row<A>(rows, [&](int64_t r, auto which) {
    Vector<A> run[runs] = {};
    const A* values = strip + r;
    int64_t k = 0;
    for (; k + runs <= depth; k += runs)
#pragma GCC unroll 8
      for (int64_t i = 0; i < runs; ++i, values += strip_rows) run[i] += load(values, Whole{});
    for (; k < depth; ++k, values += strip_rows) run[0] += load(values, Whole{});
    for (int64_t distance = runs / 2; distance > 0; distance /= 2)
      for (int64_t i = 0; i < distance; ++i) run[i] += run[i + distance];
    store(sums + r, add ? load(sums + r, which) + run[0] : run[0], which);
  });
}

template <class A>
void pack_strips(Matrix<A> matrix, int64_t rows, int64_t depth, A* packed, A* row_sums, bool add) {
  for (int64_t m = 0; m < rows; m += strip_rows, packed += strip_rows * depth) {
    const int64_t size = std::min(strip_rows, rows - m);
    pack(matrix.transposed().at(0, m), depth, size, packed, strip_rows);
    if (row_sums) add_rows(packed, depth, size, add, row_sums + m);
  }
}

template <class A>
void put_transposed(Matrix<A> matrix, int64_t rows, int64_t columns, bool add, A* out, int64_t out_stride) {
  constexpr std::integral_constant<int64_t, lanes<A>> all;  // a size that the compiler knows keeps squares in registers
  for (int64_t m = 0; m < rows; m += lanes<A>)
    over_row<A>(columns, [&](int64_t n, auto across) {
      const auto put = [&](auto height, auto down, auto width) {
        Vector<A> square[lanes<A>] = {};
        for (int64_t i = 0; i < width; ++i) square[i] = load(matrix.at(m, n + i).values, down);
        transpose<A>(square);
        for (int64_t i = 0; i < height; ++i) {
          A* to = out + (m + i) * out_stride + n;
          store(to, add ? load(to, across) + square[i] : square[i], across);
        }
      };
      const int64_t height = std::min(lanes<A>, rows - m), width = std::min(lanes<A>, columns - n);
      if (height == lanes<A> && width == lanes<A>) put(all, Whole{}, all);
      else put(height, Part{height}, width);
    });
}

// ---- tiles

template <class A, int64_t rows, int64_t vectors>
void multiply_tile(const A* left, int64_t row_stride, int64_t depth_stride, int64_t depth, const A* panel,
                   int64_t columns, bool add, A* out, int64_t out_stride, const char* ahead, int64_t ahead_stride) {
  Vector<A> sums[rows][vectors] = {};
  const A* row_values[rows];
  for (int64_t r = 0; r < rows; ++r) {
    row_values[r] = left + r * row_stride;
    for (int64_t v = 0; v < vectors; ++v) __builtin_prefetch(out + r * out_stride + v * lanes<A>, 1);  // for the end
  }
  for (int64_t k = 0, at = 0; k < depth; ++k, at += depth_stride, panel += vectors * lanes<A>) {
    Vector<A> factors[vectors];
#pragma GCC unroll 4
    for (int64_t v = 0; v < vectors; ++v) factors[v] = load(panel + v * lanes<A>, Whole{});
    __builtin_prefetch(ahead + k * ahead_stride);
#pragma GCC unroll 6
    for (int64_t r = 0; r < rows; ++r) {
      const Vector<A> value = every(row_values[r][at]);
#pragma GCC unroll 4
      for (int64_t v = 0; v < vectors; ++v) sums[r][v] = multiply_add<A>(value, factors[v], sums[r][v]);
    }
  }
  const auto put = [&](int64_t r, int64_t v, auto which) {
    A* to = out + r * out_stride + v * lanes<A>;
    store(to, add ? load(to, which) + sums[r][v] : sums[r][v], which);
  };
#pragma GCC unroll 6
  for (int64_t r = 0; r < rows; ++r) {
#pragma GCC unroll 4
    for (int64_t v = 0; v < vectors - 1; ++v) put(r, v, Whole{});
    if (columns == vectors * lanes<A>)
      put(r, vectors - 1, Whole{});
    else
      put(r, vectors - 1, Part{columns - (vectors - 1) * lanes<A>});
  }
}

template <class A, int64_t vectors>
void multiply_rows(Rows<A> left, int64_t rows, int64_t depth, const A* panel, int64_t columns, bool add, A* out,
                   int64_t out_stride, Ahead* ahead) {
  const auto tile = [&](auto count) {
    const char* next = ahead ? ahead->take(depth) : nullptr;
    const void* fetched = next ? next : static_cast<const void*>(panel);
    multiply_tile<A, count, vectors>(left.values, left.row_stride, left.depth_stride, depth, panel, columns, add, out,
                                     out_stride, static_cast<const char*>(fetched), next ? ahead->stride() : 0);
  };
  for (; rows >= tile_rows; rows -= tile_rows, left.values += left.tile_stride, out += tile_rows * out_stride)
    tile(std::integral_constant<int64_t, tile_rows>());
  switch (rows) {
    case 1: return tile(std::integral_constant<int64_t, 1>());
    case 2: return tile(std::integral_constant<int64_t, 2>());
    case 3: return tile(std::integral_constant<int64_t, 3>());
    case 4: return tile(std::integral_constant<int64_t, 4>());
    case 5: return tile(std::integral_constant<int64_t, 5>());
  }
}

template <class A>
void multiply_panel(Rows<A> left, int64_t rows, int64_t depth, const A* panel, int64_t columns, bool add, A* out,
                    int64_t out_stride, Ahead* ahead) {
  const auto multiply = [&](auto vectors) {
    multiply_rows<A, vectors>(left, rows, depth, panel, columns, add, out, out_stride, ahead);
  };
  switch ((columns + lanes<A> - 1) / lanes<A>) {
    case 1: return multiply(std::integral_constant<int64_t, 1>());
    case 2: return multiply(std::integral_constant<int64_t, 2>());
    case 3: return multiply(std::integral_constant<int64_t, std::min<int64_t>(3, panel_vectors)>());
    case 4: return multiply(std::integral_constant<int64_t, panel_vectors>());
  }
}

template void pack_panels(Matrix<float>, int64_t, int64_t, int64_t, int64_t, float*);
template void pack_panels(Matrix<double>, int64_t, int64_t, int64_t, int64_t, double*);
template void pack_panels(Matrix<BFloat16>, int64_t, int64_t, int64_t, int64_t, float*);
template void pack_panels(Matrix<Half>, int64_t, int64_t, int64_t, int64_t, float*);
template void pack_strips(Matrix<float>, int64_t, int64_t, float*, float*, bool);
template void pack_strips(Matrix<double>, int64_t, int64_t, double*, double*, bool);
template void put_transposed(Matrix<float>, int64_t, int64_t, bool, float*, int64_t);
template void put_transposed(Matrix<double>, int64_t, int64_t, bool, double*, int64_t);
template void multiply_panel(Rows<float>, int64_t, int64_t, const float*, int64_t, bool, float*, int64_t, Ahead*);
template void multiply_panel(Rows<double>, int64_t, int64_t, const double*, int64_t, bool, double*, int64_t, Ahead*);

}  // namespace nacre
