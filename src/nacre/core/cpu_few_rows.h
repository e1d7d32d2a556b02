// Matrix products C = A B of few rows, as of one sample or one token: the right factor is read once and where it lies,
// since packing it would take longer than the product itself. M rows and N columns of C, K the depth.
#pragma once

#include "nacre/core/cpu_primitives.h"

namespace nacre {

constexpr int64_t few_rows = 8;
constexpr int64_t few_rows_values_per_thread = 1 << 16;  // of the right factor, whose reading is what takes the time

// How many columns threads share out at a time.
template <class A>
constexpr int64_t few_rows_columns = 2 * lanes<A>;

// left: (M, K), its rows `left_stride` apart; out: (M, N), added to or written.

// B's columns lie in memory one after the other: each element of C is a dot product. right: (N, K)
template <class A>
void few_rows_by_dots(const A* left, int64_t left_stride, int64_t rows, const A* right, int64_t right_stride,
                      int64_t depth, int64_t columns, bool add, A* out, int64_t out_stride);

// B's rows lie in memory one after the other: each row of C is a sum of them. right: (K, N)
template <class A>
void few_rows_by_sums(const A* left, int64_t left_stride, int64_t rows, const A* right, int64_t right_stride,
                      int64_t depth, int64_t columns, bool add, A* out, int64_t out_stride);

}  // namespace nacre
