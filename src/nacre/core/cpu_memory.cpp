// The pool behind cpu_memory.h. Blocks come in sizes of which there are four to every doubling, so at most a quarter of
// one is unused; a freed block is kept for the next request of its size, as long as all blocks together stay within the
// limit. Blocks of 2 MiB and more are aligned to it and ask the kernel for huge pages, which fault 512 times less.
#include "nacre/core/cpu_memory.h"
#include "nacre/core/cpu_export.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>

#if !defined(_WIN32)
#include <pthread.h>
#include <sys/mman.h>
#include <unistd.h>
#endif

// Under AddressSanitizer what lies past a request, and what waits in the pool, is as forbidden as what malloc guards.
#if __has_include(<sanitizer/asan_interface.h>)
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(memory, bytes) ((void)(memory), (void)(bytes))
#define ASAN_UNPOISON_MEMORY_REGION(memory, bytes) ((void)(memory), (void)(bytes))
#endif

namespace nacre {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace {

constexpr size_t huge_page = size_t(1) << 21;
// Smaller blocks are left to malloc, which keeps them itself.
constexpr size_t smallest_block = size_t(1) << 16;
constexpr size_t page = 4096;

size_t block_size(size_t bytes) {
  size_t step = smallest_block / 4;
  while (step * 8 < bytes) step *= 2;
  const size_t size = (std::max(bytes, smallest_block) + step - 1) / step * step;
  return size >= huge_page ? (size + huge_page - 1) / huge_page * huge_page : size;
}

#if defined(_WIN32)
void* map_memory(size_t size) { return _aligned_malloc(size, page); }
void unmap_memory(void* memory, size_t) { _aligned_free(memory); }
size_t machine_memory() { return size_t(1) << 34; }
void* allocate(size_t size) { return _aligned_malloc(size, 64); }
void deallocate(void* memory) { _aligned_free(memory); }
#else
void* map_memory(size_t size) {
  const size_t alignment = size >= huge_page ? huge_page : page;
  const size_t mapped = size + alignment - page;
  void* memory = mmap(nullptr, mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) return nullptr;
  const auto start = reinterpret_cast<uintptr_t>(memory);
  const uintptr_t aligned = (start + alignment - 1) / alignment * alignment;
  if (aligned > start) munmap(memory, aligned - start);
  if (const size_t rest = start + mapped - aligned - size) munmap(reinterpret_cast<void*>(aligned + size), rest);
#if defined(MADV_HUGEPAGE)
  if (size >= huge_page) madvise(reinterpret_cast<void*>(aligned), size, MADV_HUGEPAGE);  // a wish: it may be refused
#endif
  return reinterpret_cast<void*>(aligned);
}

void unmap_memory(void* memory, size_t size) {
  ASAN_UNPOISON_MEMORY_REGION(memory, size);  // whoever maps these addresses next may use them
  munmap(memory, size);
}

size_t machine_memory() {
  const long pages = sysconf(_SC_PHYS_PAGES), bytes = sysconf(_SC_PAGESIZE);
  return pages > 0 && bytes > 0 ? static_cast<size_t>(pages) * static_cast<size_t>(bytes) : size_t(1) << 34;
}

void* allocate(size_t size) {
  void* memory = nullptr;
  return posix_memalign(&memory, 64, std::max<size_t>(size, 1)) == 0 ? memory : nullptr;
}
void deallocate(void* memory) { std::free(memory); }
#endif

class Pool {
 public:
  // Memory of a block's size, or null where there is none left.
  void* take(size_t size) {
    std::lock_guard<std::mutex> lock(mutex_);
    void* memory = nullptr;
    const auto kept = free_.find(size);
    if (kept != free_.end() && !kept->second.empty()) {
      memory = kept->second.back();
      kept->second.pop_back();
      cached_ -= size;
      ++reused_;
    } else {
      shrink(limit_ > size ? limit_ - size : 0);
      memory = map_memory(size);
      if (!memory) unmap_down_to(0);
      if (!memory) memory = map_memory(size);
      if (!memory) return nullptr;
      ++mapped_;
    }
    used_ += size;
    peak_ = std::max(peak_, used_);
    return memory;
  }

  void give(void* memory, size_t size) {
    std::lock_guard<std::mutex> lock(mutex_);
    used_ -= size;
    free_[size].push_back(memory);
    cached_ += size;
    shrink(limit_);
  }

  void release() {
    std::lock_guard<std::mutex> lock(mutex_);
    unmap_down_to(0);
  }

  void set_limit(size_t bytes) {
    std::lock_guard<std::mutex> lock(mutex_);
    limit_ = bytes;
    shrink(limit_);
  }

  void statistics(int64_t* values) {
    std::lock_guard<std::mutex> lock(mutex_);
    const size_t all[] = {used_, cached_, peak_, limit_, reused_, mapped_};
    std::copy(std::begin(all), std::end(all), values);
  }

