"""What ``torch.utils.flop_counter`` counts of an op, of which it sees the outside alone.

Its convention is that of nacre's bills: the products of matrices, forward and backward, 2 FLOPs for a multiply-add.
torch's counter imports triton where there is one, so it learns of the ops when somebody imports it.
"""

import importlib.abc
import importlib.util
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from nacre.core.op import Op

_COUNTER = "torch.utils.flop_counter"

_formulas: dict[Any, Callable[..., int]] = {}  # by operator, not yet known to the counter


def count_flops(op: Op, forward: Callable[..., int] | None = None, backward: Callable[..., int] | None = None) -> None:
    """Has torch's counter count an op, which it takes for nothing otherwise.

    Args:
        op: the op; where nothing else is said its formula is run without values and the products in it are counted.
        forward: the FLOPs from the result and the arguments of a call; for a formula that loops, or multiplies zeros.
        backward: the same for the backward.
    """

    def forward_flops(*arguments: Any, out_val: Any) -> int:
        return forward(out_val, *arguments) if forward else _products(op._formula, arguments)

    def backward_flops(*arguments: Any, out_val: Any) -> int:
        return backward(out_val, *arguments) if backward else _products(op._formula_backward, arguments)

    _formulas[op.operator.overloadpacket] = forward_flops
    _formulas[op.backward_operator.overloadpacket] = backward_flops
    if _COUNTER in sys.modules:
        _tell_the_counter()


def _products(formula: Callable[..., Any], arguments: tuple[Any, ...]) -> int:
    counter_of = sys.modules[_COUNTER].FlopCounterMode
    with counter_of(display=False) as counter, torch.no_grad():
        formula(*tree_map_only(Tensor, lambda tensor: torch.empty_like(tensor, device="meta"), arguments))
    return counter.get_total_flops()


def _tell_the_counter() -> None:
    for operator in list(_formulas):
        sys.modules[_COUNTER].register_flop_formula(operator, get_raw=True)(_formulas.pop(operator))


class _WhenImported(importlib.abc.MetaPathFinder):
    """Finds the counter's module as the others would, and tells it of the ops when it has been loaded."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name != _COUNTER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_tell(module: Any) -> None:
            execute(module)
            _tell_the_counter()

        spec.loader.exec_module = execute_and_tell  # type: ignore[method-assign]
        return spec


if _COUNTER not in sys.modules:
    sys.meta_path.insert(0, _WhenImported())
