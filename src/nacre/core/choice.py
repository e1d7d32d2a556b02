"""Which implementation runs a call: an op's kernels, the calls left to torch, and the record of the choices."""

import contextlib
import functools
import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from nacre.core import native
from nacre.core.dispatch import PLAIN


@dataclass(frozen=True)
class Kernel:
    """A fast implementation of an op, or of its backward, for one kind of device.

    Args:
        device: the device type it runs on, ``"cpu"`` or ``"cuda"``.
        language: what it is written in, for :func:`nacre.explain`; ``"torch"`` for torch's own kernel.
        requires: the calls it serves, each condition in words with its predicate of the op's arguments. Before a
            backward, arguments that were not saved are None, but for the first, for which the output's gradient stands.
        dtypes: those of the first argument which it serves; by default any.
        module: a module to import before the first call on that device; it registers the implementation
            (Triton kernels, so that ``import nacre`` never imports triton). The compiled library of the C++
            kernels is loaded by :mod:`nacre.core.native`.
        function: the implementation itself where it is called from Python, flat arguments to flat results; by default
            the one which is registered for the op's overload ``kernel``.
        compiled: whether it needs the compiled library, or its module.
    """

    device: str
    language: str
    requires: Mapping[str, Callable[..., bool]]
    dtypes: Sequence[torch.dtype] = ()
    module: str | None = None
    function: Callable[..., Any] | None = None
    compiled: bool = True

    def unavailable(self) -> str:
        """Why the kernel cannot run on this installation; empty when it can."""
        if not self.compiled:
            return ""
        if self.module is None:
            return native.unavailable()
        try:
            importlib.import_module(self.module)
        except ImportError as error:
            return f"{self.language} is not installed ({error})"
        return ""

    @functools.cached_property
    def conditions(self) -> str:
        """What it serves, in words."""
        return "; ".join([*([self._dtypes] if self.dtypes else []), *self.requires])

    @property
    def _dtypes(self) -> str:
        names = [str(dtype).removeprefix("torch.") for dtype in self.dtypes]
        return f"{', '.join(names[:-1])} or {names[-1]}"

    def refusal(self, arguments: Sequence[Any]) -> str:
        """Why it does not serve these arguments; empty when it does."""
        if missing := self.unavailable():
            return missing
        if self.dtypes and arguments[0].dtype not in self.dtypes:
            return f"the {self.language} kernel asks for {self._dtypes}"
        for words, holds in self.requires.items():
            if not holds(*arguments):
                return f"the {self.language} kernel asks for {words}"
        return ""


def first_serving(kernels: Sequence[Kernel], arguments: Sequence[Any]) -> tuple[Kernel | None, str]:
    """The kernel that serves these arguments, or None for the formula; and the reason."""
    device = _device_of(arguments)
    refusals: list[str] | tuple[str, ...] = ()
    for kernel in kernels:
        if kernel.device != device:
            continue
        refusal = kernel.refusal(arguments)
        if refusal:
            refusals = [*refusals, refusal]
        elif kernel.compiled or not refusals:
            return kernel, kernel.conditions
        else:  # a call which nacre's own kernels refuse goes to torch's for that reason
            return kernel, "; ".join(dict.fromkeys(refusals))
    return None, "; ".join(dict.fromkeys(refusals)) or f"no kernel for {device} yet"


def _device_of(arguments: Sequence[Any]) -> str:
    if type(arguments[0]) is torch.Tensor:  # nearly always
        return arguments[0].device.type
    for argument in arguments:
        if isinstance(argument, torch.Tensor):
            return argument.device.type
    raise TypeError("an op has at least one tensor among its arguments")


FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def cpp_kernel(
    requires: Mapping[str, Callable[..., bool]] | None = None, dtypes: Sequence[torch.dtype] = FLOATS
) -> Kernel:
    """A kernel in C++ for these dtypes of its first argument; ``requires`` is what it asks for beside."""
    return Kernel(device="cpu", language="C++", requires=requires or {}, dtypes=dtypes)


@dataclass(frozen=True)
class Choice:
    """Which implementation ran, for which operator, and why."""

    operator: str
    implementation: str
    reason: str

    def __str__(self) -> str:
        return f"{self.operator}: {self.implementation} ({self.reason})"


recorders: list[list[Choice]] = []


@contextlib.contextmanager
def record_choices() -> Iterator[list[Choice]]:
    """Collects the :class:`Choice` of every operator that runs inside the ``with`` block.

    Example:
        >>> import torch, nacre
        >>> from nacre.core.choice import record_choices
        >>> with record_choices() as choices:
        ...     _ = nacre.LayerNorm(8)(torch.ones(2, 8))
        >>> [choice.operator for choice in choices]
        ['layer_norm']
    """
    choices: list[Choice] = []
    recorders.append(choices)
    _tell()
    try:
        yield choices
    finally:
        # by identity: two recorders that saw the same choices are equal, and list.remove would take the wrong one
        del recorders[next(index for index, recorder in enumerate(recorders) if recorder is choices)]
        _tell()


