"""Which kinds of operators are measured, at which sizes, and with what."""

from collections.abc import Iterator

import torch
from torch import nn
from torch.nn import functional as F

import nacre.functional as own
from nacre.layers import LAYERS
from nacre.tools.cost import pieces
from nacre.tools.cost.probes import Probe

SIDES, OWN_SIDES = (1, 8, 32, 128, 512, 2048), (1, 8, 64, 512, 2048)
BATCHES, PARTS = (1, 16, 128), (8, 64, 512)
POSITIONS, CHANNELS = (64, 1024, 16384), (1, 3, 16, 64, 256)
WIDE, FEW = (3, 16, 64, 256, 1024), (1, 3, 16, 64)
HEADS = ((1, 8, 64), (16, 64, 256, 1024), (16, 64))
RECURRENT = ((1, 16, 64), (1, 8, 64), (32, 128, 512))
ROWS = ((1, 32, 1024, 4096), (8, 128, 1024))
PLANES = ((8, 128, 1024), (16, 256, 4096))
LOOKED_UP = ((2**6, 2**12, 2**18), (2**6, 2**12, 2**18, 2**22))
BYTES = ((2**6, 2**12, 2**16, 2**18, 2**20, 2**24),)

COPY, POINTWISE = "aten::clone", "aten::mul"
"""The kinds of what has no table of its own: what moves values, and what computes each by itself."""

SAME = {
    "nacre::linear_cross_entropy": "nacre::linear",
    "nacre::linear_cross_entropy_backward": "nacre::linear_backward",
    "nacre::residual_dropout": "nacre::dropout",
    "nacre::residual_dropout_backward": "nacre::dropout_backward",
    "aten::baddbmm": "aten::bmm",
    "aten::stack": "aten::cat",
    "aten::mean": "aten::sum",
    "aten::exp": "aten::tanh",
    "aten::_safe_softmax": "aten::_softmax",
    **dict.fromkeys(("aten::fill", "aten::zero", "aten::zeros", "aten::zeros_like", "aten::ones"), "aten::ones_like"),
}
"""Kinds which have the table of another one."""


def _both(kind: str, words: str = "", backward: str = "_backward") -> tuple[str, str]:
    return kind + words, kind + backward + words


def _products() -> Iterator[Probe]:
    kinds = ("aten::addmm", "aten::mm", "aten::mm of a transposed")
    yield Probe(kinds, (SIDES,) * 3, pieces.products)
    yield Probe(("aten::bmm",), (BATCHES, PARTS, PARTS, PARTS), pieces.batched)
    yield Probe(_both("nacre::linear"), (OWN_SIDES,) * 3, pieces.linear)
    yield Probe(_both("nacre::feed_forward"), (OWN_SIDES[1:],) * 3, pieces.feed_forwards)


def _convolutions() -> Iterator[Probe]:
    for name, kind in (("aten::convolution", nn.Conv2d), ("nacre::conv2d", LAYERS["conv2d"].layer)):
        for words, area, channels in ((", 1x1", 1, WIDE), (", 3x3", 3, CHANNELS), (", larger", 5, FEW)):
            yield Probe(_both(name, words), (POSITIONS, channels, channels), pieces.convolved(kind, area))
        planes = ((32, 256, 2048), (16, 256, 4096))
        yield Probe(_both(name, ", depthwise"), planes, pieces.depthwise(kind))
    for words, area in ((", transposed", 2), (", transposed, overlapping", 4)):
        axes = (POSITIONS, CHANNELS[1:], CHANNELS[1:])
        yield Probe(_both("aten::convolution", words), axes, pieces.transposed(area))


def _attention_and_recurrence() -> Iterator[Probe]:
    flash = "aten::_scaled_dot_product_flash_attention_for_cpu"
    for name, function in (
        (flash, F.scaled_dot_product_attention),
        ("nacre::attention", own.scaled_dot_product_attention),
    ):
        for words in ("", ", causal"):
            yield Probe(_both(name, words), HEADS, pieces.attended(function, bool(words)))
    yield Probe(_both("aten::mkldnn_rnn_layer"), RECURRENT, pieces.repeated(nn.LSTM))
    for name in ("lstm", "gru"):
        yield Probe(_both(f"nacre::{name}"), RECURRENT, pieces.repeated(LAYERS[name].layer))


