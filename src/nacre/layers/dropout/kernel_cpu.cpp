// Dropout: formula.py, with a mask that is never stored; also as the last step of a residual branch. N elements.
#include "nacre/core/cpu_dropout.h"
#include "nacre/core/cpu_layout.h"
#include "nacre/core/cpu_memory.h"
#include "nacre/core/cpu_primitives.h"
#include "nacre/core/cpu_rows.h"
#include "nacre/core/cpu_streams.h"

#include <vector>

namespace nacre {
namespace {

// How many elements are handled together where all are contiguous and rows do not matter.
constexpr int64_t piece = 4096;

// y: (N) = x times its factors, plus the residual if there is one. Elements `begin` to `begin + count` of N.
template <class T, bool has_residual, class A = Accumulator<T>>
void mask_elements(const T* residual, const T* x, T* y, int64_t begin, int64_t count, const DropoutFactors<A>& factors,
                   bool stream) {
  factors.over_row(begin, count, [&](int64_t i, auto which, Vector<A> factor) {
    Vector<A> value = load(x + i, which) * factor;
    if constexpr (has_residual) value = load(residual + i, which) + value;
    put(y + i, value, which, stream);
  });
}

// A contiguous tensor. residual, branch: (N)
template <bool has_residual>
Tensor masked_values(const Tensor& residual, const Tensor& branch, const std::optional<Tensor>& seed, double p) {
  const ScalarType dtype = branch.scalar_type();
  const bool in_pieces = branch.is_contiguous() && residual.is_contiguous();
  const int64_t count = branch.numel(), length = in_pieces ? piece : branch.size(branch.dim() - 1);
  const int64_t rows = (count + length - 1) / length;
  const RowReader residual_rows(residual, dtype, length), branch_rows(branch, dtype, length);
  const Tensor result = new_tensor(sizes_of(branch), dtype);
  with_type(dtype, [&](auto type) {
    using T = decltype(type);
    const DropoutFactors<Accumulator<T>> factors(seed, p);
    T* y = static_cast<T*>(result.mutable_data_ptr());
    const bool stream = in_pieces ? streams(y, count) : streams_rows(y, rows, length);
    in_parallel(rows, std::max<int64_t>(values_per_thread / length, 1), [&](int64_t first, int64_t last) {
      for (int64_t row = first; row < last; ++row)
        mask_elements<T, has_residual>(residual_rows.row<T>(row), branch_rows.row<T>(row), y + row * length,
                                       row * length, std::min(length, count - row * length), factors, stream);
      if (stream) finish_past_caches();
    });
  });
  return result;
}

Tensor masked(const Tensor& input, const Tensor& seed, double p) {
  const Tensor result = masked_values<false>(input, input, seed, p);
  return input.is_contiguous() ? result : laid_out(result, strides_of(torch::stable::empty_like(input)));
}

Tensor backward(const Tensor& grad_output, const Tensor& seed, double p, const std::vector<bool>& needs) {
  STD_TORCH_CHECK(needs.size() == 1, "dropout: one gradient is asked for or not");
  return needs[0] ? masked(grad_output, seed, p) : Tensor();
}

Tensor residual_forward(const Tensor& residual, const Tensor& branch, const std::optional<Tensor>& seed, double p) {
  STD_TORCH_CHECK(sizes_of(residual) == sizes_of(branch), "residual_dropout: residual and branch have one shape");
  const Tensor result = masked_values<true>(residual, branch, seed, p);
  if (residual.is_contiguous() && branch.is_contiguous()) return result;
  return laid_out(result, result_strides(residual, torch::stable::empty_like(branch)));
}

// Without a seed the branch's gradient is that of the output, as the residual's always is: core/op.py passes it on.
Tensor residual_backward(const Tensor& grad_output, const std::optional<Tensor>& seed, double p,
                         const std::vector<bool>& needs) {
  STD_TORCH_CHECK(needs.size() == 1, "residual_dropout: the branch's gradient is asked for or not");
  return needs[0] && seed ? masked(grad_output, *seed, p) : Tensor();
}

}  // namespace
}  // namespace nacre

STABLE_TORCH_LIBRARY_IMPL(nacre, CPU, m) {
  m.impl("dropout.kernel", TORCH_BOX(&nacre::masked));
  m.impl("dropout_backward.kernel", TORCH_BOX(&nacre::backward));
  m.impl("residual_dropout.kernel", TORCH_BOX(&nacre::residual_forward));
  m.impl("residual_dropout_backward.kernel", TORCH_BOX(&nacre::residual_backward));
}
