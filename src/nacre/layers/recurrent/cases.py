"""Named shapes and edge cases of LSTM and GRU."""

import torch
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from nacre.core.spec import Case, Made, Normal


def _packed(lengths: list[int], enforce_sorted: bool = True) -> Made:
    """Sequences of 2 features and these lengths, packed, whose values ask for their gradient."""

    def make(dtype: torch.dtype, generator: torch.Generator) -> PackedSequence:
        padded = Normal((max(lengths), len(lengths), 2), gradient=False).make(dtype, generator)
        packed = pack_padded_sequence(padded, torch.tensor(lengths), enforce_sorted=enforce_sorted)
        packed.data.requires_grad_()
        return packed

    return Made(make)


def _pair(first: tuple[int, ...], second: tuple[int, ...]) -> Made:
    """The initial states h_0 and c_0 of an LSTM."""
    return Made(lambda dtype, generator: tuple(Normal(shape).make(dtype, generator) for shape in (first, second)))


# small, since every value and every weight is moved by itself in a gradient check
_SIZES = {"input_size": 2, "hidden_size": 2}
_LEVELS = {"input_size": 2, "hidden_size": 1, "num_layers": 2}
_INPUT = Normal((3, 2, 2))

_SHARED = (
    Case("one level", _SIZES, (_INPUT,)),
    Case("two levels, both directions", {**_LEVELS, "bidirectional": True}, (_INPUT,)),
    Case("no bias", {**_SIZES, "bias": False}, (_INPUT,)),
    Case("batch first", {**_LEVELS, "batch_first": True}, (Normal((2, 3, 2)),)),
    Case("batch first, transposed", {**_SIZES, "batch_first": True}, (Normal((2, 4, 2), layout="transposed"),)),
    Case("unbatched, batch first", {**_SIZES, "batch_first": True}, (Normal((4, 2)),)),
    Case("one step", _SIZES, (Normal((1, 2, 2)),)),
    Case("one of everything", {"input_size": 1, "hidden_size": 1}, (Normal((1, 1, 1)),)),
    Case("odd sizes", {"input_size": 5, "hidden_size": 3}, (Normal((2, 3, 5)),)),
    Case("large input", _SIZES, (Normal((3, 2, 2), scale=20.0),)),
    Case("no sequences", {**_LEVELS, "bidirectional": True}, (Normal((3, 0, 2)),)),
    Case("frozen input", _LEVELS, (Normal((3, 2, 2), gradient=False),)),
    Case("packed", {**_SIZES, "bidirectional": True}, (_packed([4, 2, 2]),)),
    Case("packed unsorted", _LEVELS, (_packed([1, 3, 2], enforce_sorted=False),)),
    Case("dropout", {**_LEVELS, "dropout": 0.5}, (_INPUT,), random=True),
    Case("dropout of everything", {**_LEVELS, "dropout": 1.0}, (_INPUT,)),
    Case("dropout in evaluation", {**_LEVELS, "dropout": 0.5}, (_INPUT,), training=False),
    Case(
        "language model",
        {"input_size": 192, "hidden_size": 192, "num_layers": 2, "batch_first": True},
        (Normal((32, 64, 192)),),
        bench=True,
    ),
    Case(
        "tagger",
        {"input_size": 300, "hidden_size": 256, "num_layers": 2, "bidirectional": True, "batch_first": True},
        (Normal((16, 40, 300)),),
        bench=True,
    ),
    Case(
        "speech",
        {"input_size": 128, "hidden_size": 256, "num_layers": 2, "batch_first": True},
        (Normal((64, 100, 128)),),
        bench=True,
    ),
    Case("small", {"input_size": 32, "hidden_size": 64, "batch_first": True}, (Normal((16, 50, 32)),), bench=True),
    Case(
        "both directions",
        {"input_size": 256, "hidden_size": 256, "bidirectional": True, "batch_first": True},
        (Normal((32, 100, 256)),),
        bench=True,
    ),
    Case("wide", {"input_size": 1024, "hidden_size": 1024}, (Normal((50, 64, 1024)),), bench=True),
)

LSTM_CASES = (
    *_SHARED,
    Case("initial states", {**_SIZES, "num_layers": 2}, (_INPUT, _pair((2, 2, 2), (2, 2, 2)))),
    Case("unbatched, initial states", {**_SIZES, "bidirectional": True}, (Normal((3, 2)), _pair((2, 2), (2, 2)))),
    Case(
        "packed unsorted, initial states",
        {**_SIZES, "bidirectional": True},
        (_packed([1, 3, 2], enforce_sorted=False), _pair((2, 3, 2), (2, 3, 2))),
    ),
    Case("projection", {**_SIZES, "proj_size": 1, "num_layers": 2, "bidirectional": True}, (Normal((2, 1, 2)),)),
    Case(
        "projection, packed, initial states",
        {"input_size": 2, "hidden_size": 3, "proj_size": 2},
        (_packed([1, 3], enforce_sorted=False), _pair((1, 2, 2), (1, 2, 3))),
    ),
    Case("projection, no bias", {**_SIZES, "proj_size": 1, "bias": False}, (_INPUT, _pair((1, 2, 1), (1, 2, 2)))),
)

GRU_CASES = (
    *_SHARED,
    Case("initial states", {**_SIZES, "num_layers": 2}, (_INPUT, Normal((2, 2, 2)))),
    Case("unbatched, initial states", {**_SIZES, "bidirectional": True}, (Normal((3, 2)), Normal((2, 2)))),
    Case(
        "packed unsorted, initial states",
        {**_SIZES, "bidirectional": True},
        (_packed([1, 3, 2], enforce_sorted=False), Normal((2, 3, 2))),
    ),
)
