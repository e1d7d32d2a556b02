"""A recurrence of many steps, billed in one go: a few of its steps are walked, and every further one costs the same.

torch computes its GRU, its plain RNN and some of its LSTMs step by step, with some fifty operators for each, and to
watch all of them takes seconds. So three short runs are watched: the first two say what a step adds, the third confirms
it. Where it does not, every step is watched.
"""

import functools
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from nacre.tools.cost.distances import Done
from nacre.tools.cost.graph import meetings
from nacre.tools.cost.operators import Work
from nacre.tools.cost.recorder import LAST, Recorder
from nacre.tools.cost.stage import fake_tensor, tensors

WALKED = 10
"""Steps of the first of the three runs; a recurrence of no more than the longest has is watched as it is."""

_FUNCTIONS = ("gru", "lstm", "rnn_tanh", "rnn_relu")


class Functions:
    """Stands where torch.nn's recurrent layers look for their functions, and bills what has many steps in one go.

    Args:
        original: what stood there.
        recorder: the watch of the run.
    """

    def __init__(self, original: Any, recorder: Recorder) -> None:
        self._original = original
        self._recorder = recorder

    def __getattr__(self, name: str) -> Any:
        function = getattr(self._original, name)
        if name not in _FUNCTIONS:
            return function

        def call(*arguments: Any) -> Any:
            recurrence = _recurrence(function, arguments)
            bill = None if recurrence is None else recurrence.forward()
            if recurrence is None or bill is None:
                return function(*arguments)
            return _Steps.apply(self._recorder, recurrence, bill, *tensors(arguments))

        return call


@dataclass(frozen=True)
class _Form:
    """What a tensor of any number of steps is made by.

    Args:
        shape: with None for the number of steps.
        order: its axes, from the outermost in memory to the innermost.
        dtype: of its values.
        asks: whether it asks for its gradient.
    """

    shape: tuple[int | None, ...]
    order: tuple[int, ...]
    dtype: torch.dtype
    asks: bool

    def make(self, steps: int, asks: bool | None = None) -> Tensor:
        shape = [steps if length is None else length for length in self.shape]
        asks = self.asks if asks is None else asks
        return torch.empty_permuted(shape, self.order, dtype=self.dtype, device="cpu", requires_grad=asks)


@dataclass(frozen=True)
class _Bill:
    """What a recurrence does and keeps.

    Args:
        numbers: FLOPs, bytes, and how many of them live, by name.
        work: the operators, and how often they ran.
        kept: places of the given tensors which autograd keeps.
        results: the forms of the results; of a backward, of the gradients.
    """

    numbers: dict[str, int]
    work: Counter[Work]
    kept: tuple[int, ...] = ()
    results: tuple[_Form, ...] = ()


@dataclass(frozen=True)
class _Recurrence:
    """A call of a recurrence.

    Args:
        function: what computes it.
        forms: of the tensors in its arguments.
        arguments: its arguments, with a number for each tensor.
        steps: how many it has.
        recorded: whether autograd records it.
    """

    function: Callable[..., Any]
    forms: tuple[_Form, ...]
    arguments: tuple[Any, ...]
    steps: int
    recorded: bool

    def forward(self) -> _Bill | None:
        """None where what a step adds is not always the same."""
        bill = self._bill(None)
        gradients = self.recorded and any(form.asks for form in self.forms)
        if bill is None or (gradients and self.backward((True,) * len(bill.results)) is None):
            return None
        return bill

    def backward(self, given: tuple[bool, ...]) -> _Bill | None:
        """The same, where gradients come for some of the results."""
        return self._bill(given)

    def _bill(self, given: tuple[bool, ...] | None) -> _Bill | None:
        key = (self, given)
        if key not in _known:
            if len(_known) >= 256:
                _known.clear()
            with _disable_current_modes():
                runs = [_walked(self, WALKED + more, given) for more in range(3)]
                _known[key] = _continued([run for run in runs if run is not None], self.steps)
        return _known[key]


_known: dict[Any, _Bill | None] = {}


