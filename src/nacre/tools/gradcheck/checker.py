"""Checks the gradients of any layer or function, a hand-written backward included."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from nacre.core import check
from nacre.tools.gradcheck.compare import (
    REFERENCE_RTOL,
    Comparison,
    Gradients,
    Settings,
    against_differences,
    against_reference,
    analytic_gradients,
    incoming_gradients,
    vanishing_gradients,
)
from nacre.tools.gradcheck.numeric import ROUNDING
from nacre.tools.gradcheck.report import GradientError, GradientReport, GradientResult
from nacre.tools.gradcheck.subject import (
    EvaluationError,
    GradientSubject,
    Leaf,
    RandomState,
    Subject,
    prepare,
    prepare_reference,
)
from nacre.tools.gradcheck.tensors import distance, largest

__all__ = ["GradientError", "GradientReport", "GradientResult", "gradcheck"]


def gradcheck(
    module_or_function: Any,
    *inputs: Any,
    reference: Any = None,
    second_order: bool = False,
    rtol: float = 1e-6,
    atol: float = 1e-10,
    max_entries: int = 4096,
    samples: int = 256,
    directions: int = 4,
    seed: int = 0,
    raise_on_failure: bool = False,
    **keyword_inputs: Any,
) -> GradientReport:
    r"""Tells whether the gradients of a layer or function are right, and if not, which, where and by how much.

    .. math:: \frac{\partial\, v \cdot y}{\partial x_i} \approx \frac{v \cdot y(x + h e_i) - v \cdot y(x - h e_i)}{2h},
        \qquad h \approx \sqrt[3]{\epsilon} \max(1, |x_i|)

    with v a fixed random incoming gradient for each output y. The same function is evaluated in float64 on a deep copy
    of the module and on copies of the inputs, each time from the same random state and the same buffers, so dropout
    keeps its mask. The user's module, inputs, ``.grad``, buffers and random state stay as they were.

    What is checked: every floating-point input, and every parameter with ``requires_grad``. Where some input has
    ``requires_grad=True``, the inputs without it are constants, as they are to ``torch.autograd.gradcheck``. A
    gradient of None counts as zero and is compared, so that a forgotten one is found.

    Args:
        module_or_function: a module, a function of the inputs, a ``torch.autograd.Function``, or a pair
            ``(forward, backward)`` with ``forward(*inputs) -> (out, saved)`` and
            ``backward(grad, saved) -> gradients``, one for each floating-point input.
        inputs: positional inputs: tensors, nested tuples, lists and dicts of tensors, anything else.
        reference: a plain differentiable implementation, as a module or function of the same inputs. Its gradients by
            autograd are compared too, to 1e-10 of each gradient's largest entry. A module gets the parameters and
            buffers of the checked one, by name; a function gets those parameters which it takes by name after the
            inputs. Default: none.
        second_order: also check the gradient of the gradient, by all inputs, parameters and incoming gradients.
            Default: False.
        rtol: allowed error relative to the derivative. Default: 1e-6.
        atol: error that is always allowed; the rounding inside a function whose value cancels to nothing.
            Default: 1e-10.
        max_entries: in a tensor of up to this many entries every entry is compared. Default: 4096.
        samples: how many entries of a larger tensor are compared one by one. Default: 256.
        directions: in how many random directions all entries of a larger tensor are moved at once; a direction that
            does not agree is traced to an entry. Default: 4.
        seed: of the incoming gradients, samples and directions. Default: 0.
        raise_on_failure: raise :class:`GradientError` unless all is right. Default: False.
        keyword_inputs: inputs passed by keyword.

    Shape:
        - inputs: any; scalars and tensors without entries included
        - outputs: any, in nested tuples, lists, dicts and dataclasses

    Numerics:
        Truncation (h^2 y''' / 6) and rounding (eps |y| / h) leave about 1e-10 of a smooth function's size; the
        tolerance is 1e-6 of the derivative, plus what rounding the output by 64 eps amounts to. Entries that do not
        agree are measured again at eight step sizes, which estimate their own error. Where the one-sided slopes
        differ (ReLU at 0) any value between them passes, and the report counts the kink. The smallest step is 1.5e-8
        of max(1, |x|): a function that bends within less than that cannot be checked.

    Raises:
        TypeError: something that cannot be called or copied, complex or sparse tensors.
        ValueError: nothing to differentiate, an option out of range, a reference with parameters of other shapes.
        GradientError: with ``raise_on_failure``, when something is wrong; what the user's code raises while it is
            evaluated counts as that, and is part of the report otherwise.

    Cost:
        Two evaluations for each compared entry, 16 more for each that needs a closer look.

    Paper:
        Nocedal, Wright, "Numerical Optimization", 2nd edition, 2006, section 8.1.

    Example:
        >>> import torch, nacre
        >>> report = nacre.gradcheck(torch.nn.Linear(3, 2), torch.randn(4, 3))
        >>> report.ok
        True
        >>> class Square(torch.autograd.Function):
        ...     @staticmethod
        ...     def forward(ctx, x):
        ...         ctx.save_for_backward(x)
        ...         return x * x
        ...     @staticmethod
        ...     def backward(ctx, grad):
        ...         (x,) = ctx.saved_tensors
        ...         return grad * x
        >>> nacre.gradcheck(Square, torch.randn(5)).failures[0].hint
        'off by a factor of 0.5'
    """
    settings = Settings(rtol, atol, max_entries, samples, directions, seed)
    _validate(settings)
    findings = _Findings()
    failure: EvaluationError | None = None
    with _undisturbed():
        subject, findings.notes = prepare(module_or_function, inputs, keyword_inputs)
        model = None
        if reference is not None:
            model, notes = prepare_reference(reference, subject)
            findings.notes += notes
        try:
            _check(subject, model, second_order, settings, findings)
        except EvaluationError as error:
            findings.problems.append(str(error))
            failure = error
        finally:
            subject.random_state.restore()
    report = findings.report(_name(module_or_function))
    if raise_on_failure and not report.ok:
        raise GradientError(report) from failure
    return report


@dataclass
class _Findings:
    comparisons: list[Comparison] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def report(self, name: str) -> GradientReport:
        results = tuple(found.result for found in self.comparisons)
        return GradientReport(name, results, tuple(self.problems), tuple(self.notes))


def _check(
    subject: Subject, reference: Subject | None, second_order: bool, settings: Settings, findings: _Findings
) -> None:
    unknown, known = subject.modified_in_place()
    findings.notes += [f"the forward modifies {name} in place" for name in known]
    if unknown:
        findings.problems.append(
            f"the forward modifies {' and '.join(unknown)} in place without autograd knowing of it; work on a copy, or "
            "call ctx.mark_dirty in a torch.autograd.Function"
        )
        return
    outputs = subject.evaluate()
    if not outputs:
        raise check.error(ValueError, "nacre.gradcheck needs a floating-point output", "none")
    findings.problems += _unfit(subject, outputs, findings.notes)
    if findings.problems:
        return
    incoming = incoming_gradients(outputs, torch.Generator().manual_seed(settings.seed))
    gradients = analytic_gradients(subject, incoming)
    if not _equal_gradients(gradients, analytic_gradients(subject, incoming)):
        findings.problems.append("the backward is not deterministic: two calls on the same input give two gradients")
        return
    subject.random_state.notice()
    findings.comparisons, notes = against_differences(subject, incoming, gradients, settings)
    findings.notes += notes
    findings.notes += vanishing_gradients(subject.leaves, gradients, findings.comparisons)
    if reference is not None:
        findings.problems += _other_outputs(outputs, reference.evaluate())
        if findings.problems:
            return
        expected = analytic_gradients(reference, incoming)
        findings.comparisons += against_reference(subject.leaves, gradients, expected, findings.comparisons)
    if second_order:
        _check_second_order(subject, reference, incoming, settings, findings)


def _check_second_order(
    subject: Subject,
    reference: Subject | None,
    incoming: dict[str, Tensor],
    settings: Settings,
    findings: _Findings,
) -> None:
    leaves = {name: Leaf(f"incoming gradient of {name}", v.clone().requires_grad_()) for name, v in incoming.items()}
    gradient = GradientSubject(subject, leaves)
    weights = incoming_gradients(gradient.evaluate(), torch.Generator().manual_seed(settings.seed + 1))
    found = analytic_gradients(gradient, weights)
    comparisons, notes = against_differences(gradient, weights, found, settings)
    findings.notes += notes
    if reference is not None:
        expected = analytic_gradients(GradientSubject(reference, leaves), weights)
        comparisons += against_reference(gradient.leaves, found, expected, comparisons)
    for comparison in comparisons:
        comparison.result = replace(comparison.result, order=2)
    findings.comparisons += comparisons


def _unfit(subject: Subject, outputs: dict[str, Tensor], notes: list[str]) -> list[str]:
    """What makes the forward no function that could be differentiated here."""
    for name, output in outputs.items():
        if output.isnan().any():
            index = tuple(output.isnan().nonzero()[0].tolist())
            return [f"{name} is nan at {index}; choose an input where it is not"]
        if output.isinf().any():
            notes.append(f"{name}: its infinite entries are left out")
        if output.numel() and output.isinf().all():
            return [f"{name} is infinite everywhere; choose an input where it is not"]
    again = subject.evaluate()
    if {name: output.shape for name, output in again.items()} != {name: o.shape for name, o in outputs.items()}:
        return ["the forward is not deterministic: two calls on the same input give outputs of different shapes"]
    return [
        f"the forward is not deterministic: two calls on the same input, from the same random state, give {name} that "
        f"differs by {difference:.3g}; keep what it draws or counts in torch's generator or in buffers"
        for name, output in outputs.items()
        if (difference := distance(again[name], output)) > ROUNDING * largest(output)
    ]


def _other_outputs(outputs: dict[str, Tensor], reference: dict[str, Tensor]) -> list[str]:
    shapes = {name: tuple(output.shape) for name, output in outputs.items()}
    wanted = {name: tuple(output.shape) for name, output in reference.items()}
    if shapes != wanted:
        return [f"the reference returns other outputs: {wanted} where {shapes} came"]
    return [
        f"{name} differs from the reference's by {difference:.3g}: the forwards compute different functions, or draw "
        "different random numbers"
        for name, output in outputs.items()
        if (difference := distance(output, reference[name])) > REFERENCE_RTOL * largest(reference[name])
    ]


def _equal_gradients(first: Gradients, second: Gradients) -> bool:
    for output, gradients in first.items():
        for left, right in zip(gradients, second[output], strict=True):
            if left is None or right is None:
                if left is not right:
                    return False
            elif distance(left.nan_to_num(), right.nan_to_num()) > ROUNDING * largest(left):
                return False
    return True


def _validate(settings: Settings) -> None:
    for name, value, least in (
        ("rtol", settings.rtol, ROUNDING),
        ("atol", settings.atol, 0.0),
        ("max_entries", settings.max_entries, 0),
        ("samples", settings.samples, 1),
        ("directions", settings.directions, 1),
    ):
        if not value >= least:
            raise check.error(ValueError, f"{name} is at least {least:.2g}", f"{name} = {value}")


def _name(function: Any) -> str:
    if isinstance(function, tuple):
        return f"({', '.join(map(_name, function))})"
    if isinstance(function, torch.nn.Module):
        return type(function).__name__
    owner = getattr(function, "__self__", None)
    if isinstance(owner, type):
        return owner.__name__
    return getattr(function, "__name__", type(function).__name__)


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Gradients on and float64 by default inside; the caller's modes and random state afterwards."""
    state, dtype = RandomState(), torch.get_default_dtype()
    try:
        with torch.inference_mode(False), torch.enable_grad():
            torch.set_default_dtype(torch.float64)
            yield
    finally:
        torch.set_default_dtype(dtype)
        state.restore()
