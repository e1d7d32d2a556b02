"""What LayerNorm costs: no matrix product, a handful of operations an element, one read and one write."""

from typing import Any

import torch

from nacre.core.cost import Cost
from nacre.core.spec import Letters

COMPLEXITY = "time O(N D), saved O(N D)"


def sizes(layer: torch.nn.LayerNorm, input: torch.Tensor) -> dict[str, Any]:
    """N rows of D features, from a call of the layer."""
    features = 1
    for size in layer.normalized_shape:
        features *= size
    return {
        "rows": input.numel() // features if features else 0,
        "features": features,
        "weight": layer.weight is not None,
        "bias": layer.bias is not None,
        "itemsize": input.element_size(),
        "statistics_itemsize": max(4, input.element_size()),
        "input_gradient": input.requires_grad,
        "weight_gradient": layer.weight is not None and layer.weight.requires_grad,
        "bias_gradient": layer.bias is not None and layer.bias.requires_grad,
    }


def _inputs(layer: torch.nn.LayerNorm, size: int) -> tuple[torch.Tensor]:
    dtype = None if layer.weight is None else layer.weight.dtype
    return (torch.empty(size, *layer.normalized_shape, dtype=dtype, device="meta", requires_grad=True),)


LETTERS = Letters(lambda sizes: {"rows": "N", "features": "D"}, _inputs)


def cost(
    rows: int,
    features: int,
    weight: bool = True,
    bias: bool = True,
    itemsize: int = 4,
    statistics_itemsize: int = 4,
    input_gradient: bool = True,
    weight_gradient: bool = True,
    bias_gradient: bool = True,
) -> Cost:
    """The exact bill.

    Forward, an element: sum, subtract, square, sum, subtract, scale (6), and one each for weight and bias; a row:
    two divisions by D, the addition of eps, the reciprocal square root (4).
    Backward, an element: the normalised value (2), g w (1, with weight), the input gradient: h n, two sums, two
    subtractions, n times its mean, the scale (7); the weight's g n and its sum (2); the bias's sum (1); a row: two
    divisions (2).
    Traffic backward: g; for the normalised value x and the statistics; the weight for dx; each gradient is written.
    Kept: the input and two statistics a row, wherever any gradient is asked for.
    """
    elements = rows * features
    parameters = features * (weight + bias)
    statistics = 2 * rows * statistics_itemsize
    of_weight, of_bias = weight * weight_gradient, bias * bias_gradient
    normalised = max(input_gradient, of_weight)
    recorded = max(normalised, of_bias)
    return Cost(
        parameters=parameters,
        elementwise_flops=elements * (6 + weight + bias) + 4 * rows,
        backward_elementwise_flops=elements * (2 * normalised + input_gradient * (7 + weight) + 2 * of_weight + of_bias)
        + 2 * rows * input_gradient,
        bytes=itemsize * (2 * elements + parameters),
        backward_bytes=itemsize * elements * (recorded + normalised + input_gradient)
        + itemsize * features * (weight * input_gradient + of_weight + of_bias)
        + statistics * normalised,
        saved_bytes=(itemsize * elements + statistics) * recorded,
    )


def residual_cost(
    rows: int,
    features: int,
    weight: bool = True,
    bias: bool = True,
    itemsize: int = 4,
    drops: bool = True,
    residual_gradient: bool = True,
    branch_gradient: bool = True,
    sum_gradient: bool = True,
    weight_gradient: bool = True,
    bias_gradient: bool = True,
) -> Cost:
    """The exact bill of ``sum = residual + dropout(branch)`` and of its LayerNorm.

    ``drops`` tells whether dropout is at work, ``sum_gradient`` whether what follows reads the sum, too, which then
    brings a gradient of its own.

    Forward, an element: the random word, its comparison with p, times the mask, times the scale (4, where it drops),
    the addition (1), and LayerNorm's as in :func:`cost`.
    Backward, an element: mean and variance again (4), LayerNorm's as in :func:`cost`, the sum's own gradient (1), the
    branch's gradient (4, where it drops). Where nothing is dropped residual and branch have one gradient.
    Kept: the sum, from which the statistics follow, and the seed of what is dropped.
    """
    elements, seed = rows * features, 8
    input_gradient = max(residual_gradient, branch_gradient)
    norm = cost(
        rows,
        features,
        weight,
        bias,
        itemsize,
        statistics_itemsize=0,  # none are kept
        input_gradient=input_gradient,
        weight_gradient=weight_gradient,
        bias_gradient=bias_gradient,
    )
    recorded = max(input_gradient, weight * weight_gradient, bias * bias_gradient)
    masked = drops * branch_gradient
    written = residual_gradient + branch_gradient * max(drops, 1 - residual_gradient)
    return Cost(
        parameters=norm.parameters,
        elementwise_flops=elements * (1 + 4 * drops) + norm.elementwise_flops,
        backward_elementwise_flops=norm.backward_elementwise_flops
        + elements * (4 * recorded + sum_gradient * input_gradient + 4 * masked)
        + 4 * rows * recorded,
        bytes=itemsize * 2 * elements + norm.bytes,
        backward_bytes=norm.backward_bytes
        + itemsize * elements * (sum_gradient * input_gradient + written - input_gradient)
        + seed * masked,
        saved_bytes=norm.saved_bytes + seed * drops * recorded,
    )