def _recurrence(function: Callable[..., Any], arguments: tuple[Any, ...]) -> _Recurrence | None:
    """The call without its tensors; None for one that is watched step by step."""
    found = list(tensors(arguments))
    packed = isinstance(arguments[1], Tensor) and not arguments[1].is_floating_point()
    plain = all(type(tensor) is fake_tensor() or type(tensor) is torch.nn.Parameter for tensor in found)
    if packed or not plain or torch._C._are_functorch_transforms_active():
        return None
    if not all(isinstance(tensor, fake_tensor()) and _dense(tensor) for tensor in found):
        return None
    axis = 1 if arguments[-1] else 0
    steps = found[0].shape[axis]
    if steps <= WALKED + 2 or found[0].dim() != 3 or found[0].device.type != "cpu":
        return None
    forms = tuple(_form(tensor, axis if place == 0 else None) for place, tensor in enumerate(found))
    numbers = iter(range(len(found)))
    numbered = tuple(
        next(numbers)
        if isinstance(one, Tensor)
        else tuple(next(numbers) for _ in one)
        if isinstance(one, (tuple, list))
        else _Setting(one)
        for one in arguments
    )
    return _Recurrence(function, forms, numbered, steps, torch.is_grad_enabled())


@dataclass(frozen=True)
class _Setting:
    """An argument that is no tensor."""

    value: Any


def _form(tensor: Tensor, axis: int | None) -> _Form:
    shape = tuple(None if place == axis else length for place, length in enumerate(tensor.shape))
    return _Form(shape, _order(tensor), tensor.dtype, tensor.requires_grad)


def _order(tensor: Tensor) -> tuple[int, ...]:
    return tuple(sorted(range(tensor.dim()), key=lambda axis: (-tensor.stride(axis), axis)))


def _dense(tensor: Tensor) -> bool:
    """Whether its values fill a part of the memory without gaps, so that its form says all of how it lies there."""
    values = 1
    for axis in reversed(_order(tensor)):
        if tensor.stride(axis) != values and tensor.shape[axis] > 1:
            return False
        values *= tensor.shape[axis]
    return values > 0


# ---- the runs that are watched


def _walked(recurrence: _Recurrence, steps: int, given: tuple[bool, ...] | None) -> _Bill | None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    recorder = Recorder(torch.nn.Module())
    memory = recorder.memory
    with FakeTensorMode(), torch.set_grad_enabled(recurrence.recorded):
        values = [form.make(steps) for form in recurrence.forms]
        arguments = [
            one.value
            if isinstance(one, _Setting)
            else [values[place] for place in one]
            if isinstance(one, tuple)
            else values[one]
            for one in recurrence.arguments
        ]
        keys = [memory.sees(tensor, "") for tensor in values]
        before = memory.live
        with torch.autograd.graph.saved_tensors_hooks(recorder.keep, lambda kept: kept.tensor), recorder:
            results = recurrence.function(*arguments)
        if given is None:
            kept = memory.kept()
            inside = sum(size for key, size in kept.items() if key not in keys)
            made = {memory.sees(tensor, "") for tensor in results}
            forms = tuple(_result(tensor, recurrence, steps) for tensor in results)
            if len(made) < len(results) or made & {*kept, *keys}:
                return None  # results which share memory
            numbers = {"kept": inside, "most": memory.peak - before}
            places = tuple(place for place, key in enumerate(keys) if key in kept)
            return _bill(recorder, recorder.root.forward, numbers, places, forms)
        memory.settle()
        recorder.in_backward = True
        asked = [tensor for tensor, comes in zip(results, given, strict=True) if comes]
        met: Counter[str] = Counter()
        for number, additions, size in meetings(asked, lambda node: None, recorder.ends):
            # of parameters they are the model's, of states the call's own
            met[f"{'met_' * (number >= LAST)}elementwise_flops"] += additions
            met[f"{'met_' * (number >= LAST)}bytes"] += 3 * size
        orders: dict[int, tuple[int, ...]] = {}
        for place, tensor in enumerate(values):
            if tensor.requires_grad:
                tensor.register_hook(functools.partial(_notes_order, orders, place))
        gradients = [torch.empty_like(tensor) for tensor in asked]
        for tensor in gradients:
            memory.sees(tensor, "")
        del tensor, results, arguments
        values = [
            tensor for tensor in values if tensor.requires_grad
        ]  # zero states live no longer than autograd keeps them
        memory.peak = before = memory.live
        begun = len(memory.log)
        with recorder:
            torch.autograd.backward(asked, gradients)
        numbers = {"most": memory.peak - before, **{name: met.pop(name, 0) for name in _MET}}
        results = tuple(
            replace(form, order=orders.get(place, form.order)) for place, form in enumerate(recurrence.forms)
        )
        return _bill(recorder, recorder.root.backward + met, numbers, results=results, begun=begun)


_MET = ("met_elementwise_flops", "met_bytes")


def _notes_order(orders: dict[int, tuple[int, ...]], place: int, gradient: Tensor) -> None:
    orders[place] = _order(gradient)


