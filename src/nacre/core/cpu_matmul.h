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

#include "nacre/core/cpu_few_rows.h"
#include "nacre/core/cpu_memory.h"
#include "nacre/core/cpu_primitives.h"

namespace nacre {

constexpr int64_t tile_rows = 6;  // with four vectors a row: 24 sums, 4 factors and a spread value, in 32 registers
constexpr int64_t panel_vectors = vector_bytes == 64 ? 4 : 2;  // two where there are 16 registers
constexpr int64_t depth_block = 384;  // a tile's rows in the first cache, a panel of this depth in the second

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

// Packs the rows of a matrix (M, K) into tiles, (K, tile_rows) each, the last one filled up with zeros; a vector beyond
// the last may be written to. row_sums: (M), the sums of the rows, or added to what is there; or null.
template <class A>
void pack_tiles(Matrix<A> matrix, int64_t rows, int64_t depth, A* packed, A* row_sums = nullptr, bool add = false);

// The rows of a left factor: where a tile's first row begins, and the steps from row to row and along the depth.
template <class A>
struct Rows {
  const A* values;
  int64_t row_stride, depth_stride, tile_stride;

  // They lie in a matrix.
  explicit Rows(Matrix<A> matrix)
      : values(matrix.values), row_stride(matrix.row_stride), depth_stride(matrix.column_stride),
        tile_stride(tile_rows * matrix.row_stride) {}
  // They are packed into tiles.
  Rows(const A* packed, int64_t depth)
      : values(packed), row_stride(1), depth_stride(tile_rows), tile_stride(tile_rows * depth) {}
};

constexpr int64_t cache_line = 64;

// Memory that is read after a product, and comes into the caches during it: a line at each step of a tile's depth.
class Ahead {
 public:
  Ahead(const void* begin, int64_t bytes) : next_(static_cast<const char*>(begin)), end_(next_ + bytes) {}

  // Where the next lines begin, or null where all have been taken.
  const char* take(int64_t lines) {
    const char* begin = next_ < end_ ? next_ : nullptr;
    next_ += begin ? lines * cache_line : 0;
    return begin;
  }

 private:
  const char *next_, *end_;
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

// ---- whole products, shared among threads

constexpr int64_t row_block = 32 * tile_rows;           // with a block of the depth: what fits the second cache
constexpr int64_t shared_values = int64_t{1} << 17;     // a left factor so small that the second cache holds it
constexpr int64_t packed_bytes = int64_t{8} << 20;      // of the right factor at a time
constexpr int64_t multiply_adds_per_thread = 1 << 18;   // below, starting a thread costs more than it saves

// A size cut into parts of at most `largest` that are as equal as can be.
struct Parts {
  int64_t size, count;

  Parts(int64_t size, int64_t largest) : size(size), count(std::max<int64_t>((size + largest - 1) / largest, 1)) {}

  int64_t begin(int64_t part) const { return size * part / count; }
  int64_t largest() const { return (size + count - 1) / count; }
};

template <class A, class Finish>
struct Product {
  Matrix<A> left, right;
  int64_t rows, columns, depth;
  A* out;
  int64_t out_stride;
  A* row_sums;
  bool add;
  const Finish& finish;

  const Parts depths = Parts(depth, depth_block);
  const Panels<A> panels = Panels<A>(columns);
  const bool in_place = left.column_stride == 1 && !row_sums;

  bool has_few_rows() const {
    return rows <= few_rows && !row_sums && (right.row_stride == 1 || right.column_stride == 1);
  }

  // As few rows as one sample has: the right factor is not packed at all.
  void by_few_rows() const {
    const bool dots = right.row_stride == 1;
    Scratch<A> copy(in_place ? 0 : rows * depth);
    if (!in_place)
      for (int64_t m = 0; m < rows; ++m)
        for (int64_t k = 0; k < depth; ++k) copy.get()[m * depth + k] = *left.at(m, k).values;
    const A* from = in_place ? left.values : copy.get();
    const int64_t stride = in_place ? left.row_stride : depth, unit = few_rows_columns<A>;
    const int64_t per_thread = Parts(few_rows_values_per_thread, std::max<int64_t>(depth * unit, 1)).count;
    in_parallel((columns + unit - 1) / unit, per_thread, [&](int64_t begin, int64_t end) {
      const int64_t n = begin * unit, n_end = std::min(end * unit, columns);
      const A* here = right.at(0, n).values;
      if (dots)
        few_rows_by_dots(from, stride, rows, here, right.column_stride, depth, n_end - n, add, out + n, out_stride);
      else
        few_rows_by_sums(from, stride, rows, here, right.row_stride, depth, n_end - n, add, out + n, out_stride);
      finish(0, rows, n, n_end);
    });
  }

