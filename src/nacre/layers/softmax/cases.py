"""Named shapes and edge cases of softmax and log-softmax."""

import torch

from nacre.core.spec import Case, Made, Normal


def _masked(dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    """Rows of which a causal mask has hidden the future, as attention hides it."""
    values = torch.randn(5, 5, dtype=torch.float64, generator=generator)
    hidden = torch.ones(5, 5, dtype=torch.bool).triu(1)
    return values.masked_fill(hidden, -torch.inf).to(dtype).requires_grad_()


def _hidden_row(dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    """A row of which everything is hidden, between two others."""
    values = torch.randn(3, 4, dtype=torch.float64, generator=generator)
    values[1] = -torch.inf
    return values.to(dtype).requires_grad_()


CASES = (
    Case("rows", {"dim": -1}, (Normal((3, 7)),)),
    Case("columns", {"dim": 0}, (Normal((5, 3)),)),
    Case("middle", {"dim": 1}, (Normal((2, 5, 3)),)),
    Case("one row", {"dim": 0}, (Normal((7,)),)),
    Case("one number", {"dim": -1}, (Normal(()),)),
    Case("one value", {"dim": 1}, (Normal((3, 1)),)),
    Case("odd rows", {"dim": -1}, (Normal((3, 17)),)),
    Case("far from 0", {"dim": -1}, (Normal((3, 5), scale=1e4),)),
    Case("channels_last", {"dim": 1}, (Normal((2, 3, 2, 4), layout="channels_last"),)),
    Case("transposed", {"dim": -1}, (Normal((2, 5, 3), layout="transposed"),)),
    Case("strided", {"dim": -1}, (Normal((4, 6), layout="strided"),)),
    Case("no rows", {"dim": -1}, (Normal((0, 6)),)),
    Case("no values", {"dim": -1}, (Normal((3, 0)),)),
    Case("frozen input", {"dim": -1}, (Normal((4, 6), gradient=False),)),
    Case("masked", {"dim": -1}, (Made(_masked),), smooth=False),
    Case("a hidden row", {"dim": -1}, (Made(_hidden_row),), smooth=False),
    Case("small", {"dim": -1}, (Normal((64, 64)),), bench=True),
    Case("attention", {"dim": -1}, (Normal((8, 12, 197, 197)),), bench=True),
    Case("vocabulary", {"dim": -1}, (Normal((256, 50257)),), bench=True),
    Case("32,000 words", {"dim": -1}, (Normal((512, 32000)),), bench=True),
    Case("pixels", {"dim": 1}, (Normal((8, 21, 128, 128)),), bench=True),
)