  void reset_peak() {
    std::lock_guard<std::mutex> lock(mutex_);
    peak_ = used_;
  }

  std::mutex& mutex() { return mutex_; }

 private:
  // Unmaps cached blocks, the largest first, until used and cached ones together take no more than `bytes`.
  void shrink(size_t bytes) { unmap_down_to(bytes > used_ ? bytes - used_ : 0); }

  void unmap_down_to(size_t bytes) {
    for (auto blocks = free_.rbegin(); blocks != free_.rend() && cached_ > bytes; ++blocks)
      while (!blocks->second.empty() && cached_ > bytes) {
        unmap_memory(blocks->second.back(), blocks->first);
        blocks->second.pop_back();
        cached_ -= blocks->first;
      }
  }

  std::mutex mutex_;
  std::map<size_t, std::vector<void*>> free_;
  size_t used_ = 0, cached_ = 0, peak_ = 0, reused_ = 0, mapped_ = 0;
  size_t limit_ = machine_memory() / 2;
};

// Never destroyed: tensors may outlive every other static object. A fork waits until nobody holds the lock, so that a
// child finds the pool whole.
Pool& pool() {
  static Pool* instance = [] {
    static auto* made = new Pool;
#if !defined(_WIN32)
    pthread_atfork([] { made->mutex().lock(); }, [] { made->mutex().unlock(); }, [] { made->mutex().unlock(); });
#endif
    return made;
  }();
  return *instance;
}

std::atomic<bool> filled_with_nan{false};

int32_t number_of(ScalarType dtype) {
  return torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
}

Tensor torchs_tensor(const Sizes& sizes, const Sizes& strides, ScalarType dtype) {
  AtenTensorHandle tensor;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(),
                                                  number_of(dtype), aoti_torch_device_type_cpu(), -1, &tensor));
  return Tensor(tensor);
}

Tensor tensor_in_pool(const Sizes& sizes, const Sizes& strides, ScalarType dtype, size_t bytes) {
  const auto give = [](void* memory, void* bytes) { give_memory(memory, reinterpret_cast<size_t>(bytes)); };
  AtenTensorHandle tensor;
  TORCH_ERROR_CODE_CHECK(torch_from_blob(take_memory(bytes), static_cast<int64_t>(sizes.size()), sizes.data(),
                                         strides.data(), 0, number_of(dtype), aoti_torch_device_type_cpu(), -1, &tensor,
                                         aoti_torch_layout_strided(), nullptr, 0, give,
                                         reinterpret_cast<void*>(bytes)));
  return Tensor(tensor);
}

}  // namespace

void* take_memory(size_t bytes) {
  const bool pooled = bytes >= smallest_block;
  void* memory = pooled ? pool().take(block_size(bytes)) : allocate(bytes);
  STD_TORCH_CHECK(memory != nullptr, "nacre: no memory is left for ", bytes, " bytes");
  if (pooled) {
    ASAN_UNPOISON_MEMORY_REGION(memory, bytes);
    ASAN_POISON_MEMORY_REGION(static_cast<char*>(memory) + bytes, block_size(bytes) - bytes);
  }
  if (filled_with_nan) std::memset(memory, 0xff, bytes);
  return memory;
}

void give_memory(void* memory, size_t bytes) {
  if (bytes >= smallest_block) {
    ASAN_POISON_MEMORY_REGION(memory, block_size(bytes));
    pool().give(memory, block_size(bytes));
  } else {
    deallocate(memory);
  }
}

Tensor new_tensor(const Sizes& sizes, ScalarType dtype) {
  Sizes strides(sizes.size());
  int64_t stride = 1;
  for (size_t i = sizes.size(); i-- > 0; stride *= std::max<int64_t>(sizes[i], 1)) strides[i] = stride;
  return new_tensor(sizes, strides, dtype);
}

Tensor new_tensor(const Sizes& sizes, const Sizes& strides, ScalarType dtype) {
  size_t bytes = aoti_torch_dtype_element_size(number_of(dtype));
  for (const int64_t size : sizes) bytes *= static_cast<size_t>(size);
  return bytes < smallest_block ? torchs_tensor(sizes, strides, dtype) : tensor_in_pool(sizes, strides, dtype, bytes);
}

}  // namespace nacre

// ---- for memory.py, which calls them with ctypes

NACRE_EXPORT void nacre_memory_statistics(int64_t* values) { nacre::pool().statistics(values); }
NACRE_EXPORT void nacre_memory_release() { nacre::pool().release(); }
NACRE_EXPORT void nacre_memory_set_limit(uint64_t bytes) { nacre::pool().set_limit(bytes); }
NACRE_EXPORT void nacre_memory_reset_peak() { nacre::pool().reset_peak(); }
NACRE_EXPORT void nacre_memory_fill_with_nan(bool fill) { nacre::filled_with_nan = fill; }
