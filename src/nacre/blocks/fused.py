"""Neighbouring layers of a block in one pass, as long as nobody looks at what they pass to each other."""

from typing import TypeGuard, TypeVar

from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from nacre.core.check import under_autocast
from nacre.core.choice import unserved
from nacre.layers import dropout, layer_norm
from nacre.layers.dropout import Dropout
from nacre.layers.layer_norm import LayerNorm

Layer = TypeVar("Layer", bound=nn.Module)


def residual_dropout(residual: Tensor, branch: Tensor, drop: nn.Module) -> Tensor:
    """``residual + drop(branch)``.

    Args:
        residual: the stream that passes through.
        branch: what is added to it.
        drop: the branch's last module, as a rule a :class:`nacre.Dropout`.
    """
    if runs_unseen(drop, Dropout) and _alike(residual, branch):
        return dropout.residual_dropout(residual, branch, drop.p, drop.training)
    return residual + drop(branch)


def residual_dropout_layer_norm(
    residual: Tensor, branch: Tensor, drop: nn.Module, norm: nn.Module
) -> tuple[Tensor, Tensor]:
    """``norm(sum)`` and ``sum = residual + drop(branch)``.

    Args:
        residual: the stream that passes through.
        branch: what is added to it.
        drop: the branch's last module, as a rule a :class:`nacre.Dropout`.
        norm: the module that reads the sum, as a rule a :class:`nacre.LayerNorm`.
    """
    if runs_unseen(norm, LayerNorm) and runs_unseen(drop, Dropout) and _alike(residual, branch):
        return layer_norm.residual_dropout_layer_norm(
            residual, branch, drop.p, drop.training, norm.normalized_shape, norm.weight, norm.bias, norm.eps
        )
    sum = residual_dropout(residual, branch, drop)
    return norm(sum), sum


def runs_unseen(module: nn.Module, kind: type[Layer]) -> TypeGuard[Layer]:
    """Whether the module computes what the class ``kind`` does, and calling it does nothing else: no hook would run."""
    return (
        type(module) is kind
        and "forward" not in vars(module)
        and not (module._forward_hooks or module._forward_pre_hooks)
        and not (module._backward_hooks or module._backward_pre_hooks)
        and not _has_any_global_hook()
    )


def _alike(residual: Tensor, branch: Tensor) -> bool:
    """Whether the sum has the shape and dtype of both; autocast makes a branch that has not."""
    return (
        not unserved(residual, branch)
        and residual.shape == branch.shape
        and residual.dtype == branch.dtype
        and residual.device == branch.device
        and not under_autocast(residual)
    )
