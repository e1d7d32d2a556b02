"""What one operator costs, as the dispatcher of PyTorch sees it."""

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from nacre.tools.cost import elements, own
from nacre.tools.cost.kinds import VIEW, kind_of
from nacre.tools.cost.products import PRODUCTS, Counted
from nacre.tools.cost.solvers import SOLVERS
from nacre.tools.cost.stage import tensors


@dataclass(frozen=True)
class Work:
    """What one call of an operator does.

    Args:
        flops: of matrix products.
        elementwise_flops: of everything else.
        bytes: read and written: each argument and each result once.
        kind: which operators take their time as this one does.
        sizes: those that decide about its time; their meaning goes with the kind.
        dtype: of the numbers.
        pointwise: whether it computes each value of its result by itself.
        own: whether it is an operator of nacre.
        known: whether the operator's cost is known; if not, only its bytes are counted.
        distances: bytes of what it reads and writes, by the bytes that were touched since they were touched last (up
            to a power of two): how far they may have gone from the processor.
        fresh: bytes of memory that the system had to find for its results.
    """

    flops: int = 0
    elementwise_flops: int = 0
    bytes: int = 0
    kind: str = ""
    sizes: tuple[int, ...] = ()
    dtype: str = "float32"
    pointwise: bool = False
    own: bool = False
    known: bool = True
    distances: tuple[tuple[int, int], ...] = ()
    fresh: int = 0


NOTHING = Work(kind=VIEW)


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
    flops, elementwise = known or (0, 0)
    size = traffic(name, given, result)
    kind, sizes = kind_of(f"{space}::{name}", given, result, size)
    return Work(
        flops=flops,
        elementwise_flops=elementwise,
        bytes=size,
        kind=kind,
        sizes=sizes,
        dtype=dtype,
        pointwise=torch.Tag.pointwise in operator.tags,
        own=space == "nacre",
        known=known is not None,
    )


def _counted(operator: Any, space: str, name: str, given: Mapping[str, Any], result: Any) -> Counted | None:
    if space not in ("aten", "mkldnn", "prims"):
        return None
    if name in PRODUCTS:
        return PRODUCTS[name](given, result)
    for rules in (elements.RULES, SOLVERS):
        if name in rules:
            operations = rules[name](given, result)
            return None if operations is None else (0, operations)
    if name in elements.MOVES:
        return 0, 0
    if name in elements.PER_INPUT:
        return 0, next((value.numel() for value in given.values() if isinstance(value, torch.Tensor)), 0)
    if name in elements.PER_RESULT or torch.Tag.pointwise in operator.tags:
        return 0, elements.first(result).numel()
    return None


def _has_tensor(result: Any) -> bool:
    return any(True for _ in tensors(result))


_FACTORS = frozenset("mm bmm mv dot vdot addmm addmv baddbmm addbmm convolution".split())


def check_dtypes(operator: Any, arguments: tuple[Any, ...]) -> None:
    """Products take factors of one dtype, which fake tensors do not look at.

    Raises:
        RuntimeError: as torch does for tensors with values.
    """
    space, name, _ = _identity(operator)
    if space == "aten" and name in _FACTORS:
        dtypes = dict.fromkeys(str(one.dtype) for one in arguments if isinstance(one, torch.Tensor))
        if len(dtypes) > 1:
            raise RuntimeError(f"the factors of {name} have the same dtype, but these have {' and '.join(dtypes)}")


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


def traffic(name: str, given: Mapping[str, Any], result: Any) -> int:
    """Bytes read and written: each argument once, each result once; of a table that is looked up in, the rows."""
    written = sum(size(tensor) for tensor in tensors(result))
    read = list(tensors(given))
    if name in _READS_ROWS:
        return 2 * written + sum(size(tensor) for tensor in read[1:])
    if name in _ONLY_WRITES:
        read = read[1:]
    return written + sum(size(tensor) for tensor in read)


def touched(operator: Any, arguments: Any, keywords: Any, result: Any) -> list[tuple[torch.Tensor, int]]:
    """The tensors that an operator reads and writes, with the bytes; of a table that is looked up in, the rows."""
    _, name, free = _identity(operator)
    if free:
        return []
    written = [(tensor, size(tensor)) for tensor in tensors(result)]
    read = [(tensor, size(tensor)) for tensor in tensors((arguments, keywords))]
    if name in _READS_ROWS and read:
        read[0] = (read[0][0], sum(each for _, each in written))
    return (read[1:] if name in _ONLY_WRITES else read) + written


_SPARSE = (torch.sparse_coo, torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc)


def size(tensor: torch.Tensor) -> int:
    """Bytes of the values; what is expanded lies in memory once."""
    if tensor.layout is not torch.strided:
        return tensor._nnz() * tensor.element_size() if tensor.layout in _SPARSE else 0
    own = math.prod(length for length, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride)
    return own * tensor.element_size() if tensor.numel() else 0
