// The words of cpu_random.h at any place of their sequence, for tests, which compare them with published ones.
#include "nacre/core/cpu_random.h"
#include "nacre/core/cpu_export.h"

// Writes the `count` words from the first one of `block` on, two vectors at a time or four.
NACRE_EXPORT void nacre_random_words(int64_t seed, uint64_t block, int64_t count, bool four, uint32_t* words) {
  const nacre::Philox philox(seed);
  const auto write = [&](const auto& vectors) {
    const int64_t here = std::min<int64_t>(count, sizeof vectors / sizeof(uint32_t));
    std::memcpy(words, &vectors, static_cast<size_t>(here) * sizeof(uint32_t));
    words += here;
    count -= here;
    block += sizeof vectors / sizeof(uint32_t) / 4;
  };
  while (count > 0) four ? write(philox.words<4>(block)) : write(philox.words<2>(block));
}
