"""Where several gradients of one tensor meet in the graph of autograd, they are added."""

import math
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor


def meetings(
    results: list[Tensor], layer_of: Callable[[Any], Any], ends: Callable[[int], None]
) -> Iterator[tuple[int, int, int]]:
    """Each place in the graph where gradients meet: number of the node, additions, and bytes of as many values.

    Gradients that meet within a layer are in its bill; so the edges which come from one layer's call are one.

    Args:
        results: where the graph starts.
        layer_of: the bill that covers a node; None for a node that is counted by its operators.
        ends: is called with a node's number whenever the node has done its work; additions follow then.
    """
    waiting: list[Any] = [tensor.grad_fn for tensor in results if tensor.grad_fn is not None]
    seen = set(waiting)
    edges: dict[tuple[Any, int], set[Any]] = {}
    while waiting:
        node = waiting.pop()
        node.register_hook(_when_done(ends, node._sequence_nr()))
        layer = layer_of(node)
        for place, (following, index) in enumerate(node.next_functions):
            if following is None:
                continue
            if layer is None:
                edges.setdefault((following, index), set()).add((node, place))
            elif layer_of(following) is not layer:
                edges.setdefault((following, index), set()).add(layer)
            if following not in seen:
                seen.add(following)
                waiting.append(following)
    for (node, index), sources in edges.items():
        if len(sources) > 1:
            values, itemsize = _gradient(node, index)
            additions = (len(sources) - 1) * values
            yield node._sequence_nr(), additions, itemsize * additions


def _when_done(ends: Callable[[int], None], number: int) -> Callable[..., None]:
    return lambda *_: ends(number)


def _gradient(node: Any, index: int) -> tuple[int, int]:
    """How many values the gradient that flows into a node has, and their size."""
    if hasattr(node, "variable"):
        return node.variable.numel(), node.variable.element_size()
    known = node._input_metadata[index]
    return math.prod(known.shape), known.dtype.itemsize
