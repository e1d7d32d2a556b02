"""The linear map of one chunk of rows, and its gradients, whose parts are then joined or added over the chunks."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def linear_gradients(dz: Tensor | None, x: Tensor, linear_weight: Tensor, needs: list[bool]) -> list[Tensor | None]:
    if dz is None:
        return [None, None, None]
    dz = dz.flatten(1)
    # the products run in the dtype of x; what is summed over chunks stays in that of dz
    rounded = dz.to(x.dtype)
    return [
        torch.mm(rounded, matrix(linear_weight)) if needs[0] else None,
        torch.mm(rounded.T, x).to(dz.dtype) if needs[1] else None,
        dz.sum(0) if needs[2] else None,
    ]


def add(total: Tensor | None, part: Tensor | None) -> Tensor | None:
    return part if total is None or part is None else total + part


def joined(parts: Sequence[Any]) -> Any:
    return None if parts[0] is None else torch.cat(list(parts))


def like(gradients: Sequence[Tensor | None], of: Sequence[Any]) -> tuple[Tensor | None, ...]:
    pairs = zip(gradients, of, strict=True)
    return tuple(None if d is None else d.reshape(to.shape).to(to.dtype) for d, to in pairs)


def logits(x: Tensor, linear_weight: Tensor, linear_bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    z = torch.mm(x, matrix(linear_weight).T).to(dtype).unflatten(1, linear_weight.shape[:-1])
    return z if linear_bias is None else z + linear_bias


def matrix(linear_weight: Tensor) -> Tensor:
    return linear_weight.flatten(0, -2)
