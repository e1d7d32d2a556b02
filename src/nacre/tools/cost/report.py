"""The bill of a model: a row for each call of a module, and their sum."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from nacre.core.cost import Cost
from nacre.tools.bench.results import Ceilings, Machine

_IN_WORDS = {
    "nacre::residual_dropout_layer_norm": "residual + dropout + norm",
    "nacre::residual_dropout": "residual + dropout",
    "nacre::feed_forward": "feed-forward maps",
    "aten::_scaled_dot_product_flash_attention_for_cpu": "attention",
    "nacre::attention": "attention",
}
"""The steps which blocks do in one pass."""


@dataclass
class CostRow:
    """One call of a module.

    Attributes:
        name: its path in the model, as ``named_modules`` gives it; empty for the model itself.
        kind: its class.
        depth: how many calls it lies within.
        parent: the index of the row of the call it lies within; None for the model.
        inputs: shapes of the tensors it was given.
        outputs: shapes of the tensors it returned.
        formula: the layer of nacre whose ``cost.py`` billed the call; empty where operators were counted.
        sizes: what the letters of that layer's formula stand for in the call.
        own: what the call did itself.
        total: that and what all calls within it did; ``parameters`` are those of the module, each once.
        share: of the model's FLOPs, forward and backward together, elementwise ones included.
        unknown: operators without a known cost, and how often they ran in the call itself.
        forward_work: what ran in the call itself: a record of each kind of operator call, and how often.
        backward_work: the same for the backward.
        predicted_seconds: of forward and backward, from counts and measured ceilings; None until asked for.
        measured_forward_seconds: with ``measure=True``.
        measured_backward_seconds: with ``measure=True``.
        limit_seconds: the least time this machine needs for the row's products and traffic; None until predicted.
    """

    name: str
    kind: str
    depth: int
    parent: int | None
    inputs: tuple[tuple[int, ...], ...]
    outputs: tuple[tuple[int, ...], ...]
    formula: str
    own: Cost
    total: Cost = field(default_factory=Cost)
    share: float = 0.0
    sizes: Mapping[str, int] = field(default_factory=dict)
    unknown: Mapping[str, int] = field(default_factory=dict)
    forward_work: Mapping[Any, int] = field(default_factory=dict, repr=False)
    backward_work: Mapping[Any, int] = field(default_factory=dict, repr=False)
    predicted_seconds: float | None = None
    measured_forward_seconds: float | None = None
    measured_backward_seconds: float | None = None
    limit_seconds: float | None = None

    @property
    def measured_seconds(self) -> float | None:
        """Forward and backward together."""
        if self.measured_forward_seconds is None:
            return None
        return self.measured_forward_seconds + (self.measured_backward_seconds or 0.0)

    @property
    def share_of_limit(self) -> float | None:
        """How much of the machine's limit the measured call reaches: 1 is the limit itself."""
        seconds = self.measured_seconds
        return None if not seconds or self.limit_seconds is None else self.limit_seconds / seconds

    @property
    def own_operations(self) -> tuple[str, ...]:
        """What the call does itself forward, in words: at most three, those with most work first."""
        sums: dict[str, int] = {}
        for work, count in self.forward_work.items():
            done = count * (work.flops + work.elementwise_flops)
            name = _IN_WORDS.get(work.kind.partition(",")[0], work.kind.partition(",")[0].rpartition("::")[2])
            sums[name] = sums.get(name, 0) + done
        names = sorted((name for name, done in sums.items() if done), key=lambda name: -sums[name])
        return tuple(names[:3])

    def as_json(self) -> dict[str, Any]:
        """All but the records of single operators, as plain values."""
        left_out = ("own", "total", "forward_work", "backward_work", "sizes", "unknown", "inputs", "outputs")
        values = {one.name: getattr(self, one.name) for one in fields(self) if one.name not in left_out}
        return {
            **values,
            "inputs": [list(shape) for shape in self.inputs],
            "outputs": [list(shape) for shape in self.outputs],
            "sizes": dict(self.sizes),
            "unknown": dict(self.unknown),
            "own_operations": list(self.own_operations),
            "own": asdict(self.own),
            "total": asdict(self.total),
            "measured_seconds": self.measured_seconds,
            "share_of_limit": self.share_of_limit,
        }


