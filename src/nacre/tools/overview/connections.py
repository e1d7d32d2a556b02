"""Who depends on whom: the derivative of every output position by every input position, found by running the layer."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nacre.core.spec import Case, LayerSpec
from nacre.tools.overview.scenes import SHOWN, Scene

_NOTHING = 1e-12
"""A derivative this much smaller than the largest is rounding: outputs are computed in float64."""


@dataclass(frozen=True)
class Connections:
    """How much each output position depends on each input position.

    Args:
        strengths: for every output position the largest derivative by each input position, from 0 to 1.
        inputs: the grid of the input positions, (rows, columns).
        outputs: the grid of the output positions.
    """

    strengths: tuple[tuple[float, ...], ...]
    inputs: tuple[int, int]
    outputs: tuple[int, int]

    def sources(self, output: int) -> list[int]:
        """The input positions on which an output position depends."""
        return [place for place, strength in enumerate(self.strengths[output]) if strength]

    @property
    def watched(self) -> int:
        """The output position to look at: of those which depend on anything, the one nearest to the middle."""
        rows, columns = self.outputs
        middle = ((rows - 1) / 2, (columns - 1) / 2)
        return max(
            range(len(self.strengths)),
            key=lambda place: (bool(self.sources(place)), -math.dist(divmod(place, columns), middle)),
        )

    def describe(self) -> str:
        """The pattern in words.

        Example:
            >>> Connections(((1.0, 0.0), (0.5, 1.0)), (1, 2), (1, 2)).describe()
            'each depends on itself and all before it'
        """
        found = [self.sources(place) for place in range(len(self.strengths))]
        count = len(self.strengths[0])
        every = list(range(count))
        if all(sources == every for sources in found):
            return "each depends on every one"
        if self.inputs == self.outputs and all(sources in ([], [place]) for place, sources in enumerate(found)):
            silent = sum(not sources for sources in found)
            rest = f"; {silent} of {len(found)} on nothing" if silent else ""
            return f"each depends on its own alone{rest}"
        if self.inputs == self.outputs and all(sources == every[: place + 1] for place, sources in enumerate(found)):
            return "each depends on itself and all before it"
        if all(sources in ([], self._row(place)) for place, sources in enumerate(found)):
            silent = sum(not sources for sources in found)
            rest = f"; {silent} of {len(found)} on nothing" if silent else ""
            return f"each depends on all of its own row{rest}"
        if all(len(sources) == 1 for sources in found):
            return "each depends on one alone, which the input picks"
        if window := self._window(found):
            return f"each depends on a window of {window[0]} x {window[1]} around it, fewer at the edge"
        numbers = sorted(len(sources) for sources in found)
        return f"each depends on {numbers[0]} to {numbers[-1]} of {count}"

    def _row(self, output: int) -> list[int]:
        rows, columns = self.inputs
        place = output // self.outputs[1] if self.outputs[0] == rows else output
        return list(range(place * columns, (place + 1) * columns))

    def _window(self, found: list[list[int]]) -> tuple[int, int] | None:
        """Rows and columns of the window, where every output sees its part of one that slides with it."""
        if self.inputs != self.outputs or not all(found):
            return None
        columns = self.inputs[1]
        offsets = set()
        for output, sources in enumerate(found):
            row, column = divmod(output, columns)
            offsets |= {(source // columns - row, source % columns - column) for source in sources}
        reaches = [{offset[axis] for offset in offsets} for axis in (0, 1)]
        height, width = (max(reach) - min(reach) + 1 for reach in reaches)
        largest = max(len(sources) for sources in found)
        return (height, width) if largest == height * width == len(offsets) else None


def connect(spec: LayerSpec, scene: Scene) -> Connections:
    """Runs a call of the layer in float64 and differentiates each output position, with torch's random state kept."""
    case = next(case for case in spec.cases if case.name == scene.case)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        # what is dropped shows in the picture of dropout and would hide the pattern in others
        layer = spec.layer(**case.arguments).double().train(case.training and spec.name == "dropout")
        inputs, keywords = _cut_inputs(case, scene)
        source = inputs[0] if scene.parameter is None else dict(layer.named_parameters())[scene.parameter]
        output = layer(*inputs, **keywords)
        output = output[0] if isinstance(output, tuple) else output
        return _differentiate(output, source, scene)


def _cut_inputs(case: Case, scene: Scene) -> tuple[list[Any], dict[str, Any]]:
    """The inputs of the case, as far as they are drawn; what was one tensor stays one."""
    inputs, keywords = case.make(torch.float64)
    cut: dict[int, Tensor] = {}
    if scene.parameter is None:
        cut = {id(one): _cut(one, scene.source) for one in inputs if one is inputs[0]}
    given = {name: _cut(one, scene.keywords[name]) if name in scene.keywords else one for name, one in keywords.items()}
    return [cut.get(id(one), one) for one in inputs], given


def _cut(tensor: Tensor, axes: str) -> Tensor:
    sizes = {"first": 1, "each": SHOWN}
    places = tuple(slice(sizes.get(axis)) for axis in axes.split())
    return tensor.detach()[places].clone().requires_grad_(tensor.is_floating_point())


def _differentiate(output: Tensor, source: Tensor, scene: Scene) -> Connections:
    # sums of features can stay the same whatever the input (after a normalisation): random ones do not
    weights = torch.rand(output.shape, dtype=output.dtype, generator=torch.Generator().manual_seed(1)) + 0.5
    shown, grid = _positions(output * weights, scene.output)
    rows = []
    for position in shown.flatten(1).sum(1):
        (gradient,) = torch.autograd.grad(position, source, retain_graph=True)
        seen, source_grid = _positions(gradient.abs(), scene.source)
        rows.append(seen.flatten(1).amax(1))
    strengths = torch.stack(rows)
    strengths = strengths / strengths.amax().clamp(min=torch.finfo(strengths.dtype).tiny)
    strengths = strengths.where(strengths > _NOTHING, 0)
    if grid[0] == 1 and grid[1] == source_grid[0]:
        grid = (grid[1], 1)  # beside its rows
    return Connections(tuple(map(tuple, strengths.tolist())), source_grid, grid)


def _positions(tensor: Tensor, axes: str) -> tuple[Tensor, tuple[int, int]]:
    """A row for each position that is drawn, with all that lies there; and the grid of positions."""
    words = axes.split()
    each = [axis for axis, word in enumerate(words) if word == "each"]
    rest = [axis for axis, word in enumerate(words) if word != "each"]
    tensor = tensor[tuple(slice(1) if word == "first" else slice(None) for word in words)]
    sizes = [tensor.shape[axis] for axis in each]
    grid = (1, *sizes) if len(sizes) == 1 else tuple(sizes)
    return tensor.permute(*each, *rest).reshape(math.prod(sizes), -1), (grid[0], grid[1])
