"""Whether a random layer draws what it should: no two sides draw the same numbers."""

import copy
import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from nacre.tools.bench.sides import Step

_DEVIATIONS = 8
"""Standard errors that two means may lie apart: so many because an error found from 4 draws may be found too small."""

_SLACK = 0.02
"""Relative to the size of the noise: rounding adds to it, other than equally in different orders of operations."""


_ZEROS = 0.01
"""Share of zeros that rounding may explain: the gradient of a key's bias is 0 but for it."""

Noise = Mapping[str, tuple[Tensor, ...]]


def without_dropout(module: nn.Module) -> nn.Module:
    """A copy of the module that drops nothing, otherwise in the same mode."""
    module = copy.deepcopy(module)
    for part in module.modules():
        if isinstance(part, nn.modules.dropout._DropoutNd):
            part.p = 0.0
        elif isinstance(part, nn.MultiheadAttention | nn.RNNBase):
            part.dropout = 0.0
    return module


def dropout_problem(step: Step, p: float, dtype: torch.dtype) -> str:
    """What is wrong with the output and the gradient of a Dropout; empty when nothing is.

    Args:
        step: a step through the layer.
        p: the probability of an element to be dropped.
        dtype: of its input.
    """
    input = step.inputs[0].detach().clone()  # it may be dropped in place
    results = step.results()
    output, cotangents = results.pop("output"), step.cotangents or []
    certain = input != 0  # a dropped element cannot be told from one that was 0
    dropped = output == 0
    share, deviation = dropped[certain].double().mean().item(), math.sqrt(p * (1 - p) / max(output.numel(), 1))
    if abs(share - p) > _DEVIATIONS * deviation + 1e-9:
        return f"output has a share of zeros of {share:.4f} for p = {p}"
    scale = 0.0 if p == 1 else 1 / (1 - p)
    rounding = 4 * torch.finfo(dtype).eps  # of the scale and of the product, with room for as much again
    pairs = [("output", output, input), *((name, found, cotangents[0]) for name, found in results.items())]
    for name, found, given in pairs:
        right = torch.where(dropped, 0.0, given.double() * scale)
        if not torch.allclose(found.double()[certain], right[certain], rtol=rounding, atol=0):
            return f"{name} is not {scale:.4g} times what was given where the output is kept, and 0 elsewhere"
    return ""


def noise_problem(ours: Noise, torchs: Noise, rounding: Mapping[str, float]) -> str:
    """What is wrong with the random part of a side's results, beside torch.nn's; empty when nothing is.

    Each result's share of zeros and its mean square distance from the result without dropout must be torch.nn's,
    within what chance and ``rounding``, the mean square of rounding errors, explain.
    """
    for name, values in ours.items():
        slacks = (_ZEROS, _SLACK * torchs[name][1].mean().item() + rounding[name])
        for what, slack, mine, theirs in zip(("share of zeros", "noise"), slacks, values, torchs[name], strict=True):
            error = math.sqrt((mine.var() / len(mine) + theirs.var() / len(theirs)).item())
            apart = abs(mine.mean() - theirs.mean()).item()
            if not apart <= _DEVIATIONS * error + slack:  # NaN is a problem too
                return f"{name} has a {what} of {mine.mean().item():.4g}, torch.nn's {theirs.mean().item():.4g}"
    return ""


def noise(step: Step, expected: Mapping[str, Tensor]) -> Noise:
    """Share of zeros and mean square distance from what is expected without dropout, of each result in every draw."""
    numbers = sum(tensor.numel() for tensor in expected.values())
    draws = 64 if numbers < 10_000 else 16 if numbers < 1_000_000 else 4  # a large tensor's mean varies little
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in expected}
    for seed in range(draws):
        for name, tensor in step.results(seed).items():
            tensor = tensor.double()
            zeros, noise = (tensor == 0).double().mean(), (tensor - expected[name]).square().mean()
            found[name].append((zeros.item(), noise.item()))
    return {name: tuple(torch.tensor(values, dtype=torch.float64).unbind(1)) for name, values in found.items()}
