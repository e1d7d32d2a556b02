"""Named shapes and edge cases of MultiheadAttention."""

import torch

from nacre.core.spec import Case, Made, Normal, Same

SELF = (Same(0), Same(0))
NO_WEIGHTS = {"need_weights": False}


def _causal(length: int) -> Made:
    return Made(lambda dtype, generator: torch.ones(length, length, dtype=torch.bool).triu(1))


def _ignored(*ignored: list[bool]) -> Made:
    return Made(lambda dtype, generator: torch.tensor(ignored))


SMALL = {"embed_dim": 4, "num_heads": 2}
TOKENS = Normal((3, 2, 4))

CASES = (
    Case("self", SMALL, (TOKENS, *SELF)),
    Case("self without weights", SMALL, (TOKENS, *SELF), NO_WEIGHTS),
    Case("weights of each head", SMALL, (TOKENS, *SELF), {"average_attn_weights": False}),
    Case("batch first", {**SMALL, "batch_first": True}, (Normal((2, 3, 4)), *SELF)),
    Case("batch first without weights", {**SMALL, "batch_first": True}, (Normal((2, 3, 4)), *SELF), NO_WEIGHTS),
    Case("unbatched", SMALL, (Normal((3, 4)), *SELF)),
    Case("unbatched without weights", {**SMALL, "batch_first": True}, (Normal((3, 4)), *SELF), NO_WEIGHTS),
    Case("no bias", {**SMALL, "bias": False}, (TOKENS, *SELF), NO_WEIGHTS),
    Case("cross", SMALL, (TOKENS, Normal((5, 2, 4)), Same(1))),
    Case("cross without weights", SMALL, (TOKENS, Normal((5, 2, 4)), Same(1)), NO_WEIGHTS),
    Case("three inputs", SMALL, (TOKENS, Normal((2, 2, 4)), Normal((2, 2, 4))), NO_WEIGHTS),
    Case("value is query", SMALL, (TOKENS, Normal((3, 2, 4)), Same(0)), NO_WEIGHTS),
    Case("kdim and vdim", {**SMALL, "kdim": 3, "vdim": 5}, (TOKENS, Normal((2, 2, 3)), Normal((2, 2, 5)))),
    Case(
        "kdim, no bias, batch first",
        {**SMALL, "kdim": 3, "vdim": 1, "bias": False, "batch_first": True},
        (Normal((2, 3, 4)), Normal((2, 2, 3)), Normal((2, 2, 1))),
        NO_WEIGHTS,
    ),
    Case("bias_kv", {**SMALL, "add_bias_kv": True}, (TOKENS, *SELF)),
    Case("zero_attn", {**SMALL, "add_zero_attn": True}, (TOKENS, *SELF), NO_WEIGHTS),
    Case(
        "bias_kv, zero_attn and masks",
        {**SMALL, "add_bias_kv": True, "add_zero_attn": True},
        (TOKENS, *SELF),
        {"attn_mask": _causal(3), "key_padding_mask": _ignored([True, False, False], [False, False, True])},
    ),
    Case("causal mask", SMALL, (TOKENS, *SELF), {"attn_mask": _causal(3)}),
    Case("causal hint", SMALL, (TOKENS, *SELF), {"attn_mask": _causal(3), "is_causal": True, **NO_WEIGHTS}),
    Case("causal hint with weights", SMALL, (TOKENS, *SELF), {"attn_mask": _causal(3), "is_causal": True}),
    Case(
        "padding",
        SMALL,
        (TOKENS, *SELF),
        {"key_padding_mask": _ignored([False, False, True], [False, False, False])},
    ),
    Case(
        "causal and padding",
        {**SMALL, "batch_first": True},
        (Normal((2, 3, 4)), *SELF),
        {
            "attn_mask": _causal(3),
            "key_padding_mask": _ignored([False, False, True], [False, False, False]),
            "is_causal": True,
            **NO_WEIGHTS,
        },
    ),
    Case(
        "unbatched padding",
        SMALL,
        (Normal((3, 4)), *SELF),
        {"key_padding_mask": Made(lambda dtype, generator: torch.tensor([False, True, False]))},
    ),
    Case("learned mask", SMALL, (TOKENS, *SELF), {"attn_mask": Normal((3, 3)), **NO_WEIGHTS}),
    Case("learned mask of each head", SMALL, (TOKENS, *SELF), {"attn_mask": Normal((4, 3, 3))}),
    Case(
        "learned masks of queries and keys",
        SMALL,
        (TOKENS, *SELF),
        {"attn_mask": Normal((3, 3)), "key_padding_mask": Normal((2, 3)), **NO_WEIGHTS},
    ),
    # without weights a query with nothing to see gets 0; with weights NaN, where no difference quotient exists
    Case(
        "all padding, without weights",
        SMALL,
        (TOKENS, *SELF),
        {"key_padding_mask": _ignored([True, True, True], [False, False, True]), **NO_WEIGHTS},
    ),
    Case(
        "all padding",
        SMALL,
        (TOKENS, *SELF),
        {"key_padding_mask": _ignored([True, True, True], [False, False, True])},
        smooth=False,
    ),
    Case("one head", {"embed_dim": 3, "num_heads": 1}, (Normal((2, 2, 3)), *SELF)),
    Case("heads of one feature", {"embed_dim": 3, "num_heads": 3}, (Normal((2, 2, 3)), *SELF), NO_WEIGHTS),
    Case("one token", {"embed_dim": 2, "num_heads": 2}, (Normal((1, 1, 2)), *SELF)),
    Case("odd sizes", {"embed_dim": 6, "num_heads": 3}, (Normal((5, 1, 6)), *SELF), NO_WEIGHTS),
    Case("transposed", SMALL, (Normal((3, 2, 4), layout="transposed"), *SELF), NO_WEIGHTS),
    Case("strided", SMALL, (Normal((3, 2, 4), layout="strided"), *SELF)),
    Case("no batch elements", SMALL, (Normal((3, 0, 4)), *SELF)),
    Case("no queries", SMALL, (Normal((0, 2, 4)), Normal((3, 2, 4)), Same(1)), NO_WEIGHTS),
    Case("no keys", SMALL, (TOKENS, Normal((0, 2, 4)), Same(1))),
    Case("no keys, without weights", SMALL, (TOKENS, Normal((0, 2, 4)), Same(1)), NO_WEIGHTS),
    Case("frozen input", SMALL, (Normal((3, 2, 4), gradient=False), *SELF)),
    Case("frozen keys", SMALL, (TOKENS, Normal((2, 2, 4), gradient=False), Same(1)), NO_WEIGHTS),
    Case("evaluation", {**SMALL, "dropout": 0.5}, (TOKENS, *SELF), training=False),
    Case("dropout", {**SMALL, "dropout": 0.5}, (TOKENS, *SELF), random=True),
    Case("dropout without weights", {**SMALL, "dropout": 0.25}, (TOKENS, *SELF), NO_WEIGHTS, random=True),
    Case("dropout of all", {**SMALL, "dropout": 1.0}, (TOKENS, *SELF), random=True),
    Case(
        "small",
        {"embed_dim": 64, "num_heads": 4, "batch_first": True},
        (Normal((4, 16, 64)), *SELF),
        NO_WEIGHTS,
        bench=True,
    ),
    Case(
        "image tokens",
        {"embed_dim": 768, "num_heads": 12, "batch_first": True},
        (Normal((8, 197, 768)), *SELF),
        NO_WEIGHTS,
        bench=True,
    ),
    Case(
        "image tokens with weights",
        {"embed_dim": 768, "num_heads": 12, "batch_first": True},
        (Normal((8, 197, 768)), *SELF),
        bench=True,
    ),
    Case(
        "image tokens, dropout",
        {"embed_dim": 768, "num_heads": 12, "batch_first": True, "dropout": 0.1},
        (Normal((8, 197, 768)), *SELF),
        NO_WEIGHTS,
        random=True,
        bench=True,
    ),
    Case(
        "text, causal, dropout",
        {"embed_dim": 256, "num_heads": 4, "batch_first": True, "dropout": 0.1},
        (Normal((2, 1024, 256)), *SELF),
        {"attn_mask": _causal(1024), "is_causal": True, **NO_WEIGHTS},
        random=True,
        bench=True,
    ),
    Case(
        "text with weights",
        {"embed_dim": 512, "num_heads": 8, "batch_first": True},
        (Normal((4, 256, 512)), *SELF),
        bench=True,
    ),
)
