// What the CPU kernels share: vectors whose loads and stores convert, sums over rows, and checked access to tensors.
//
// Every kernel file is compiled once for each instruction set into a library of its own (CMakeLists.txt), of which
// nacre/core/native.py loads the best that the machine runs. So a kernel is written once, in vectors of
// `lanes<A>` values, and nothing in it asks which processor it is on.
//
// Kernels compute in an accumulator type A: double for double, float for float, Half and BFloat16.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <optional>
#include <type_traits>
#include <utility>

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace nacre {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// ---- vectors

#if defined(__AVX512F__)
constexpr int64_t vector_bytes = 64;
#elif defined(__AVX2__)
constexpr int64_t vector_bytes = 32;
#else
constexpr int64_t vector_bytes = 16;
#endif

template <class T>
using Accumulator = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <class Element, int64_t bytes>
struct VectorOf {
  typedef Element type __attribute__((vector_size(bytes)));
};

template <class A>
using Vector = typename VectorOf<A, vector_bytes>::type;

template <class A>
constexpr int64_t lanes = vector_bytes / static_cast<int64_t>(sizeof(A));

// As many values of type T as a vector of its accumulator has lanes, the way they lie in memory.
template <class T>
using Stored = typename VectorOf<std::conditional_t<sizeof(T) == 2, uint16_t, T>,
                                 lanes<Accumulator<T>> * static_cast<int64_t>(sizeof(T))>::type;

// Which lanes of a vector belong to a row: all, or the first `count`; the others load as zero and are not stored.
struct Whole {};
struct Part {
  int64_t count;
};

template <class T>
inline Stored<T> read(const T* from, Whole) {
  Stored<T> values;
  std::memcpy(&values, from, sizeof values);
  return values;
}

template <class T>
inline void write(T* to, Stored<T> values, Whole) {
  std::memcpy(to, &values, sizeof values);
}

#if defined(__AVX512F__)
template <class T>
inline Stored<T> read(const T* from, Part part) {
  const uint32_t mask = (1u << part.count) - 1;
  if constexpr (sizeof(T) == 2) return (Stored<T>)_mm256_maskz_loadu_epi16(static_cast<__mmask16>(mask), from);
  if constexpr (sizeof(T) == 4) return (Stored<T>)_mm512_maskz_loadu_epi32(static_cast<__mmask16>(mask), from);
  if constexpr (sizeof(T) == 8) return (Stored<T>)_mm512_maskz_loadu_epi64(static_cast<__mmask8>(mask), from);
}

template <class T>
inline void write(T* to, Stored<T> values, Part part) {
  const uint32_t mask = (1u << part.count) - 1;
  if constexpr (sizeof(T) == 2) _mm256_mask_storeu_epi16(to, static_cast<__mmask16>(mask), (__m256i)values);
  if constexpr (sizeof(T) == 4) _mm512_mask_storeu_epi32(to, static_cast<__mmask16>(mask), (__m512i)values);
  if constexpr (sizeof(T) == 8) _mm512_mask_storeu_epi64(to, static_cast<__mmask8>(mask), (__m512i)values);
}
#else
template <class T>
inline Stored<T> read(const T* from, Part part) {
  Stored<T> values = {};
  const int64_t count = std::min<int64_t>(part.count, sizeof(values) / sizeof(T));  // a part is no more: so GCC knows
  for (int64_t lane = 0; lane < count; ++lane)
    std::memcpy(reinterpret_cast<T*>(&values) + lane, from + lane, sizeof(T));
  return values;
}

template <class T>
inline void write(T* to, Stored<T> values, Part part) {
  for (int64_t lane = 0; lane < part.count; ++lane)
    std::memcpy(to + lane, reinterpret_cast<T*>(&values) + lane, sizeof(T));
}
#endif

// ---- conversion between what is stored and what is computed with

template <class T>
inline Vector<Accumulator<T>> widen(Stored<T> values) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    return (Vector<float>)(__builtin_convertvector(values, Vector<uint32_t>) << 16);
  } else if constexpr (std::is_same_v<T, Half>) {
#if defined(__AVX512F__)
    return (Vector<float>)_mm512_cvtph_ps((__m256i)values);
#elif defined(__AVX2__)
    return (Vector<float>)_mm256_cvtph_ps((__m128i)values);
#else
    Vector<float> wide;
    for (int64_t lane = 0; lane < lanes<float>; ++lane) wide[lane] = Half(values[lane], Half::from_bits());
    return wide;
#endif
  } else {
    return values;
  }
}

