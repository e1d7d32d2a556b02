"""The Conv2d layer and its functional form."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nacre.core import check
from nacre.core.choice import sizes_decide, torch_instead, unserved, whole_by_torch
from nacre.core.flop_counter import count_flops
from nacre.core.op import Op
from nacre.core.tracing import Proxy, as_torchs_layer, traced
from nacre.layers.conv2d import formula, served
from nacre.layers.conv2d.cost import outputs


def _fake(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """The output's shape and strides alone: the formula's windows would bind a traced graph to one size of image."""
    left, right, top, bottom = padding
    rows = outputs(input.shape[2] + top + bottom, weight.shape[2], stride[0], dilation[0])
    columns = outputs(input.shape[3] + left + right, weight.shape[3], stride[1], dilation[1])
    return formula.lay_out(input.new_empty(input.shape[0], weight.shape[0], rows, columns), input, weight)


def _fake_backward(grad: Tensor, input: Tensor, weight: Tensor, *numbers: Any) -> tuple[Tensor | None, ...]:
    needs = numbers[-1]
    return (
        formula.lay_out(input, input, weight) if needs[0] else None,
        formula.lay_out(weight, input, weight) if needs[1] else None,
        grad.new_empty(weight.shape[0]) if needs[2] else None,
    )


_op = Op(
    "conv2d(Tensor input, Tensor weight, Tensor? bias, SymInt[] stride, SymInt[] padding, SymInt[] dilation,"
    " SymInt groups) -> Tensor output",
    forward=formula.forward,
    backward=formula.backward,
    saved=("input", "weight", "stride", "padding", "dilation", "groups"),
    gradients=("input", "weight", "bias"),
    autocast={"cpu": "lower", "cuda": "lower", "xpu": "lower", "mps": "lower"},
    kernels=served.KERNELS,
    backward_kernels=served.BACKWARD_KERNELS,
    fake=_fake,
    fake_backward=_fake_backward,
)


def _flops(output: Tensor, _: Tensor, weight: Tensor, *settings: Any) -> int:
    return 2 * output.numel() * weight.shape[1:].numel()


def _backward_flops(_: Any, grad: Tensor, input: Tensor, *others: Any) -> int:
    return _flops(grad, input, *others) * (others[-1][0] + others[-1][1])


count_flops(_op, _flops, _backward_flops)


class Conv2d(torch.nn.Conv2d):
    r"""Slides learned kernels over images: every output value is a weighted sum of the window under the kernel.

    .. math:: y_{n,o,p,q} = b_o + \sum_{c,i,j} x_{n,\,c,\,p s + i d,\,q s + j d} \, w_{o,c,i,j}

    with x padded, s the stride and d the dilation. With ``groups`` the channels are cut into as many equal parts, and
    each part of the output sees its part of the input only.

    Args:
        in_channels: channels of the input, C.
        out_channels: channels of the output, E.
        kernel_size: rows and columns of the kernel, I and J; an int for both.
        stride: rows and columns from one window to the next; an int for both. Default: 1.
        padding: rows added above and below, columns added left and right; an int for both; ``"valid"`` for none,
            ``"same"`` for as many as keep the size (an odd one goes below or right; stride 1 only). Default: 0.
        dilation: rows and columns from one tap of the kernel to the next; an int for both. Default: 1.
        groups: parts of the channels; divides C and E. ``groups=in_channels`` is a depthwise convolution. Default: 1.
        bias: learn a bias of E values. Default: True.
        padding_mode: what the padding holds: ``"zeros"``, the input's mirror image (``"reflect"``), its outermost
            values (``"replicate"``) or its opposite side (``"circular"``). Default: ``"zeros"``.
        device: where the parameters are made. Default: torch's default device.
        dtype: of the parameters. Default: torch's default dtype.

    ``weight`` (E, C / groups, I, J) and ``bias`` (E) start uniform in :math:`\pm \sqrt{groups / (C I J)}`.

    Shape:
        - input: (N, C, H, W), or (C, H, W) for one image
        - output: (N, E, P, Q), or (E, P, Q), with P = floor((H + padding - dilation (I - 1) - 1) / stride) + 1, both
          sides of the padding together, and Q alike; in channels-last memory where the input or the weight is

    Numerics:
        float16 and bfloat16 are multiplied and summed in float32 and rounded once. Under autocast it runs in the lower
        precision. On the CPU, kernels of 3 x 3 with stride 1 and many channels are multiplied by Winograd's algorithm,
        whose rounding errors are like those of torch's direct sums, and smaller for the weight's gradient. nacre's
        kernels (that one, one channel in each of several groups, kernels of one value, few channels of input or of
        output) give the same bits for any number of threads; torch's, which serve the rest, sum the gradient of the
        weight in an order that depends on that number.

    Raises:
        ValueError: the constructor's arguments do not fit together.
        RuntimeError: the input has not C channels or is smaller than the kernel, or dtypes or devices do not match.

    Cost:
        E C I J / G + E parameters for G groups, 2 N E P Q C I J / G FLOPs, twice that backward, N C H W values kept for
        the backward.

    Paper:
        LeCun, Bottou, Bengio, Haffner, "Gradient-Based Learning Applied to Document Recognition", Proc. IEEE 86, 1998.

    Example:
        >>> import torch, nacre
        >>> layer = nacre.Conv2d(3, 64, 3, padding=1)
        >>> layer(torch.ones(2, 3, 8, 8)).shape
        torch.Size([2, 64, 8, 8])
        >>> sum(parameter.numel() for parameter in layer.parameters())
        1792
    """

    __prepare_scriptable__ = as_torchs_layer

    def forward(self, input: Tensor) -> Tensor:
        if type(input) is not Tensor and isinstance(input, Proxy):
            return traced(self, input)
        return self._conv_forward(input, self.weight, self.bias)

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if self.padding_mode == "zeros":
            return conv2d(input, weight, bias, self.stride, self.padding, self.dilation, self.groups)
        padded = torch.nn.functional.pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode)
        return conv2d(padded, weight, bias, self.stride, 0, self.dilation, self.groups)

    def output_size(self, h: int, w: int) -> tuple[int, int]:
        """Rows and columns of the output for an input of ``h`` rows and ``w`` columns.

        Raises:
            RuntimeError: the kernel does not fit into the padded input.

        Example:
            >>> import nacre
            >>> nacre.Conv2d(3, 64, 7, stride=2, padding=3).output_size(224, 224)
            (112, 112)
        """
        left, right, top, bottom = self._reversed_padding_repeated_twice
        padded = (h + top + bottom, w + left + right)
        _validate_reach(padded, self.kernel_size, self.dilation)
        height, width = (
            outputs(size, taps, s, d)
            for size, taps, s, d in zip(padded, self.kernel_size, self.stride, self.dilation, strict=True)
        )
        return height, width


def conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: str | int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Tensor:
    """Slides kernels over images; see :class:`nacre.Conv2d`.

    Args:
        input: images of shape (N, C, H, W), or one of shape (C, H, W).
        weight: kernels of shape (E, C / groups, I, J).
        bias: of shape (E). Default: none.
        stride: from one window to the next; one number for rows and columns or a pair. Default: 1.
        padding: zeros on each side, one number or a pair; or ``"same"`` or ``"valid"``. Default: 0.
        dilation: from one tap to the next, one number or a pair. Default: 1.
        groups: parts into which the channels are cut. Default: 1.

    Raises:
        RuntimeError: shapes, dtypes or devices do not match, or a number is out of its range.

    Example:
        >>> import torch, nacre
        >>> image = torch.tensor([[[0.0, 1.0, 3.0, 6.0]]])
        >>> nacre.functional.conv2d(image, torch.tensor([[[[-1.0, 1.0]]]]))
        tensor([[[1., 2., 3.]]])
    """
    usual = isinstance(weight, Tensor) and not isinstance(padding, str)
    if (
        usual
        and sizes_decide(input)
        and (reason := served.best_left_to_torch(input, weight, stride, dilation, groups))
        and whole_by_torch("conv2d", reason)
    ):
        try:
            return torch.conv2d(input, weight, bias, stride, padding, dilation, groups)
        except (RuntimeError, TypeError):
            pass  # what follows says more clearly what is wrong
    if reason := _unusual(input, weight, stride, padding, dilation, groups) or unserved(input, weight, bias):
        function = torch.nn.functional.conv2d
        return torch_instead("conv2d", reason, function, input, weight, bias, stride, padding, dilation, groups)
    _validate_shapes(input, weight, bias, groups)
    stride, dilation = _pair("stride", stride, least=1), _pair("dilation", dilation, least=1)
    margins = _margins(padding, weight.shape[2:], stride, dilation)
    padded = (input.shape[-2] + margins[2] + margins[3], input.shape[-1] + margins[0] + margins[1])
    _validate_reach(padded, weight.shape[2:], dilation)
    check.same_dtype("conv2d", input=input, weight=weight, bias=bias)
    check.same_device("conv2d", input=input, weight=weight, bias=bias)
    if input.dim() == 3:
        return _op(input.unsqueeze(0), weight, bias, stride, margins, dilation, groups).squeeze(0)
    return _op(input, weight, bias, stride, margins, dilation, groups)


def _unusual(input: Any, weight: Any, *numbers: Any) -> str:
    """Why a call that no Conv2d makes is left to torch, which serves or refuses it; empty for the usual ones."""
    if not (isinstance(input, Tensor) and isinstance(weight, Tensor)):
        return f"an input of type {type(input).__name__} and a weight of type {type(weight).__name__}"
    if weight.dim() > 1 and weight.shape[1] == 0:
        return "kernels without channels"
    for number in numbers:
        for part in number if isinstance(number, (tuple, list)) else (number,):
            if isinstance(part, bool) or not isinstance(part, (int, str, torch.SymInt)):
                return f"a number of type {type(part).__name__}"
    return ""


def _pair(name: str, value: int | Sequence[int], least: int) -> tuple[int, int]:
    """Numbers for rows and columns."""
    pair = tuple(value) if isinstance(value, (tuple, list)) else (value,)
    if len(pair) == 1:
        pair *= 2
    if len(pair) != 2:
        raise check.error(RuntimeError, f"the {name} of conv2d is one number or a pair", f"{name} = {value}")
    if min(pair) < least:
        what = "negative" if least == 0 else "non-positive"
        raise check.error(
            RuntimeError,
            f"{what} {name} is not supported: the {name} of conv2d is at least {least}",
            f"{name} = {value}",
        )
    return pair


def _margins(
    padding: str | int | Sequence[int], kernel_size: Sequence[int], stride: Sequence[int], dilation: Sequence[int]
) -> tuple[int, int, int, int]:
    """Columns of zeros left and right, rows of zeros above and below."""
    if padding == "valid":
        return (0, 0, 0, 0)
    if padding == "same":
        if max(stride) > 1:
            raise check.error(
                RuntimeError,
                "padding='same' is not supported for strided convolutions, since it keeps the size of the input",
                f"stride = {tuple(stride)}",
                "Give the padding as a number.",
            )
        down, across = (d * (taps - 1) for d, taps in zip(dilation, kernel_size, strict=True))
        return (across // 2, across - across // 2, down // 2, down - down // 2)
    if isinstance(padding, str):
        raise check.error(
            RuntimeError,
            f"Invalid padding string: {padding!r}; the padding of conv2d is 'same', 'valid' or numbers",
            f"{padding!r}",
        )
    down, across = _pair("padding", padding, least=0)
    return (across, across, down, down)


def _validate_shapes(input: Tensor, weight: Tensor, bias: Tensor | None, groups: int) -> None:
    if weight.dim() != 4 or min(weight.shape) == 0:
        raise check.error(
            RuntimeError,
            "the weight of conv2d has the shape (out_channels, in_channels / groups, rows, columns), none of them 0",
            f"a weight of shape {check.shape(weight)}",
        )
    out_channels, channels, rows, columns = weight.shape
    if groups < 1 or out_channels % groups:
        raise check.error(
            RuntimeError,
            "groups is a positive number which divides the output channels",
            f"groups = {groups} for {out_channels} output channels",
        )
    if input.dim() not in (3, 4) or input.shape[-3] != channels * groups:
        layer = f"Conv2d({channels * groups}, {out_channels}, ({rows}, {columns}), groups={groups})"
        rule = "Expected 3D (unbatched) or 4D (batched) input to conv2d"
        if input.dim() in (3, 4):
            rule = f"Given groups={groups}, weight of size {list(weight.shape)}, expected input{list(input.shape)} to"
            rule += f" have {channels * groups} channels, but got {input.shape[-3]} channels instead"
        raise check.error(
            RuntimeError,
            f"{rule}: {layer} takes inputs of shape (N, {channels * groups}, H, W) or ({channels * groups}, H, W)",
            f"an input of shape {check.shape(input)}",
            _likely_fix(input, channels * groups),
        )
    if min(input.shape[-2:]) == 0:
        raise check.error(
            RuntimeError, "an image has at least one row and one column", f"an input of shape {check.shape(input)}"
        )
    if bias is not None and tuple(bias.shape) != (out_channels,):
        raise check.error(
            RuntimeError,
            f"expected bias to be 1-dimensional with {out_channels} elements, one for each output channel of conv2d",
            f"a bias of shape {check.shape(bias)}",
        )


def _likely_fix(input: Tensor, in_channels: int) -> str:
    if input.dim() == 2 and in_channels == 1:
        return "Did you mean input.unsqueeze(0)?"
    if input.dim() == 3 and in_channels == 1:
        return "Did you mean input.unsqueeze(1)?"
    if input.dim() in (3, 4) and input.shape[-1] == in_channels:
        return "Did you mean input.movedim(-1, -3)?"
    return ""


def _validate_reach(padded: Sequence[int], kernel_size: Sequence[int], dilation: Sequence[int]) -> None:
    height, width = (d * (taps - 1) + 1 for d, taps in zip(dilation, kernel_size, strict=True))
    if height > padded[0] or width > padded[1]:
        raise check.error(
            RuntimeError,
            f"Calculated padded input size per channel: ({padded[0]} x {padded[1]}). Kernel size: ({height} x {width})."
            " Kernel size can't be greater than actual input size",
            f"a kernel that reaches over {height} x {width} values, and a padded input of {padded[0]} x {padded[1]}",
            "Did you mean to pad more, or to pool less before?",
        )