def _rows() -> Iterator[Probe]:
    for name, softmax, own_softmax in (
        ("softmax", F.softmax, own.softmax),
        ("log_softmax", F.log_softmax, own.log_softmax),
    ):
        yield Probe(_both(f"aten::_{name}", backward="_backward_data"), ROWS, pieces.over_rows(softmax, -1))
        yield Probe(_both(f"nacre::{name}"), ROWS, pieces.over_rows(own_softmax, -1))
    yield Probe(_both("aten::native_layer_norm"), ROWS, pieces.normalised(nn.LayerNorm))
    yield Probe(_both("nacre::layer_norm"), ROWS, pieces.normalised(LAYERS["layer_norm"].layer))
    yield Probe(_both("nacre::residual_dropout_layer_norm"), ROWS, pieces.residual)
    yield Probe(_both("nacre::cross_entropy"), ROWS, pieces.classified(LAYERS["cross_entropy"].layer()))
    yield Probe(("aten::sum over rows",), ROWS, pieces.summed)


def _planes() -> Iterator[Probe]:
    yield Probe(_both("aten::native_batch_norm"), PLANES, pieces.batch_normalised)
    yield Probe(_both("aten::max_pool2d_with_indices"), PLANES, pieces.over_planes(F.max_pool2d, kernel_size=2))
    yield Probe(_both("aten::avg_pool2d"), PLANES, pieces.over_planes(F.avg_pool2d, kernel_size=2))
    for mode in ("nearest", "bilinear"):
        upsampled = pieces.over_planes(F.interpolate, scale_factor=2, mode=mode)
        yield Probe(_both(f"aten::upsample_{mode}2d"), PLANES, upsampled)


def _bytes() -> Iterator[Probe]:
    for name in ("gelu", "silu", "tanh", "sigmoid", "relu"):
        backward = "aten::threshold_backward" if name == "relu" else f"aten::{name}_backward"
        for kind, tensors in ((f"aten::{name}", 2), (backward, 3)):
            yield Probe((kind,), BYTES, pieces.pointwise(tensors, getattr(F, name)))
        for kind, tensors in ((f"nacre::{name}", 2), (f"nacre::{name}_backward", 3)):
            yield Probe((kind,), BYTES, pieces.pointwise(tensors, getattr(own, name)))
    yield Probe(_both("nacre::dropout"), BYTES, pieces.pointwise(2, LAYERS["dropout"].layer(0.1)))
    yield Probe(("aten::add",), BYTES, pieces.pointwise(3, lambda x: x.detach() + x.detach()))
    yield Probe((POINTWISE,), BYTES, pieces.pointwise(3, lambda x: x.detach() * x.detach()))
    yield Probe(("aten::bernoulli",), BYTES, pieces.pointwise(1, lambda x: x.detach().bernoulli_(0.9)))
    yield Probe(("aten::ones_like",), BYTES, pieces.pointwise(1, torch.ones_like))
    yield Probe(("aten::cat",), BYTES, pieces.pointwise(4, lambda x: torch.cat((x.detach(), x.detach()))))
    yield Probe(("aten::sum",), BYTES, pieces.pointwise(1, lambda x: x.detach().sum()))
    yield Probe((COPY,), BYTES, pieces.pointwise(2, lambda x: x.detach().clone()))
    yield Probe((f"{COPY}, rearranged",), BYTES, pieces.rearranged)


def _tables() -> Iterator[Probe]:
    for name, backward, kind in (
        ("aten::embedding", "aten::embedding_dense_backward", nn.Embedding),
        ("nacre::embedding", "nacre::embedding_backward", LAYERS["embedding"].layer),
    ):
        yield Probe((name,), BYTES, pieces.looked_up(kind))
        yield Probe((backward,), LOOKED_UP, pieces.table_gradient(kind))


_GROUPS = (_products, _convolutions, _attention_and_recurrence, _rows, _planes, _bytes, _tables)

PROBES: dict[str, Probe] = {kind: probe for group in _GROUPS for probe in group() for kind in probe.kinds}
"""The probe of each kind that has one."""