@dataclass
class CostReport:
    """What :func:`nacre.cost` found.

    Attributes:
        model: the class of the model.
        params: parameters of the model, tied ones once, those included that no call used.
        trainable_params: those of them which ask for a gradient.
        rows: one for each call of a module, each after the one it lies within; the first is the model.
        peak_bytes: the most that lived at one time: parameters, buffers, inputs, results, what is kept for the
            backward, and gradients, of parameters too. What an operator needs within itself and an optimizer's state
            are not in it.
        peak_in: the row whose operator brought it there.
        parameter_bytes: of parameters and buffers.
        unknown: operators without a known cost, and how often they ran; only their bytes are in the bill.
        real: whether the model ran on real numbers, since fake ones could not tell what it does.
        machine: where times were measured or predicted.
        warnings: what speaks against trusting the times.
        ceilings: the best speeds of that machine, from which the limits follow.
        converted_seconds: with ``measure=True``, of the model as :func:`nacre.convert` makes it, forward and backward;
            None where it has nothing to convert.
    """

    model: str
    params: int
    trainable_params: int
    rows: list[CostRow]
    peak_bytes: int
    peak_in: str
    parameter_bytes: int
    unknown: Mapping[str, int]
    real: bool = False
    machine: Machine | None = None
    ceilings: Ceilings | None = None
    warnings: tuple[str, ...] = ()
    converted_seconds: float | None = None

    @property
    def total(self) -> Cost:
        """The whole bill as one record."""
        return self.rows[0].total

    @property
    def flops(self) -> int:
        """FLOPs of matrix products, forward; a multiply-add is 2."""
        return self.total.flops

    @property
    def backward_flops(self) -> int:
        """FLOPs of matrix products, backward, for the gradients that are really needed."""
        return self.total.backward_flops

    @property
    def elementwise_flops(self) -> int:
        """Everything else, forward."""
        return self.total.elementwise_flops

    @property
    def backward_elementwise_flops(self) -> int:
        """Everything else, backward."""
        return self.total.backward_elementwise_flops

    @property
    def bytes(self) -> int:
        """Compulsory traffic forward: what each call reads and writes, once."""
        return self.total.bytes

    @property
    def backward_bytes(self) -> int:
        """The same backward."""
        return self.total.backward_bytes

    @property
    def saved_bytes(self) -> int:
        """What autograd keeps for the backward, each storage once, without parameters and buffers."""
        return self.total.saved_bytes

    @property
    def predicted_seconds(self) -> float:
        """The time to expect for forward and backward on this machine; measures its ceilings once, then keeps them."""
        if self.rows[0].predicted_seconds is None:
            self.predict()
        return self.rows[0].predicted_seconds or 0.0

    def predict(self) -> None:
        """Fills in each row's ``predicted_seconds`` and ``limit_seconds``."""
        from nacre.tools.cost.speed import predict

        predict(self)

    def children(self, index: int) -> Iterator[int]:
        """The indices of the rows right within a row."""
        return (place for place, row in enumerate(self.rows) if row.parent == index)

    def table(self, depth: int | None = None) -> str:
        """The bill as text, a line for each row.

        Args:
            depth: leave out what lies deeper. Default: nothing is left out.
        """
        from nacre.tools.cost.text import table

        return table(self, depth)

    def to_json(self) -> dict[str, Any]:
        """Everything, as ``json.dump`` takes it; ``rows`` are in the order of the calls, ``parent`` is an index."""
        totals = {name: value for name, value in asdict(self.total).items() if name != "parameters"}
        return {
            "model": self.model,
            "params": self.params,
            "trainable_params": self.trainable_params,
            **totals,
            "peak_bytes": self.peak_bytes,
            "peak_in": self.peak_in,
            "parameter_bytes": self.parameter_bytes,
            "predicted_seconds": self.rows[0].predicted_seconds,
            "measured_seconds": self.rows[0].measured_seconds,
            "limit_seconds": self.rows[0].limit_seconds,
            "converted_seconds": self.converted_seconds,
            "share_of_limit": self.rows[0].share_of_limit,
            "unknown": dict(self.unknown),
            "real": self.real,
            "machine": None if self.machine is None else asdict(self.machine),
            "ceilings": None if self.ceilings is None else asdict(self.ceilings),
            "warnings": list(self.warnings),
            "rows": [row.as_json() for row in self.rows],
        }

    def to_dataframe(self) -> Any:
        """A pandas DataFrame, a line for each row; needs pandas.

        Raises:
            ModuleNotFoundError: pandas is not installed.
        """
        import pandas

        lines = []
        for row in self.rows:
            values = row.as_json()
            own, total = values.pop("own"), values.pop("total")
            lines.append({**values, **total, **{f"own_{name}": value for name, value in own.items()}})
        return pandas.DataFrame(lines)

    def html(self, path: str | Path) -> None:
        """Writes the bill as one page that needs no other file and no network.

        Args:
            path: the file to write; it is there whole or not at all.
        """
        from nacre.tools.cost.page import write_page

        write_page(self, Path(path))

    def __str__(self) -> str:
        return self.table()
