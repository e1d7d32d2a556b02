"""What Conv2d costs: a sum of (C / groups) I J products for every output value, and twice that backward."""

from collections.abc import Mapping
from typing import Any

import torch

from nacre.core.cost import Cost, share
from nacre.core.spec import Letters

COMPLEXITY = "time O(N E C I J P Q), saved O(N C H W)"


def outputs(size: int, kernel_size: int, stride: int, dilation: int) -> int:
    """How many windows, ``stride`` apart, lie within ``size`` rows (padding included)."""
    return (size - dilation * (kernel_size - 1) - 1) // stride + 1


def sizes(layer: torch.nn.Conv2d, input: torch.Tensor) -> dict[str, Any]:
    """N samples of C channels and H x W values, E output channels, I x J taps, from a call of the layer."""
    left, right, top, bottom = layer._reversed_padding_repeated_twice
    return {
        "samples": input.shape[0] if input.dim() == 4 else 1,
        "in_channels": layer.in_channels,
        "out_channels": layer.out_channels,
        "height": input.shape[-2],
        "width": input.shape[-1],
        "kernel_height": layer.kernel_size[0],
        "kernel_width": layer.kernel_size[1],
        "stride": tuple(layer.stride),
        "padding": (top + bottom, left + right),
        "dilation": tuple(layer.dilation),
        "groups": layer.groups,
        "padding_mode": layer.padding_mode,
        "bias": layer.bias is not None,
        "itemsize": input.element_size(),
        "input_gradient": input.requires_grad,
        "weight_gradient": layer.weight.requires_grad,
        "bias_gradient": layer.bias is not None and layer.bias.requires_grad,
    }


def _names(sizes: Mapping[str, Any]) -> dict[str, str]:
    names = {"samples": "N", "out_channels": "E", "in_channels": "C", "kernel_height": "I", "kernel_width": "J"}
    names |= {"height": "H", "width": "W"}
    return names | {"groups": "G"} if sizes["groups"] > 1 else names


def _inputs(layer: torch.nn.Conv2d, size: int) -> tuple[torch.Tensor]:
    reach = [step * (taps - 1) for step, taps in zip(layer.dilation, layer.kernel_size, strict=True)]
    shape = (size, layer.in_channels, reach[0] + size, reach[1] + size)
    return (layer.weight.new_empty(shape, device="meta", requires_grad=True),)


def _where(
    height: Any, width: Any, kernel_height: Any, kernel_width: Any, stride: Any, padding: Any, dilation: Any, **_: Any
) -> dict[str, Any]:
    return {
        "P": outputs(height + padding[0], kernel_height, stride[0], dilation[0]),
        "Q": outputs(width + padding[1], kernel_width, stride[1], dilation[1]),
    }


# P windows of I rows, the stride apart, cover an image: H is at most a multiple of P I
LETTERS = Letters(_names, _inputs, at_most={"H": ("P I",), "W": ("Q J",), "G": ("C", "E")}, where=_where)


def cost(
    samples: int,
    in_channels: int,
    out_channels: int,
    height: int,
    width: int,
    kernel_height: int,
    kernel_width: int,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
    groups: int = 1,
    padding_mode: str = "zeros",
    bias: bool = True,
    itemsize: int = 4,
    input_gradient: bool = True,
    weight_gradient: bool = True,
    bias_gradient: bool = True,
) -> Cost:
    """The exact bill; ``padding`` is the number of rows and of columns added, both sides together.

    Forward: each of the N E P Q outputs is a sum of C / groups I J products, products with the padding's zeros
    included, as papers count them; the bias is one addition an output.
    Backward: each of those products w x has the two derivatives g w and g x, so either gradient sums as many products
    as the forward. Zeros that an implementation sets between the values of a strided gradient, or around it, are
    no part of that sum and not counted. The bias's gradient is one addition an output. Where padding repeats values of
    the input, its gradients are added to theirs.
    Traffic: g is read once; the input's gradient reads w and writes dx, the weight's reads x and writes dw.
    Kept: the input; padded by another mode than zeros, its padded copy, beside which torch's reflection and
    replication keep the input for their own backward.
    """
    padded_height, padded_width = height + padding[0], width + padding[1]
    values = samples * in_channels * height * width
    padded_values = samples * in_channels * padded_height * padded_width
    results = (
        samples
        * out_channels
        * outputs(padded_height, kernel_height, stride[0], dilation[0])
        * outputs(padded_width, kernel_width, stride[1], dilation[1])
    )
    products = share(in_channels, groups) * kernel_height * kernel_width
    weights = out_channels * products
    parameters = weights + out_channels * bias
    repeats = 0 if padding_mode == "zeros" else 1
    kept_twice = input_gradient * (padding_mode in ("reflect", "replicate"))
    recorded = 1 - (1 - input_gradient) * (1 - weight_gradient) * (1 - bias_gradient)
    return Cost(
        parameters=parameters,
        flops=2 * results * products,
        backward_flops=2 * results * products * (input_gradient + weight_gradient),
        elementwise_flops=results * bias,
        backward_elementwise_flops=results * bias_gradient + (padded_values - values) * repeats * input_gradient,
        bytes=itemsize * (values + results + parameters),
        backward_bytes=itemsize
        * (results * recorded + (weights + values) * (input_gradient + weight_gradient) + out_channels * bias_gradient),
        saved_bytes=itemsize * (values * (1 - repeats + kept_twice) + padded_values * repeats) * recorded,
    )
