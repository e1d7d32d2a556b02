"""A layer's description: what it replaces, what it computes, what it costs, and the cases that prove it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from nacre.core.cost import Cost


@dataclass(frozen=True)
class Normal:
    """An input of independent standard normal values.

    Args:
        shape: the shape of the tensor.
        scale: the standard deviation.
        gradient: whether the input asks for its gradient.
        layout: ``"contiguous"``, ``"transposed"`` (the last two dimensions swapped in memory), ``"strided"`` (every
            second element of a larger tensor) or ``"channels_last"``.
    """

    shape: tuple[int, ...]
    scale: float = 1.0
    gradient: bool = True
    layout: str = "contiguous"

    def make(self, dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
        # drawn in float64 and rounded, so that every dtype sees the same numbers
        shape = list(self.shape)
        if self.layout == "strided":
            shape[-1] *= 2
        values = (torch.randn(shape, dtype=torch.float64, generator=generator) * self.scale).to(dtype)
        if self.layout == "strided":
            values = values[..., ::2]
        elif self.layout == "transposed":
            values = values.transpose(-1, -2).contiguous().transpose(-1, -2)
        elif self.layout == "channels_last":
            values = values.contiguous(memory_format=torch.channels_last)
        return values.detach().requires_grad_(self.gradient)


@dataclass(frozen=True)
class Integers:
    """An input of integers drawn from ``low`` to ``high - 1``: tokens, class indices."""

    shape: tuple[int, ...]
    high: int
    low: int = 0

    def make(self, dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
        return torch.randint(self.low, self.high, self.shape, generator=generator)


@dataclass(frozen=True)
class Made:
    """An input made by a function of dtype and generator: masks, packed sequences, probabilities, tuples of states."""

    function: Callable[[torch.dtype, torch.Generator], Any]

    def make(self, dtype: torch.dtype, generator: torch.Generator) -> Any:
        return self.function(dtype, generator)


@dataclass(frozen=True)
class Same:
    """The very tensor of an earlier positional input: self-attention has one tensor as query, key and value."""

    index: int


@dataclass(frozen=True)
class Case:
    """One way to build and call a layer: it feeds tests, gradient check and benchmark alike.

    Args:
        name: what is special about the case.
        arguments: keyword arguments of the constructor.
        inputs: descriptions of the positional inputs of ``forward``, each with ``make(dtype, generator)``.
        keywords: the same for the keyword inputs; a value without ``make`` is passed as it is.
        training: whether the layer is in training mode.
        smooth: whether the function is differentiable there, so that finite differences apply.
        random: whether the result draws random numbers, so that it equals torch.nn's in distribution only.
        bench: whether it is a shape that users run, to be timed; such a case is too large for finite differences.
    """

    name: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    inputs: tuple[Any, ...] = ()
    keywords: Mapping[str, Any] = field(default_factory=dict)
    training: bool = True
    smooth: bool = True
    random: bool = False
    bench: bool = False

    def make(self, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The inputs of ``forward``, positional and by keyword."""
        generator = torch.Generator().manual_seed(seed)
        made: list[Any] = []
        for value in self.inputs:
            made.append(made[value.index] if isinstance(value, Same) else value.make(dtype, generator))
        keywords = {
            name: value.make(dtype, generator) if hasattr(value, "make") else value
            for name, value in self.keywords.items()
        }
        return tuple(made), keywords


@dataclass(frozen=True)
class Letters:
    """How the sizes of a call are written in formulas: ``rows`` as N, ``in_features`` as D.

    Args:
        names: the letters of a call's sizes, by the name that ``cost`` takes them under; numbers and products stand as
            text, ``"B T"``. Sizes without a letter are the call's settings and stay the numbers they are.
        inputs: ``inputs(layer, size)``, the inputs of a usual call on the meta device, as ``size`` makes them larger.
        at_most: letters which each of some products bounds, up to a constant factor: ``{"H": ("E",)}`` for the heads
            of an attention.
        where: letters for what ``cost`` computes from sizes on its way, ``where(**sizes)``; None for none.
        meanings: what letters stand for, where the name of their size does not say it.
    """

    names: Callable[[Mapping[str, Any]], Mapping[str, Any]]
    inputs: Callable[[Any, int], tuple[torch.Tensor, ...]]
    at_most: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    where: Callable[..., Mapping[str, Any]] | None = None
    meanings: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class LayerSpec:
    """Everything that tests, tools and the command line need to know of a layer.

    Args:
        name: the one name of folder, op, command line and test.
        layer: the class.
        replaces: the torch.nn class which it subclasses and replaces; None for a layer that torch.nn does not have.
        purpose: what it is for, in a few words.
        complexity: growth of forward time and of saved memory, as text in ``letters``; :func:`nacre.cost_formula`
            derives it from ``cost``.
        operators: the ops (``torch.ops.nacre``) it calls.
        sizes: ``sizes(layer, *inputs, **keywords) -> dict``, the sizes of one call as exact integers.
        cost: ``cost(**sizes) -> Cost``.
        cases: named shapes and edge cases.
        letters: how the sizes are written in formulas; without, :func:`nacre.cost_formula` does not know the layer.
    """

    name: str
    layer: type[torch.nn.Module]
    replaces: type[torch.nn.Module] | None
    purpose: str
    complexity: str
    operators: tuple[str, ...]
    sizes: Callable[..., dict[str, Any]]
    cost: Callable[..., Cost]
    cases: tuple[Case, ...]
    letters: Letters | None = None
