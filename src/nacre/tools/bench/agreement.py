"""Whether the sides compute the same: no side whose result is wrong is timed."""

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from nacre.core.spec import Case
from nacre.tools.bench.randomness import Noise, dropout_problem, noise, noise_problem, without_dropout
from nacre.tools.bench.sides import Step, in_float64
from nacre.tools.gradcheck.tensors import distance, largest

SLACK = {torch.float64: 1e-11, torch.float32: 1e-5, torch.bfloat16: 2**-6, torch.float16: 2**-9}
"""How far a result may lie from float64's beyond twice torch.nn's own distance, relative to its largest value.

float32 and float64 add up to some millions of terms in another order, which moves a sum by about their number's square
root in roundings, 1e-5 and, with room for a judge that rounds as much as the judged, 1e-11. bfloat16 and float16 round
what was added in float32, twice where a kernel hands over to another: 2 units in the last place of 2**-8 and 2**-11,
and room for a cancellation.
"""

_JUMPS = 10
"""A float32 error of so many times ``SLACK`` is no rounding error but the jump of a gradient, as ReLU's at 0, where
rounding decides on the side: how many elements that befalls is chance, and so many times torch.nn's error may be ours.
"""


class Judge:
    """Compares sides with torch.nn's layer in float64.

    Args:
        case: tells inputs, and whether they are random.
        reference: the layer by torch.nn, or nacre's own where torch has none; gives the yardstick too.
        dtype: of the sides.
    """

    def __init__(self, case: Case, reference: nn.Module, dtype: torch.dtype) -> None:
        self.case = case
        self.dtype = dtype
        self.reference = reference
        self.inputs, self.keywords = case.make(dtype)
        self._noise: Noise | None = None  # of torch.nn's layer
        self._is_dropout = case.random and isinstance(reference, nn.Dropout)
        if self._is_dropout:
            return  # each result alone shows whether it is right
        # without its random part a layer has one right result; what the random part adds is judged by its size
        plain = without_dropout(reference) if case.random else copy.deepcopy(reference)
        self._expected = Step(plain.double(), *in_float64(self.inputs, self.keywords)).results()
        plain = without_dropout(reference) if case.random else copy.deepcopy(reference)
        self._torchs = Step(plain, self.inputs, self.keywords).results()

    def problem(self, step: Step) -> str:
        """What is wrong with the results of a side, empty when nothing is."""
        if self._is_dropout:
            return dropout_problem(step, self.case.arguments.get("p", 0.5), self.dtype)
        if not self.case.random:
            return disagreement(step.results(), self._torchs, self._expected, self.dtype)
        if step.call is step.module:  # a compiled module cannot be told to drop nothing
            plain = Step(without_dropout(step.module), self.inputs, self.keywords)
            if problem := disagreement(plain.results(), self._torchs, self._expected, self.dtype):
                return f"without dropout: {problem}"
        if self._noise is None:
            self._noise = noise(Step(self.reference, self.inputs, self.keywords), self._expected)
        rounding = {name: (SLACK[self.dtype] * scale) ** 2 for name, scale in _scales(self._expected).items()}
        return noise_problem(noise(step, self._expected), self._noise, rounding)


def disagreement(
    ours: Mapping[str, Tensor], torchs: Mapping[str, Tensor], expected: Mapping[str, Tensor], dtype: torch.dtype
) -> str:
    """The first result that is further from float64 than twice torch's own distance and ``SLACK``; empty for none."""
    if list(ours) != list(torchs):
        return f"it has {', '.join(ours)}, torch.nn {', '.join(torchs)}"
    scales = _scales(expected)
    for name, tensor in ours.items():
        if problem := _difference(tensor, torchs[name], expected[name], SLACK[dtype] * scales[name]):
            return f"{name} {problem}"
    return ""


def _scales(expected: Mapping[str, Tensor]) -> dict[str, float]:
    """The largest value of every result; a gradient that is 0 but for rounding is measured by the others."""
    scales = {name: largest(tensor.to_dense()) for name, tensor in expected.items()}
    floor = 0.01 * max((scale for name, scale in scales.items() if name.startswith("gradient")), default=0.0)
    return {name: max(scale, floor) if name.startswith("gradient") else scale for name, scale in scales.items()}


def _difference(ours: Tensor, torchs: Tensor, expected: Tensor, slack: float) -> str:
    if (ours.shape, ours.dtype) != (torchs.shape, torchs.dtype):
        return f"is {ours.dtype} of shape {tuple(ours.shape)}, torch.nn's {torchs.dtype} of {tuple(torchs.shape)}"
    ours, torchs, expected = (tensor.detach().to_dense().double() for tensor in (ours, torchs, expected))
    if not torch.equal(ours.isnan(), torchs.isnan()) or not torch.equal(ours.isinf(), torchs.isinf()):
        return "is NaN or infinite where torch.nn's is not, or finite where it is"
    finite = torchs.isfinite() & expected.isfinite()
    ours, torchs, expected = (torch.where(finite, tensor, 0) for tensor in (ours, torchs, expected))
    torchs_error, error = distance(torchs, expected), distance(ours, expected)
    allowed = slack + torchs_error * (_JUMPS if torchs_error > _JUMPS * slack else 2)
    return f"is {error:.2g} away from float64, more than {allowed:.2g}" if error > allowed else ""
