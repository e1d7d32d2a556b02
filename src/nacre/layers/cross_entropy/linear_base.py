"""The class that LinearCrossEntropyLoss extends: torch's, or its equal for a torch older than 2.13, which has none."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.loss import _WeightedLoss


class WithoutTorch(_WeightedLoss):
    """Constructor, state and representation of ``torch.nn.LinearCrossEntropyLoss``."""

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        out_features: tuple[int, ...] = (),
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        reduction: str = "mean",
        weight: Tensor | None = None,
        ignore_index: int | None = None,
        label_smoothing: float = 0.0,
        options: Any = None,
    ) -> None:
        if weight is not None and tuple(weight.shape) != (num_classes,):
            raise RuntimeError(f"expected weight shape to be {(num_classes,)}, got {tuple(weight.shape)}")
        if not 0 <= label_smoothing <= 1:
            raise RuntimeError(f"expected label_smoothing to be in range [0, 1], got {label_smoothing}")
        super().__init__(weight=weight, reduction=reduction)
        self.num_classes = num_classes
        self.out_features = out_features
        self.ignore_index = ignore_index
        self.label_smoothing = label_smoothing
        logits = math.prod(out_features, start=num_classes)
        self.linear = torch.nn.Linear(in_features, logits, bias=bias, device=device, dtype=dtype)
        self.options = options

    def extra_repr(self) -> str:
        return (
            f"in_features={self.linear.in_features}, num_classes={self.num_classes},"
            f" out_features={self.out_features}, bias={self.linear.bias is not None}, reduction={self.reduction},"
            f" ignore_index={self.ignore_index}, label_smoothing={self.label_smoothing}, options={self.options}"
        )


BASE: Any = getattr(torch.nn, "LinearCrossEntropyLoss", WithoutTorch)
