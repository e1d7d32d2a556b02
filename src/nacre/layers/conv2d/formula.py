"""Conv2d: every output value is the inner product of a kernel and the window of the input under it, plus a bias.

The three products of a convolution are one sum, here for the rows, with stride s and dilation d (columns go alike):

    correlate(x, w, s, d)[n, o, p] = sum over c, i of x[n, c, p s + i d] w[o, c, i]

Forward, with x padded by zeros:

    y = correlate(x, w, s, d) + b

Backward, with g = dL/dy. Tap i of output row p reads row p s + i d of x, hence

    dL/dw[o, c, i] = sum over n, p of x[n, c, i d + p s] g[n, o, p]
    dL/dx[n, c, a] = sum over o and those p, i with p s + i d = a of g[n, o, p] w[o, c, i]
    dL/db[o]       = sum over n, p of g[n, o, p]

The gradient of the weight is a correlation of x with g in which stride and dilation change places and samples play
the part of channels. That of the input is the full correlation of g, its rows spread s apart with zeros between them,
with the flipped kernel, input and output channels exchanged. Nearly all products with those zeros are left out: row
a = s m + r meets only the taps whose reach i d has the remainder r when divided by s. So each remainder becomes an
output channel of a correlation with stride 1, whose rows are then woven together.

Groups are an axis of their own, over which nothing is summed. Letters of the shapes: N samples, G groups, C input and
O output channels of one group, H x W input, P x Q output, I x J kernel.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad


def correlate(x: Tensor, w: Tensor, stride: list[int], dilation: list[int]) -> Tensor:
    """Slides kernels w of shape (G, O, C, I, J) over x of shape (N, G, C, H, W) and returns (N, G, O, P, Q)."""
    for axis in (0, 1):
        x = x.unfold(3 + axis, (w.shape[3 + axis] - 1) * dilation[axis] + 1, stride[axis])
    windows = x[..., :: dilation[0], :: dilation[1]]
    # einsum copies its first operand with the summed axes innermost, its second with those that stay: the copy of the
    # windows is several times faster along the longer ones
    if windows.shape[4] < windows.shape[6]:
        return torch.einsum("ngcpqij,gocij->ngopq", windows, w)
    return torch.einsum("gocij,ngcpqij->ngopq", w, windows)


def forward(
    input: Tensor, weight: Tensor, bias: Tensor | None, stride: list, padding: list, dilation: list, groups: int
) -> tuple[Tensor, tuple]:
    y = correlate(pad(_split(input, 1, groups), padding), _split(weight, 0, groups), stride, dilation).flatten(1, 2)
    if bias is not None:
        y = y + bias[:, None, None]
    return lay_out(y, input, weight), (input, weight, stride, padding, dilation, groups)


def backward(grad: Tensor, saved: tuple, needs: list[bool]) -> tuple[Tensor | None, ...]:
    input, weight, stride, padding, dilation, groups = saved
    g = _split(grad, 1, groups)
    grad_input = grad_weight = grad_bias = None
    if needs[0]:
        x = _input_gradient(g, _split(weight, 0, groups), input.shape[2:], stride, padding[2::-2], dilation)
        grad_input = lay_out(x.flatten(1, 2), input, weight)
    if needs[1]:
        # the last rows and columns of the input may lie beyond every window
        sizes = zip(g.shape[3:], stride, weight.shape[2:], dilation, strict=True)
        rows, columns = ((p - 1) * s + (i - 1) * d + 1 for p, s, i, d in sizes)
        x = pad(_split(input, 1, groups), padding)[..., :rows, :columns].permute(2, 1, 0, 3, 4)
        w = correlate(x, g.permute(1, 2, 0, 3, 4), dilation, stride).permute(1, 2, 0, 3, 4)
        grad_weight = lay_out(w.flatten(0, 1), input, weight)
    if needs[2]:
        grad_bias = g.sum((0, 3, 4)).flatten().to(grad.dtype)
    return grad_input, grad_weight, grad_bias


def _input_gradient(g: Tensor, w: Tensor, size: list, stride: list, padding: list, dilation: list) -> Tensor:
    channels = w.shape[2]
    w = _split_taps(_split_taps(w, stride[1], dilation[1]).movedim(3, -1), stride[0], dilation[0])
    w = w.flip(3, 5).permute(0, 2, 6, 4, 1, 5, 3).flatten(1, 3)  # (G, C with remainders, O, I taps, J taps)
    spacing = [d if s == 1 else 1 for s, d in zip(stride, dilation, strict=True)]
    margins = []
    for axis in (1, 0):  # pad takes the last axis first
        first, last = padding[axis] // stride[axis], (padding[axis] + size[axis] - 1) // stride[axis]
        margins += [(w.shape[3 + axis] - 1) * spacing[axis] - first, last + 1 - g.shape[3 + axis]]
    x = correlate(pad(g, margins), w, [1, 1], spacing).unflatten(2, (channels, *stride))
    x = x.permute(0, 1, 2, 5, 3, 6, 4).flatten(5, 6).flatten(3, 4)  # remainders woven into rows and columns
    top, left = padding[0] % stride[0], padding[1] % stride[1]
    return x[..., top : top + size[0], left : left + size[1]]


def _split_taps(w: Tensor, stride: int, dilation: int) -> Tensor:
    """Splits the last axis in two: [m, r] is the tap whose reach is m * stride + r, or zero where there is none."""
    if stride == 1:
        return w.unsqueeze(-1)
    count = ((w.shape[-1] - 1) * dilation + stride) // stride
    spread = pad(w.unsqueeze(-1), (0, dilation - 1)).flatten(-2)
    return pad(spread, (0, count * stride - spread.shape[-1])).unflatten(-1, (count, stride))


def _split(tensor: Tensor, axis: int, groups: int) -> Tensor:
    # half precision is multiplied and summed in float32 and rounded once
    tensor = tensor.to(torch.promote_types(tensor.dtype, torch.float32))
    return tensor.unflatten(axis, (groups, tensor.shape[axis] // groups))


def lay_out(tensor: Tensor, input: Tensor, weight: Tensor) -> Tensor:
    """Gives a result the dtype of the input and, as torch does, the memory format of the input or of the weight."""
    channels_last = input.shape[0] > 0 and (is_channels_last(input) or is_channels_last(weight))
    if channels_last:
        tensor = tensor.permute(0, 2, 3, 1)
    tensor = tensor.to(input.dtype, copy=True, memory_format=torch.contiguous_format)
    return tensor.permute(0, 3, 1, 2) if channels_last else tensor


def is_channels_last(tensor: Tensor) -> bool:
    least = 0
    for axis in (1, 3, 2, 0):
        size, stride = tensor.shape[axis], tensor.stride(axis)
        # torch's rule, also where sizes of 1 leave both readings open
        if size == 0 or stride == 0 or stride < least or (axis == 0 and least == tensor.stride(1)):
            return False
        least = stride * size
    return True
