// Whole matrix products, shared among threads: how C = A B is cut so that what is packed stays in the caches.
//
// M rows and N columns of C, K the depth. The sizes alone decide how, so that an element of C is the same sum whatever
// the threads.
#pragma once

#include <algorithm>

#include "nacre/core/cpu_few_rows.h"
#include "nacre/core/cpu_matmul.h"
#include "nacre/core/cpu_memory.h"
#include "nacre/core/cpu_primitives.h"

namespace nacre {

constexpr int64_t row_block = 32 * tile_rows;          // with a block of the depth: what fits the second cache
constexpr int64_t shared_values = int64_t{1} << 17;    // a left factor so small that the second cache holds it
constexpr int64_t packed_bytes = int64_t{8} << 20;     // of the right factor at a time
constexpr int64_t wide_values = 1 << 18;               // of a left factor that every thread packs as a whole

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
      const Scratch<A> strips(in_place ? 0 : in_strips(rows) * depth);
      if (!in_place) pack_strips(left, rows, depth, strips.get(), first == 0 ? row_sums : nullptr, add);
      const Parts groups(own.count, Parts(shared_values, std::max<int64_t>(rows * panel_vectors * lanes<A>, 1)).count);
      for (int64_t group = 0; group < groups.count; ++group)
        for (int64_t part = 0; part < depths.count; ++part) {
          const int64_t k = depths.begin(part), steps = depths.begin(part + 1) - k;
          const Block block{left.at(0, k), strips.get() + k * strip_rows, strip_rows * depth};
          for (int64_t panel = groups.begin(group); panel < groups.begin(group + 1); ++panel) {
            const int64_t n = first + own.begin(panel), n_end = std::min(first + own.begin(panel + 1), last);
            pack_panels(right.at(k, n), steps, n_end - n, packed.get());
            multiply_block(block, rows, steps, packed.get(), n_end - n, add || part > 0, out + n);
            if (part + 1 == depths.count) finish(0, rows, n, n_end);
          }
        }
    });
  }

  // Few rows of long factors that both lie along the depth, as a batch times a layer's weights: C' = B' A' packs the
  // smaller factor, which every thread does for itself, and reads the larger where it lies. What is saved is packing,
  // columns * depth values of it; what it costs is rows * depth more in each thread, and turning the result round.
  bool is_wide() const {
    return left.column_stride == 1 && right.row_stride == 1 && !row_sums && rows * depth <= wide_values &&
           depth * (columns - 2 * rows) > 4 * rows * columns;
  }

  void by_transposing() const {
    const int64_t per_thread = Parts(multiply_adds_per_thread, std::max<int64_t>(tile_rows * rows * depth, 1)).count;
    in_parallel(in_tiles(columns), per_thread, [&](int64_t from, int64_t to) {
      const Panels<A> own(rows);
      const Scratch<A> packed(own.begin(own.count) * depth), block(row_block * rows);
      for (int64_t part = 0; part < depths.count; ++part)
        pack_panels(left.transposed().at(depths.begin(part), 0), steps(part), rows,
                    packed.get() + own.begin(own.count) * depths.begin(part));
      for (int64_t n = from * tile_rows, n_end; n < std::min(to * tile_rows, columns); n = n_end) {
        n_end = std::min({n + row_block, to * tile_rows, columns});
        for (int64_t part = 0; part < depths.count; ++part)
          multiply(Rows<A>(right.transposed().at(n, depths.begin(part))), n_end - n, steps(part),
                   packed.get() + own.begin(own.count) * depths.begin(part), rows, part > 0, block.get(), rows);
        put_transposed(Matrix<A>{block.get(), 1, rows}, rows, n_end - n, add, out + n, out_stride);
        finish(0, rows, n, n_end);
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
        in_parallel(in_tiles(rows), per_thread, [&](int64_t from, int64_t to) {
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

  // Rows of the left factor: where they lie, or, where they are packed, their first strip and the step to the next.
  struct Block {
    Matrix<A> where;
    const A* strips;
    int64_t strip_stride;
  };

  void multiply_block(const Block& block, int64_t rows, int64_t depth, const A* panel, int64_t columns, bool add, A* to,
                      Ahead* ahead = nullptr) const {
    if (in_place) return multiply_panel(Rows<A>(block.where), rows, depth, panel, columns, add, to, out_stride);
    const A* strip = block.strips;
    for (int64_t m = 0; m < rows; m += strip_rows, strip += block.strip_stride)
      multiply_panel(Rows<A>::of_strip(strip), std::min(strip_rows, rows - m), depth, panel, columns, add,
                     to + m * out_stride, out_stride, ahead);
  }

  // What multiply_rows packs after a block and a part of the depth, where it lies in rows which no processor foresees.
  Ahead packed_next(const Portion& portion, int64_t m, int64_t part, int64_t end) const {
    const bool same_rows = part + 1 < portion.part_end;
    const int64_t row = same_rows ? m : m + row_block, next = same_rows ? part + 1 : portion.part;
    if (in_place || left.row_stride != 1 || row >= end) return {nullptr, 0};
    return {left.at(row, depths.begin(next)).values, std::min(row_block, end - row) * int64_t{sizeof(A)},
            left.column_stride * int64_t{sizeof(A)}};
  }

  static int64_t in_tiles(int64_t rows) { return (rows + tile_rows - 1) / tile_rows; }
  static int64_t in_strips(int64_t rows) { return (rows + strip_rows - 1) / strip_rows * strip_rows; }
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
    const Scratch<A> strips(in_place ? 0 : row_block * depths.largest());
    for (int64_t m = begin; m < end; m += row_block) {
      const int64_t m_end = std::min(m + row_block, end);
      for (int64_t part = portion.part; part < portion.part_end; ++part) {
        const Matrix<A> here = left.at(m, depths.begin(part));
        A* sums = portion.panel == 0 && row_sums ? row_sums + m : nullptr;
        if (!in_place) pack_strips(here, m_end - m, steps(part), strips.get(), sums, add || part > 0);
        const Block block{here, strips.get(), strip_rows * steps(part)};
        Ahead next = packed_next(portion, m, part, end);
        for (int64_t panel = portion.panel; panel < portion.panel_end; ++panel) {
          const int64_t n = panels.begin(panel), n_end = std::min(panels.begin(panel + 1), columns);
          multiply_block(block, m_end - m, steps(part), place(portion, part, panel), n_end - n, add || part > 0,
                         out + m * out_stride + n, &next);
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
  else if (whole.is_wide())
    whole.by_transposing();
  else if (rows * (whole.in_place ? whole.depths.largest() : depth) <= shared_values && columns >= rows / 2)
    whole.by_columns();
  else
    whole.by_rows();
}

// The sums of a matrix's rows, (M) of (M, K), where no product with it is asked for; or added to what is there.
template <class A>
void sum_rows(Matrix<A> matrix, int64_t rows, int64_t depth, A* sums, bool add = false) {
  const Parts depths(depth, depth_block);
  const int64_t strips = (rows + strip_rows - 1) / strip_rows;
  const int64_t per_thread = Parts(values_per_thread, std::max<int64_t>(strip_rows * depth, 1)).count;
  in_parallel(strips, per_thread, [&](int64_t from, int64_t to) {
    const Scratch<A> strip(strip_rows * depths.largest());
    for (int64_t m = from * strip_rows; m < std::min(to * strip_rows, rows); m += strip_rows)
      for (int64_t part = 0; part < depths.count; ++part) {
        const int64_t k = depths.begin(part), steps = depths.begin(part + 1) - k;
        pack_strips(matrix.at(m, k), std::min(strip_rows, rows - m), steps, strip.get(), sums + m, add || part > 0);
      }
  });
}

}  // namespace nacre