def record(operator: str, implementation: str, reason: str) -> None:
    for recorder in recorders:
        recorder.append(Choice(operator, implementation, reason))


def unserved(*tensors: object) -> str:
    """Why nacre's ops leave these tensors to torch; empty when they serve them.

    The formulas and their derivatives are those of real numbers in dense, strided tensors. A class of tensors which
    answers operators itself (sharded, quantised, masked ones) knows torch's.
    """
    if tensors[0] is None:
        return "no input"
    for tensor in tensors:
        if tensor is None:
            continue
        if not isinstance(tensor, torch.Tensor):
            return f"a value of type {type(tensor).__name__}"
        if tensor.is_nested:
            return "a nested tensor"
        if type(tensor) not in PLAIN and _answers_itself(type(tensor)):
            return f"a tensor of type {type(tensor).__name__}"
        if tensor.layout is not torch.strided:
            return f"a tensor of layout {tensor.layout}"
        if tensor.dtype in FLOATS:  # none of those which follow
            continue
        if not tensor.is_floating_point() or tensor.itemsize == 1:
            return f"a tensor of dtype {tensor.dtype}"
        if tensor.is_quantized:
            return "a quantised tensor"
    return ""


def _answers_itself(kind: type[torch.Tensor]) -> bool:
    """Whether a class of tensors has a say in what operators do; torch's own fake tensors know every operator."""
    if kind.__module__.startswith("torch._subclasses."):
        return False
    usual = torch.Tensor.__torch_function__.__func__  # type: ignore[attr-defined]
    function = getattr(kind.__torch_function__, "__func__", usual)  # a disabled one has none
    return function is not usual or kind.__torch_dispatch__ is not torch.Tensor.__torch_dispatch__


def torch_instead(name: str, reason: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Calls torch's own ``function`` for a call that nacre leaves to torch, and lets :func:`nacre.explain` say so."""
    if not torch.compiler.is_compiling() and recorders:
        record(name, "torch", reason)
    return function(*args, **kwargs)


_small_calls_to_torch = True
_plain: tuple[type, ...] = (torch.Tensor,)
unwatched = True
"""Whether small calls go to torch and nobody records it: a layer asks this first, since one more call of a function of
Python shows beside torch's own layer."""


def _tell() -> None:
    """Tells the layers and autograd's library whether every call has its kernel chosen by :func:`first_serving`."""
    global unwatched
    unwatched = _small_calls_to_torch and not recorders
    if native.records():
        torch.ops.nacre_autograd.python_chooses(not unwatched)


@contextlib.contextmanager
def chosen_as_plain(kind: type) -> Iterator[None]:
    """Leaves tensors of a class that stands for plain ones to torch where those are left, inside the ``with`` block."""
    global _plain
    before, _plain = _plain, (*_plain, kind)
    try:
        yield
    finally:
        _plain = before


@contextlib.contextmanager
def kernels_at_any_size() -> Iterator[None]:
    """Lets small calls run nacre's own kernels as well inside the ``with`` block, where :func:`small` says yes."""
    global _small_calls_to_torch
    before, _small_calls_to_torch = _small_calls_to_torch, False
    _tell()
    try:
        yield
    finally:
        _small_calls_to_torch = before
        _tell()


def at_any_size() -> bool:
    """Whether :func:`kernels_at_any_size` is at work: for a condition of a kernel which asks for a size."""
    return not _small_calls_to_torch


def sizes_decide(input: Any) -> bool:
    """Whether the size of a call may leave it to torch's own operator: outside tests it may.

    A graph that is compiled or exported serves all sizes alike, and to compare one would tie it to that.
    """
    return type(input) in _plain and _small_calls_to_torch and not torch.compiler.is_compiling()


def small(name: str, input: Any, below: int) -> bool:
    """Whether a call is so small that torch's own operator, which autograd knows without Python's help, is faster.

    Args:
        name: the op's name, for :func:`nacre.explain`.
        input: the input whose elements count.
        below: the number of elements from which nacre's kernel is taken, Python's part considered.
    """
    return (
        sizes_decide(input) and input.numel() < below and torch_is_ahead(name, f"{below:,} values" if recorders else "")
    )


def torch_is_ahead(name: str, under: str) -> bool:
    """Lets :func:`nacre.explain` say that a call is left to torch's own operator, which is faster for its size.

    Args:
        name: the op's name.
        under: the size from which nacre's kernel is faster, in words.

    Returns:
        True, as the last of the conditions under which a call is left to torch.
    """
    return whole_by_torch(name, f"under {under} torch's own operator is faster") if recorders else True


def whole_by_torch(name: str, reason: str) -> bool:
    """The same for another reason why torch's operator, its autograd included, serves a call best."""
    if recorders:
        record(name, "torch", reason)
    return True
