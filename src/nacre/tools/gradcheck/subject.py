"""What a gradient check evaluates: the user's layer or function, in float64, always from the same state.

A module is deep-copied, and every tensor input is copied for each call, so that nothing of the user's is touched.
Before each evaluation the random state and the buffers go back to where they were: dropout draws the same mask, batch
norm starts from the same running statistics, and the layer is a plain function of its leaves.
"""

import copy
import inspect
import random
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from nacre.core import check
from nacre.tools.gradcheck.pair import joined
from nacre.tools.gradcheck.tensors import (
    named_inputs,
    named_tensors,
    refuse_unsupported,
    replace_tensors,
    same_values,
    strided_copy,
)


class EvaluationError(Exception):
    """The user's code raised while it was evaluated, or did what no forward or backward may do."""

    @classmethod
    def raised(cls, stage: str, cause: Exception) -> "EvaluationError":
        return cls(f"{stage} raised {type(cause).__name__}: {cause}")


@dataclass(frozen=True)
class Leaf:
    """A tensor whose gradient is checked; finite differences move its values."""

    name: str
    tensor: Tensor


class Differentiable(Protocol):
    """A function of its leaves: a layer, or the gradient of one."""

    leaves: list[Leaf]

    def evaluate(self) -> dict[str, Tensor]:
        """The floating-point outputs at the present values of the leaves, recorded by autograd."""
        ...


class RandomState:
    """The generators of torch, Python and numpy and those given, as they are now."""

    def __init__(self, generators: Iterable[torch.Generator] = ()) -> None:
        self._torch = torch.random.get_rng_state()
        self._cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
        self._python = random.getstate()
        self._numpy: Any = sys.modules.get("numpy.random")
        self._numpy_state: Any = self._numpy.get_state() if self._numpy else None
        self._numpy_moves = True
        self._generators = [(generator, generator.get_state()) for generator in generators]

    def restore(self) -> None:
        torch.random.set_rng_state(self._torch)
        if self._cuda is not None:
            torch.cuda.set_rng_state_all(self._cuda)
        random.setstate(self._python)
        if self._numpy and self._numpy_moves:
            self._numpy.set_state(self._numpy_state)
        for generator, state in self._generators:
            generator.set_state(state)

    def notice(self) -> None:
        """Leaves numpy's generator alone from now on if it has not moved since it was last set, which takes longer than
        a layer."""
        if self._numpy:
            before, now = self._numpy_state, self._numpy.get_state()
            self._numpy_moves = now[2:] != before[2:] or bytes(now[1]) != bytes(before[1])


class Subject:
    """A layer or function in float64, and the leaves it depends on.

    Args:
        call: what to evaluate.
        inputs: its positional inputs, tensors already in float64.
        keywords: the same by keyword.
        leaves: the tensors to check, among the inputs and the parameters of ``module``.
        module: the copied module inside ``call``, if there is one.
    """

    def __init__(
        self,
        call: Callable[..., Any],
        inputs: tuple,
        keywords: dict[str, Any],
        leaves: list[Leaf],
        module: torch.nn.Module | None,
    ) -> None:
        self.call, self.inputs, self.keywords, self.leaves, self.module = call, inputs, keywords, leaves, module
        owners = [] if module is None else list(module.modules())
        self._buffers = [
            (owner, name, buffer.detach().clone())
            for owner in owners
            for name, buffer in owner._buffers.items()
            if buffer is not None
        ]
        values = [*inputs, *keywords.values(), *(value for owner in owners for value in vars(owner).values())]
        self.random_state = RandomState(value for value in values if isinstance(value, torch.Generator))
        self._copies: list[tuple[Tensor, Tensor, Any]] = []

    def evaluate(self) -> dict[str, Tensor]:
        self.random_state.restore()
        for owner, name, values in self._buffers:
            owner._buffers[name] = values.clone()
        self._copies = []
        inputs, keywords = replace_tensors((self.inputs, self.keywords), self._copy)
        try:
            result = self.call(*inputs, **keywords)
        except Exception as error:
            raise EvaluationError.raised("the forward", error) from error
        outputs = dict(named_tensors(result, "output"))
        for name, output in outputs.items():
            refuse_unsupported(name, output)
        return {name: output for name, output in outputs.items() if output.is_floating_point()}

    def _copy(self, tensor: Tensor) -> Tensor:
        # not a leaf, so that a layer may work in place on it as it may inside a network
        copied = strided_copy(tensor)
        self._copies.append((tensor, copied, copied.grad_fn))
        return copied

    def modified_in_place(self) -> tuple[list[str], list[str]]:
        """Tensors which one evaluation changes: without autograd knowing of it, and with."""
        parameters = [] if self.module is None else list(self.module.named_parameters())
        before = [parameter.detach().clone() for _, parameter in parameters]
        self.evaluate()
        unknown = [
            name
            for (name, parameter), values in zip(parameters, before, strict=True)
            if not same_values(parameter, values)
        ]
        known: list[str] = []
        names = {id(tensor): name for name, tensor in named_inputs(self.inputs, self.keywords)}
        for tensor, copied, node in self._copies:
            if not same_values(tensor, copied):
                followed = copied.grad_fn is not node or not tensor.requires_grad
                (known if followed else unknown).append(names[id(tensor)])
        return unknown, known


