"""Runs a model once, on tensors without values, and writes its bill."""

import contextlib
import inspect
import logging
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from nacre.core import check
from nacre.core.choice import chosen_as_plain
from nacre.core.cost import Cost
from nacre.tools.cost.patches import recording
from nacre.tools.cost.recorder import Call, Recorder
from nacre.tools.cost.report import CostReport, CostRow
from nacre.tools.cost.stage import Stage, apart, is_real, returned, staged, tensors


class CostError(ValueError):
    """The model cannot be billed with these inputs; the message says what to give."""


def cost(model: nn.Module, *inputs: Any, measure: bool = False, **keywords: Any) -> CostReport:
    """The exact bill of one training step of a model: by row, with what each module costs forward and backward.

    The model runs once, forward and, where a gradient is asked for, backward from all its results, on tensors that
    have a shape and no memory; so a model on the device ``meta`` is billed like any other, as if it were on the CPU.
    It is left as it was. Only where its control flow depends on values, and inputs and parameters have some, it runs on
    real numbers.

    A layer of nacre and the torch.nn layer that it replaces are billed by the layer's ``cost.py``, so parameters and
    FLOPs are the same before and after :func:`nacre.convert`. (Where a block of nacre does a dropout, an addition and a
    normalisation in one pass, they are the block's own operations, with less traffic; what nacre does not keep between
    two linear maps its backward forms once more.) Everything else is counted operator by operator: products exactly;
    one operation for each value that an elementwise operator returns or a reduction reads; an operator without a known
    cost is named in ``unknown``.

    A backward is counted as it runs: nothing for a frozen weight, an input without gradient or a result that nothing
    depends on. Activation checkpointing pays the forward once more, as far as torch goes: it ends the second forward as
    soon as it has what the backward needs, so the last layer's product may not run again (with torch.nn's Linear it
    does not, with nacre's it does).

    ``saved_bytes`` and ``peak_bytes`` are observed, of the model as it is: torch.nn's layers keep other tensors than
    nacre's, so these do change with a conversion. A storage that two calls keep is billed whole to the first.

    Args:
        model: any module; its mode, training or evaluation, and which parameters ask for a gradient, decide what runs.
            Within ``torch.no_grad()`` the bill is that of the forward alone.
        inputs: what its forward takes: tensors with values, fake ones or ones of the device ``meta``, in lists, tuples,
            dicts, dataclasses and namespaces too.
        measure: time each row's forward and backward on this machine too; needs real tensors. Default: False.
        keywords: keyword inputs of its forward.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: the model cannot be called with these inputs, decides by values that are not there, or has
            parameters without a shape yet; the message says what to give.

    Example:
        >>> import torch, nacre
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
        >>> report = nacre.cost(model, torch.empty(10, 8, device="meta"))
        >>> report.params, report.flops, report.backward_flops
        (212, 3840, 5120)
        >>> report.rows[1].name, report.rows[1].total.backward_flops  # the first layer's input needs no gradient
        ('0', 2560)
    """
    if not isinstance(model, nn.Module):
        raise check.error(TypeError, "nacre.cost takes a torch.nn.Module", f"a {type(model).__name__}")
    given = [*tensors((inputs, keywords)), *model.parameters(), *model.buffers()]
    real = is_real(given)
    sparse = any(tensor.layout is not torch.strided for tensor in given)  # what they hold is known from values alone
    try:
        report = _run(model, inputs, keywords, real=real and sparse)
    except CostError as error:
        if not real or not _depends_on_values(error.__cause__):
            raise
        report = _run(model, inputs, keywords, real=True)
    if measure:
        if not real:
            rule = "nacre.cost measures models and inputs that have values"
            raise check.error(ValueError, rule, "some without", "Build the model on the CPU and give real inputs.")
        from nacre.tools.cost.measure import measure_rows

        measure_rows(report, model, inputs, keywords)
    return report


def _run(model: nn.Module, inputs: Any, keywords: Any, real: bool) -> CostReport:
    recorder = Recorder(model)
    signature = _signature(model)
    asked = torch.is_grad_enabled()  # in inference mode it is not, and tensors made there cannot be recorded elsewhere
    with apart(), torch.inference_mode(False), torch.set_grad_enabled(asked), staged(model, real) as stage:
        arguments, named = stage.values(inputs), stage.values(dict(keywords))
        recorder.memory.owns((*model.parameters(), *model.buffers()))
        parameter_bytes = recorder.memory.live
        for tensor in tensors((arguments, named)):
            recorder.memory.sees(tensor, "")
        before = len(recorder.memory.log)
        with _quiet(stage, real), recording(recorder), recorder:
            _forward_and_backward(recorder, signature, arguments, named)
        recorder.share_work(recorder.memory.log[before:])
    return _report(recorder, model, parameter_bytes, real)


def _forward_and_backward(recorder: Recorder, signature: str, arguments: Any, named: Any) -> None:
    model = recorder.root.module
    hooks = torch.autograd.graph.saved_tensors_hooks(recorder.keep, lambda kept: kept.tensor)
    try:
        with hooks:
            result = model(*arguments, **named)
    except Exception as error:
        raise _refused(model, signature, arguments, named, error) from error
    results = [tensor for tensor in returned(result) if tensor.requires_grad]
    recorder.memory.settle()
    if not results:
        return
    recorder.in_backward = True
    recorder.watch_graph(results)
    gradients = [torch.empty_like(tensor) for tensor in results]
    try:
        torch.autograd.backward(results, gradients)
    except Exception as error:
        raise _refused(model, signature, arguments, named, error, "the backward of ") from error