  // Some rows: every thread has its own columns of the right factor, and packs a panel just before it is used. As many
  // panels as the cache holds results for share a block of the left factor.
  void by_columns() const {
    const int64_t per_thread = Parts(multiply_adds_per_thread, std::max<int64_t>(rows * depth * lanes<A>, 1)).count;
    in_parallel(panels.vectors, per_thread, [&](int64_t from, int64_t to) {
      const int64_t first = from * lanes<A>, last = std::min(to * lanes<A>, columns);
      const Panels<A> own(last - first);
      Scratch<A> packed(panel_vectors * lanes<A> * depths.largest());
      Scratch<A> tiles(in_place ? 0 : packed_rows(rows) * depth + lanes<A>);
      if (!in_place) pack_tiles(left, rows, depth, tiles.get(), first == 0 ? row_sums : nullptr, add);
      const Parts groups(own.count, Parts(shared_values, std::max<int64_t>(rows * panel_vectors * lanes<A>, 1)).count);
      for (int64_t group = 0; group < groups.count; ++group)
        for (int64_t part = 0; part < depths.count; ++part) {
          const int64_t k = depths.begin(part), steps = depths.begin(part + 1) - k;
          const Rows<A> block = in_place ? Rows<A>(left.at(0, k)) : Rows<A>(tiles.get() + k * tile_rows, depth);
          for (int64_t panel = groups.begin(group); panel < groups.begin(group + 1); ++panel) {
            const int64_t n = first + own.begin(panel), n_end = std::min(first + own.begin(panel + 1), last);
            pack_panels(right.at(k, n), steps, n_end - n, packed.get());
            multiply_panel(block, rows, steps, packed.get(), n_end - n, add || part > 0, out + n, out_stride);
            if (part + 1 == depths.count) finish(0, rows, n, n_end);
          }
        }
    });
  }

  // Many rows: all threads pack a portion of the right factor, then each multiplies its own rows with it.
  void by_rows() const {
    const int64_t panel_bytes = std::max<int64_t>(depths.largest(), 1) * panel_vectors * vector_bytes;
    const Parts panel_groups(panels.count, std::max<int64_t>(packed_bytes / panel_bytes, 1));
    const int64_t all_panels_bytes = std::max<int64_t>(panels.count, 1) * panel_bytes;
    const Parts depth_groups(depths.count, std::max<int64_t>(packed_bytes / all_panels_bytes, 1));
    const Scratch<A> packed(panel_groups.largest() * depth_groups.largest() * panel_bytes / sizeof(A));
    for (int64_t i = 0; i < panel_groups.count; ++i)
      for (int64_t j = 0; j < depth_groups.count; ++j) {
        const Portion portion{panel_groups.begin(i), panel_groups.begin(i + 1), depth_groups.begin(j),
                              depth_groups.begin(j + 1), packed.get()};
        pack(portion);
        const int64_t tile_work = tile_rows * depth * (panels.begin(portion.panel_end) - panels.begin(portion.panel));
        const int64_t per_thread = Parts(multiply_adds_per_thread, std::max<int64_t>(tile_work, 1)).count;
        in_parallel(packed_rows(rows) / tile_rows, per_thread, [&](int64_t from, int64_t to) {
          multiply_rows(portion, from * tile_rows, std::min(to * tile_rows, rows));
        });
      }
  }

 private:
  // Panels and parts of the depth, and where they are packed: part after part, and in each panel after panel.
  struct Portion {
    int64_t panel, panel_end, part, part_end;
    A* packed;
  };

  static int64_t packed_rows(int64_t rows) { return (rows + tile_rows - 1) / tile_rows * tile_rows; }
  int64_t steps(int64_t part) const { return depths.begin(part + 1) - depths.begin(part); }

