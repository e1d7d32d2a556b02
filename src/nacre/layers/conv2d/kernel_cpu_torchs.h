// Torch's own gradients of a convolution's weight and bias, for the kernels that leave them to torch.
#pragma once

#include "nacre/layers/conv2d/kernel_cpu.h"

#include <array>
#include <tuple>

namespace nacre::conv2d {

using ThreeGradients = std::tuple<Tensor, Tensor, Tensor>;

// The gradient of the input is an undefined tensor, as are those that are not asked for. The padding is alike on both
// sides.
inline ThreeGradients torchs_backward(const Tensor& grad, const Tensor& input, const Tensor& weight,
                                      const Numbers& stride, const Numbers& padding, const Numbers& dilation,
                                      int64_t groups, const std::vector<bool>& needs) {
  using torch::stable::detail::from;
  using torch::stable::detail::to;
  const std::array<bool, 3> mask{false, needs[1], needs[2]};
  std::array<StableIValue, 11> stack{
      from(grad), from(input), from(weight), from(std::optional(Numbers{weight.size(0)})), from(stride),
      from(Numbers{padding[2], padding[0]}), from(dilation), from(false), from(Numbers{0, 0}), from(groups),
      from(torch::headeronly::HeaderOnlyArrayRef<bool>(mask.data(), mask.size()))};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::convolution_backward", "", stack.data(), TORCH_ABI_VERSION));
  to<Tensor>(stack[0]);  // is owned, though undefined
  ThreeGradients found{Tensor(), to<Tensor>(stack[1]), to<Tensor>(stack[2])};
  // oneDNN gives both where one of them is asked for
  if (!needs[1]) std::get<1>(found) = Tensor();
  if (!needs[2]) std::get<2>(found) = Tensor();
  return found;
}

}  // namespace nacre::conv2d
