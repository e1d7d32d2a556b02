"""Two linear maps with an activation and dropout between them, which keep only what they must for the backward."""

from typing import Any

import torch
from torch import Tensor

from nacre.core import check
from nacre.core.choice import cpp_kernel
from nacre.core.flop_counter import count_flops
from nacre.core.op import Op
from nacre.core.random import dropout_seed
from nacre.layers.linear import feed_forward_formula as formula

ACTIVATIONS = ("gelu", "gelu_tanh", "relu", "silu")
DTYPES = (torch.float32, torch.float64)
"""What the op is for: half precision would round what it makes anew in another way."""


def _fake(input: Tensor, weight1: Tensor, bias1: Tensor | None, weight2: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    """Shapes only: to trace the generator's rounds would take long."""
    leading = input.shape[:-1]
    return input.new_empty((*leading, weight2.shape[0])), input.new_empty((*leading, weight1.shape[0]))


def _fake_backward(
    grad: Tensor, input: Tensor, weight1: Tensor, bias1: Tensor | None, weight2: Tensor, *others: Any
) -> tuple[Tensor | None, ...]:
    shapes = (input.shape, weight1.shape, weight1.shape[:1], weight2.shape, weight2.shape[:1])
    return tuple(grad.new_empty(shape) if needed else None for shape, needed in zip(shapes, others[-1], strict=True))


_op = Op(
    "feed_forward(Tensor input, Tensor weight1, Tensor? bias1, Tensor weight2, Tensor? bias2, str activation,"
    " Tensor? seed, float p) -> (Tensor output, Tensor hidden)",
    forward=formula.forward,
    backward=formula.backward,
    saved=("input", "weight1", "bias1", "weight2", "activation", "seed", "p", "hidden"),
    gradients=("input", "weight1", "bias1", "weight2", "bias2"),
    fake=_fake,
    fake_backward=_fake_backward,
    kernels=[cpp_kernel(dtypes=DTYPES)],
)
count_flops(_op)


def feed_forward(
    input: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    activation: str,
    p: float,
    training: bool,
) -> Tensor:
    """``linear(dropout(activation(linear(input, weight1, bias1)), p, training), weight2, bias2)``.

    Args:
        input: rows of shape (\\*, D), in float32 or float64.
        weight1: of shape (H, D).
        bias1: of shape (H), or None.
        weight2: of shape (E, H).
        bias2: of shape (E), or None.
        activation: one of ``ACTIVATIONS``.
        p: probability of a hidden feature to be dropped, from 0 to 1.
        training: drop; otherwise all are kept.

    Raises:
        ValueError: p outside 0 to 1.

    Example:
        >>> import torch
        >>> identity = torch.eye(2)
        >>> feed_forward(torch.tensor([1.0, -1.0]), identity, None, identity, None, "relu", 0.5, training=False)
        tensor([1., 0.])
    """
    check.probability("dropout", p)
    seed = dropout_seed(input, p, training)
    return _op(input, weight1, bias1, weight2, bias2, activation, seed, 0.0 if seed is None else float(p))