  A* place(const Portion& portion, int64_t part, int64_t panel) const {
    const int64_t first = panels.begin(portion.panel), width = panels.begin(portion.panel_end) - first;
    return portion.packed + (depths.begin(part) - depths.begin(portion.part)) * width +
           (panels.begin(panel) - first) * steps(part);
  }

  void pack(const Portion& portion) const {
    const int64_t panels_each = portion.panel_end - portion.panel;
    const int64_t values = std::max<int64_t>(depths.largest(), 1) * panel_vectors * lanes<A>;
    in_parallel((portion.part_end - portion.part) * panels_each, Parts(values_per_thread, values).count,
                [&](int64_t from, int64_t to) {
                  for (int64_t i = from; i < to; ++i) {
                    const int64_t part = portion.part + i / panels_each, panel = portion.panel + i % panels_each;
                    pack_panels(right.at(depths.begin(part), 0), steps(part), columns, panel, panel + 1,
                                place(portion, part, panel));
                  }
                });
  }

  void multiply_rows(const Portion& portion, int64_t begin, int64_t end) const {
    const Scratch<A> tiles(in_place ? 0 : row_block * depths.largest() + lanes<A>);
    for (int64_t m = begin; m < end; m += row_block) {
      const int64_t m_end = std::min(m + row_block, end);
      for (int64_t part = portion.part; part < portion.part_end; ++part) {
        const Matrix<A> here = left.at(m, depths.begin(part));
        A* sums = portion.panel == 0 && row_sums ? row_sums + m : nullptr;
        if (!in_place) pack_tiles(here, m_end - m, steps(part), tiles.get(), sums, add || part > 0);
        const Rows<A> block = in_place ? Rows<A>(here) : Rows<A>(tiles.get(), steps(part));
        for (int64_t panel = portion.panel; panel < portion.panel_end; ++panel) {
          const int64_t n = panels.begin(panel), n_end = std::min(panels.begin(panel + 1), columns);
          multiply_panel(block, m_end - m, steps(part), place(portion, part, panel), n_end - n, add || part > 0,
                         out + m * out_stride + n, out_stride);
          if (part + 1 == depths.count) finish(m, m_end, n, n_end);
        }
      }
    }
  }
};

// out = left right, (M, N) = (M, K) (K, N). As soon as rows [m0, m1) of columns [n0, n1) are complete, and while they
// are in the caches, the thread that completed them calls finish(m0, m1, n0, n1). row_sums: (M), the sums of the left
// factor's rows, where they are asked for. add: the product, and these sums, are added to what is there.
template <class A, class Finish>
void product(Matrix<A> left, Matrix<A> right, int64_t rows, int64_t columns, int64_t depth, A* out, int64_t out_stride,
             const Finish& finish, A* row_sums = nullptr, bool add = false) {
  const Product<A, Finish> whole{left, right, rows, columns, depth, out, out_stride, row_sums, add, finish};
  if (whole.has_few_rows())
    whole.by_few_rows();
  else if (rows * (whole.in_place ? whole.depths.largest() : depth) <= shared_values && columns >= rows / 2)
    whole.by_columns();
  else
    whole.by_rows();
}

// The sums of a matrix's rows, (M) of (M, K), where no product with it is asked for; or added to what is there.
template <class A>
void sum_rows(Matrix<A> matrix, int64_t rows, int64_t depth, A* sums, bool add = false) {
  const Parts depths(depth, depth_block);
  const int64_t tiles = (rows + tile_rows - 1) / tile_rows;
  const int64_t per_thread = Parts(values_per_thread, std::max<int64_t>(tile_rows * depth, 1)).count;
  in_parallel(tiles, per_thread, [&](int64_t from, int64_t to) {
    Scratch<A> tile(tile_rows * depths.largest() + lanes<A>);
    for (int64_t m = from * tile_rows; m < std::min(to * tile_rows, rows); m += tile_rows)
      for (int64_t part = 0; part < depths.count; ++part) {
        const int64_t k = depths.begin(part), steps = depths.begin(part + 1) - k;
        pack_tiles(matrix.at(m, k), std::min(tile_rows, rows - m), steps, tile.get(), sums + m, add || part > 0);
      }
  });
}

}  // namespace nacre
