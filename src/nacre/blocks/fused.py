"""Neighbouring layers of a block in one pass, as long as nobody looks at what they pass to each other."""

from collections.abc import Callable
from typing import Any, TypeGuard, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from nacre.core.check import under_autocast
from nacre.core.choice import unserved
from nacre.layers import dropout, layer_norm, linear
from nacre.layers.activation import GELU, ReLU, SiLU, gelu, relu, silu
from nacre.layers.dropout import Dropout
from nacre.layers.layer_norm import LayerNorm
from nacre.layers.linear import Linear
from nacre.layers.linear.feed_forward import DTYPES

Layer = TypeVar("Layer", bound=nn.Module)

# torch's functions which a TransformerEncoderLayer may have for its activation, with the layer and the function of ours
FUNCTIONS: dict[Any, tuple[str, Callable[[Tensor], Tensor]]] = {
    torch.nn.functional.gelu: ("gelu", gelu),
    torch.nn.functional.relu: ("relu", relu),
    torch.nn.functional.silu: ("silu", silu),
}


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


def feed_forward(x: Tensor, first: nn.Module, activation: Any, drop: nn.Module | None, second: nn.Module) -> Tensor:
    """``second(drop(activation(first(x))))``.

    Args:
        x: rows of features.
        first: to the hidden features, as a rule a :class:`nacre.Linear`.
        activation: a module or a function.
        drop: what follows the activation, as a rule a :class:`nacre.Dropout`; None for nothing.
        second: from the hidden features, as a rule a :class:`nacre.Linear`.
    """
    name = activation_name(activation)
    if (
        name
        and runs_unseen(first, Linear)
        and runs_unseen(second, Linear)
        and (drop is None or runs_unseen(drop, Dropout))
        and _fits(x, first, second)
    ):
        p, training = (0.0, False) if drop is None else (drop.p, drop.training)
        return linear.feed_forward(x, first.weight, first.bias, second.weight, second.bias, name, p, training)
    hidden = FUNCTIONS.get(activation, ("", activation))[1](first(x))
    return second(hidden if drop is None else drop(hidden))


def activation_name(activation: Any) -> str:
    """The name that the op ``feed_forward`` has for a function, or for a module that runs unseen; empty if none."""
    if not isinstance(activation, nn.Module):
        return FUNCTIONS.get(activation, ("",))[0]
    if runs_unseen(activation, GELU):
        return {"none": "gelu", "tanh": "gelu_tanh"}.get(activation.approximate, "")
    return "relu" if runs_unseen(activation, ReLU) else "silu" if runs_unseen(activation, SiLU) else ""


def _fits(x: Tensor, first: Linear, second: Linear) -> bool:
    """Whether the two maps follow each other, all in one dtype on the CPU without autocast; else they say more."""
    parameters = (first.weight, first.bias, second.weight, second.bias)
    return (
        not unserved(x, *parameters)
        and x.device.type == "cpu"
        and x.dtype in DTYPES
        and x.dim() > 0
        and all(tensor is None or (tensor.dtype == x.dtype and tensor.device == x.device) for tensor in parameters)
        and x.shape[-1] == first.weight.shape[1]
        and first.weight.shape[0] == second.weight.shape[1]
        and not under_autocast(x)
    )


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
