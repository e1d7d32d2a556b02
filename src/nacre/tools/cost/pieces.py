"""The small pieces of models from which the probes are made; each is built from a dtype and the sizes of a point."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nacre.blocks.residual import ResidualDropoutLayerNorm
from nacre.layers import LAYERS
from nacre.layers.linear.feed_forward import feed_forward

Step = Callable[[], Any]
"""Runs a piece's forward."""


def _values(dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float32).to(dtype).requires_grad_()


# ---- products


def products(dtype: torch.dtype, rows: int, inner: int, columns: int) -> Step:
    x, weight, bias = _values(dtype, rows, inner), _values(dtype, columns, inner), _values(dtype, columns)
    plain = _values(dtype, inner, columns)
    turned = _values(dtype, inner, rows + 8)[:, :rows].detach()
    return lambda: (F.linear(x, weight, bias), _mm(x, plain), _mm(turned.t(), plain))


def _mm(left: Tensor, right: Tensor) -> Tensor:
    return torch.mm(left.detach(), right.detach())


def linear(dtype: torch.dtype, rows: int, inner: int, columns: int) -> Step:
    layer, x = LAYERS["linear"].layer(inner, columns).to(dtype), _values(dtype, rows, inner)
    return lambda: layer(x)


def batched(dtype: torch.dtype, batch: int, rows: int, inner: int, columns: int) -> Step:
    left, right = _values(dtype, batch, rows, inner).detach(), _values(dtype, batch, inner, columns).detach()
    return lambda: torch.bmm(left, right)


def feed_forwards(dtype: torch.dtype, rows: int, inner: int, hidden: int) -> Step:
    x, first, second = _values(dtype, rows, inner), _values(dtype, hidden, inner), _values(dtype, inner, hidden)
    bias, last = _values(dtype, hidden), _values(dtype, inner)
    return lambda: feed_forward(x, first, bias, second, last, "gelu", 0.0, True)


# ---- convolutions: images of a batch of 4


def _image(positions: int, batch: int = 4) -> tuple[int, int, int]:
    side = max(math.isqrt(positions // batch), 1)
    return batch, side, max(positions // batch // side, 1)


def convolved(kind: Any, area: int, **options: Any) -> Callable[..., Step]:
    def build(dtype: torch.dtype, positions: int, channels: int, outputs: int) -> Step:
        batch, height, width = _image(positions)
        layer = kind(channels, outputs, area, padding=area // 2, **options).to(dtype)
        x = _values(dtype, batch, channels, height, width)
        return lambda: layer(x)

    return build


def transposed(area: int) -> Callable[..., Step]:
    """To twice the height and width."""

    def build(dtype: torch.dtype, positions: int, channels: int, outputs: int) -> Step:
        batch, height, width = _image(positions)
        layer = nn.ConvTranspose2d(channels, outputs, area, stride=2, padding=area // 2 - 1).to(dtype)
        x = _values(dtype, batch, channels, height, width)
        return lambda: layer(x)

    return build


def depthwise(kind: Any) -> Callable[..., Step]:
    def build(dtype: torch.dtype, planes: int, positions: int) -> Step:
        channels, side = planes // 4, math.isqrt(positions)
        layer = kind(channels, channels, 3, padding=1, groups=channels).to(dtype)
        x = _values(dtype, 4, channels, side, side)
        return lambda: layer(x)

    return build


# ---- attention and recurrence


def attended(function: Callable[..., Tensor], causal: bool) -> Callable[..., Step]:
    def build(dtype: torch.dtype, heads: int, tokens: int, features: int) -> Step:
        query, key, value = (_values(dtype, 1, heads, tokens, features) for _ in range(3))
        return lambda: function(query, key, value, is_causal=causal)

    return build


def repeated(kind: Any) -> Callable[..., Step]:
    def build(dtype: torch.dtype, steps: int, batch: int, hidden: int) -> Step:
        layer, x = kind(hidden, hidden).to(dtype), _values(dtype, steps, batch, hidden)
        return lambda: layer(x)[0]

    return build


# ---- rows, planes, bytes


def over_rows(function: Callable[..., Tensor], dim: int) -> Callable[..., Step]:
    def build(dtype: torch.dtype, rows: int, features: int) -> Step:
        x = _values(dtype, rows, features)
        return lambda: function(x, dim)

    return build


def summed(dtype: torch.dtype, rows: int, features: int) -> Step:
    x = _values(dtype, rows, features).detach()
    return lambda: x.sum(0, keepdim=True)


def normalised(kind: Any) -> Callable[..., Step]:
    def build(dtype: torch.dtype, rows: int, features: int) -> Step:
        layer, x = kind(features).to(dtype), _values(dtype, rows, features)
        return lambda: layer(x)

    return build


def _plane(dtype: torch.dtype, planes: int, positions: int) -> Tensor:
    """Eight images."""
    side = math.isqrt(positions)
    return _values(dtype, 8, planes // 8, side, side)


def batch_normalised(dtype: torch.dtype, planes: int, positions: int) -> Step:
    layer, x = nn.BatchNorm2d(planes // 8).to(dtype), _plane(dtype, planes, positions)
    return lambda: layer(x)


def over_planes(function: Callable[..., Tensor], **options: Any) -> Callable[..., Step]:
    def build(dtype: torch.dtype, planes: int, positions: int) -> Step:
        x = _plane(dtype, planes, positions)
        return lambda: function(x, **options)

    return build


def residual(dtype: torch.dtype, rows: int, features: int) -> Step:
    block = ResidualDropoutLayerNorm(features, 0.1).to(dtype)
    x, branch = _values(dtype, rows, features), _values(dtype, rows, features)
    return lambda: block(x, branch)


def classified(loss: Any) -> Callable[..., Step]:
    def build(dtype: torch.dtype, rows: int, classes: int) -> Step:
        x, target = _values(dtype, rows, classes), torch.randint(classes, (rows,))
        return lambda: loss(x, target)

    return build


def table_gradient(kind: Any) -> Callable[..., Step]:
    """Rows of 64 values, of a table of so many values."""

    def build(dtype: torch.dtype, values: int, table: int) -> Step:
        layer = kind(table // 64, 64).to(dtype)
        tokens = torch.randint(layer.num_embeddings, (values // 64,))
        return lambda: layer(tokens)

    return build


def looked_up(kind: Any) -> Callable[..., Step]:
    """Rows of 64 values, of a table that fits into a cache."""

    def build(dtype: torch.dtype, size: int) -> Step:
        layer = kind(2**12, 64).to(dtype)
        tokens = torch.randint(layer.num_embeddings, (max(_length(size, 2, dtype) // 64, 1),))
        return lambda: layer(tokens)

    return build


def _length(size: int, tensors: int, dtype: torch.dtype) -> int:
    return max(size // (tensors * dtype.itemsize), 1)


def pointwise(tensors: int, function: Callable[[Tensor], Any]) -> Callable[..., Step]:
    """An operator which reads and writes so many tensors of one size."""

    def build(dtype: torch.dtype, size: int) -> Step:
        x = _values(dtype, _length(size, tensors, dtype))
        return lambda: function(x)

    return build


def rearranged(dtype: torch.dtype, size: int) -> Step:
    count = _length(size, 2, dtype)
    x = _values(dtype, max(count // 64, 2), 64).detach()
    return lambda: x.view(-1, 8, 8).transpose(0, 1).contiguous()
