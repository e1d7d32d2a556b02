// Memory that stays: what a kernel's results lie in comes from a pool and goes back to it, so that a training step
// finds the memory of the step before, already mapped, instead of faulting in fresh pages. memory.py tells and sets its
// bounds.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstddef>
#include <cstdint>
#include <vector>

namespace nacre {

// At least `bytes` bytes, aligned to 64, to be given back with the same number by any thread.
void* take_memory(size_t bytes);
void give_memory(void* memory, size_t bytes);

using Sizes = std::vector<int64_t>;

// A new tensor on the CPU, contiguous unless strides are given: those of a tensor whose elements lie densely in some
// order. Its values are undefined.
torch::stable::Tensor new_tensor(const Sizes& sizes, torch::headeronly::ScalarType dtype);
torch::stable::Tensor new_tensor(const Sizes& sizes, const Sizes& strides, torch::headeronly::ScalarType dtype);

// Scratch memory for `count` values of type T, until the end of its scope.
template <class T>
class Scratch {
 public:
  explicit Scratch(int64_t count)
      : bytes_(static_cast<size_t>(count) * sizeof(T)), values_(static_cast<T*>(take_memory(bytes_))) {}
  ~Scratch() { give_memory(values_, bytes_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  T* get() const { return values_; }

 private:
  size_t bytes_;
  T* values_;
};

}  // namespace nacre
