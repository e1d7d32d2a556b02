// Writing past the caches: what is larger than they are is not read into them only to be overwritten.
#pragma once

#include "nacre/core/cpu_primitives.h"

#include <algorithm>
#include <cstdint>
#include <cstring>

namespace nacre {

// What is larger does not stay in a processor's caches from one operation to the next.
constexpr int64_t bytes_in_caches = int64_t(1) << 23;

// Whether it is worth it for `count` values; `to` is then aligned to a vector.
template <class T>
inline bool streams(const T* to, int64_t count) {
  const bool aligned = reinterpret_cast<uintptr_t>(to) % vector_bytes == 0;
  return aligned && count * static_cast<int64_t>(sizeof(T)) >= bytes_in_caches;
}

// The same for rows that are stored one by one: each has to begin where a vector does.
template <class T>
inline bool streams_rows(const T* to, int64_t rows, int64_t size) {
  return size % lanes<Accumulator<T>> == 0 && streams(to, rows * size);
}

// Stores whole vectors past the caches, to an address aligned to what is stored, and the rest as ever.
template <class T, class Lanes>
inline void store_past_caches(T* to, Vector<Accumulator<T>> values, Lanes which) {
  const Stored<T> stored = narrow<T>(values);
#if defined(__AVX2__)
  if constexpr (std::is_same_v<Lanes, Whole>) {
#if defined(__AVX512F__)
    if constexpr (sizeof stored == 64) return _mm512_stream_si512(reinterpret_cast<__m512i*>(to), (__m512i)stored);
#endif
    if constexpr (sizeof stored == 32) return _mm256_stream_si256(reinterpret_cast<__m256i*>(to), (__m256i)stored);
    if constexpr (sizeof stored == 16) return _mm_stream_si128(reinterpret_cast<__m128i*>(to), (__m128i)stored);
  }
#endif
  write<T>(to, stored, which);
}

// Stores past the caches where asked, else as ever.
template <class T, class Lanes>
inline void put(T* to, Vector<Accumulator<T>> values, Lanes which, bool past_caches) {
  past_caches ? store_past_caches(to, values, which) : store(to, values, which);
}

// Writes zeros past the caches.
inline void zero_past_caches(void* to, size_t bytes) {
#if defined(__SSE2__)
  char* at = static_cast<char*>(to);
  const size_t before = std::min(bytes, -reinterpret_cast<uintptr_t>(to) % 64), lines = (bytes - before) / 64;
  std::memset(at, 0, before);
  at += before;
  for (size_t line = 0; line < lines; ++line, at += 64)
    for (int64_t part = 0; part < 64; part += 16)
      _mm_stream_si128(reinterpret_cast<__m128i*>(at + part), _mm_setzero_si128());
  std::memset(at, 0, bytes - before - 64 * lines);
#else
  std::memset(to, 0, bytes);
#endif
}

// To be called by each thread after its last store: other threads may then read what it wrote.
inline void finish_past_caches() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

}  // namespace nacre
