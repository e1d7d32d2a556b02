"""Dropout as the last step of a residual branch, in one pass."""

from collections.abc import Sequence

import torch
from torch import Tensor

from nacre.core import check
from nacre.core.choice import cpp_kernel, small
from nacre.core.op import Op
from nacre.core.random import dropout_seed
from nacre.layers.dropout import formula

_TORCH_BELOW = 65536


def _fake(residual: Tensor, branch: Tensor, seed: Tensor | None, p: float) -> Tensor:
    """With any mask: to trace the generator's rounds would take long."""
    return residual + torch.empty_like(branch)


def _fake_backward(grad: Tensor, seed: Tensor | None, p: float, needs: Sequence[bool]) -> Tensor | None:
    return None if seed is None or not needs[0] else torch.empty_like(grad)


_op = Op(
    "residual_dropout(Tensor residual, Tensor branch, Tensor? seed, float p) -> Tensor output",
    forward=formula.residual_forward,
    backward=formula.residual_backward,
    saved=("seed", "p"),
    gradients=("branch",),
    passes={"residual": "output", "branch": "output"},
    fake=_fake,
    fake_backward=_fake_backward,
    kernels=[
        cpp_kernel(),
    ],
)


def residual_dropout(residual: Tensor, branch: Tensor, p: float, training: bool) -> Tensor:
    """``residual + dropout(branch, p, training)``, read and written once; the residual's gradient is not copied.

    Args:
        residual: the stream that passes through.
        branch: what is added to it, of the same shape, dtype and device.
        p: probability of an element of the branch to be dropped, from 0 to 1.
        training: drop; otherwise the branch is added as it is.

    Raises:
        ValueError: p outside 0 to 1.

    Example:
        >>> import torch
        >>> residual_dropout(torch.ones(2), torch.ones(2), 0.5, training=False)
        tensor([2., 2.])
    """
    check.probability("dropout", p)
    seed = dropout_seed(branch, p, training)
    if seed is None:
        if small("residual_dropout", branch, _TORCH_BELOW):
            return residual + branch
        p = 0.0
    return _op(residual, branch, seed, float(p))
