"""Which implementation serves which convolutions on the CPU; every bound is where two of them were measured equal.

The predicates see the op's arguments: input, weight, bias, stride, padding, dilation, groups. Before a backward the
bias is None.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nacre.core.choice import Kernel, at_any_size, cpp_kernel
from nacre.layers.conv2d import by_torch, formula

_EXACT = (torch.float32, torch.float64)
_PLANE = 64  # values of an image of 8 x 8, whose rows fill half a vector
_TAPS = 9
_PIXELS = 196  # an image of 14 x 14
_FEWEST, _VERY_FEW, _FEW = 3, 8, 31  # input channels: in short rows as well, in any layout, in planes
_FEW_KERNELS = 24
_COLUMNS = 16  # a vector
_WIDE = 32  # channels
_WIDEST = 1 << 17  # kernels, of one output and one input channel
_TILES = 768
_MULTIPLIER = 64  # kernels a channel, whose gradients are held at once
_LARGE = 1 << 16
_SMALLEST = 1024
_SMALL = 8192
_SMALL_PRODUCT = 16384  # of kernels of one value, or of more than _TAPS, over several channels
_OF_ONE_CHANNEL = "torch's own are the fastest of one channel a group, of short rows or small images"
_OF_SEVERAL = "torch's own are the fastest of such kernels over several channels"
_UNDER_SMALLEST = f"under {_SMALLEST:,} values torch's own operator is faster"
_UNDER_SMALL = f"under {_SMALL:,} values torch's own operator is faster"
_UNDER_SMALL_PRODUCT = f"under {_SMALL_PRODUCT:,} values torch's own operator is faster"


def _torchs(function: Callable[..., Any]) -> Kernel:
    return Kernel(device="cpu", language="torch", requires={"images": _has_images}, function=function, compiled=False)


def _has_images(input: Tensor, *_: Any) -> bool:
    return input.shape[0] > 0


def _in_planes(input: Tensor, weight: Tensor, *_: Any) -> bool:
    """For one image without batch, as the weight lies."""
    return not ((input.dim() == 4 and formula.is_channels_last(input)) or formula.is_channels_last(weight))


def _large_plane(input: Tensor, *_: Any) -> bool:
    return input.shape[2] * input.shape[3] > _PLANE or at_any_size()


def _long_rows(input: Tensor, weight: Tensor, bias: Tensor | None, stride: Any, *_: Any) -> bool:
    return max(stride) == 1 or input.shape[3] >= 2 * _COLUMNS or at_any_size()


def _large_plane_or_kernel(input: Tensor, weight: Tensor, *_: Any) -> bool:
    return _large_plane(input) or weight.shape[2] * weight.shape[3] > _TAPS


def _one_by_one(input: Tensor, weight: Tensor, bias: Tensor | None, *numbers: Any) -> bool:
    stride, padding, _, groups = numbers
    return groups == max(weight.shape[2:]) == max(stride) == 1 and not any(padding)


def _large_for_product(input: Tensor, weight: Tensor, *_: Any) -> bool:
    return input.shape[2] * input.shape[3] >= _PIXELS or not _in_planes(input, weight) or at_any_size()


def _in_planes_or_large_kernel(input: Tensor, weight: Tensor, *_: Any) -> bool:
    return weight.shape[2] * weight.shape[3] > _TAPS or _in_planes(input, weight)


def _wide_planes(input: Tensor, weight: Tensor, *_: Any) -> bool:
    return _in_planes(input, weight) and (input.shape[-1] >= _COLUMNS or at_any_size())


_DEPTHWISE = {
    "images": _has_images,
    "one input channel a group": lambda input, weight, *_: weight.shape[1] == 1,
    f"at most {_MULTIPLIER} kernels a channel": lambda input, weight, *_: (
        weight.shape[0] <= _MULTIPLIER * input.shape[1]
    ),
}

_FEW_CHANNELS = {
    "images": _has_images,
    "one group": lambda *arguments: arguments[-1] == 1,
    f"at most {_FEW} input channels, or {_FEW_KERNELS} kernels of stride 1": lambda input, weight, bias, stride, *_: (
        _few(weight, stride)
    ),
}

_FEW_IN_PLANES = {
    **_FEW_CHANNELS,
    f"images whose channels lie one after another, of at least {_COLUMNS} columns": _wide_planes,
    "a stride of at most 2": lambda *arguments: max(arguments[3]) <= 2,
}


def _three_by_three(input: Tensor, weight: Tensor, bias: Tensor | None, *numbers: Any) -> bool:
    stride, _, dilation, groups = numbers
    return tuple(weight.shape[2:]) == (3, 3) and max(stride) == max(dilation) == groups == 1


def _wide_kernels(input: Tensor, weight: Tensor, *_: Any) -> bool:
    few, many = sorted(weight.shape[:2])
    return (few >= _WIDE and few * many <= _WIDEST) or at_any_size()


def _many_tiles(input: Tensor, *_: Any) -> bool:
    return input.shape[0] * input.shape[2] * input.shape[3] >= 4 * _TILES or at_any_size()


_WINOGRAD = {
    "images": _has_images,
    "one group, kernels of 3 x 3, stride and dilation 1": _three_by_three,
    "images whose channels lie one after another": _in_planes,
    f"at least {_WIDE} channels of input and of output, and at most {_WIDEST:,} kernels": _wide_kernels,
    f"at least {_TILES} squares of four values": _many_tiles,
}

_POINTWISE = {
    "images": _has_images,
    "one group, kernels of one value, stride 1 and no padding": _one_by_one,
    f"images of at least {_PIXELS} values, or channels-last memory": _large_for_product,
}


def _at_most(most: int, *numbers: Any) -> bool:
    return all(part <= most for one in numbers for part in (one if isinstance(one, (tuple, list)) else (one,)))


def _few(weight: Tensor, stride: Any) -> bool:
    return weight.shape[1] <= _FEW or (weight.shape[0] <= _FEW_KERNELS and _at_most(1, stride))


def best_left_to_torch(input: Tensor, weight: Tensor, stride: Any, dilation: Any, groups: int) -> str:
    """Why torch's own operator is the fastest, its autograd included; empty where a kernel of nacre may take part."""
    tensors = isinstance(input, Tensor) and isinstance(weight, Tensor)
    if not tensors or not input.is_cpu or input.dim() < 3 or weight.dim() != 4:
        return ""
    values, channels, taps = input.numel(), weight.shape[1], weight.shape[2] * weight.shape[3]
    if values < _SMALLEST:
        return _UNDER_SMALLEST
    if input.dtype not in _EXACT:
        return "half precision is torch's own"
    if channels == 1:
        return "" if _gains_of_one_channel(input, weight, stride, groups) else _OF_ONE_CHANNEL
    one_image = input.dim() == 3 or input.shape[0] == 1
    if taps == 1 or not _few(weight, stride) or (one_image and taps <= _TAPS):
        if values < _SMALL:
            return _UNDER_SMALL
        if values < _SMALL_PRODUCT and not 1 < taps <= _TAPS:
            return _UNDER_SMALL_PRODUCT
    return "" if groups == 1 and _gains_of_several(input, weight, stride, dilation) else _OF_SEVERAL


