"""A pair ``forward(...) -> (out, saved)``, ``backward(grad, saved) -> gradients`` as one differentiable function."""

import inspect
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from nacre.core import check
from nacre.tools.gradcheck.tensors import named_inputs, replace_tensors


def joined(forward: Callable[..., Any], backward: Callable[..., Any]) -> Callable[..., Any]:
    """A function whose value is ``out`` and whose gradients are those of ``backward``.

    ``backward`` returns one gradient for each floating-point input, or one for each argument, in order. It may take
    a third argument, ``needs``, as the formulas of nacre do; here every gradient is needed.
    """

    def call(*inputs: Any, **keywords: Any) -> Any:
        named = [(name, tensor) for name, tensor in named_inputs(inputs, keywords) if tensor.is_floating_point()]

        def run(tensors: Iterable[Tensor]) -> tuple[Any, Any]:
            given = iter(tensors)
            arguments, keyword_arguments = replace_tensors(
                (inputs, keywords), lambda tensor: next(given) if tensor.is_floating_point() else tensor
            )
            return forward(*arguments, **keyword_arguments)

        def pair_forward(ctx: Any, *tensors: Tensor) -> Any:
            ctx.save_for_backward(*tensors)
            output, ctx.saved = run(tensors)
            return output

        def pair_backward(ctx: Any, *incoming: Tensor) -> Any:
            # to be differentiated again, what was saved must hang on the graph: it is computed anew
            saved = run(ctx.saved_tensors)[1] if torch.is_grad_enabled() else ctx.saved
            needs = [[True] * len(named)] if len(inspect.signature(backward).parameters) > 2 else []
            found = backward(incoming[0] if len(incoming) == 1 else incoming, saved, *needs)
            return _matched(found, named, inputs)

        members = {"forward": staticmethod(pair_forward), "backward": staticmethod(pair_backward)}
        pair: Any = type("Pair", (torch.autograd.Function,), members)
        return pair.apply(*(tensor for _, tensor in named))

    return call


def _matched(found: Any, named: list[tuple[str, Tensor]], inputs: tuple) -> tuple[Tensor | None, ...]:
    """The gradients which a backward returned, one for each floating-point input, of its shape."""
    gradients = tuple(found) if isinstance(found, (tuple, list)) else (found,)
    if len(gradients) == len(inputs) != len(named):
        floating = [isinstance(value, Tensor) and value.is_floating_point() for value in inputs]
        gradients = tuple(gradient for gradient, kept in zip(gradients, floating, strict=True) if kept)
    if len(gradients) != len(named):
        raise check.error(
            RuntimeError,
            f"backward returns one gradient for each floating-point input ({', '.join(name for name, _ in named)})",
            f"{len(gradients)} gradients",
        )
    for gradient, (name, tensor) in zip(gradients, named, strict=True):
        if gradient is not None and gradient.shape != tensor.shape:
            raise check.error(
                RuntimeError,
                f"the gradient of {name} has its shape, {check.shape(tensor)}",
                f"a gradient of shape {check.shape(gradient)}",
                _shape_cause(tuple(gradient.shape), tuple(tensor.shape)),
            )
    return gradients


def _shape_cause(got: tuple[int, ...], expected: tuple[int, ...]) -> str:
    """The likely reason for a gradient of the wrong shape, as a sentence; empty if none is recognised."""
    added = len(got) - len(expected)
    padded = (1,) * added + expected
    if len(got) == len(padded) and all(size in (1, wide) for size, wide in zip(padded, got, strict=True)):
        dimensions = [d for d, size in enumerate(padded) if d < added or size != got[d]]
        listed = ", ".join(map(str, dimensions))
        return f"It is not summed over dimension{'s' * (len(dimensions) > 1)} {listed}."
    return "It is transposed." if got == expected[::-1] else ""
