// Counter-based random numbers: the words of random.py, many blocks of four at a time.
//
// Philox4x32-10 multiplies words of 32 bits into products of 64, so a word stands in the lower half of a lane of 64
// bits; what the upper half holds does not matter.
#pragma once

#include "nacre/core/cpu_primitives.h"

#include <cmath>

namespace nacre {

using Words = Vector<uint64_t>;

// ---- what vectors of words need of the processor

// The products of the lower halves with a multiplier.
inline Words product(Words words, uint64_t multiplier) {
#if defined(__AVX512F__)
  return (Words)_mm512_mul_epu32((__m512i)words, (__m512i)(Words{} + multiplier));
#elif defined(__AVX2__)
  return (Words)_mm256_mul_epu32((__m256i)words, (__m256i)(Words{} + multiplier));
#elif defined(__SSE2__)
  return (Words)_mm_mul_epu32((__m128i)words, (__m128i)(Words{} + multiplier));
#else
  return (words & 0xffffffffu) * multiplier;
#endif
}

// The even lanes of two vectors by turns: a0 b0 a2 b2 ...
inline Words even_lanes(Words a, Words b) {
#if defined(__AVX512F__)
  return (Words)_mm512_maskz_unpacklo_epi64(0xff, (__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
  return (Words)_mm256_unpacklo_epi64((__m256i)a, (__m256i)b);
#elif defined(__SSE2__)
  return (Words)_mm_unpacklo_epi64((__m128i)a, (__m128i)b);
#else
  for (int64_t lane = 1; lane < lanes<uint64_t>; lane += 2) a[lane] = b[lane - 1];
  return a;
#endif
}

// The odd lanes: a1 b1 a3 b3 ...
inline Words odd_lanes(Words a, Words b) {
#if defined(__AVX512F__)
  return (Words)_mm512_maskz_unpackhi_epi64(0xff, (__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
  return (Words)_mm256_unpackhi_epi64((__m256i)a, (__m256i)b);
#elif defined(__SSE2__)
  return (Words)_mm_unpackhi_epi64((__m128i)a, (__m128i)b);
#else
  for (int64_t lane = 1; lane < lanes<uint64_t>; lane += 2) b[lane - 1] = a[lane];
  return b;
#endif
}

// ---- the cipher

class Philox {
 public:
  explicit Philox(int64_t seed) {
    uint32_t left = static_cast<uint32_t>(seed), right = static_cast<uint32_t>(static_cast<uint64_t>(seed) >> 32);
    for (auto& key : keys_) {
      key = {left, right};
      left += 0x9E3779B9u;
      right += 0xBB67AE85u;
    }
  }

  // The words of consecutive blocks in their order, from the first word of `block` on.
  //
  // A group of blocks, one a lane, makes two vectors. Each operation waits for the one before it, so that a caller
  // asks for several groups at once where it can: four vectors.
  template <size_t vectors>
  std::array<Vector<uint32_t>, vectors> words(uint64_t block) const {
    static_assert(vectors % 2 == 0, "a group of blocks makes two vectors");
    constexpr size_t groups = vectors / 2;
    constexpr int64_t count = lanes<uint64_t>;
    // the first half of a group in the even lanes, the second in the odd ones, so that each half makes one vector
    Words order;
    for (int64_t lane = 0; lane < count; ++lane) order[lane] = static_cast<uint64_t>(lane / 2 + lane % 2 * (count / 2));

    Words state[groups][4];
    for (size_t group = 0; group < groups; ++group) {
      const Words counter = order + (block + group * count);
      state[group][0] = counter;
      state[group][1] = counter >> 32;
      state[group][2] = state[group][3] = Words{};
    }
    for (const auto& key : keys_)
      for (auto& [a, b, c, d] : state) {
        const Words left = product(a, 0xD2511F53u), right = product(c, 0xCD9E8D57u);
        a = (right >> 32) ^ b ^ key[0];
        b = right;
        c = (left >> 32) ^ d ^ key[1];
        d = left;
      }

    std::array<Vector<uint32_t>, vectors> words;
    for (size_t group = 0; group < groups; ++group) {
      const auto [a, b, c, d] = state[group];
      const Words front = (a & 0xffffffffu) | (b << 32), back = (c & 0xffffffffu) | (d << 32);
      words[2 * group] = (Vector<uint32_t>)even_lanes(front, back);
      words[2 * group + 1] = (Vector<uint32_t>)odd_lanes(front, back);
    }
    return words;
  }

 private:
  std::array<std::array<uint64_t, 2>, 10> keys_;  // one pair a round
};

// ---- masks

// Which elements dropout keeps: each with probability 1 - p, from the word whose number is its flat position.
class KeepMask {
 public:
  KeepMask(int64_t seed, double p) : philox_(seed) {
    const double threshold = std::nearbyint(p * 4294967296.0);
    none_ = threshold > 4294967295.0;
    threshold_ = none_ ? 0 : static_cast<uint32_t>(threshold);
  }

  // Masks of consecutive elements from `position` on, a multiple of 4: all bits of a lane are set where its element is
  // kept. Each vector has lanes<float> of them; their number is even, and four are faster than twice two.
  template <size_t vectors>
  std::array<Vector<int32_t>, vectors> from(int64_t position) const {
    std::array<Vector<int32_t>, vectors> masks = {};
    if (none_) return masks;
    const auto words = philox_.words<vectors>(static_cast<uint64_t>(position) / 4);
    for (size_t i = 0; i < vectors; ++i) masks[i] = words[i] >= threshold_;
    return masks;
  }

 private:
  Philox philox_;
  uint32_t threshold_;
  bool none_;
};

}  // namespace nacre