def _gains_of_one_channel(input: Tensor, weight: Tensor, stride: Any, groups: int) -> bool:
    if groups == 1 and not (_at_most(2, stride) or input.requires_grad):
        return False
    if weight.shape[2] * weight.shape[3] > _TAPS:
        return True
    plane = input.shape[-2] * input.shape[-1] > _PLANE and _in_planes(input, weight)
    return plane and (_at_most(1, stride) or input.shape[-1] > _COLUMNS)


def _gains_of_several(input: Tensor, weight: Tensor, stride: Any, dilation: Any) -> bool:
    in_planes, channels, size = _in_planes(input, weight), weight.shape[1], tuple(weight.shape[2:])
    if size == (1, 1) and _at_most(1, stride) and (input.shape[-2] * input.shape[-1] >= _PIXELS or not in_planes):
        return True
    if not _few(weight, stride):
        wide = size == (3, 3) and _wide_kernels(input, weight) and input.dim() == 4 and _many_tiles(input)
        return wide and in_planes and _at_most(1, stride, dilation)
    columns, large = input.shape[-1], input.numel() >= _LARGE
    if in_planes and columns >= _COLUMNS and _at_most(2, stride):
        # of short rows of outputs torch's weight gradients are as fast, its input gradients slower
        return input.requires_grad or columns >= 2 * _COLUMNS or _at_most(1, stride) or not large
    return input.requires_grad and large and channels <= (_VERY_FEW if columns >= _COLUMNS else _FEWEST)


KERNELS = (
    cpp_kernel(
        {
            **_DEPTHWISE,
            "images whose channels lie one after another": _in_planes,
            f"images of more than {_PLANE} values": _large_plane,
            f"a stride of 1, or images of at least {2 * _COLUMNS} columns": _long_rows,
        },
        _EXACT,
    ),
    cpp_kernel(_POINTWISE, _EXACT),
    cpp_kernel(_FEW_IN_PLANES, _EXACT),
    cpp_kernel(_WINOGRAD, _EXACT),
    _torchs(by_torch.forward),
)

BACKWARD_KERNELS = (
    cpp_kernel(
        {
            **_DEPTHWISE,
            f"images whose channels lie one after another, or more than {_TAPS} taps": _in_planes_or_large_kernel,
            f"images of more than {_PLANE} values, or more than {_TAPS} taps": _large_plane_or_kernel,
        },
        _EXACT,
    ),
    cpp_kernel(_POINTWISE, _EXACT),
    cpp_kernel(_FEW_CHANNELS, _EXACT),
    cpp_kernel(_WINOGRAD, _EXACT),
    _torchs(by_torch.backward),
)
