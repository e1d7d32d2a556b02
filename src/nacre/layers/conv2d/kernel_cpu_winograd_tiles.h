// The tiles of Winograd's algorithm (kernel_cpu_winograd.h), and the transform of the inputs under them.
#pragma once

#include "nacre/core/cpu_matmul.h"
#include "nacre/layers/conv2d/kernel_cpu_planes.h"

namespace nacre::conv2d {

constexpr int64_t tile_places = 16;
constexpr int64_t group_tiles = 64;

// A convolution (N, C, H, W) -> (N, E, P, Q) with `top` rows and `left` columns of zeros before the input.
struct Tiling {
  int64_t samples, channels, kernels, height, width, rows, columns, top, left;

  int64_t down() const { return (rows + 1) / 2; }
  int64_t across() const { return (columns + 1) / 2; }
  int64_t tiles() const { return samples * down() * across(); }
};

// Tiles of one row: `count` from column `column` on, the first of them number `at` of its group.
struct Run {
  int64_t sample, row, column, count, at;
};

inline std::vector<Run> runs(const Tiling& tiling, int64_t begin, int64_t end) {
  std::vector<Run> found;
  for (int64_t tile = begin; tile < end; tile += found.back().count) {
    const int64_t line = tile / tiling.across(), column = tile % tiling.across();
    found.push_back({line / tiling.down(), line % tiling.down(), column, std::min(tiling.across() - column, end - tile),
                     tile - begin});
  }
  return found;
}

// B' d B of the tiles of a vector. rows: of the input, `step` apart; to: (places, `to_step`)
template <class A>
inline void transform_inputs(const A* rows, int64_t step, A* to, int64_t to_step) {
  Vector<A> d[4][4];
  for (int64_t r = 0; r < 4; ++r) {
    const A* from = rows + r * step;
    const auto even = [](int64_t lane) { return 2 * lane; };
    const auto odd = [](int64_t lane) { return 2 * lane + 1; };
    const Vector<A> one = load(from, Whole{}), two = load(from + lanes<A>, Whole{});
    const Vector<A> three = load(from + 2, Whole{}), four = load(from + 2 + lanes<A>, Whole{});
    const Vector<A> v[4] = {picked<A>(one, two, even), picked<A>(one, two, odd), picked<A>(three, four, even),
                            picked<A>(three, four, odd)};
    d[r][0] = v[0] - v[2], d[r][1] = v[1] + v[2], d[r][2] = v[2] - v[1], d[r][3] = v[1] - v[3];
  }
  for (int64_t c = 0; c < 4; ++c, to += to_step) {
    store(to, d[0][c] - d[2][c], Whole{});
    store(to + 4 * to_step, d[1][c] + d[2][c], Whole{});
    store(to + 8 * to_step, d[2][c] - d[1][c], Whole{});
    store(to + 12 * to_step, d[1][c] - d[3][c], Whole{});
  }
}

// The inputs of a group of tiles: for each place a matrix (C, tiles), as panels of a right factor or as it is.
template <class A>
class TileInputs {
 public:
  explicit TileInputs(const Tiling& tiling)
      : tiling_(tiling), row_(2 * std::min(tiling.across(), group_tiles) + 4 * lanes<A>),
        place_(tiling.channels * group_tiles + cache_line) {}

  int64_t values() const { return tile_places * place_; }
  int64_t place_step() const { return place_; }
  int64_t scratch_values() const { return 4 * row_ + tile_places * step_; }
  const A* at(const A* panels, int64_t place) const { return panels + place * place_; }

  // x: (N, C, H, W)
  void operator()(const std::vector<Run>& runs, const A* x, A* scratch, A* panels, bool in_panels = true) const {
    A* transformed = scratch + 4 * row_;
    const Panels<A> cut(in_panels ? runs.back().at + runs.back().count : 0);
    for (int64_t c = 0; c < tiling_.channels; ++c) {
      for (const Run& run : runs) {
        copy(run, x + (run.sample * tiling_.channels + c) * tiling_.height * tiling_.width, scratch);
        for (int64_t i = 0; i < run.count; i += lanes<A>)
          transform_inputs(scratch + 2 * i, row_, transformed + run.at + i, step_);
      }
      for (int64_t place = 0; place < tile_places; ++place) {
        const A* from = transformed + place * step_;
        if (!in_panels) std::copy_n(from, group_tiles, panels + place * place_ + c * group_tiles);
        for (int64_t panel = 0; panel < cut.count; ++panel) {
          A* to = panels + place * place_ + cut.begin(panel) * tiling_.channels + c * cut.size(panel);
          for (int64_t i = 0; i < cut.size(panel); i += lanes<A>)
            store(to + i, load(from + cut.begin(panel) + i, Whole{}), Whole{});
        }
      }
    }
  }

 private:
  // Four rows of the input under a run; zeros where there is none.
  void copy(const Run& run, const A* plane, A* rows) const {
    const int64_t first = 2 * run.column - tiling_.left, size = 2 * run.count + 2;
    const int64_t from = std::max<int64_t>(-first, 0), until = std::min(tiling_.width - first, size);
    for (int64_t r = 0; r < 4; ++r, rows += row_) {
      const int64_t row = 2 * run.row + r - tiling_.top;
      const bool within = row >= 0 && row < tiling_.height && until > from;
      for (int64_t i = 0; i < size; i += lanes<A>) store(rows + i, Vector<A>{}, Whole{});
      const A* values = plane + row * tiling_.width + first;
      if (within)
        over_row<A>(until - from, [&](int64_t i, auto which) {
          store(rows + from + i, load(values + from + i, which), which);
        });
    }
  }

  static constexpr int64_t step_ = group_tiles + cache_line;
  const Tiling& tiling_;
  int64_t row_, place_;
};

}  // namespace nacre::conv2d
