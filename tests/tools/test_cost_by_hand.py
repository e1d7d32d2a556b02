"""Bills of small models, each derived by hand: as they are, without values, and converted; what they keep, observed.

The first layer's input asks for no gradient unless it says so; ``A + B`` in a number is the sum of its products.
"""

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import nacre
from nacre.tools.cost.stage import mapped
from tests.tools import small_models as small
from tests.tools.test_cost_exact import Function
from tests.tools.test_cost_models import kept


def given(*shape, gradient=True, **options):
    return torch.randn(*shape, **options).requires_grad_(gradient)


def rows(*shape, **options):
    return given(*shape, gradient=False, **options)


def without_values(inputs):
    """The same on the device meta, one tensor in two places staying one; the numbers of steps keep theirs."""
    memo = {}

    def meta(tensor):
        if id(tensor) not in memo:
            empty = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
            memo[id(tensor)] = empty.requires_grad_(tensor.requires_grad)
        return memo[id(tensor)]

    packed = [isinstance(one, PackedSequence) for one in inputs]
    return tuple(
        PackedSequence(meta(one.data), *one[1:]) if is_packed else mapped(one, meta)
        for one, is_packed in zip(inputs, packed, strict=True)
    )


def function(call):
    return lambda: Function(call)


def cross_attention(**options):
    return lambda: nn.MultiheadAttention(8, 2, batch_first=True, **options)


def packed(width):
    """4 and 2 steps: 6 rows; 4 of them have a state before."""
    return pack_padded_sequence(rows(4, 2, width), [4, 2])


TOKENS = torch.tensor([[1, 2, 3, 4, 5], [6, 7, 8, 9, 10]])
QUERIES, KEYS = given(2, 5, 8), given(2, 3, 8)
HEADS = given(2, 4, 6, 8), given(2, 4, 7, 8), given(2, 4, 7, 8)

