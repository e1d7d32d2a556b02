"""What the activations cost: a few operations an element, one read and one write."""

from typing import Any

import torch

from nacre.core.cost import Cost
from nacre.core.spec import Letters

COMPLEXITY = "time O(N), saved O(N)"


def sizes(layer: torch.nn.Module, input: torch.Tensor) -> dict[str, Any]:
    """N elements, from a call of the layer."""
    return {
        "elements": input.numel(),
        "itemsize": input.element_size(),
        "input_gradient": input.requires_grad,
    }


def gelu_sizes(layer: torch.nn.GELU, input: torch.Tensor) -> dict[str, Any]:
    """N elements and which GELU, from a call of the layer."""
    return {**sizes(layer, input), "tanh": layer.approximate == "tanh"}


def _inputs(layer: torch.nn.Module, size: int) -> tuple[torch.Tensor]:
    return (torch.empty(size, device="meta", requires_grad=True),)


LETTERS = Letters(lambda sizes: {"elements": "N"}, _inputs)


def gelu_cost(elements: int, tanh: bool = False, itemsize: int = 4, input_gradient: bool = True) -> Cost:
    """The exact bill.

    Forward with erf, an element: x / sqrt(2), erf, 1 +, x / 2, product (5).
    Backward with erf: P (4), p: square, scale, exp, scale (4), x p, the sum, g times it (3).
    Forward with tanh: u: square, a times, 1 +, x times, scale (5), tanh (1), 1 +, x / 2, product (3).
    Backward with tanh: u and t (6), (1 + t) / 2 (2), du/dx beyond the square (3), its term: square, 1 -, x / 2, two
    products (5), the sum, g times it (2).
    """
    return _cost(elements, 5 + 4 * tanh, 11 + 7 * tanh, itemsize, input_gradient)


def relu_cost(elements: int, itemsize: int = 4, input_gradient: bool = True) -> Cost:
    """The exact bill: one comparison an element, forward and backward."""
    return _cost(elements, 1, 1, itemsize, input_gradient)


def silu_cost(elements: int, itemsize: int = 4, input_gradient: bool = True) -> Cost:
    """The exact bill.

    Forward, an element: sigmoid, product (2). Backward: sigmoid, 1 - s, times x, 1 +, times s, times g (6).
    """
    return _cost(elements, 2, 6, itemsize, input_gradient)


def tanh_cost(elements: int, itemsize: int = 4, input_gradient: bool = True) -> Cost:
    """The exact bill: forward one tanh an element; backward a square, 1 - it, times g (3)."""
    return _cost(elements, 1, 3, itemsize, input_gradient)


def sigmoid_cost(elements: int, itemsize: int = 4, input_gradient: bool = True) -> Cost:
    """The exact bill: forward one sigmoid an element; backward 1 - y, times y, times g (3)."""
    return _cost(elements, 1, 3, itemsize, input_gradient)


def _cost(elements: int, forward: int, backward: int, itemsize: int, input_gradient: bool) -> Cost:
    """One tensor is kept, input or output; backward reads it and g, and writes the input's gradient."""
    return Cost(
        elementwise_flops=elements * forward,
        backward_elementwise_flops=elements * backward * input_gradient,
        bytes=itemsize * 2 * elements,
        backward_bytes=itemsize * 3 * elements * input_gradient,
        saved_bytes=itemsize * elements * input_gradient,
    )
