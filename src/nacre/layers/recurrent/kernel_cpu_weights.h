// The products of LSTM and GRU: rows of one step after another with weights that are packed once for all steps, or
// where there are few rows not at all.
//
// M rows and N columns of a product, K the depth.
#pragma once

#include "nacre/layers/recurrent/kernel_cpu.h"

namespace nacre {

// Whether so few rows are multiplied in all that the weights are read where they lie: to pack them is to read, write
// and read them again before the first row is multiplied.
inline bool has_few_rows(const Steps& steps) { return steps.total() <= 64; }

// The right factor (K, N) of products with the rows of one step after another, one of its strides being 1.
template <class A>
class Weights {
 public:
  Weights(const Steps& steps, Matrix<A> matrix, int64_t depth, int64_t columns)
      : matrix_(matrix), few_(has_few_rows(steps)), depths_(depth, depth_block), columns_(columns), panels_(columns),
        packed_(few_ ? 0 : panels_.vectors * lanes<A> * depth) {
    if (few_) return;
    const int64_t per_thread = Parts(values_per_thread, std::max<int64_t>(depth * panel_vectors * lanes<A>, 1)).count;
    in_parallel(panels_.count, per_thread, [&](int64_t from, int64_t to) {
      pack_panels(matrix, depth, columns, from, to, packed_.get() + panels_.begin(from) * depth);
    });
  }

  int64_t panels() const { return panels_.count; }

  // Writes left W into panels `from` to `to` of the columns of out, or adds it. left: (rows, K), out: (rows, N)
  void multiply(Matrix<A> left, int64_t rows, int64_t from, int64_t to, bool add, A* out, int64_t out_stride,
                Ahead* ahead = nullptr) const {
    if (few_) return multiply_few(left, rows, panels_.begin(from), panels_.begin(to), add, out, out_stride);
    for (int64_t panel = from; panel < to; ++panel) {
      const int64_t begin = panels_.begin(panel), size = panels_.size(panel);
      const A* packed = packed_.get() + begin * depths_.size;
      for (int64_t part = 0; part < depths_.count; ++part) {
        const int64_t k = depths_.begin(part), steps = depths_.begin(part + 1) - k;
        multiply_panel(Rows<A>(left.at(0, k)), rows, steps, packed + k * size, std::min(size, columns_ - begin),
                       add || part > 0, out + begin, out_stride, ahead);
      }
    }
  }

 private:
  void multiply_few(Matrix<A> left, int64_t rows, int64_t begin, int64_t end, bool add, A* out,
                    int64_t out_stride) const {
    const int64_t columns = std::min(end, columns_) - begin;
    if (columns <= 0) return;
    if (matrix_.row_stride == 1)
      return few_rows_by_dots(left.values, left.row_stride, rows, matrix_.at(0, begin).values, matrix_.column_stride,
                              depths_.size, columns, add, out + begin, out_stride);
    // in parts of the depth, since rounding errors grow with the length of a plain sum
    const Parts parts(depths_.size, depth_block / 4);
    const Scratch<A> sums(rows * columns);
    for (int64_t part = 0; part < parts.count; ++part) {
      const int64_t k = parts.begin(part), steps = parts.begin(part + 1) - k;
      few_rows_by_sums(left.at(0, k).values, left.row_stride, rows, matrix_.at(k, begin).values, matrix_.row_stride,
                       steps, columns, false, sums.get(), columns);
      for (int64_t row = 0; row < rows; ++row)
        over_row<A>(columns, [&](int64_t n, auto which) {
          A* to = out + row * out_stride + begin + n;
          const Vector<A> sum = load(sums.get() + row * columns + n, which);
          store(to, add || part > 0 ? load(to, which) + sum : sum, which);
        });
    }
  }

  Matrix<A> matrix_;
  bool few_;
  Parts depths_;
  int64_t columns_;
  Panels<A> panels_;
  Scratch<A> packed_;
};

}  // namespace nacre
