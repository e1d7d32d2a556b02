"""What Linear costs: one matrix product forward, two of the same size backward."""

from typing import Any

import torch

from nacre.core.cost import Cost
from nacre.core.spec import Letters

COMPLEXITY = "time O(N D E), saved O(N D)"


def sizes(layer: torch.nn.Linear, input: torch.Tensor) -> dict[str, Any]:
    """N rows of D features in and E features out, from a call of the layer."""
    rows = 1
    for size in input.shape[:-1]:
        rows *= size
    return {
        "rows": rows,
        "in_features": layer.in_features,
        "out_features": layer.out_features,
        "bias": layer.bias is not None,
        "itemsize": input.element_size(),
        "input_gradient": input.requires_grad,
        "weight_gradient": layer.weight.requires_grad,
        "bias_gradient": layer.bias is not None and layer.bias.requires_grad,
    }


def _inputs(layer: torch.nn.Linear, size: int) -> tuple[torch.Tensor]:
    return (layer.weight.new_empty(size, layer.in_features, device="meta", requires_grad=True),)


LETTERS = Letters(lambda sizes: {"rows": "N", "in_features": "D", "out_features": "E"}, _inputs)


def cost(
    rows: int,
    in_features: int,
    out_features: int,
    bias: bool = True,
    itemsize: int = 4,
    input_gradient: bool = True,
    weight_gradient: bool = True,
    bias_gradient: bool = True,
) -> Cost:
    """The exact bill.

    Forward: each of the N E outputs is a sum of D products, 2 N D E FLOPs; the bias is one addition an output.
    Backward: g W sums E products for each of N D values, g' x sums N products for each of E D weights, 2 N D E FLOPs
    each; the bias's gradient is one addition for each of the N E values of g.
    Traffic backward: g is read once; g W reads W and writes dx, g' x reads x and writes dW, the bias writes db.
    Kept: the input, wherever any gradient is asked for.
    """
    inputs, outputs, weights = rows * in_features, rows * out_features, in_features * out_features
    parameters = weights + out_features * bias
    product = 2 * rows * in_features * out_features
    recorded = 1 - (1 - input_gradient) * (1 - weight_gradient) * (1 - bias_gradient)
    return Cost(
        parameters=parameters,
        flops=product,
        backward_flops=product * (input_gradient + weight_gradient),
        elementwise_flops=outputs * bias,
        backward_elementwise_flops=outputs * bias_gradient,
        bytes=itemsize * (inputs + outputs + parameters),
        backward_bytes=itemsize
        * (outputs * recorded + (weights + inputs) * (input_gradient + weight_gradient) + out_features * bias_gradient),
        saved_bytes=itemsize * inputs * recorded,
    )
