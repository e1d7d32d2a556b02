#include "nacre/core/cpu_few_rows.h"

#include "nacre/core/cpu_math.h"

namespace nacre {
namespace {

constexpr int64_t rows_at_once = 4;

// Calls body(first, count) for each few of the rows, the count being a constant.
template <class Body>
void over_rows(int64_t rows, Body body) {
  int64_t r = 0;
  for (; r + rows_at_once <= rows; r += rows_at_once) body(r, std::integral_constant<int64_t, rows_at_once>());
  switch (rows - r) {
    case 1: return body(r, std::integral_constant<int64_t, 1>());
    case 2: return body(r, std::integral_constant<int64_t, 2>());
    case 3: return body(r, std::integral_constant<int64_t, 3>());
  }
}

// As many sums as hide the time of a multiply-add, and as leave registers for its factors.
template <int64_t rows>
constexpr int64_t dots_at_once = (vector_bytes == 64 ? 16 : 8) / (rows <= 2 ? 2 : 4);

template <class A, int64_t rows, int64_t columns>
void dots(const A* left, int64_t left_stride, const A* right, int64_t right_stride, int64_t depth, bool add, A* out,
          int64_t out_stride) {
  Vector<A> sums[rows][columns] = {};
  over_row<A>(depth, [&](int64_t k, auto which) {
    Vector<A> factors[rows];
    for (int64_t r = 0; r < rows; ++r) factors[r] = load(left + r * left_stride + k, which);
#pragma GCC unroll 8
    for (int64_t c = 0; c < columns; ++c) {
      const Vector<A> values = load(right + c * right_stride + k, which);
#pragma GCC unroll 4
      for (int64_t r = 0; r < rows; ++r) sums[r][c] = multiply_add<A>(factors[r], values, sums[r][c]);
    }
  });
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < columns; ++c) {
      A* to = out + r * out_stride + c;
      *to = add ? *to + total<A>(sums[r][c]) : total<A>(sums[r][c]);
    }
}

// Four rows of the right factor at a time, of as many columns as leave them and the rows of C in the first cache.
constexpr int64_t steps_at_once = 4;
constexpr int64_t column_block = 512;

template <class A, int64_t rows, int64_t steps>
void add_rows(const A* left, int64_t left_stride, const A* right, int64_t right_stride, int64_t columns, bool add,
              A* out, int64_t out_stride) {
  over_row<A>(columns, [&](int64_t n, auto which) {
    Vector<A> values[steps];
    for (int64_t k = 0; k < steps; ++k) values[k] = load(right + k * right_stride + n, which);
    for (int64_t r = 0; r < rows; ++r) {
      A* to = out + r * out_stride + n;
      Vector<A> sum = add ? load(to, which) : Vector<A>{};
      for (int64_t k = 0; k < steps; ++k) sum = multiply_add<A>(every(left[r * left_stride + k]), values[k], sum);
      store(to, sum, which);
    }
  });
}

}  // namespace

template <class A>
void few_rows_by_dots(const A* left, int64_t left_stride, int64_t rows, const A* right, int64_t right_stride,
                      int64_t depth, int64_t columns, bool add, A* out, int64_t out_stride) {
  const auto some = [&](int64_t n, auto at_once) {
    over_rows(rows, [&](int64_t r, auto count) {
      dots<A, count, at_once>(left + r * left_stride, left_stride, right + n * right_stride, right_stride, depth, add,
                              out + r * out_stride + n, out_stride);
    });
  };
  const auto all = [&](auto at_once) {
    int64_t n = 0;
    for (; n + at_once <= columns; n += at_once) some(n, at_once);
    for (; n < columns; ++n) some(n, std::integral_constant<int64_t, 1>());
  };
  if (rows <= 2)
    all(std::integral_constant<int64_t, dots_at_once<2>>());
  else
    all(std::integral_constant<int64_t, dots_at_once<rows_at_once>>());
}

template <class A>
void few_rows_by_sums(const A* left, int64_t left_stride, int64_t rows, const A* right, int64_t right_stride,
                      int64_t depth, int64_t columns, bool add, A* out, int64_t out_stride) {
  for (int64_t n = 0; n < columns; n += column_block) {
    const int64_t size = std::min(column_block, columns - n);
    const auto some = [&](int64_t k, auto steps) {
      over_rows(rows, [&](int64_t r, auto count) {
        add_rows<A, count, steps>(left + r * left_stride + k, left_stride, right + k * right_stride + n, right_stride,
                                  size, add || k > 0, out + r * out_stride + n, out_stride);
      });
    };
    int64_t k = 0;
    for (; k + steps_at_once <= depth; k += steps_at_once) some(k, std::integral_constant<int64_t, steps_at_once>());
    for (; k < depth; ++k) some(k, std::integral_constant<int64_t, 1>());
    if (depth == 0) some(0, std::integral_constant<int64_t, 0>());
  }
}

template void few_rows_by_dots(const float*, int64_t, int64_t, const float*, int64_t, int64_t, int64_t, bool, float*,
                               int64_t);
template void few_rows_by_dots(const double*, int64_t, int64_t, const double*, int64_t, int64_t, int64_t, bool, double*,
                               int64_t);
template void few_rows_by_sums(const float*, int64_t, int64_t, const float*, int64_t, int64_t, int64_t, bool, float*,
                               int64_t);
template void few_rows_by_sums(const double*, int64_t, int64_t, const double*, int64_t, int64_t, int64_t, bool, double*,
                               int64_t);

}  // namespace nacre
