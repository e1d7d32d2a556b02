"""Residual blocks: what they compute, or what they are given beside it, is added to a stream that passes through."""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from nacre.blocks.fused import residual_dropout, residual_dropout_layer_norm
from nacre.blocks.parts import LAYER_NORM_SIZES, letters_of, sizes, sum_of_parts
from nacre.core.spec import Case, LayerSpec, Letters, Normal
from nacre.layers.activation import GELU
from nacre.layers.dropout import Dropout
from nacre.layers.dropout.cost import residual_cost as residual_dropout_cost
from nacre.layers.layer_norm import LayerNorm
from nacre.layers.layer_norm.cost import residual_cost as residual_dropout_layer_norm_cost
from nacre.layers.layer_norm.cost import sizes as layer_norm_sizes
from nacre.layers.linear import Linear


class ResidualBlock(nn.Module):
    r"""Adds a small learned change to its input, so that deep stacks still pass the input and its gradient through.

    .. math:: y = x + \mathrm{Linear}(\mathrm{GELU}(\mathrm{LayerNorm}(x)))

    Args:
        dim: features of a row, D.
        bias: whether the linear layer and the normalisation learn biases. Default: True.
        eps: added to the variance in the normalisation. Default: 1e-5.
        device: where the parameters are made. Default: torch's default device.
        dtype: of the parameters. Default: torch's default dtype.

    Shape:
        - input: (\*, D), any leading dimensions
        - output: as the input

    Numerics:
        Those of its parts; the sum is rounded once.

    Raises:
        RuntimeError: the input's last dimension is not ``dim``, or dtypes or devices do not match.

    Cost:
        D^2 + 3 D parameters, the sum of its parts and one addition an element.

    Paper:
        He, Zhang, Ren, Sun, "Identity Mappings in Deep Residual Networks", 2016, arXiv:1603.05027.

    Example:
        >>> import torch, nacre
        >>> nacre.ResidualBlock(8)(torch.ones(2, 8)).shape
        torch.Size([2, 8])
    """

    def __init__(
        self,
        dim: int,
        bias: bool = True,
        eps: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.norm = LayerNorm(dim, eps=eps, bias=bias, device=device, dtype=dtype)
        self.activation = GELU()
        self.linear = Linear(dim, dim, bias=bias, device=device, dtype=dtype)

    def forward(self, input: Tensor) -> Tensor:
        return input + self.linear(self.activation(self.norm(input)))


class ResidualDropout(nn.Module):
    r"""Adds a branch to the stream that it left, with dropout on the branch, in one pass.

    .. math:: y = r + \mathrm{Dropout}(x)

    Args:
        p: probability of an element of the branch to be dropped, from 0 to 1. Default: 0.5.

    Shape:
        - residual: any
        - branch: as the residual
        - output: as the residual

    Numerics:
        The mask is that of :class:`nacre.Dropout` from the same generator. float16 and bfloat16 are computed in float32
        and rounded once.

    Raises:
        ValueError: p outside 0 to 1.

    Cost:
        No parameters, O(N) time; a seed of 8 bytes is kept for the backward, which passes the residual's gradient on as
        it is, without a copy.

    Paper:
        He, Zhang, Ren, Sun, "Deep Residual Learning for Image Recognition", 2015, arXiv:1512.03385.

    Example:
        >>> import torch, nacre
        >>> layer = nacre.ResidualDropout(p=0.5).eval()
        >>> layer(torch.tensor([1.0, 2.0]), torch.tensor([10.0, 20.0]))
        tensor([11., 22.])
    """

    def __init__(self, p: float = 0.5) -> None:
        super().__init__()
        self.dropout = Dropout(p)

    def forward(self, residual: Tensor, branch: Tensor) -> Tensor:
        return residual_dropout(residual, branch, self.dropout)


class ResidualDropoutLayerNorm(nn.Module):
    r"""Adds a branch to the stream that it left, with dropout on the branch, and normalises the sum; in one pass.

    .. math:: s = r + \mathrm{Dropout}(x), \qquad y = \mathrm{LayerNorm}(s)

    A block that normalises first feeds y to its next branch and s is the stream; in one that normalises last y is.

    Args:
        dim: features of a row, D.
        p: probability of an element of the branch to be dropped, from 0 to 1. Default: 0.5.
        eps: added to the variance. Default: 1e-5.
        bias: whether the normalisation learns a bias. Default: True.
        device: where the parameters are made. Default: torch's default device.
        dtype: of the parameters. Default: torch's default dtype.

    Shape:
        - residual: (\*, D), any leading dimensions
        - branch: as the residual
        - output: y and s, each as the residual

    Numerics:
        The mask is that of :class:`nacre.Dropout` from the same generator. float16 and bfloat16 are computed in
        float32, s is rounded once, and y is the LayerNorm of the rounded s.

    Raises:
        ValueError: p outside 0 to 1.
        RuntimeError: the residual does not end in ``dim`` features, or dtypes or devices do not match.

    Cost:
        2 D parameters, O(N D) time; the N D values of s are kept for the backward, and a seed.

    Paper:
        Ba, Kiros, Hinton, "Layer Normalization", 2016, arXiv:1607.06450.

    Example:
        >>> import torch, nacre
        >>> layer = nacre.ResidualDropoutLayerNorm(2, p=0.1).eval()
        >>> normalised, stream = layer(torch.tensor([1.0, 2.0]), torch.tensor([0.0, 2.0]))
        >>> stream
        tensor([1., 4.])
        >>> normalised
        tensor([-1.0000,  1.0000], grad_fn=<...>)
    """

    def __init__(
        self,
        dim: int,
        p: float = 0.5,
        eps: float = 1e-5,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.dropout = Dropout(p)
        self.norm = LayerNorm(dim, eps=eps, bias=bias, device=device, dtype=dtype)

    def forward(self, residual: Tensor, branch: Tensor) -> tuple[Tensor, Tensor]:
        return residual_dropout_layer_norm(residual, branch, self.dropout, self.norm)


def _joined_sizes(
    layer: ResidualDropout | ResidualDropoutLayerNorm, residual: Tensor, branch: Tensor
) -> dict[str, Any]:
    dropout = layer.dropout
    return {
        "drops": dropout.training and dropout.p > 0 and residual.numel() > 0,
        "itemsize": residual.element_size(),
        "residual_gradient": residual.requires_grad,
        "branch_gradient": branch.requires_grad,
    }


def _dropout_sizes(layer: ResidualDropout, residual: Tensor, branch: Tensor) -> dict[str, Any]:
    return {"elements": residual.numel(), **_joined_sizes(layer, residual, branch)}


def _layer_norm_sizes(layer: ResidualDropoutLayerNorm, residual: Tensor, branch: Tensor) -> dict[str, Any]:
    norm = layer_norm_sizes(layer.norm, residual)
    kept = {size: norm[size] for size in LAYER_NORM_SIZES}
    return {**kept, **_joined_sizes(layer, residual, branch)}


CASES = (
    Case("rows", {"dim": 6}, (Normal((3, 6)),)),
    Case("tokens", {"dim": 5}, (Normal((2, 3, 5)),)),
    Case("one row", {"dim": 4}, (Normal((4,)),)),
    Case("no bias", {"dim": 4, "bias": False}, (Normal((3, 4)),)),
    Case("large eps", {"dim": 4, "eps": 0.1}, (Normal((3, 4)),)),
    Case("no rows", {"dim": 4}, (Normal((0, 4)),)),
    Case("frozen input", {"dim": 4}, (Normal((3, 4), gradient=False),)),
    Case("transposed", {"dim": 4}, (Normal((2, 3, 4), layout="transposed"),)),
    Case("text", {"dim": 512}, (Normal((8, 256, 512)),), bench=True),
)


def _pair(*shape: int, **options: Any) -> tuple[Normal, Normal]:
    return Normal(shape, **options), Normal(shape, **options)


DROPOUT_CASES = (
    Case("none dropped", {"p": 0.0}, _pair(3, 7)),
    Case("half dropped", {"p": 0.5}, _pair(3, 7), random=True),
    Case("all dropped", {"p": 1.0}, _pair(3, 7)),
    Case("one number", {"p": 0.0}, _pair()),
    Case("evaluation", {"p": 0.5}, _pair(3, 7), training=False),
    Case("transposed branch", {"p": 0.0}, (Normal((2, 5, 3)), Normal((2, 5, 3), layout="transposed"))),
    Case("transposed, dropped", {"p": 0.3}, _pair(2, 5, 3, layout="transposed"), random=True),
    Case("frozen residual", {"p": 0.3}, (Normal((4, 6), gradient=False), Normal((4, 6))), random=True),
    Case("frozen branch", {"p": 0.3}, (Normal((4, 6)), Normal((4, 6), gradient=False)), random=True),
    Case("no rows", {"p": 0.3}, _pair(0, 6)),
    Case("text", {"p": 0.1}, _pair(4, 512, 512), random=True, bench=True),
)

LAYER_NORM_CASES = (
    Case("none dropped", {"dim": 7, "p": 0.0}, _pair(3, 7)),
    Case("some dropped", {"dim": 7, "p": 0.3}, _pair(3, 7), random=True),
    Case("all dropped", {"dim": 7, "p": 1.0}, _pair(3, 7)),
    Case("one row", {"dim": 5, "p": 0.0}, _pair(5)),
    Case("no bias", {"dim": 6, "p": 0.0, "bias": False}, _pair(2, 3, 6)),
    Case("evaluation", {"dim": 6, "p": 0.5}, _pair(4, 6), training=False),
    Case("transposed branch", {"dim": 3, "p": 0.0}, (Normal((2, 5, 3)), Normal((2, 5, 3), layout="transposed"))),
    Case("transposed, dropped", {"dim": 3, "p": 0.3}, _pair(2, 5, 3, layout="transposed"), random=True),
    Case("frozen residual", {"dim": 6, "p": 0.3}, (Normal((4, 6), gradient=False), Normal((4, 6))), random=True),
    Case("no rows", {"dim": 6, "p": 0.3}, _pair(0, 6)),
    Case("text", {"dim": 512, "p": 0.1}, _pair(4, 512, 512), random=True, bench=True),
)


def _inputs(block: ResidualBlock, size: int) -> tuple[Tensor]:
    return (block.linear.weight.new_empty(size, block.linear.in_features, device="meta", requires_grad=True),)


def _dropout_inputs(block: ResidualDropout, size: int) -> tuple[Tensor, Tensor]:
    residual, branch = (torch.empty(size, device="meta", requires_grad=True) for _ in range(2))
    return residual, branch


def _layer_norm_inputs(block: ResidualDropoutLayerNorm, size: int) -> tuple[Tensor, Tensor]:
    shape = (size, *block.norm.normalized_shape)
    residual, branch = (block.norm.weight.new_empty(shape, device="meta", requires_grad=True) for _ in range(2))
    return residual, branch


SPECS = (
    LayerSpec(
        name="residual_block",
        layer=ResidualBlock,
        replaces=None,
        purpose="adds a learned change to its input",
        complexity="time O(N D^2), saved O(N D)",
        operators=("layer_norm", "gelu", "linear"),
        sizes=sizes,
        cost=partial(sum_of_parts, 1),
        cases=CASES,
        letters=Letters(lambda sizes: letters_of(sizes, "N", lambda width: "D"), _inputs),
    ),
    LayerSpec(
        name="residual_dropout",
        layer=ResidualDropout,
        replaces=None,
        purpose="adds a branch to the stream that it left, with dropout",
        complexity="time O(N), saved O(1)",
        operators=("residual_dropout",),
        sizes=_dropout_sizes,
        cost=residual_dropout_cost,
        cases=DROPOUT_CASES,
        letters=Letters(lambda sizes: {"elements": "N"}, _dropout_inputs),
    ),
    LayerSpec(
        name="residual_dropout_layer_norm",
        layer=ResidualDropoutLayerNorm,
        replaces=None,
        purpose="adds a branch to the stream that it left, with dropout, and normalises the sum",
        complexity="time O(N D), saved O(N D)",
        operators=("residual_dropout_layer_norm",),
        sizes=_layer_norm_sizes,
        cost=residual_dropout_layer_norm_cost,
        cases=LAYER_NORM_CASES,
        letters=Letters(lambda sizes: {"rows": "N", "features": "D"}, _layer_norm_inputs),
    ),
)
