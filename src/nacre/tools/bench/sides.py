"""The sides of a comparison: one layer by torch.nn, by torch.compile and by nacre, with the same state and inputs."""

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from nacre.core.choice import record_choices
from nacre.core.spec import Case, LayerSpec
from nacre.tools.convert import ConversionReport, convert
from nacre.tools.gradcheck.tensors import named_inputs, named_tensors, replace_tensors, strided_copy

_SEED = 1


class Step:
    """Forward and backward of one call as a training step makes them.

    The gradients are dropped first, as optimizers do, so that each step writes into fresh ones; the output is dropped
    when the step ends.

    Args:
        module: whose parameters get gradients.
        inputs: positional inputs of ``forward``; copied.
        keywords: the same for keyword inputs.
        call: what is called in place of the module: its compiled form. Default: the module.
    """

    def __init__(
        self, module: nn.Module, inputs: tuple, keywords: Mapping[str, Any], call: Callable[..., Any] | None = None
    ) -> None:
        self.module = module
        self.call = module if call is None else call
        self.inputs, self.keywords = _copied((inputs, dict(keywords)))
        named = dict(named_inputs(self.inputs, self.keywords)) | dict(module.named_parameters())
        self.leaves = {name: tensor for name, tensor in named.items() if tensor.requires_grad}
        self.cotangents: list[Tensor] | None = None

    def __call__(self) -> Any:
        for leaf in self.leaves.values():
            leaf.grad = None
        output = self.call(*self.inputs, **self.keywords)
        results = [tensor for _, tensor in named_tensors(output, "output") if tensor.requires_grad]
        if results and self.leaves:
            if self.cotangents is None:
                self.cotangents = _cotangents(results)
            torch.autograd.backward(results, self.cotangents)
        return output

    def results(self, seed: int = 0) -> dict[str, Tensor]:
        """What one call computes: the tensors of its output, and every gradient."""
        torch.manual_seed(seed)
        output = self()
        found = {name: tensor.detach() for name, tensor in named_tensors(output, "output")}
        gradients = {name: leaf.grad for name, leaf in self.leaves.items() if leaf.grad is not None}
        return found | {f"gradient of {name}": gradient for name, gradient in gradients.items()}


def build(spec: LayerSpec, case: Case, dtype: torch.dtype) -> tuple[nn.Module, nn.Module | None]:
    """The layer of a case and the same layer by torch.nn, with equal states; None where torch has no such layer."""
    torch.manual_seed(_SEED)
    layer = spec.layer(**case.arguments)
    with torch.no_grad():
        for parameter in layer.parameters():  # a fresh LayerNorm's weight of 1 would hide a forgotten factor
            parameter.add_(torch.randn(parameter.shape) * 0.1)
    layer = layer.to(dtype).train(case.training)
    if spec.replaces is not None:
        reference = spec.replaces(**case.arguments).to(dtype).train(case.training)
        reference.load_state_dict(layer.state_dict())
        return layer, reference
    report = ConversionReport()
    reference = convert(copy.deepcopy(layer), to="torch", report=report)
    return layer, reference if report.converted else None


def compiled(module: nn.Module) -> Callable[..., Any]:
    """The module as torch.compile makes it, from a compiler that remembers no earlier case."""
    torch._dynamo.reset()
    return torch.compile(module)


def in_float64(inputs: tuple, keywords: Mapping[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """The same values in float64: what float64 judges must have been given rounded."""
    return _copied((inputs, dict(keywords)), torch.float64)


def implementation(step: Step) -> str:
    """What nacre ran in a call: its kernels, its formulas, torch or several of them."""
    with record_choices() as choices:
        step()
    return " + ".join(sorted({choice.implementation for choice in choices})) or "torch"


def _copied(values: Any, dtype: torch.dtype | None = None) -> Any:
    """Copies as leaves; what was one tensor in two places stays one."""
    copies: dict[int, Tensor] = {}

    def replacement(tensor: Tensor) -> Tensor:
        if id(tensor) not in copies:
            target = dtype if tensor.is_floating_point() else None
            copies[id(tensor)] = strided_copy(tensor.detach(), target).requires_grad_(tensor.requires_grad)
        return copies[id(tensor)]

    return replace_tensors(values, replacement)


def _cotangents(results: list[Tensor]) -> list[Tensor]:
    """Gradients to start from, in the strides of the results; the same values in every dtype, but for rounding."""
    generator = torch.Generator().manual_seed(_SEED)
    return [
        torch.empty_like(result, requires_grad=False).copy_(torch.randn(result.shape, generator=generator))
        for result in results
    ]
