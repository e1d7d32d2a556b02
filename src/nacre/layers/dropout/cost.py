"""What Dropout costs: a random word and three operations an element, one read and one write; nothing in evaluation."""

from typing import Any

import torch

from nacre.core.cost import Cost
from nacre.core.spec import Letters

COMPLEXITY = "time O(N), saved O(1)"

SEED_BYTES = 8


def sizes(layer: torch.nn.Dropout, input: torch.Tensor) -> dict[str, Any]:
    """N elements, and whether any can be dropped, from a call of the layer."""
    return {
        "elements": input.numel(),
        "active": layer.training and layer.p > 0 and input.numel() > 0,
        "itemsize": input.element_size(),
        "input_gradient": input.requires_grad,
    }


def _inputs(layer: torch.nn.Dropout, size: int) -> tuple[torch.Tensor]:
    return (torch.empty(size, device="meta", requires_grad=True),)


LETTERS = Letters(lambda sizes: {"elements": "N"}, _inputs)


def cost(elements: int, active: bool = True, itemsize: int = 4, input_gradient: bool = True) -> Cost:
    """The exact bill.

    Forward and backward, an element: the random word, its comparison with p, times the mask, times the scale (4).
    In evaluation, and where p is 0, the output is the input itself and costs nothing.
    """
    recorded = active * input_gradient
    return Cost(
        elementwise_flops=4 * elements * active,
        backward_elementwise_flops=4 * elements * recorded,
        bytes=itemsize * 2 * elements * active,
        backward_bytes=(itemsize * 2 * elements + SEED_BYTES) * recorded,
        saved_bytes=SEED_BYTES * recorded,
    )


def residual_cost(
    elements: int,
    drops: bool = True,
    itemsize: int = 4,
    residual_gradient: bool = True,
    branch_gradient: bool = True,
) -> Cost:
    """The exact bill of ``residual + dropout(branch)``.

    Forward, an element: the random word, its comparison with p, times the mask, times the scale (4, where it drops),
    the addition (1). Backward, an element of the branch's gradient: the same 4. The residual's gradient is that of the
    output, as the branch's is where nothing is dropped: neither is read nor written.
    """
    masked = drops * branch_gradient
    return Cost(
        elementwise_flops=elements * (1 + 4 * drops),
        backward_elementwise_flops=4 * elements * masked,
        bytes=itemsize * 3 * elements,
        backward_bytes=(itemsize * 2 * elements + SEED_BYTES) * masked,
        saved_bytes=SEED_BYTES * drops * max(residual_gradient, branch_gradient),
    )
