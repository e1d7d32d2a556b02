// Tiles of columns: what softmax and cross-entropy do to slices which are no rows, with the columns in the lanes of
// vectors. A tile stays in cache between the passes over it, and the next one is copied from memory meanwhile.
//
// x: (N, D, M): N outer positions, D values along the dimension, M inner positions; N M columns. A tile: (D, W).
#pragma once

#include "nacre/core/cpu_memory.h"
#include "nacre/core/cpu_primitives.h"
#include "nacre/core/cpu_softmax.h"
#include "nacre/core/cpu_streams.h"

#include <algorithm>
#include <cstdint>
#include <utility>

namespace nacre {

// Columns that are worked on together: the place of the first one's first value in the tensor, its index, their number.
struct Block {
  int64_t start, column, count;
};

// How a tensor is cut into tiles: parts of one outer position, or several whole ones where those have few columns.
struct Tiles {
  int64_t outer, size, inner;
  int64_t positions, width, pitch, count;  // rows of a tile lie `pitch` values apart: whole vectors, no power of two

  explicit Tiles(const Slices& slices) : outer(slices.outer), size(slices.size), inner(slices.inner) {
    // the rows are runs of memory as long as can be while a tile stays in the nearest caches
    const int64_t fitting = std::clamp<int64_t>(8192 / std::max<int64_t>(size, 1) / 64 * 64, 64, 1024);
    positions = 1;
    if (inner < 32)
      positions = std::clamp<int64_t>(fitting / std::max<int64_t>(inner, 1), 1, std::max<int64_t>(outer, 1));
    width = inner < 32 ? positions * inner : std::min(inner, fitting);
    pitch = (width + 15) / 16 * 16;
    pitch += pitch % 128 == 0 ? 16 : 0;
    count = inner == 0 ? 0 : within() ? outer * per_position() : (outer + positions - 1) / positions;
  }

  bool within() const { return inner >= 32; }
  int64_t per_position() const { return (inner + width - 1) / width; }
  int64_t values() const { return size * pitch; }
  int64_t per_thread() const { return std::max<int64_t>(values_per_thread / std::max<int64_t>(size * width, 1), 1); }

  Block block(int64_t tile) const {
    if (within()) {
      const int64_t n = tile / per_position(), first = tile % per_position() * width;
      return {n * size * inner + first, n * inner + first, std::min(width, inner - first)};
    }
    const int64_t n = tile * positions;
    return {n * size * inner, n * inner, std::min(positions, outer - n) * inner};
  }
};

// Copies a thread's tiles of a tensor one after the other: each while the one before it is computed with.
template <class T>
class TileReader {
 public:
  using A = Accumulator<T>;
  static int64_t scratch_values(const Tiles& tiles) { return 2 * tiles.values(); }

  // values: (N, D, M); scratch: (2, D, W)
  TileReader(const T* values, const Tiles& tiles, int64_t begin, int64_t end, A* scratch)
      : tiles_(tiles), values_(values), next_(begin), end_(end), front_(scratch), back_(scratch + tiles.values()) {
    std::fill(scratch, scratch + scratch_values(tiles), A(0));  // the lanes beside the last column as well
    start();
  }

  // The next tile. Meanwhile step() fetches the one after it, and the lines of `result` (D, M) for writing.
  A* take(const T* result) {
    finish();
    std::swap(front_, back_);
    ++next_;
    start();
    result_ = result;
    return front_;
  }

  // Copies one vector. The row after it is on its way by then, which the processor would not guess.
  void step() {
    if (row_ == tiles_.size) return;
    const int64_t rest = count_ - column_;
    __builtin_prefetch(from_ + column_ + tiles_.inner);
    if (result_) __builtin_prefetch(result_ + row_ * tiles_.inner + column_, 1);
    if (rest >= lanes<A>)
      store(to_ + column_, load(from_ + column_, Whole{}), Whole{});
    else
      store(to_ + column_, load(from_ + column_, Part{rest}), Whole{});
    column_ += lanes<A>;
    if (column_ < count_) return;
    column_ = 0;
    ++row_;
    from_ += tiles_.inner;
    to_ += tiles_.pitch;
  }

 private:
  void start() {
    row_ = tiles_.size;
    if (next_ >= end_) return;
    const Block block = tiles_.block(next_);
    from_ = values_ + block.start;
    to_ = back_;
    count_ = block.count;
    column_ = 0;
    if (tiles_.within()) row_ = 0;
  }

  void finish() {
    while (row_ < tiles_.size) step();
    if (!tiles_.within() && next_ < end_) copy_positions();
  }

  void copy_positions() {
    const int64_t inner = tiles_.inner, size = tiles_.size, positions = count_ / inner;
    for (int64_t n = 0; n < positions; ++n)
      for (int64_t d = 0; d < size; ++d) {
        const T* from = from_ + (n * size + d) * inner;
        A* to = to_ + d * tiles_.pitch + n * inner;
        if (inner == 1)
          *to = static_cast<A>(*from);
        else
          over_row<A>(inner, [&](int64_t i, auto which) { store(to + i, load(from + i, which), which); });
      }
  }

  const Tiles tiles_;
  const T* values_;
  int64_t next_, end_;
  A *front_, *back_;
  const T *from_ = nullptr, *result_ = nullptr;
  A* to_ = nullptr;
  int64_t row_, column_ = 0, count_ = 0;
};

// Writes what value(d, i, values, lanes) makes of a tile's values to its place in the tensor. to: (N, D, M)
template <class T, class A = Accumulator<T>, class Value>
inline void write_tile(A* tile, const Tiles& tiles, const Block& block, bool stream, T* to, Value value) {
  const int64_t inner = tiles.inner, size = tiles.size;
  if (tiles.within()) {
    for (int64_t d = 0; d < size; ++d)
      over_row<A>(block.count, [&](int64_t i, auto which) {
        const auto values = value(d, i, load(tile + d * tiles.pitch + i, which), which);
        put(to + block.start + d * inner + i, values, which, stream);
      });
    return;
  }
  for (int64_t d = 0; d < size; ++d)
    for (int64_t i = 0; i < block.count; i += lanes<A>) {
      A* at = tile + d * tiles.pitch + i;
      store(at, value(d, i, load(at, Whole{}), Whole{}), Whole{});
    }
  for (int64_t n = 0; n < block.count / inner; ++n)
    for (int64_t d = 0; d < size; ++d) {
      const A* from = tile + d * tiles.pitch + n * inner;
      T* run = to + block.start + (n * size + d) * inner;
      if (inner == 1)
        *run = static_cast<T>(*from);
      else
        over_row<A>(inner, [&](int64_t i, auto which) { store(run + i, load(from + i, which), which); });
    }
}

// Calls body(begin, end) for parts of the tiles, side by side.
template <class Body>
inline void over_tiles(const Tiles& tiles, const Body& body) {
  in_parallel(tiles.count, tiles.per_thread(), [&](int64_t begin, int64_t end) {
    body(begin, end);
    finish_past_caches();
  });
}

// Whether tiles written to `to` go past the cache: their rows are many, and all are aligned.
template <class T>
inline bool stream_tiles(const Tiles& tiles, const T* to) {
  return tiles.within() && streams_rows(to, tiles.outer * tiles.size, tiles.inner);
}

}  // namespace nacre
