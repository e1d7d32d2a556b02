"""What softmax and log-softmax cost: a handful of operations an element, one read and one write."""

from typing import Any

import torch

from nacre.core.cost import Cost
from nacre.core.spec import Letters

COMPLEXITY = "time O(N D), saved O(N D)"


def implicit_dim(dimensions: int) -> int:
    """The dimension which torch.nn takes where none is given: 0 of 0, 1 or 3 dimensions, else 1."""
    return 0 if dimensions in (0, 1, 3) else 1


def sizes(layer: torch.nn.Softmax | torch.nn.LogSoftmax, input: torch.Tensor) -> dict[str, Any]:
    """N slices of D values each, from a call of the layer."""
    shape = list(input.shape) or [1]
    features = shape.pop(implicit_dim(input.dim()) if layer.dim is None else layer.dim)
    rows = 1
    for size in shape:
        rows *= size
    return {
        "rows": rows,
        "features": features,
        "itemsize": input.element_size(),
        "input_gradient": input.requires_grad,
    }


def _inputs(layer: torch.nn.Softmax | torch.nn.LogSoftmax, size: int) -> tuple[torch.Tensor]:
    dim = layer.dim or 0
    dimensions = max(dim + 1 if dim >= 0 else -dim, 2)
    return (torch.empty([size] * dimensions, device="meta", requires_grad=True),)


LETTERS = Letters(lambda sizes: {"rows": "N", "features": "D"}, _inputs)


def softmax_cost(rows: int, features: int, itemsize: int = 4, input_gradient: bool = True) -> Cost:
    """The exact bill.

    Forward, an element: maximum, subtract, exponential, sum, divide (5).
    Backward, an element: g s, sum, subtract, times s (4).
    """
    return _cost(rows * features, 5 * rows * features, itemsize, input_gradient)


def log_softmax_cost(rows: int, features: int, itemsize: int = 4, input_gradient: bool = True) -> Cost:
    """The exact bill.

    Forward, an element: maximum, subtract, exponential, sum, subtract (5); a slice: the logarithm (1).
    Backward, an element: exponential, sum, times s, subtract (4).
    """
    return _cost(rows * features, 5 * rows * features + rows, itemsize, input_gradient)


def _cost(elements: int, forward: int, itemsize: int, input_gradient: bool) -> Cost:
    """The output is kept; backward reads it and g, and writes the input's gradient."""
    return Cost(
        elementwise_flops=forward,
        backward_elementwise_flops=4 * elements * input_gradient,
        bytes=itemsize * 2 * elements,
        backward_bytes=itemsize * 3 * elements * input_gradient,
        saved_bytes=itemsize * elements * input_gradient,
    )