// Rounds to the nearest value, ties to even, as torch does.
template <class T>
inline Stored<T> narrow(Vector<Accumulator<T>> values) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    const auto bits = (Vector<uint32_t>)values;
    const auto rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const auto not_a_number = Vector<uint32_t>{} + 0x7fc0u;
    return __builtin_convertvector(values == values ? rounded : not_a_number, Stored<T>);
  } else if constexpr (std::is_same_v<T, Half>) {
#if defined(__AVX512F__)
    return (Stored<T>)_mm512_cvtps_ph((__m512)values, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(__AVX2__)
    return (Stored<T>)_mm256_cvtps_ph((__m256)values, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
    Stored<T> stored;
    for (int64_t lane = 0; lane < lanes<float>; ++lane) stored[lane] = Half(values[lane]).x;
    return stored;
#endif
  } else {
    return values;
  }
}

template <class T, class Lanes>
inline Vector<Accumulator<T>> load(const T* from, Lanes which) {
  return widen<T>(read(from, which));
}

template <class T, class Lanes>
inline void store(T* to, Vector<Accumulator<T>> values, Lanes which) {
  write<T>(to, narrow<T>(values), which);
}

// A vector that is used several times and loaded once: of its own accord the compiler loads it again for each product.
template <class V>
inline V in_register(V values) {
#if defined(__AVX512F__)
  asm("" : "+v"(values));
#elif defined(__x86_64__)
  asm("" : "+x"(values));
#elif defined(__aarch64__)
  asm("" : "+w"(values));
#endif
  return values;
}

// ---- rows

// Calls body(i, lanes) for each vector of a row of `count` values, i being the index of its first value.
template <class A, class Body>
inline void over_row(int64_t count, Body body) {
  int64_t i = 0;
  for (; i + lanes<A> <= count; i += lanes<A>) body(i, Whole{});
  if (i < count) body(i, Part{count - i});
}

template <class A>
inline Vector<A> keep(Vector<A> values, Whole, A = 0) {
  return values;
}

// Zero, or another given value, in the lanes which are no part of the row.
template <class A>
inline Vector<A> keep(Vector<A> values, Part part, A otherwise = 0) {
  Vector<A> index;
  for (int64_t lane = 0; lane < lanes<A>; ++lane) index[lane] = static_cast<A>(lane);
  return index < static_cast<A>(part.count) ? values : Vector<A>{} + otherwise;
}

// The sum of all lanes: the upper half is added to the lower one until one lane is left.
template <class A, int64_t bytes = vector_bytes>
inline A total(typename VectorOf<A, bytes>::type values) {
  if constexpr (bytes == sizeof(A)) {
    return values[0];
  } else {
    typename VectorOf<A, bytes / 2>::type halves[2];
    std::memcpy(&halves, &values, sizeof values);
    return total<A, bytes / 2>(halves[0] + halves[1]);
  }
}

// The sums over a row of the N vectors that terms(i, lanes) gives. An addition waits for the one before it, so four
// run side by side; they are put away after a run of them, since rounding errors grow with the length of a plain sum.
template <class A, size_t N, class Terms>
inline std::array<A, N> sums_over_row(int64_t count, Terms terms) {
  constexpr int64_t step = 4 * lanes<A>, run = 256 * step;
  Vector<A> sums[4][N] = {}, earlier[N] = {};
  const auto add_up = [&](size_t n) { return (sums[0][n] + sums[1][n]) + (sums[2][n] + sums[3][n]); };
  int64_t i = 0;
  for (int64_t end = run;; end += run) {
    for (const int64_t last = std::min(end, count); i + step <= last; i += step)
      for (int64_t side = 0; side < 4; ++side) {
        const std::array<Vector<A>, N> values = terms(i + side * lanes<A>, Whole{});
        for (size_t n = 0; n < N; ++n) sums[side][n] += values[n];
      }
    if (count - i < step) break;
    for (size_t n = 0; n < N; ++n) {
      earlier[n] += add_up(n);
      for (auto& side : sums) side[n] = Vector<A>{};
    }
  }
  over_row<A>(count - i, [&](int64_t rest, auto which) {
    const std::array<Vector<A>, N> values = terms(i + rest, which);
    for (size_t n = 0; n < N; ++n) sums[0][n] += keep<A>(values[n], which);
  });
  std::array<A, N> totals;
  for (size_t n = 0; n < N; ++n) totals[n] = total<A>(earlier[n] + add_up(n));
  return totals;
}

// ---- threads

// Below this many values, starting a thread costs more than it saves.
constexpr int64_t values_per_thread = 32768;

// Calls body(begin, end) for parts of 0 to count, side by side where a thread has at least `per_thread` of them.
template <class Body>
inline void in_parallel(int64_t count, int64_t per_thread, const Body& body) {
  torch::stable::parallel_for(0, count, per_thread, body);
}

// ---- sums over rows: the same bits for any number of threads

// Consecutive rows whose values are added apart, before the blocks are added in pairs. The shape alone decides them,
// and they are short: rounding errors grow with the length of a plain sum.
struct RowBlocks {
  int64_t rows, size, count, per_thread;

  RowBlocks(int64_t rows, int64_t features) : rows(rows) {
    size = std::clamp<int64_t>((rows + 63) / 64, 8, 64);
    count = (rows + size - 1) / size;
    per_thread = std::max<int64_t>(values_per_thread / std::max<int64_t>(size * features, 1), 1);
  }

  int64_t begin(int64_t block) const { return block * size; }
  int64_t end(int64_t block) const { return std::min(rows, (block + 1) * size); }
};

// Adds block to block, then pair to pair, and so on. sums: (B, D), one row for each of B blocks, which serves as
// scratch; result: (D)
template <class A>
inline void add_blocks(A* sums, A* result, int64_t blocks, int64_t features) {
  for (int64_t distance = 1; distance < blocks; distance *= 2)
    for (int64_t block = 0; block + distance < blocks; block += 2 * distance) {
      A* to = sums + block * features;
      const A* from = to + distance * features;
      over_row<A>(features, [&](int64_t i, auto which) {
        store(to + i, load(to + i, which) + load(from + i, which), which);
      });
    }
  if (blocks > 0)
    std::copy(sums, sums + features, result);
  else
    std::fill(result, result + features, A(0));
}

// ---- tensors

// Calls body with a value of the C++ type of a floating-point dtype.
template <class Body>
inline auto with_type(ScalarType dtype, Body body) {
  switch (dtype) {
    case ScalarType::Float: return body(float());
    case ScalarType::Double: return body(double());
    case ScalarType::BFloat16: return body(BFloat16());
    case ScalarType::Half: return body(Half());
    default: STD_TORCH_CHECK(false, "this kernel serves float32, float64, bfloat16 and float16");
  }
}

inline ScalarType accumulator_dtype(ScalarType dtype) {
  return dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// The tensor itself where it already is contiguous and of the dtype, else a copy.
inline Tensor contiguous_as(const Tensor& tensor, ScalarType dtype) {
  STD_TORCH_CHECK(tensor.is_cpu(), "a CPU kernel takes tensors on the CPU");
  const Tensor converted = tensor.scalar_type() == dtype ? tensor : torch::stable::to(tensor, dtype);
  return converted.is_contiguous() ? converted : torch::stable::contiguous(converted);
}

// The values of an optional tensor, or null.
template <class A>
inline const A* values(const std::optional<Tensor>& tensor) {
  return tensor ? static_cast<const A*>(tensor->const_data_ptr()) : nullptr;
}

}  // namespace nacre
