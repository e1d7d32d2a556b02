"""What a layer costs: exact integers from shapes.

One multiply-add is 2 FLOPs. ``flops`` and ``backward_flops`` count matrix-type work (matmul, convolution, the products
inside attention and recurrence), the numbers that papers quote; ``elementwise_flops`` count everything else apart, one
for each addition, multiplication, division, comparison, square root, exponential or other function of one element. So a
sum, a mean or a maximum is one for each value read; softmax, normalisation, dropout and losses are the sum of what
their formulas do to an element. Copies, gathers, padding and views are none: they have bytes
alone. What no formula decides by the sizes (sorting, eigenvalues) is named in a model's bill, with its bytes.

``bytes`` is the compulsory traffic: each input and parameter read once, each output written once. ``saved_bytes`` is
what is kept for the backward, parameters not counted and each storage once.
"""

from dataclasses import dataclass, fields
from typing import Any


@dataclass(frozen=True)
class Cost:
    """The bill of one call of a layer, forward and backward.

    Example:
        >>> Cost(parameters=6, flops=12) + Cost(parameters=2, flops=4)
        Cost(parameters=8, flops=16, backward_flops=0, elementwise_flops=0, backward_elementwise_flops=0, \
bytes=0, backward_bytes=0, saved_bytes=0)
    """

    parameters: int = 0
    flops: int = 0
    backward_flops: int = 0
    elementwise_flops: int = 0
    backward_elementwise_flops: int = 0
    bytes: int = 0
    backward_bytes: int = 0
    saved_bytes: int = 0

    def __add__(self, other: "Cost") -> "Cost":
        if not isinstance(other, Cost):
            return NotImplemented
        return Cost(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(Cost)))


def share(number: Any, parts: Any) -> Any:
    """The equal share of a number which ``parts`` divide, an integer; of a symbol, an expression.

    Example:
        >>> share(12, 4)
        3
    """
    return number // parts if isinstance(number, int) else number / parts
