"""What tests, bills and tables know of the residual blocks: sizes, cases, letters of the sizes, and complexity."""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from nacre.blocks.parts import LAYER_NORM_SIZES, letters_of, sizes, sum_of_parts
from nacre.blocks.residual import ResidualBlock, ResidualDropout, ResidualDropoutLayerNorm
from nacre.core.spec import Case, LayerSpec, Letters, Normal
from nacre.layers.dropout.cost import residual_cost as residual_dropout_cost
from nacre.layers.layer_norm.cost import residual_cost as residual_dropout_layer_norm_cost
from nacre.layers.layer_norm.cost import sizes as layer_norm_sizes


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
