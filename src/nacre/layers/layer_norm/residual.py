"""LayerNorm of a residual stream and of the branch that is added to it, with the branch's dropout, in one pass."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nacre.core import check
from nacre.core.choice import cpp_kernel, small
from nacre.core.op import Op
from nacre.core.random import dropout_seed
from nacre.layers.layer_norm import residual_formula
from nacre.layers.layer_norm.layer import validate

_TORCH_BELOW = 65536


def _fake(residual: Tensor, branch: Tensor, seed: Tensor | None, *others: Any) -> tuple[Tensor, Tensor]:
    """With any mask: to trace the generator's rounds would take long."""
    return residual_formula.forward(residual, torch.empty_like(branch), None, *others)[0]


def _fake_backward(
    grad_output: Tensor | None, grad_sum: Tensor | None, sum: Tensor, seed: Tensor | None, *others: Any
) -> tuple[Tensor | None, ...]:
    needs: Sequence[bool] = others[-1]
    found = residual_formula.backward((grad_output, grad_sum), (sum, None, *others[:-1]), list(needs))
    if seed is None or not needs[1]:
        return found
    return found[0], torch.empty_like(sum, memory_format=torch.contiguous_format), *found[2:]


_op = Op(
    "residual_dropout_layer_norm(Tensor residual, Tensor branch, Tensor? seed, float p, SymInt[] normalized_shape,"
    " Tensor? weight, Tensor? bias, float eps) -> (Tensor output, Tensor sum)",
    forward=residual_formula.forward,
    backward=residual_formula.backward,
    saved=("sum", "seed", "p", "normalized_shape", "weight", "eps"),
    gradients=("residual", "branch", "weight", "bias"),
    passes={"branch": "residual"},
    outputs=2,
    fake=_fake,
    fake_backward=_fake_backward,
    kernels=[
        cpp_kernel(),
    ],
)


def residual_dropout_layer_norm(
    residual: Tensor,
    branch: Tensor,
    p: float,
    training: bool,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """LayerNorm of ``sum = residual + dropout(branch, p, training)``, and the sum itself.

    Args:
        residual: the stream that passes through, of shape (\\*, normalized_shape).
        branch: what is added to it, of the same shape, dtype and device.
        p: probability of an element of the branch to be dropped, from 0 to 1.
        training: drop; otherwise the branch is added as it is.
        normalized_shape: sizes of the last dimensions, which are normalised together.
        weight: scale of shape ``normalized_shape``.
        bias: shift of shape ``normalized_shape``.
        eps: added to the variance.

    Raises:
        ValueError: p outside 0 to 1.

    Example:
        >>> import torch
        >>> zero, values = torch.zeros(2), torch.tensor([0.0, 2.0])
        >>> residual_dropout_layer_norm(zero, values, 0.5, False, (2,), None, None, 0.0)
        (tensor([-1.,  1.]), tensor([0., 2.]))
    """
    check.probability("dropout", p)
    normalized_shape = tuple(normalized_shape)
    validate(residual, normalized_shape, weight, bias)
    seed = dropout_seed(branch, p, training)
    if seed is None:
        if small("residual_dropout_layer_norm", branch, _TORCH_BELOW):
            sum = residual + branch
            return torch.layer_norm(sum, normalized_shape, weight, bias, eps), sum
        p = 0.0
    return _op(residual, branch, seed, float(p), normalized_shape, weight, bias, eps)
