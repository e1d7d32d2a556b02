"""A batch of sequences as its steps in time: what the formulas of the recurrent layers share.

A plain batch has the shape (T, B, features): every step is the rows of all B sequences. A packed batch has the shape
(N, features): the steps stand one after another, and step t has ``batch_sizes[t]`` rows, one for each sequence that
lasts longer than t. The longest sequences come first, so the rows of a step continue the first rows of the step before.

One recurrence serves both. Its state has a row for every sequence at every time; a step reads and replaces the first
rows of it, and the rows of sequences that have ended (or, from the last step to the first, have not begun) stay. So
the state at the end holds each sequence's final state, wherever that sequence ended.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def order(steps: int, reverse: bool) -> list[int]:
    """The numbers of the steps as the recurrence walks through them.

    Example:
        >>> order(3, reverse=True)
        [2, 1, 0]
    """
    return list(range(steps))[:: -1 if reverse else 1]


def split(values: Tensor, batch_sizes: Tensor | None) -> Sequence[Tensor]:
    """The steps of a plain batch, or of a packed one."""
    return values.unbind(0) if batch_sizes is None else values.split(batch_sizes.tolist())


def join(steps: Sequence[Tensor], batch_sizes: Tensor | None) -> Tensor:
    """The batch of these steps: the inverse of ``split``."""
    return torch.stack(tuple(steps)) if batch_sizes is None else torch.cat(tuple(steps))


def replace(state: Tensor, rows: Tensor) -> Tensor:
    """The state with its first rows replaced.

    Example:
        >>> replace(torch.zeros(3, 1), torch.ones(2, 1)).flatten()
        tensor([1., 1., 0.])
    """
    count = rows.shape[0]
    return rows if count == state.shape[0] else torch.cat((rows, state[count:]))


def states_before(states: Tensor, initial: Tensor, batch_sizes: Tensor | None, reverse: bool) -> Tensor:
    """The states that the steps read, where ``states`` are those that they wrote.

    Example:
        >>> states_before(torch.tensor([[1.0], [2.0], [3.0]]), torch.zeros(1), None, reverse=False).flatten()
        tensor([0., 1., 2.])
    """
    steps = split(states, batch_sizes)
    before, state = list(steps), initial
    for t in order(len(steps), reverse):
        before[t] = state[: steps[t].shape[0]]
        state = replace(state, steps[t])
    return join(before, batch_sizes)


def gradient(grad: Tensor | None, like: Tensor, dtype: torch.dtype) -> Tensor:
    """The gradient of a result in this dtype; zeros in the shape of ``like`` where nothing depends on the result."""
    return torch.zeros_like(like, dtype=dtype) if grad is None else grad.to(dtype)