# name: (model, inputs, forward, backward, parameters, bytes kept)
MODELS = {
    # 10 rows; two products of 2 * 10 * 6 * 11 = 1,320, each with two gradients. Kept: tokens 80, the rows of the table
    # and twice them 2 * 240
    "one table of three modules": (small.Tied, (TOKENS,), 2_640, 5_280, 66, 560),
    # each 720; the last two gradients, through the middle one, the first its weight's. Kept: input and both ReLUs'
    "a frozen layer in the middle": (small.frozen_middle, (rows(10, 6),), 2_160, 720 + 720 + 1_440, 126, 720),
    # both once more; the outer one's two gradients; the inner one once more again, and its two. Kept: the input
    "a checkpoint within another, reentrant": (
        lambda: small.Nested(use_reentrant=True), (given(10, 6),), 1_440, 1_440 + 1_440 + 720 + 1_440, 84, 240,
    ),
    "a checkpoint within another": (
        lambda: small.Nested(use_reentrant=False, early_stop=False), (given(10, 6),), 1_440, 5_040, 84, 240,
    ),
    # each 720; the first half's first layer once more: its second one's product is not needed again (nacre's runs once
    # more). Kept: the input, the first half's result, and what lies between in the second
    "two halves, the first checkpointed": (small.Halves, (rows(10, 6),), 2_880, 5_040 + 720, 168, 720),
    # 84 inputs each fill 3 channels x 4 taps: 2 * 84 * 12
    "transposed convolution of one dimension": (
        lambda: nn.ConvTranspose1d(6, 9, 4, stride=2, groups=3), (given(2, 6, 7),), 2_016, 4_032, 81, 336,
    ),
    # 108 inputs each fill 3 channels x 8 taps
    "transposed convolution of three dimensions": (
        lambda: nn.ConvTranspose3d(4, 6, 2, stride=2, groups=2, output_padding=1),
        (given(1, 4, 3, 3, 3),), 5_184, 10_368, 102, 432,
    ),
    # 200 inputs each fill 3 channels x 9 taps
    "transposed, dilated, grouped": (
        lambda: nn.ConvTranspose2d(4, 6, 3, stride=3, dilation=2, groups=2, output_padding=1),
        (given(2, 4, 5, 5),), 10_800, 21_600, 114, 800,
    ),
    # 2 * 6 * 10 outputs of 12 products; kept: the input with one value more at both ends, 2 * 4 * 12
    "circular padding": (
        lambda: nn.Conv1d(4, 6, 3, padding=1, padding_mode="circular", bias=False),
        (given(2, 4, 10),), 2_880, 5_760, 72, 384,
    ),
    # 8 outputs of 64 places, 27 products: each group has one channel
    "grouped, three dimensions": (
        lambda: nn.Conv3d(4, 8, 3, padding=1, groups=4), (rows(1, 4, 4, 4, 4),), 27_648, 27_648, 224, 1_024,
    ),
    # 12 outputs of 16 places, 9 products: three filters for each channel
    "depthwise with three filters": (
        lambda: nn.Conv2d(4, 12, 3, groups=4), (rows(1, 4, 6, 6),), 3_456, 3_456, 120, 576,
    ),
    "an image without a batch": (lambda: nn.Conv2d(3, 4, 3), (given(3, 8, 8),), 7_776, 15_552, 112, 768),
    # 2 * 3 * 4 * 5 and 2 * 3 * 5 * 6; kept: both factors of both
    "three matrices": (
        function(lambda a, b, c: torch.einsum("ij,jk,kl->il", a, b, c)),
        (given(3, 4), given(4, 5), given(5, 6)), 120 + 180, 600, 0, 4 * (12 + 20 + 30 + 15),
    ),
    # 7 sums of 12 products; each gradient as many
    "two summed axes": (
        function(lambda a, b: torch.einsum("bij,bij->b", a, b)), (given(7, 3, 4), given(7, 3, 4)), 168, 336, 0, 672,
    ),
    "nothing of the first summand": (
        function(lambda c, a, b: torch.baddbmm(c, a, b, beta=0)),
        (rows(7, 3, 5), given(7, 3, 4), given(7, 4, 5)), 840, 1_680, 0, 4 * (84 + 140),
    ),
    # 6 products of 4 x 5 and 5 x 6, of which the right ones are 3; kept: both, the right ones for each of 6
    "a product over broadcast axes": (
        function(torch.matmul), (given(2, 3, 4, 5), given(3, 5, 6)), 1_440, 2_880, 0, 4 * (120 + 180),
    ),
    # the cheaper order is the last two first: 2 * 4 * 5 * 2, then 2 * 3 * 4 * 2
    "a chain of matrices": (
        function(lambda a, b, c: torch.linalg.multi_dot([a, b, c])),
        (given(3, 4), given(4, 5), given(5, 2)), 80 + 48, 2 * 128, 0, 4 * (12 + 20 + 10 + 8),
    ),
    # rows 12: x A first, 2 * 12 * 5 * 3 * 4, then with y 2 * 12 * 5 * 4; without the inputs' the weight's gradient
    "bilinear": (lambda: nn.Bilinear(3, 4, 5), (rows(2, 6, 3), rows(2, 6, 4)), 1_440 + 480, 1_440, 65, 336),
    # projections 2 * 64 * (10 + 6 + 6 + 10) = 4,096; a learned key beside 3: products of 2 * 2 * 5 * 4 * 8 = 640
    "cross attention with a learned key": (
        cross_attention(add_bias_kv=True), (QUERIES, KEYS, KEYS), 4_096 + 2 * 640, 8_192 + 5 * 640, 304, None,
    ),
    "with a key of zeros": (
        cross_attention(add_zero_attn=True), (QUERIES, KEYS, KEYS), 4_096 + 2 * 640, 8_192 + 5 * 640, 288, None,
    ),
    # 4 heads of 6 queries, 2 heads of 7 keys, 8 features: products of 2 * 2 * 4 * 42 * 8 = 5,376
    "grouped queries": (
        function(lambda q, k, v: functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)),
        (HEADS[0], given(2, 2, 7, 8), given(2, 2, 7, 8)), 10_752, 26_880, 0, None,
    ),
    # with a bias that asks for its gradient torch keeps the weights: four products
    "a bias with a gradient": (
        function(functional.scaled_dot_product_attention), (*HEADS, given(6, 7)), 10_752, 21_504, 0, None,
    ),
    "causal": (
        function(lambda q, k, v: functional.scaled_dot_product_attention(q, k, v, is_causal=True)),
        HEADS, 10_752, 26_880, 0, None,
    ),
    # 6 rows, 12 x 7 weights; the state's gradient for 4 of them
    "packed": (lambda: nn.GRU(3, 4), (packed(3),), 1_008, 1_008 + 2 * 4 * 48, 108, None),
    "packed and plain": (lambda: nn.RNN(3, 4), (packed(3),), 336, 336 + 2 * 4 * 16, 36, None),
    "packed, with a cell": (lambda: nn.LSTM(3, 4), (packed(3),), 1_344, 1_344 + 2 * 4 * 64, 144, None),
    # backward in time the second sequence joins where the first has a state: 5 rows have a gradient there
    "packed, both ways": (
        lambda: nn.GRU(3, 4, bidirectional=True), (packed(3),), 2_016, 2_016 + 2 * 4 * 48 + 2 * 5 * 48, 216, None,
    ),
    "cells": (lambda: nn.LSTMCell(3, 4), (given(2, 3),), 2 * 2 * 16 * 7, 2 * 2 * 16 * 7 + 2 * 2 * 16 * 3, 144, 216),
    "states given": (
        lambda: nn.GRU(3, 4), (given(5, 2, 3), given(1, 2, 4)), 1_680, 1_680 + 720 + 960, 108, 1_240,
    ),
    "parameters that are computed": (small.Doubled, (rows(10, 6),), 720, 720, 42, 240),
    # four calls; all but the first have an input with a gradient; kept: the input and four tanh
    "a loop": (small.Loop, (rows(10, 6),), 2_880, 2_880 + 3 * 720, 42, 5 * 240),
    "in place": (small.InPlace, (rows(10, 6),), 1_440, 720 + 1_440, 84, 480),
    # the buffer has no gradient; kept: the input
    "a buffer": (small.Rotation, (rows(10, 6),), 1_440, 720 + 720, 36, 240),
    # three of 2 * 10 * 96; the first two have no input's gradient; kept: the input, both maps, silu, and their product
    "a gated step": (small.Gated, (rows(10, 8),), 3 * 1_920, 4 * 1_920, 288, 4 * (80 + 4 * 120)),
    # 2 * 10 * 8 * 24; scores and their product 2 * 2 * 2 * 25 * 4 = 800 each; 2 * 10 * 64
    "slopes of distances": (small.Distances, (rows(2, 5, 8),), 3_840 + 1_600 + 1_280, 3_840 + 3_200 + 2_560, 288, None),
    "a bias of distances": (small.Relative, (rows(2, 5, 8),), 1_280 + 1_600, 1_280 + 4 * 800, 80, None),
    # 2 * 10 * 16 and 2 * 10 * 24; the second's input has a gradient
    "a scan": (small.Scan, (rows(2, 5, 4),), 320 + 480, 320 + 960, 12 + 20 + 30, None),
    # 256 outputs of 36, 72 and 4 products
    "a residual block": (
        small.Residual, (rows(2, 4, 8, 8),),
        2 * 256 * (36 + 72 + 4), 2 * 256 * (36 + 144 + 4), 288 + 576 + 32 + 48, None,
    ),
    # 10 tokens; a block has 2 * 10 * (4 * 64 + 2 * 256) = 15,360 and two products of 800; the head 2 * 10 * 88
    "a language model": (
        small.Language, (TOKENS,),
        2 * (15_360 + 1_600) + 1_760, 2 * (2 * 15_360 + 5 * 800) + 2 * 1_760,
        88 + 40 + 2 * (32 + 4 * 64 + 32 + 2 * 256 + 40) + 16, None,
    ),
    # 2 images: 2 * 8 patches * 8 * 48; 10 tokens: 2 * 10 * (4 * 64 + 2 * 128), products of 800; 2 * 2 * 40. The images
    # need no gradient
    "a vision transformer": (
        small.Vision, (rows(2, 3, 8, 8),),
        6_144 + 10_240 + 1_600 + 160, 6_144 + 20_480 + 4_000 + 320,
        8 * 48 + 8 + 8 + (4 * 64 + 32 + 2 * 128 + 24 + 32) + 45, None,
    ),
    # 6 rows whatever their experts: 2 * 6 * 32 each. Kept: the input, what is between twice, and 3 ends of 4 bytes
    "experts in one call": (
        small.Grouped, (rows(6, 8), torch.tensor([2, 3, 6], dtype=torch.int32)), 768, 3 * 384, 192, None,
    ),
    "a symmetric weight": (small.symmetric, (rows(10, 6),), 720, 720, 42, 240),
    "a derivative of one's own": (small.Own, (given(10, 6),), 480, 960, 24, 240),
    # 120, and 120 for the slope; the backward has two gradients of either. (nacre's layer forms its weight's gradient
    # with the slope, which this one does not ask for: it is not converted)
    "a penalty of the gradient": (small.Penalty, (rows(10, 6),), 240, 480, 7, None),
    "lower precision": (small.Lowered, (rows(10, 6),), 720, 720, 42, 120),
    "half precision": (lambda: nn.Linear(6, 4).half(), (rows(10, 6, dtype=torch.float16),), 480, 480, 28, 120),
    "a vector": (lambda: nn.Linear(6, 4), (rows(6),), 48, 48, 28, 24),
    "no rows": (lambda: nn.Linear(6, 4), (rows(0, 6),), 0, 0, 28, 0),
}  # fmt: skip


NOT_CONVERTED = ("two halves, the first checkpointed", "a penalty of the gradient")


def bill(report):
    names = ("params", "flops", "backward_flops", "elementwise_flops", "backward_elementwise_flops", "saved_bytes")
    return {name: getattr(report, name) for name in (*names, "bytes", "backward_bytes", "peak_bytes")}


@pytest.mark.parametrize("name", MODELS)
def test_a_bill_by_hand(name):
    build, inputs, forward, backward, parameters, kept_bytes = MODELS[name]
    report = nacre.cost(build(), *inputs)
    assert not report.unknown and not report.real
    assert (report.params, report.flops) == (parameters, forward)
    assert backward is None or report.backward_flops == backward
    assert kept_bytes is None or report.saved_bytes == kept_bytes
    assert report.saved_bytes == kept(build(), *inputs)
    with torch.device("meta"):
        model = build()
    assert bill(nacre.cost(model, *without_values(inputs))) == bill(report)
    converted = nacre.cost(nacre.convert(build()), *inputs)
    for count in ("params", "flops", "backward_flops", "elementwise_flops"):
        if name not in NOT_CONVERTED:
            assert getattr(converted, count) == getattr(report, count), count