def _result(tensor: Tensor, recurrence: _Recurrence, steps: int) -> _Form:
    """The first result has all steps, the others the last one alone."""
    batch_first = recurrence.arguments[-1].value
    return _form(tensor, (1 if batch_first else 0) if tensor.shape[0 if not batch_first else 1] == steps else None)


def _bill(
    recorder: Recorder,
    counts: Counter[str],
    numbers: dict[str, int],
    kept: tuple[int, ...] = (),
    results: tuple[_Form, ...] = (),
    begun: int = 0,
) -> _Bill:
    names = ("flops", "elementwise_flops", "bytes")
    work = Counter(event.work for event in recorder.memory.log[begun:] if isinstance(event, Done))
    return _Bill({**numbers, **{name: counts[name] for name in names}}, work, kept, results)


# ---- what follows from them


def _continued(bills: Sequence[_Bill], steps: int) -> _Bill | None:
    """The bill of so many steps, from those of three numbers of steps that follow each other."""
    if len(bills) < 3:
        return None
    first, second, third = bills
    further = steps - WALKED
    if any((one.kept, one.results) != (first.kept, first.results) for one in bills):
        return None
    if first.work.total() == second.work.total() or not all(work.known for work in third.work):
        return None  # one operator for all steps needs no help
    numbers = {name: _line([one.numbers[name] for one in bills], further) for name in first.numbers}
    every = set(first.work) & set(second.work) & set(third.work)
    often = {work: _line([one.work[work] for one in bills], further) for work in every}
    rest = [
        sorted((one.work - Counter({work: one.work[work] for work in every})).elements(), key=_rank) for one in bills
    ]
    if None in numbers.values() or None in often.values() or len({len(one) for one in rest}) > 1:
        return None
    grown = [_grown(works, further) for works in zip(*rest, strict=True)]
    if None in grown:
        return None
    work: Counter[Work] = Counter({one: count for one, count in often.items() if count})
    work.update(one for one in grown if one is not None)
    return _Bill({name: value or 0 for name, value in numbers.items()}, work, first.kept, first.results)


def _line(values: Sequence[int], further: int) -> int | None:
    """What comes so much further on the line through three values; None where they do not lie on one."""
    first, second, third = values
    return first + further * (second - first) if third - second == second - first else None


def _rank(work: Work) -> Any:
    return work.kind, work.dtype, work.flops, work.bytes, work.sizes


def _grown(works: Sequence[Work], further: int) -> Work | None:
    """An operator over all steps at once, whose sizes grow with them."""
    first = works[0]
    fixed = {(one.kind, one.dtype, one.pointwise, one.own, one.known, len(one.sizes)) for one in works}
    counts = [_line([getattr(one, name) for one in works], further) for name in ("flops", "elementwise_flops", "bytes")]
    sizes = [_line(values, further) for values in zip(*(one.sizes for one in works), strict=True)]
    if len(fixed) > 1 or None in counts or None in sizes:
        return None
    flops, elementwise, traffic = (count or 0 for count in counts)
    grown = tuple(size or 0 for size in sizes)
    return replace(first, flops=flops, elementwise_flops=elementwise, bytes=traffic, sizes=grown)


# ---- the call itself


class _Steps(torch.autograd.Function):
    """Stands for the recurrence in the graph of autograd: it keeps as much, and lives as much at most."""

    @staticmethod
    def forward(ctx: Any, recorder: Recorder, recurrence: _Recurrence, bill: _Bill, *given: Tensor) -> Any:
        ctx.recorder, ctx.recurrence, ctx.places = recorder, recurrence, bill.kept
        ctx.set_materialize_grads(False)
        recorder.runs_at_once(bill.numbers, bill.work)
        with recorder.standing_in():
            inside = torch.empty(bill.numbers["kept"], dtype=torch.uint8, device="cpu")
            results = tuple(form.make(recurrence.steps, asks=False) for form in bill.results)
        ctx.save_for_backward(*(given[place] for place in bill.kept), *([inside] if inside.numel() else []))
        return results

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> Any:
        bill = ctx.recurrence.backward(tuple(gradient is not None for gradient in gradients))
        if bill is None:
            raise RuntimeError("the backward of a recurrence does not do the same at every step")
        ctx.recorder.runs_at_once(bill.numbers, bill.work)
        for tensor in ctx.saved_tensors[len(ctx.places) :]:
            ctx.recorder.memory.lets_go(tensor)
        needed = zip(bill.results, ctx.needs_input_grad[3:], strict=True)
        with ctx.recorder.standing_in():
            made = [form.make(ctx.recurrence.steps, asks=False) if needs else None for form, needs in needed]
        return None, None, None, *made
