// Matrix products for the CPU kernels: C = A B in tiles that stay in the vector registers.
//
// The right factor is packed: its columns are cut into panels of up to `panel_vectors` vectors, and a panel holds, row
// after row, what one step of a tile multiplies with. The left factor is read where it lies, one value at a time,
// spread over a vector. A tile of `tile_rows` rows and one panel's columns of C is added up in registers over the whole
// depth, so that a step of it is as many multiply-adds as the tile has vectors, and reads nothing but the two factors.
//
// M rows and N columns of C, K the depth; every element of C is the sum of the same products in the same order whatever
// the tiles and threads. Goto and van de Geijn, "Anatomy of High-Performance Matrix Multiplication", TOMS 34 (3), 2008.
#pragma once

#include <algorithm>

#include "nacre/core/cpu_primitives.h"

namespace nacre {

constexpr int64_t tile_rows = 6;  // with four vectors a row: 24 sums, 4 factors and a spread value, in 32 registers
constexpr int64_t strip_rows = 8 * tile_rows;  // packed side by side: whole tiles, and whole vectors of any width
constexpr int64_t panel_vectors = vector_bytes == 64 ? 4 : 2;  // two where there are 16 registers
constexpr int64_t depth_block = 384;  // a tile's rows in the first cache, a panel of this depth in the second
constexpr int64_t multiply_adds_per_thread = 1 << 18;  // below, starting a thread costs more than it saves

// A size cut into parts of at most `largest` that are as equal as can be.
struct Parts {
  int64_t size, count;

  Parts(int64_t size, int64_t largest) : size(size), count(std::max<int64_t>((size + largest - 1) / largest, 1)) {}

  int64_t begin(int64_t part) const { return size * part / count; }
  int64_t largest() const { return (size + count - 1) / count; }
};

// A matrix that lies in memory with any two strides.
template <class T>
struct Matrix {
  const T* values;
  int64_t row_stride, column_stride;

  Matrix at(int64_t row, int64_t column) const {
    return {values + row * row_stride + column * column_stride, row_stride, column_stride};
  }
  Matrix transposed() const { return {values, column_stride, row_stride}; }
};

// How N columns are cut into panels: as few as can be, of widths that differ by one vector at most.
template <class A>
struct Panels {
  int64_t vectors, count;

  explicit Panels(int64_t columns)
      : vectors((columns + lanes<A> - 1) / lanes<A>), count((vectors + panel_vectors - 1) / panel_vectors) {}

  int64_t begin(int64_t panel) const {
    return count ? (panel * (vectors / count) + std::min(panel, vectors % count)) * lanes<A> : 0;
  }
  int64_t size(int64_t panel) const { return begin(panel + 1) - begin(panel); }
};

// Packs panels `from` to `to` of the matrix (K, N), the last vector filled up with zeros: each (K, its size), one after
// the other.
template <class T>
void pack_panels(Matrix<T> matrix, int64_t depth, int64_t columns, int64_t from, int64_t to, Accumulator<T>* packed);

template <class T>
inline void pack_panels(Matrix<T> matrix, int64_t depth, int64_t columns, Accumulator<T>* packed) {
  pack_panels(matrix, depth, columns, 0, Panels<Accumulator<T>>(columns).count, packed);
}

// Packs the rows of a matrix (M, K) into strips, (K, strip_rows) each, one after the other; what is no row of the last
// one is left as it is, but for the lanes of a vector. row_sums: (M), the sums of the rows, or added to what is there;
// or null.
template <class A>
void pack_strips(Matrix<A> matrix, int64_t rows, int64_t depth, A* packed, A* row_sums = nullptr, bool add = false);

// Writes a matrix (M, N) whose columns lie together in memory to `out`, its rows `out_stride` apart; or adds it.
template <class A>
void put_transposed(Matrix<A> matrix, int64_t rows, int64_t columns, bool add, A* out, int64_t out_stride);

// The rows of a left factor: where a tile's first row begins, and the steps from row to row and along the depth.
template <class A>
struct Rows {
  const A* values;
  int64_t row_stride, depth_stride, tile_stride;

  // They lie in a matrix.
  explicit Rows(Matrix<A> matrix)
      : values(matrix.values), row_stride(matrix.row_stride), depth_stride(matrix.column_stride),
        tile_stride(tile_rows * matrix.row_stride) {}
  // They are a packed strip.
  static Rows of_strip(const A* packed) { return Rows(Matrix<A>{packed, 1, strip_rows}); }
  // They are packed into tiles, (K, tile_rows) each.
  Rows(const A* packed, int64_t depth)
      : values(packed), row_stride(1), depth_stride(tile_rows), tile_stride(tile_rows * depth) {}
};

constexpr int64_t cache_line = 64;

// Memory that is read after a product, and comes into the caches during it: a line at each step of a tile's depth.
class Ahead {
 public:
  // Lines that follow each other.
  Ahead(const void* begin, int64_t bytes) : Ahead(begin, bytes, cache_line, 0) {}
  // Rows of so many bytes, `row_stride` bytes apart: a line of each of them, then the next line of each.
  Ahead(const void* begin, int64_t bytes, int64_t row_stride) : Ahead(begin, bytes, row_stride, cache_line) {}

  // Where the next lines begin, each a stride from the other; or null where all have been taken.
  const char* take(int64_t lines) {
    const char* begin = next_ < end_ ? next_ : nullptr;
    next_ += begin ? (step_ ? step_ : lines * stride_) : 0;
    return begin;
  }
  int64_t stride() const { return stride_; }

 private:
  Ahead(const void* begin, int64_t bytes, int64_t stride, int64_t step)
      : next_(static_cast<const char*>(begin)), end_(next_ + bytes), stride_(stride), step_(step) {}

  const char *next_, *end_;
  int64_t stride_, step_;
};

// Writes C = A B, or adds A B to C, for one panel of B. left: (M, K), panel: (K, size), out: (M, `columns`), its rows
// `out_stride` apart.
template <class A>
void multiply_panel(Rows<A> left, int64_t rows, int64_t depth, const A* panel, int64_t columns, bool add, A* out,
                    int64_t out_stride, Ahead* ahead = nullptr);

// The same for all panels. packed: those of (K, N), out: (M, N).
template <class A>
inline void multiply(Rows<A> left, int64_t rows, int64_t depth, const A* packed, int64_t columns, bool add, A* out,
                     int64_t out_stride) {
  const Panels<A> panels(columns);
  for (int64_t panel = 0; panel < panels.count; ++panel) {
    const int64_t begin = panels.begin(panel);
    multiply_panel(left, rows, depth, packed + begin * depth, std::min(panels.size(panel), columns - begin), add,
                   out + begin, out_stride);
  }
}

}  // namespace nacre
