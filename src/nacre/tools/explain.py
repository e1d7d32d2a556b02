"""Tells which implementation of each op runs for a call, and why."""

from dataclasses import dataclass
from typing import Any

import torch

from nacre.core.choice import Choice, record_choices


@dataclass(frozen=True)
class Explanation:
    """The choices made in one call, in order; prints as a line each."""

    choices: tuple[Choice, ...]

    def __str__(self) -> str:
        if not self.choices:
            return "no op of nacre ran: torch computed this call"
        return "\n".join(str(choice) for choice in self.choices)


def explain(layer: Any, *inputs: Any, **keywords: Any) -> Explanation:
    """Calls a layer, model or function once and tells which implementation each of its ops took, and why.

    The call is real, without gradients; torch's random state is put back afterwards.

    Args:
        layer: what to call.
        inputs: its positional inputs.
        keywords: its keyword inputs.

    Example:
        >>> import torch, nacre
        >>> print(nacre.explain(nacre.LayerNorm(4), torch.ones(2, 4)))
        layer_norm: ...
    """
    with torch.random.fork_rng(), torch.no_grad(), record_choices() as choices:
        layer(*inputs, **keywords)
    return Explanation(tuple(choices))
