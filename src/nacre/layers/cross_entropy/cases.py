"""Named shapes and edge cases of the cross-entropy losses."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from nacre.core.spec import Case, Integers, Made, Normal


@dataclass(frozen=True)
class Probabilities:
    """A distribution over the classes of dimension 1 (or the only one) for each token."""

    shape: tuple[int, ...]
    gradient: bool = False

    def make(self, dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
        scores = torch.randn(self.shape, dtype=torch.float64, generator=generator)
        return scores.softmax(1 if len(self.shape) > 1 else 0).to(dtype).requires_grad_(self.gradient)


@dataclass(frozen=True)
class SomeIgnored:
    """Class indices of which every second one is ``ignore_index``."""

    shape: tuple[int, ...]
    high: int
    ignore_index: int = -100

    def make(self, dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
        target = torch.randint(self.high, self.shape, generator=generator)
        target.view(-1)[::2] = self.ignore_index
        return target


def _impossible_classes(dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    logits = torch.randn(3, 4, dtype=torch.float64, generator=generator).to(dtype)
    logits[:, 2] = -torch.inf
    return logits.requires_grad_()


def _one_of(ignored: int, size: int) -> Made:
    return Made(lambda dtype, generator: torch.full((size,), ignored))


WEIGHT = torch.tensor([0.5, 2.0, 1.0, 0.25, 3.0])


def _loss(name: str, arguments: Mapping[str, Any], *inputs: Any, **settings: Any) -> Case:
    return Case(name, arguments, inputs, **settings)


CASES = (
    _loss("indices", {}, Normal((4, 5)), Integers((4,), 5)),
    _loss("sum", {"reduction": "sum"}, Normal((4, 5)), Integers((4,), 5)),
    _loss("none", {"reduction": "none"}, Normal((4, 5)), Integers((4,), 5)),
    _loss("one token", {}, Normal((5,)), Integers((), 5)),
    _loss("one token, none", {"reduction": "none"}, Normal((5,)), Integers((), 5)),
    _loss("one class", {}, Normal((3, 1)), Integers((3,), 1)),
    _loss("places", {}, Normal((2, 3, 4)), Integers((2, 4), 3)),
    _loss("image", {"reduction": "none"}, Normal((2, 3, 2, 3)), Integers((2, 2, 3), 3)),
    _loss("image, channels_last", {}, Normal((2, 3, 2, 2), layout="channels_last"), Integers((2, 2, 2), 3)),
    _loss("volume", {"reduction": "none"}, Normal((1, 2, 2, 2, 3)), Integers((1, 2, 2, 3), 2)),
    _loss("weights", {"weight": WEIGHT}, Normal((4, 5)), Integers((4,), 5)),
    _loss("weights, none", {"weight": WEIGHT, "reduction": "none"}, Normal((4, 5)), Integers((4,), 5)),
    _loss("weights, places", {"weight": WEIGHT}, Normal((2, 5, 3)), Integers((2, 3), 5)),
    _loss("smoothing", {"label_smoothing": 0.1}, Normal((4, 5)), Integers((4,), 5)),
    _loss("all smoothing", {"label_smoothing": 1.0}, Normal((4, 5)), Integers((4,), 5)),
    _loss("smoothing, weights", {"label_smoothing": 0.3, "weight": WEIGHT}, Normal((4, 5)), Integers((4,), 5)),
    _loss("ignored", {}, Normal((5, 4)), SomeIgnored((5,), 4)),
    _loss("ignored class", {"ignore_index": 1, "reduction": "none"}, Normal((5, 4)), SomeIgnored((5,), 4, 1)),
    _loss(
        "ignored, weights, smoothing, places",
        {"ignore_index": -1, "weight": WEIGHT, "label_smoothing": 0.2},
        *(Normal((2, 5, 3)), SomeIgnored((2, 3), 5, -1)),
    ),
    _loss("probabilities", {}, Normal((4, 5)), Probabilities((4, 5))),
    _loss("probabilities, none", {"reduction": "none"}, Normal((4, 5)), Probabilities((4, 5), gradient=True)),
    _loss("probabilities, sum, weights", {"reduction": "sum", "weight": WEIGHT}, Normal((3, 5)), Probabilities((3, 5))),
    _loss(
        "probabilities, weights, smoothing, places",
        {"weight": WEIGHT, "label_smoothing": 0.2},
        *(Normal((2, 5, 2)), Probabilities((2, 5, 2), gradient=True)),
    ),
    _loss("probabilities, one token", {}, Normal((5,)), Probabilities((5,), gradient=True)),
    _loss("frozen logits", {}, Normal((4, 5), gradient=False), Probabilities((4, 5), gradient=True)),
    _loss("odd sizes", {}, Normal((13, 3)), Integers((13,), 3)),
    _loss("transposed", {}, Normal((2, 3, 4), layout="transposed"), Integers((2, 4), 3)),
    _loss("strided", {}, Normal((4, 5), layout="strided"), Integers((4,), 5)),
    _loss("no tokens", {}, Normal((0, 5)), Integers((0,), 5), smooth=False),
    _loss("no tokens, sum", {"reduction": "sum"}, Normal((0, 5)), Integers((0,), 5)),
    _loss("no places, none", {"reduction": "none"}, Normal((2, 3, 0)), Integers((2, 0), 3)),
    _loss("all ignored", {}, Normal((3, 5)), _one_of(-100, 3), smooth=False),
    _loss("impossible classes", {}, Made(_impossible_classes), _one_of(1, 3), smooth=False),
    _loss("impossible targets", {}, Made(_impossible_classes), _one_of(2, 3), smooth=False),
    _loss("huge logits", {}, Normal((4, 5), scale=1e4), Integers((4,), 5), smooth=False),
    _loss("digits", {}, Normal((128, 10)), Integers((128,), 10), bench=True),
    _loss("characters", {}, Normal((768, 65)), Integers((768,), 65), bench=True),
    _loss("vocabulary", {}, Normal((512, 50304)), Integers((512,), 50304), bench=True),
    _loss("32,000 words", {}, Normal((2048, 32000)), Integers((2048,), 32000), bench=True),
    _loss("segmentation", {}, Normal((8, 21, 128, 128)), Integers((8, 128, 128), 21), bench=True),
)


def _linear(in_features: int, num_classes: int, **others: Any) -> dict[str, Any]:
    return {"in_features": in_features, "num_classes": num_classes, **others}


LINEAR_CASES = (
    _loss("rows", _linear(3, 4), Normal((5, 3)), Integers((5,), 4)),
    _loss("bias", _linear(3, 4, bias=True), Normal((5, 3)), Integers((5,), 4)),
    _loss("sum", _linear(3, 4, reduction="sum"), Normal((5, 3)), Integers((5,), 4)),
    _loss("none", _linear(3, 4, reduction="none"), Normal((5, 3)), Integers((5,), 4)),
    _loss("one row", _linear(3, 4, bias=True), Normal((3,)), Integers((), 4)),
    _loss("one row, none", _linear(3, 4, reduction="none"), Normal((3,)), Integers((), 4)),
    _loss("one feature", _linear(1, 3), Normal((4, 1)), Integers((4,), 3)),
    _loss("one class", _linear(3, 1), Normal((4, 3)), Integers((4,), 1)),
    _loss("places", _linear(3, 4, out_features=(2,), bias=True), Normal((2, 3)), Integers((2, 2), 4)),
    _loss(
        "two dimensions of places, none",
        _linear(2, 3, out_features=(2, 2), reduction="none"),
        *(Normal((2, 2)), Integers((2, 2, 2), 3)),
    ),
    _loss("weights", _linear(3, 5, weight=WEIGHT, bias=True), Normal((4, 3)), Integers((4,), 5)),
    _loss("smoothing", _linear(3, 4, label_smoothing=0.1), Normal((5, 3)), Integers((5,), 4)),
    _loss("ignored", _linear(3, 4), Normal((5, 3)), SomeIgnored((5,), 4)),
    _loss("ignored class", _linear(3, 4, ignore_index=2, reduction="none"), Normal((5, 3)), SomeIgnored((5,), 4, 2)),
    _loss("probabilities", _linear(3, 4, bias=True), Normal((5, 3)), Probabilities((5, 4), gradient=True)),
    _loss(
        "probabilities, weights, smoothing, places",
        _linear(2, 5, weight=WEIGHT, label_smoothing=0.2, out_features=(2,)),
        *(Normal((2, 2)), Probabilities((2, 5, 2))),
    ),
    _loss("frozen input", _linear(3, 4), Normal((5, 3), gradient=False), Integers((5,), 4)),
    _loss("strided", _linear(3, 4), Normal((5, 3), layout="strided"), Integers((5,), 4)),
    _loss("no rows, sum", _linear(3, 4, bias=True, reduction="sum"), Normal((0, 3)), Integers((0,), 4)),
    _loss("no rows", _linear(3, 4), Normal((0, 3)), Integers((0,), 4), smooth=False),
    _loss("all ignored", _linear(3, 4), Normal((3, 3)), _one_of(-100, 3), smooth=False),
    _loss("huge logits", _linear(3, 4), Normal((4, 3), scale=1e4), Integers((4,), 4), smooth=False),
    _loss("characters", _linear(128, 65), Normal((768, 128)), Integers((768,), 65), bench=True),
    _loss("vocabulary", _linear(768, 50304), Normal((1024, 768)), Integers((1024,), 50304), bench=True),
)
