// Rows of a tensor that need not be contiguous: a transposed view of tokens, say, whose features lie together.
#pragma once

#include "nacre/core/cpu_layout.h"
#include "nacre/core/cpu_memory.h"
#include "nacre/core/cpu_primitives.h"

#include <cstddef>
#include <cstdint>

namespace nacre {

// Reads the tensor's own memory where the values of a row lie one after the other, else that of a contiguous copy.
class RowReader {
 public:
  // length: values of a row, the product of the last dimensions; of a contiguous tensor any number.
  RowReader(const Tensor& tensor, ScalarType dtype, int64_t length)
      : tensor_(of_rows(tensor, length) ? tensor : contiguous_as(tensor, dtype)), length_(length) {
    STD_TORCH_CHECK(tensor_.is_cpu(), "a CPU kernel takes tensors on the CPU");
    STD_TORCH_CHECK(tensor_.scalar_type() == dtype, "this kernel takes tensors of one dtype");
    if (tensor_.is_contiguous()) return;
    sizes_ = sizes_of(tensor_);
    strides_ = strides_of(tensor_);
    for (int64_t within = 1; within < length; within *= sizes_.back(), sizes_.pop_back(), strides_.pop_back()) {}
  }

  template <class T>
  const T* row(int64_t index) const {
    const T* values = static_cast<const T*>(tensor_.const_data_ptr());
    if (sizes_.empty()) return values + index * length_;
    for (size_t i = sizes_.size(); i-- > 0; index /= sizes_[i]) values += index % sizes_[i] * strides_[i];
    return values;
  }

 private:
  static bool of_rows(const Tensor& tensor, int64_t length) {
    if (tensor.is_contiguous()) return true;
    int64_t within = 1;
    for (int64_t i = tensor.dim(); i-- > 0 && within < length; within *= tensor.size(i))
      if (tensor.size(i) != 1 && tensor.stride(i) != within) return false;
    return within == length;
  }

  Tensor tensor_;
  int64_t length_;
  Sizes sizes_, strides_;  // of the dimensions that number the rows; none of a contiguous tensor
};

}  // namespace nacre