class GradientSubject:
    """The gradient of a subject as a function of its leaves and of the incoming gradients: its second order."""

    def __init__(self, first: Subject, incoming: dict[str, Leaf]) -> None:
        self.first, self.incoming = first, incoming
        self.leaves = [*first.leaves, *incoming.values()]

    def evaluate(self) -> dict[str, Tensor]:
        outputs = {name: output for name, output in self.first.evaluate().items() if output.requires_grad}
        if not outputs:
            return {}
        incoming = [self.incoming[name].tensor for name in outputs]
        found = differentiate(list(outputs.values()), self.first.leaves, incoming, create_graph=True)
        return {
            f"gradient of {leaf.name}": torch.zeros_like(leaf.tensor) if gradient is None else gradient
            for leaf, gradient in zip(self.first.leaves, found, strict=True)
        }


def differentiate(
    outputs: list[Tensor], leaves: list[Leaf], incoming: list[Tensor], create_graph: bool = False
) -> list[Tensor | None]:
    """The analytic gradients of the leaves; None where nothing reaches a leaf."""
    tensors = [leaf.tensor for leaf in leaves]
    try:
        found = torch.autograd.grad(
            outputs, tensors, incoming, retain_graph=True, create_graph=create_graph, allow_unused=True
        )
    except Exception as error:
        raise EvaluationError.raised("the backward", error) from error
    return [gradient.to_dense() if gradient is not None and gradient.is_sparse else gradient for gradient in found]


