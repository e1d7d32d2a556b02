"""What one operator costs, as the dispatcher of PyTorch sees it."""

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from nacre.tools.cost import elements, own
from nacre.tools.cost.products import PRODUCTS
from nacre.tools.cost.solvers import SOLVERS
from nacre.tools.cost.stage import tensors


@dataclass(frozen=True)
class Work:
    """What one call of an operator does.

    Args:
        flops: of matrix products.
        elementwise_flops: of everything else.
        bytes: read and written: each argument and each result once.
        product: multiply-adds of one matrix product, where several run side by side in one call.
        dtype: of the numbers.
        attention: whether its products are those of attention, whose parts are small.
        random: random numbers drawn, which torch does on one thread of a CPU.
        own: whether it is an operator of nacre.
        known: whether the operator's cost is known; if not, only its bytes are counted.
    """

    flops: int = 0
    elementwise_flops: int = 0
    bytes: int = 0
    product: int = 0
    dtype: str = "float32"
    attention: bool = False
    random: int = 0
    own: bool = False
    known: bool = True


NOTHING = Work()


def work_of(operator: Any, arguments: tuple[Any, ...], keywords: Mapping[str, Any], result: Any) -> Work:
    """What the operator has done.

    Args:
        operator: an overload, as a dispatch mode gets it.
        arguments: its positional arguments.
        keywords: its keyword arguments.
        result: what it returned.
    """
    space, name, free = _identity(operator)
    if free:
        return NOTHING
    given = _named(operator, arguments, keywords)
    dtype = str(elements.first(result).dtype).removeprefix("torch.") if _has_tensor(result) else "float32"
    known = own.counted(name, given) if space == "nacre" else _counted(operator, space, name, given, result)
    flops, elementwise, product = known or (0, 0, 0)
    return Work(
        flops=flops,
        elementwise_flops=elementwise,
        bytes=traffic(name, given, result),
        product=product,
        dtype=dtype,
        attention="attention" in name,
        random=elements.first(result).numel() if name in _DRAWS else 0,
        own=space == "nacre",
        known=known is not None,
    )


def _counted(
    operator: Any, space: str, name: str, given: Mapping[str, Any], result: Any
) -> tuple[int, int, int] | None:
    if space not in ("aten", "mkldnn", "prims"):
        return None
    if name in PRODUCTS:
        return PRODUCTS[name](given, result)
    for rules in (elements.RULES, SOLVERS):
        if name in rules:
            operations = rules[name](given, result)
            return None if operations is None else (0, operations, 0)
    if name in elements.MOVES:
        return 0, 0, 0
    if name in elements.PER_INPUT:
        return 0, next((value.numel() for value in given.values() if isinstance(value, torch.Tensor)), 0), 0
    if name in elements.PER_RESULT or torch.Tag.pointwise in operator.tags:
        return 0, elements.first(result).numel(), 0
    return None


def _has_tensor(result: Any) -> bool:
    return any(True for _ in tensors(result))


@functools.cache
def _identity(operator: Any) -> tuple[str, str, bool]:
    """Namespace, name without the mark of an operator in place, and whether it neither reads nor writes a value."""
    space, _, name = operator._schema.name.partition("::")
    if name.endswith("_") and not name.endswith("__"):
        name = name[:-1]
    return space, name, operator.is_view or name in elements.FREE


@functools.cache
def _arguments(operator: Any) -> tuple[tuple[str, Any], ...]:
    return tuple((argument.name, argument.default_value) for argument in operator._schema.arguments)


def _named(operator: Any, arguments: tuple[Any, ...], keywords: Mapping[str, Any]) -> dict[str, Any]:
    given = dict(_arguments(operator))
    given.update(zip(given, arguments, strict=False))
    given.update(keywords)
    return given


_READS_ROWS = frozenset(("embedding", "index_select", "gather", "index", "_unsafe_index"))
_ONLY_WRITES = frozenset(
    ("copy fill zero bernoulli uniform normal exponential random zeros_like ones_like full_like empty_like rand_like"
     " randn_like new_zeros new_ones new_full").split()
)  # fmt: skip


_DRAWS = frozenset("bernoulli uniform normal exponential rand randn native_dropout random".split())


def traffic(name: str, given: Mapping[str, Any], result: Any) -> int:
    """Bytes read and written: each argument once, each result once; of a table that is looked up in, the rows."""
    written = sum(size(tensor) for tensor in tensors(result))
    read = list(tensors(given))
    if name in _READS_ROWS:
        return 2 * written + sum(size(tensor) for tensor in read[1:])
    if name in _ONLY_WRITES:
        read = read[1:]
    return written + sum(size(tensor) for tensor in read)


def size(tensor: torch.Tensor) -> int:
    """Bytes of the values; what is expanded lies in memory once."""
    if tensor.layout is not torch.strided:
        return tensor._nnz() * tensor.element_size() if tensor.is_sparse else 0
    own = math.prod(length for length, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride)
    return own * tensor.element_size() if tensor.numel() else 0
