"""What tests, bills and tables know of the transformer blocks: cases, letters of the sizes, and complexity."""

from collections.abc import Mapping
from fractions import Fraction
from functools import partial
from typing import Any

import torch
from torch import Tensor

from nacre.blocks.encoder_layer import TransformerEncoderLayer
from nacre.blocks.parts import letters_of, sizes, sum_of_parts
from nacre.blocks.transformer import TransformerBlock
from nacre.core.spec import Case, LayerSpec, Letters, Made, Normal


def _masked(*ignored: list[bool]) -> Made:
    return Made(lambda dtype, generator: torch.tensor(ignored))


def _causal(tokens: int) -> Made:
    return Made(lambda dtype, generator: torch.ones(tokens, tokens, dtype=torch.bool).triu(1))


_SMALL = {"dim": 4, "num_heads": 2, "mlp_ratio": 2}
_TOKENS = (Normal((2, 3, 4)),)
_PADDING = _masked([False, False, True], [False, False, False])

BLOCK_CASES = (
    Case("tokens", _SMALL, _TOKENS),
    Case("one sequence", _SMALL, (Normal((3, 4)),)),
    Case("causal", {**_SMALL, "causal": True}, _TOKENS),
    Case("norm last", {**_SMALL, "norm_first": False}, _TOKENS),
    Case("no bias", {**_SMALL, "bias": False}, _TOKENS),
    Case("relu", {**_SMALL, "activation": "relu"}, _TOKENS, smooth=False),
    Case("silu", {**_SMALL, "activation": "silu"}, _TOKENS),
    Case("gelu with tanh", {**_SMALL, "activation": "gelu_tanh"}, _TOKENS),
    Case("padding", _SMALL, _TOKENS, {"key_padding_mask": _PADDING}),
    Case("causal and padding", {**_SMALL, "causal": True}, _TOKENS, {"key_padding_mask": _PADDING}),
    Case("causal and a learned mask", {**_SMALL, "causal": True}, _TOKENS, {"attn_mask": Normal((3, 3))}),
    Case("evaluation", {**_SMALL, "dropout": 0.5}, _TOKENS, training=False),
    Case("dropout", {**_SMALL, "dropout": 0.5}, _TOKENS, random=True),
    Case("one token", _SMALL, (Normal((2, 1, 4)),)),
    Case("no sequence", _SMALL, (Normal((0, 3, 4)),)),
    Case("frozen input", _SMALL, (Normal((2, 3, 4), gradient=False),)),
    Case(
        "GPT-2",
        {"dim": 768, "num_heads": 12, "dropout": 0.1, "causal": True},
        (Normal((8, 128, 768)),),
        random=True,
        bench=True,
    ),
)

_LAYER = {"d_model": 4, "nhead": 2, "dim_feedforward": 5, "dropout": 0.0, "activation": "gelu"}
_FIRST = {**_LAYER, "batch_first": True}

LAYER_CASES = (
    Case("tokens", _LAYER, (Normal((3, 2, 4)),)),
    Case("batch first", _FIRST, _TOKENS),
    Case("one sequence", _LAYER, (Normal((3, 4)),)),
    Case("norm first", {**_FIRST, "norm_first": True}, _TOKENS),
    Case("no bias", {**_FIRST, "bias": False}, _TOKENS),
    Case("relu", {**_FIRST, "activation": "relu"}, _TOKENS, smooth=False),
    Case("silu", {**_FIRST, "activation": torch.nn.functional.silu}, _TOKENS),
    Case("causal", _FIRST, _TOKENS, {"src_mask": _causal(3), "is_causal": True}),
    Case("mask", {**_FIRST, "norm_first": True}, _TOKENS, {"src_mask": _causal(3)}),
    Case("padding", _FIRST, _TOKENS, {"src_key_padding_mask": _PADDING}),
    Case("mask and padding", _FIRST, _TOKENS, {"src_mask": _causal(3), "src_key_padding_mask": _PADDING}),
    Case("learned mask", _FIRST, _TOKENS, {"src_mask": Normal((3, 3))}),
    Case("evaluation", {**_FIRST, "dropout": 0.5}, _TOKENS, training=False),
    Case("evaluation, padding", _FIRST, _TOKENS, {"src_key_padding_mask": _PADDING}, training=False),
    Case("dropout", {**_FIRST, "dropout": 0.5}, _TOKENS, random=True),
    Case("no sequence", _FIRST, (Normal((0, 3, 4)),)),
    Case("frozen input", _FIRST, (Normal((2, 3, 4), gradient=False),)),
    Case(
        "BERT",
        {"d_model": 768, "nhead": 12, "dim_feedforward": 3072, "activation": "gelu", "batch_first": True},
        (Normal((8, 128, 768)),),
        random=True,
        bench=True,
    ),
    Case(
        "characters",
        {"d_model": 128, "nhead": 4, "dim_feedforward": 512, "batch_first": True},
        (Normal((12, 64, 128)),),
        random=True,
        bench=True,
    ),
    Case(
        "original transformer",
        {"d_model": 512, "nhead": 8, "batch_first": True},
        (Normal((4, 512, 512)),),
        random=True,
        bench=True,
    ),
)


def _dim(sizes: Mapping[str, Any]) -> int:
    return next(own["embed_dim"] for name, own in sizes["parts"] if name == "attention")


def _block_names(sizes: Mapping[str, Any]) -> dict[str, Any]:
    dim = _dim(sizes)
    return letters_of(sizes, "B T", lambda width: "D" if width == dim else f"{Fraction(width, dim)} D")


def _layer_names(sizes: Mapping[str, Any]) -> dict[str, Any]:
    dim = _dim(sizes)
    return letters_of(sizes, "B T", lambda width: "D" if width == dim else "F")


def _block_inputs(block: TransformerBlock, size: int) -> tuple[Tensor]:
    tokens = (size, size + 1, block.attn.embed_dim)
    return (block.attn.out_proj.weight.new_empty(tokens, device="meta", requires_grad=True),)


def _layer_inputs(layer: torch.nn.TransformerEncoderLayer, size: int) -> tuple[Tensor]:
    shape = (size, size + 1) if layer.self_attn.batch_first else (size + 1, size)
    tokens = (*shape, layer.self_attn.embed_dim)
    return (layer.self_attn.out_proj.weight.new_empty(tokens, device="meta", requires_grad=True),)


_AT_MOST = {"H": ("D",), "M": ("B H T^2",)}
_MEANINGS = {"T": "tokens", "F": "hidden_features"}

SPECS = (
    LayerSpec(
        name="transformer_block",
        layer=TransformerBlock,
        replaces=None,
        purpose="gathers from other tokens, then thinks about it",
        complexity="time O(B T D (T + D)), saved O(B T D)",
        operators=("attention", "linear", "feed_forward", "residual_dropout_layer_norm"),
        sizes=sizes,
        cost=partial(sum_of_parts, 2),
        cases=BLOCK_CASES,
        letters=Letters(_block_names, _block_inputs, _AT_MOST, meanings=_MEANINGS),
    ),
    LayerSpec(
        name="transformer_encoder_layer",
        layer=TransformerEncoderLayer,
        replaces=torch.nn.TransformerEncoderLayer,
        purpose="torch.nn's transformer block",
        complexity="time O(B T D (T + D + F)), saved O(B T (D + F))",
        operators=("attention", "linear", "feed_forward", "residual_dropout_layer_norm"),
        sizes=sizes,
        cost=partial(sum_of_parts, 2),
        cases=LAYER_CASES,
        letters=Letters(_layer_names, _layer_inputs, _AT_MOST, meanings=_MEANINGS),
    ),
)