def prepare(function: Any, inputs: tuple, keywords: dict[str, Any]) -> tuple[Subject, list[str]]:
    """The subject of a check, and what is to be said about what is left out of it."""
    call, module = _callable(function)
    tensors = dict(named_inputs(inputs, keywords))
    for name, tensor in tensors.items():
        refuse_unsupported(name, tensor)
    asked = any(tensor.requires_grad for tensor in tensors.values())

    def in_float64(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return strided_copy(tensor)
        return strided_copy(tensor.detach(), torch.float64).requires_grad_(tensor.requires_grad or not asked)

    inputs, keywords = replace_tensors((inputs, keywords), in_float64)
    leaves, notes = [], []
    for name, tensor in named_inputs(inputs, keywords):
        if tensor.requires_grad:
            leaves.append(Leaf(name, tensor))
        elif tensor.is_floating_point():
            notes.append(f"{name} is not checked: it has requires_grad=False and other inputs have True")
    if module is not None:
        notes += _shared_memory(function)
        leaves += _parameter_leaves(module, notes)
    if not leaves:
        dtypes = ", ".join(str(tensor.dtype) for tensor in tensors.values())
        raise check.error(
            ValueError,
            "nacre.gradcheck needs a floating-point input, or a parameter which is not frozen",
            f"inputs of dtype {dtypes}" if tensors else "no tensor input",
            "Pass the inputs of forward after the module: nacre.gradcheck(module, x).",
        )
    return Subject(call, inputs, keywords, leaves, module), notes


def prepare_reference(reference: Any, subject: Subject) -> tuple[Subject, list[str]]:
    """The reference on the very leaves of ``subject``: its inputs, and its parameters by name."""
    subject.random_state.restore()  # the state it takes as its own is the subject's
    call, module = _callable(reference)
    keywords, notes = dict(subject.keywords), []
    given = {} if subject.module is None else dict(subject.module.named_parameters(remove_duplicate=False))
    if module is None:
        keywords.update(_asked_by_name(reference, given, subject))
    else:
        notes = _share_parameters(module, given)
    if module is not None and subject.module is not None:
        _share_state(module, subject.module)
    return Subject(call, subject.inputs, keywords, subject.leaves, module), notes


def _callable(function: Any) -> tuple[Callable[..., Any], torch.nn.Module | None]:
    if isinstance(function, torch.nn.Module):
        module = _float64_copy(function)
        return module, module
    if isinstance(function, type) and issubclass(function, torch.autograd.Function):
        return function.apply, None
    if isinstance(function, tuple) and len(function) == 2 and all(callable(part) for part in function):
        return joined(*function), None
    if callable(function) and not isinstance(function, type):
        return function, None
    raise check.error(
        TypeError,
        "nacre.gradcheck takes a module, a function, a torch.autograd.Function or a pair (forward, backward)",
        f"the class {function.__name__}" if isinstance(function, type) else f"a {type(function).__name__}",
        f"Did you mean an instance, {function.__name__}(...)?" if isinstance(function, type) else "",
    )


def _float64_copy(module: torch.nn.Module) -> torch.nn.Module:
    for name, parameter in module.named_parameters():
        if isinstance(parameter, torch.nn.parameter.UninitializedParameter):
            rule = "nacre.gradcheck needs parameters which have values"
            raise check.error(ValueError, rule, f"{name}, uninitialised", "Call the module once on an input.")
        refuse_unsupported(name, parameter)
    try:
        copied = copy.deepcopy(module).double()
    except Exception as error:
        rule = "nacre.gradcheck works on a deep copy of the module"
        got = f"a {type(module).__name__} which copy.deepcopy refuses ({error})"
        raise check.error(TypeError, rule, got) from error
    for owner in copied.modules():
        for name, value in list(vars(owner).items()):
            # a constant kept as a plain attribute, which .double() does not see
            if isinstance(value, Tensor) and value.is_floating_point():
                setattr(owner, name, value.double())
    return copied


def _shared_memory(module: torch.nn.Module) -> list[str]:
    names: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters():
        if parameter.numel():
            names.setdefault(parameter.untyped_storage().data_ptr(), []).append(name)
    return [
        f"{' and '.join(sharing)} share memory but are separate parameters: each is checked on its own"
        for sharing in names.values()
        if len(sharing) > 1
    ]


def _parameter_leaves(module: torch.nn.Module, notes: list[str]) -> list[Leaf]:
    names: dict[int, list[str]] = {}
    parameters: dict[int, Tensor] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
        parameters[id(parameter)] = parameter
    leaves = []
    for key, (name, *others) in names.items():
        if not parameters[key].requires_grad:
            notes.append(f"{name} is not checked: it is frozen (requires_grad=False)")
            continue
        leaves.append(Leaf(name, parameters[key]))
        if others:
            notes.append(f"{name} is also {', '.join(others)} (tied): one gradient, summed over its uses")
    return leaves


def _share_parameters(module: torch.nn.Module, given: dict[str, torch.nn.Parameter]) -> list[str]:
    notes = []
    for name, own in list(module.named_parameters(remove_duplicate=False)):
        if name not in given:
            notes.append(f"{name} of the reference is not in what is checked, and keeps its own values")
            continue
        if given[name].shape != own.shape:
            raise check.error(
                ValueError,
                "the parameters of the reference are taken from the checked module, by name",
                f"{name} of shape {check.shape(own)} in the reference, {check.shape(given[name])} in the module",
            )
        path, _, last = name.rpartition(".")
        setattr(module.get_submodule(path), last, given[name])
    return notes


def _share_state(module: torch.nn.Module, checked: torch.nn.Module) -> None:
    module.train(checked.training)
    buffers = dict(checked.named_buffers(remove_duplicate=False))
    for name, buffer in module.named_buffers(remove_duplicate=False):
        if name in buffers and buffers[name].shape == buffer.shape:
            buffer.copy_(buffers[name])


def _asked_by_name(reference: Any, given: dict[str, torch.nn.Parameter], subject: Subject) -> dict[str, Tensor]:
    """The parameters of the checked module which a reference function takes by their names, after the inputs."""
    try:
        wanted = list(inspect.signature(reference).parameters)[len(subject.inputs) :]
    except (TypeError, ValueError):  # a builtin without a signature, or a pair
        return {}
    return {name: given[name] for name in wanted if name in given and name not in subject.keywords}