@contextlib.contextmanager
def _quiet(stage: Stage, real: bool) -> Iterator[None]:
    """The fake tensors' mode, or the random state of torch as it was."""
    from torch._subclasses.fake_tensor import FakeTensor

    if real:
        with torch.random.fork_rng(devices=[]):
            yield
    else:
        log = logging.getLogger("torch._subclasses.fake_tensor")
        level = log.level
        log.setLevel(logging.CRITICAL)  # what goes wrong is said once, by the error
        try:
            with stage.mode, chosen_as_plain(FakeTensor):
                yield
        finally:
            log.setLevel(level)


def _depends_on_values(error: BaseException | None) -> bool:
    """Whether fake tensors could not tell what to do; errors of other kinds come from the model or its inputs."""
    from torch._subclasses import fake_tensor

    kinds = (
        fake_tensor.DataDependentOutputException,
        fake_tensor.DynamicOutputShapeException,
        fake_tensor.UnsupportedOperatorException,
        NotImplementedError,
    )
    text = str(error)
    if "not implemented for '" in text:  # a dtype that the operator does not take
        return False
    return (
        isinstance(error, kinds)
        or "data-dependent" in text
        or any(word in text for word in ("Fake", "numpy", "not allocated"))
    )


def _signature(model: nn.Module) -> str:
    """What a model's forward takes, without the types."""
    taken = inspect.signature(model.forward)
    plain = [parameter.replace(annotation=inspect.Parameter.empty) for parameter in taken.parameters.values()]
    return str(taken.replace(parameters=plain, return_annotation=inspect.Signature.empty))


def _refused(
    model: nn.Module, signature: str, arguments: Any, named: Any, error: Exception, part: str = ""
) -> CostError:
    name = type(model).__name__
    shapes = [str(tuple(tensor.shape)) for tensor in tensors((arguments, named))]
    given = f"inputs of shape {', '.join(shapes)}" if shapes else "no input"
    if _depends_on_values(error):
        return CostError(
            f"{part}{name} decides by values, which inputs without values do not have; got {given}. "
            "Give real tensors, and a model which is not on the device meta."
        )
    said = (str(error).strip() or type(error).__name__).splitlines()[0]
    return CostError(
        f"{part}{name} cannot be called with these inputs; got {given}, and it said: {said.rstrip('.')}. "
        f"Its forward takes {signature}."
    )


def _report(recorder: Recorder, model: nn.Module, parameter_bytes: int, real: bool) -> CostReport:
    rows: list[CostRow] = []
    _append(rows, recorder.root, None, 0)
    whole = rows[0].total
    everything = whole.flops + whole.backward_flops + whole.elementwise_flops + whole.backward_elementwise_flops
    unknown: Counter[str] = Counter()
    for row in rows:
        bill = row.total
        own = bill.flops + bill.backward_flops + bill.elementwise_flops + bill.backward_elementwise_flops
        row.share = own / everything if everything else 0.0
        unknown.update(row.unknown)
    parameters = list(model.parameters())
    return CostReport(
        model=type(model).__name__,
        params=sum(parameter.numel() for parameter in parameters),
        trainable_params=sum(parameter.numel() for parameter in parameters if parameter.requires_grad),
        rows=rows,
        peak_bytes=recorder.memory.peak,
        peak_in=recorder.memory.peak_in,
        parameter_bytes=parameter_bytes,
        unknown=dict(unknown),
        real=real,
    )


def _append(rows: list[CostRow], call: Call, parent: int | None, depth: int) -> Cost:
    """Adds the rows of a call and of the calls within it; returns the sum of their bills."""
    own = Cost(
        parameters=sum(parameter.numel() for parameter in call.module._parameters.values() if parameter is not None),
        flops=call.forward["flops"],
        backward_flops=call.backward["flops"],
        elementwise_flops=call.forward["elementwise_flops"],
        backward_elementwise_flops=call.backward["elementwise_flops"],
        bytes=call.forward["bytes"],
        backward_bytes=call.backward["bytes"],
        saved_bytes=call.saved_bytes,
    )
    row = CostRow(
        name=call.name,
        kind=_kind(call.module),
        depth=depth,
        parent=parent,
        inputs=call.inputs,
        outputs=call.outputs,
        formula=call.formula,
        sizes=call.sizes,
        own=own,
        unknown=dict(call.unknown),
        forward_work=dict(call.forward_work),
        backward_work=dict(call.backward_work),
    )
    place = len(rows)
    rows.append(row)
    total = own
    for child in call.children:
        total = total + _append(rows, child, place, depth + 1)
    parameters = sum(parameter.numel() for parameter in call.module.parameters())
    row.total = Cost(**{**vars(total), "parameters": parameters})
    return row.total


def _kind(module: nn.Module) -> str:
    package = type(module).__module__.split(".")[0]
    name = type(module).__name__
    return {"torch": f"torch.nn.{name}", "nacre": f"nacre.{name}"}.get(package, name)
