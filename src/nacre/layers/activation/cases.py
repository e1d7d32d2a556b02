"""Named shapes and edge cases of the activations."""

from collections.abc import Mapping
from typing import Any

from nacre.core.spec import Case, Normal


def _cases(arguments: Mapping[str, Any] | None = None, suffix: str = "") -> tuple[Case, ...]:
    """The cases which all of them share, since each treats every element alone."""
    arguments = arguments or {}
    inputs = {
        "rows": Normal((3, 7)),
        "one number": Normal(()),
        "one element": Normal((1,)),
        "far from 0": Normal((5, 11), scale=5.0),
        "very far from 0": Normal((13,), scale=1e4),
        "four dimensions": Normal((2, 3, 1, 5)),
        "channels_last": Normal((2, 3, 2, 4), layout="channels_last"),
        "transposed": Normal((2, 5, 3), layout="transposed"),
        "strided": Normal((4, 6), layout="strided"),
        "no elements": Normal((0, 6)),
        "frozen input": Normal((4, 6), gradient=False),
    }
    return tuple(Case(name + suffix, arguments, (given,)) for name, given in inputs.items())


_BENCH = (
    Case("small", {}, (Normal((64, 64)),), bench=True),
    Case("image", {}, (Normal((32, 64, 56, 56)),), bench=True),
    Case("text", {}, (Normal((8, 197, 3072)),), bench=True),
    Case("image tokens", {}, (Normal((32, 196, 3072)),), bench=True),
)

GELU_CASES = (
    *_cases(),
    *_cases({"approximate": "tanh"}, suffix=", tanh"),
    *_BENCH,
    Case("text, tanh", {"approximate": "tanh"}, (Normal((8, 197, 3072)),), bench=True),
)
RELU_CASES = (
    *_cases(),
    Case("inplace", {"inplace": True}, (Normal((3, 7), gradient=False),)),
    *_BENCH,
    Case("image, channels_last", {}, (Normal((32, 64, 56, 56), layout="channels_last"),), bench=True),
)
SILU_CASES = (*_cases(), *_BENCH)
TANH_CASES = (*_cases(), *_BENCH)
SIGMOID_CASES = (*_cases(), *_BENCH)
