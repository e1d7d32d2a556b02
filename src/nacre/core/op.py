"""An op: one schema, one formula, any number of kernels, and the choice between them.

An :class:`Op` is declared once, in a layer's ``layer.py``, and becomes two operators of ``torch.ops.nacre``:
``<name>`` and ``<name>_backward``. What the dispatcher of PyTorch calls for them, from the outside in:

==================  ==============================================================================================
autocast            casts the floating-point arguments as torch's own autocast does for the same layer
autograd            records a node whose backward calls ``<name>_backward``; where forward-mode differentiation or a
                    ``torch.func`` transform is at work, and for a backward that is itself differentiated, the
                    formula runs as plain torch operations, so that torch differentiates every order of it
vmap                the formula, whose plain torch operations know how to be batched
fake tensors        the formula, or ``fake`` where a formula's loop would be slow to trace
every device        the choice: a kernel which serves the arguments, else the formula
==================  ==============================================================================================

A plain call which a kernel serves skips the dispatcher: where no mode, transform, autocast, tracer or subclass of a
tensor is about, only autograd and the choice have a say. Where the kernel is compiled, autograd's part of such a call
is as well (core/autograd.cpp).

Kernels are implementations of the overload ``nacre::<name>.kernel`` (and ``<name>_backward.kernel``), which has the
same schema: C++ adds ``STABLE_TORCH_LIBRARY_IMPL(nacre, CPU, m)``, Triton registers on ``CUDA``. A backward that is
itself differentiated is ``<name>_backward_formula``, plain torch operations.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch._C import _any_requires_grad, _are_functorch_transforms_active
from torch.autograd import forward_ad

from nacre.core import native
from nacre.core.choice import Kernel, first_serving, record, recorders
from nacre.core.dispatch import AUTOCAST_KEYS, apart, made_apart, parse, unobserved, without_autocast

_library = torch.library.Library("nacre", "DEF")

OPS: dict[str, "Op"] = {}
"""Every declared op by its name."""


def call(name: str, *arguments: Any) -> Any:
    """Runs the op of that name: for a layer that is built on another's op, since layers do not import each other."""
    return OPS[name](*arguments)


_IN_TENSORS = object()  # stands where a saved value is a tensor, which autograd keeps


class Op:
    """Declares an operator and its backward.

    Args:
        schema: the operator in torch's schema language, outputs named:
            ``"scale(Tensor input, float factor) -> Tensor output"``. Outputs after the first ``outputs`` are
            intermediates, kept for the backward and without a gradient.
        forward: the formula, ``forward(*arguments) -> (output, saved)``; ``output`` is a tuple when ``outputs > 1``,
            ``saved`` a tuple in the order of the argument ``saved`` of this declaration.
        backward: the formula's derivative, ``backward(grad, saved, needs) -> gradient`` (a tuple when there are
            several ``gradients``), with None for a gradient that ``needs`` says is not needed. ``grad`` is a tuple
            when ``outputs > 1``, with None for an output that nothing depends on.
        last_backward: the same for a graph which is not kept, where it may write into saved intermediates and return
            them; None from it leaves the call to the backward.
        saved: what the backward needs, by name: arguments, outputs, intermediates. Where intermediates are among
            them they must follow from the saved tensors and the arguments which are not tensors, so that a double
            backward can compute them anew: a tensor argument that is not saved is None then.
        gradients: the arguments whose gradient the backward computes.
        passes: arguments with the output, or the other argument, whose gradient is theirs too, unchanged and without a
            copy: those of a sum have the gradient of the sum. Of an argument that is among ``gradients`` as well this
            holds where the backward gives None though its gradient is needed.
        outputs: how many of the schema's outputs are results rather than intermediates.
        autocast: per device type what autocast does with floating-point arguments, as torch does for the same
            layer: ``"lower"`` casts to the autocast dtype, ``"float32"`` casts to float32, absent leaves them.
        autocast_keeps: the arguments which autocast leaves as they are (the states of a recurrence).
        kernels: the fast implementations; the first which serves a call runs.
        backward_kernels: those of the backward, where they are not the same. Autograd follows the compiled forward with
            the compiled backward without asking them, which has to serve wherever the forward does.
        explained: wraps whatever runs a forward, formula or kernel, to say more of an error where values can be seen.
        fake: shapes, dtypes and strides of the outputs for fake tensors; by default the formula itself.
        fake_backward: the same for the backward.
    """

    def __init__(
        self,
        schema: str,
        *,
        forward: Callable[..., Any],
        backward: Callable[..., Any],
        last_backward: Callable[..., Any] | None = None,
        saved: Sequence[str],
        gradients: Sequence[str],
        passes: Mapping[str, str] | None = None,
        outputs: int = 1,
        autocast: Mapping[str, str] | None = None,
        autocast_keeps: Sequence[str] = (),
        kernels: Sequence[Kernel] = (),
        backward_kernels: Sequence[Kernel] | None = None,
        explained: Callable[[Callable[..., Any]], Callable[..., Any]] | None = None,
        fake: Callable[..., Any] | None = None,
        fake_backward: Callable[..., Any] | None = None,
    ) -> None:
        self.name, arguments, returns = parse(schema)
        self.forward_formula, self.backward_formula = explained(forward) if explained else forward, backward
        self.last_backward = last_backward
        self.saved, self.gradients, self.outputs = tuple(saved), tuple(gradients), outputs
        self.kernels = tuple(kernels)
        self.backward_kernels = self.kernels if backward_kernels is None else tuple(backward_kernels)
        self.arguments = tuple(arguments)
        self.returns = tuple(returns)
        self.intermediates = self.returns[outputs:]
        self._save_from = tuple((self.arguments + self.returns).index(name) for name in self.saved)
        saved_at = {name: outputs + index for index, name in enumerate(self.saved)}
        self._choose_from = tuple(saved_at.get(name) for name in self.arguments)
        self._keeps = tuple(name in autocast_keeps for name in self.arguments)
        self._saved_at = {name: index for index, name in enumerate(self.saved)}
        self._gradient_at = tuple(self.arguments.index(name) for name in self.gradients)
        places = self.returns[:outputs] + self.arguments
        self._passes = tuple((self.arguments.index(to), places.index(of)) for to, of in (passes or {}).items())

        kinds = arguments | returns
        grads = [f"{'Tensor' if outputs == 1 else 'Tensor?'} grad_{name}" for name in self.returns[:outputs]]
        kept = [f"{kinds[name]} {name}" for name in self.saved]
        results = "Tensor" if len(self.gradients) == 1 else f"({', '.join('Tensor' for _ in self.gradients)})"
        backward_schema = f"({', '.join([*grads, *kept, 'bool[] needs'])}) -> {results}"
        forward_schema = schema[len(self.name) :]
        for name, rest in ((self.name, forward_schema), (f"{self.name}_backward", backward_schema)):
            _library.define(name + rest)
            _library.define(f"{name}.kernel{rest}")
        self._define_backward_formula(kinds, [*grads, *kept], results)
        self._recorded = self._have_kernels_recorded()
        self.operator = getattr(torch.ops.nacre, self.name).default
        self.backward_operator = getattr(torch.ops.nacre, f"{self.name}_backward").default
        kernel = getattr(torch.ops.nacre, self.name).kernel
        self._kernel = explained(kernel) if explained else kernel
        self._backward_kernel = getattr(torch.ops.nacre, f"{self.name}_backward").kernel

        self._function = self._make_function()
        # what Function.apply comes to where no transform is active, which is known by then
        self._apply = super(torch.autograd.Function, self._function).apply  # type: ignore[misc]
        OPS[self.name] = self
        _library.impl(self.name, self._autograd, "Autograd", with_keyset=True)
        _library.impl(self.name, self._dispatched, "CompositeExplicitAutograd")
        _library.impl(f"{self.name}_backward", self._dispatched_backward, "CompositeExplicitAutograd")
        _library.impl(self.name, self._formula, "FuncTorchBatched")
        _library.impl(f"{self.name}_backward", self._formula_backward, "FuncTorchBatched")
        for name, traced in (
            (self.name, fake or self._formula),
            (f"{self.name}_backward", fake_backward or self._formula_backward),
        ):
            torch.library.register_fake(f"nacre::{name}", made_apart(traced), lib=_library)
        for device, policy in (autocast or {}).items():
            _library.impl(self.name, self._make_autocast(device, policy), AUTOCAST_KEYS[device])

    def __call__(self, *arguments: Any) -> Any:
        """Runs the op; returns its outputs without the intermediates."""
        kernel, reason = self.choose(*arguments) if unobserved(arguments) else (None, "")
        if kernel is None:
            results = self.operator(*arguments)
        elif self._recorded and kernel.function is None and not recorders:
            results = self._kernel(*arguments)
        elif torch.is_grad_enabled() and _any_requires_grad(*arguments):
            if recorders:
                record(self.name, f"{kernel.language} kernel", reason)
            results = self._apply(kernel.function or self._kernel, *arguments)
        else:
            results = self._run(kernel, reason, *arguments)
        if len(self.returns) == 1:
            return results
        return results[0] if self.outputs == 1 else results[: self.outputs]

    # ---- the formula, as the dispatcher sees it: flat arguments, flat results

    def _formula(self, *arguments: Any) -> Any:
        with without_autocast():
            output, saved = self.forward_formula(*arguments)
        if len(self.returns) == 1:
            return output
        results = (output,) if self.outputs == 1 else tuple(output)
        return (*results, *(saved[self._saved_at[name]] for name in self.intermediates))

    def _formula_backward(self, *arguments: Any) -> Any:
        grads, saved, needs = arguments[: self.outputs], arguments[self.outputs : -1], arguments[-1]
        with without_autocast():
            return self.backward_formula(grads[0] if self.outputs == 1 else grads, saved, needs)

    def _formula_apart(self, *arguments: Any) -> Any:
        return apart(self._formula(*arguments), arguments)

    def _formula_backward_apart(self, *arguments: Any) -> Any:
        return apart(self._formula_backward(*arguments), arguments)

    # ---- the choice between kernels and formula, where autograd, autocast and transforms are done with

    def choose(self, *arguments: Any) -> tuple[Kernel | None, str]:
        """The kernel that serves these arguments, or None for the formula; and the reason."""
        return first_serving(self.kernels, arguments)

    def _choose_backward(self, arguments: Sequence[Any]) -> tuple[Kernel | None, str]:
        given = [None if index is None else arguments[index] for index in self._choose_from]
        if self._choose_from[0] is None:
            given[0] = next(grad for grad in arguments[: self.outputs] if grad is not None)
        return first_serving(self.backward_kernels, given)

    def _run(self, kernel: Kernel | None, reason: str, *arguments: Any) -> Any:
        if recorders:
            record(self.name, f"{kernel.language} kernel" if kernel else "formula", reason)
        return (kernel.function or self._kernel)(*arguments) if kernel else self._formula_apart(*arguments)

    def _run_backward(self, kernel: Kernel | None, reason: str, *arguments: Any) -> Any:
        if recorders:
            record(f"{self.name}_backward", f"{kernel.language} kernel" if kernel else "formula", reason)
        if kernel is None:
            return self._formula_backward_apart(*arguments)
        return (kernel.function or self._backward_kernel)(*arguments)

    def _dispatched(self, *arguments: Any) -> Any:
        return self._run(*self.choose(*arguments), *arguments)

    def _dispatched_backward(self, *arguments: Any) -> Any:
        return self._run_backward(*self._choose_backward(arguments), *arguments)

    def _backward(self, *arguments: Any) -> Any:
        """The backward of a call, in autograd's hands."""
        kernel, reason = self._choose_backward(arguments) if unobserved(arguments) else (None, "")
        if kernel is None:
            return self.backward_operator(*arguments)
        return self._run_backward(kernel, reason, *arguments)

    def _last_backward(self, grads: Sequence[Any], saved: Sequence[Any], needs: list[bool]) -> Any:
        if self.last_backward is None or torch._C._autograd._get_current_graph_task_keep_graph():
            return None
        if not unobserved((*grads, *saved)):
            return None
        found = self.last_backward(grads[0] if self.outputs == 1 else grads, saved, needs)
        if found is not None and recorders:
            kernel, reason = self._choose_backward((*grads, *saved, needs))
            record(f"{self.name}_backward", f"{kernel.language} kernel" if kernel else "formula", reason)
        return found

    # ---- autograd

    def _define_backward_formula(self, kinds: Mapping[str, str], saved: Sequence[str], results: str) -> None:
        """Declares the backward for where it is differentiated: it takes the arguments that are no tensors as well."""
        is_setting = [not kinds[name].startswith("Tensor") for name in self.arguments]
        settings = [f"{kinds[name]} set_{name}" for name in self.arguments if not kinds[name].startswith("Tensor")]

        def backward_formula(*arguments: Any) -> Any:
            grads, values = arguments[: self.outputs], arguments[self.outputs : len(saved)]
            rest = iter(arguments[len(saved) : -1])
            given = [next(rest) if setting else None for setting in is_setting]
            return self._differentiable_backward(grads, values, given, arguments[-1])

        # not an overload of the backward: when Python ends, torch takes overloads of one signature away only in part
        _library.define(f"{self.name}_backward_formula({', '.join([*saved, *settings, 'bool[] needs'])}) -> {results}")
        _library.impl(f"{self.name}_backward_formula", backward_formula, "CompositeImplicitAutograd")

    def _have_kernels_recorded(self) -> bool:
        """Hands autograd's part of compiled kernels to core/autograd.cpp, where it can be; whether it could."""
        _library.impl(f"{self.name}_backward.kernel", torch.library.fallthrough_kernel, "Autograd")
        if self.last_backward is not None or not native.records():
            _library.impl(f"{self.name}.kernel", torch.library.fallthrough_kernel, "Autograd")
            return False
        passes = [number for pair in self._passes for number in pair]
        torch.ops.nacre_autograd.record(self.name, self.outputs, self._save_from, self._gradient_at, passes)
        return True

    def _autograd(self, keyset: Any, *arguments: Any) -> Any:
        if _are_functorch_transforms_active() or forward_ad._current_level >= 0:
            return self._formula(*arguments)
        if torch.is_grad_enabled() and _any_requires_grad(*arguments):
            return self._function.apply(functools.partial(self._redispatch, keyset), *arguments)
        return self._redispatch(keyset, *arguments)

    def _redispatch(self, keyset: Any, *arguments: Any) -> Any:
        # below the recording of views too: a formula that ends in a view has a result of its own to its caller
        with torch._C._AutoDispatchBelowADInplaceOrView():
            return self.operator.redispatch(keyset & torch._C._after_ADInplaceOrView_keyset, *arguments)

    def _make_function(self) -> type[torch.autograd.Function]:
        op, several = self, len(self.returns) > 1

        def forward(ctx: Any, run: Callable[..., Any], *arguments: Any) -> Any:
            results = run(*arguments)
            values = (*arguments, *results) if several else (*arguments, results)
            saved = [values[index] for index in op._save_from]
            ctx.save_for_backward(*[value for value in saved if isinstance(value, torch.Tensor)])
            ctx.saved = [_IN_TENSORS if isinstance(value, torch.Tensor) else value for value in saved]
            ctx.set_materialize_grads(False)
            if op.intermediates:
                ctx.settings = [None if isinstance(value, torch.Tensor) else value for value in arguments]
                ctx.mark_non_differentiable(*results[op.outputs :])
            return results

        def backward(ctx: Any, *grads: torch.Tensor | None) -> Any:
            gradients: list[torch.Tensor | None] = [None] * (1 + len(op.arguments))
            grads = grads[: op.outputs]
            if all(grad is None for grad in grads):
                return tuple(gradients)
            tensors = iter(ctx.saved_tensors)
            saved = [next(tensors) if value is _IN_TENSORS else value for value in ctx.saved]
            needed = ctx.needs_input_grad
            needs = [needed[1 + index] for index in op._gradient_at]
            if torch.is_grad_enabled():
                found = op._differentiable_backward(grads, saved, ctx.settings if op.intermediates else (), needs)
            else:
                found = op._last_backward(grads, saved, needs)
                found = op._backward(*grads, *saved, needs) if found is None else found
            for index, gradient in zip(op._gradient_at, (found,) if len(op.gradients) == 1 else found, strict=True):
                gradients[1 + index] = gradient
            for index, place in op._passes:
                if gradients[1 + index] is None and needed[1 + index]:
                    gradients[1 + index] = (*grads, *gradients[1:])[place]
            return tuple(gradients)

        members = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
        return type(f"Nacre_{self.name}", (torch.autograd.Function,), members)

    def _differentiable_backward(
        self, grads: Sequence[Any], saved: Sequence[Any], settings: Sequence[Any], needs: Sequence[bool]
    ) -> Any:
        """The backward as plain torch operations on tensors which autograd follows.

        Saved arguments and outputs are part of the graph already; intermediates are constants to it, so they are
        computed again from the saved arguments.
        """
        if self.intermediates:
            given = dict(zip(self.saved, saved, strict=True))
            arguments = (given.get(name, value) for name, value in zip(self.arguments, settings, strict=True))
            with without_autocast():
                _, saved = self.forward_formula(*arguments)
        return self._formula_backward(*grads, *saved, needs)

    # ---- autocast

    def _make_autocast(self, device: str, policy: str) -> Callable[..., Any]:
        def cast(value: Any, dtype: torch.dtype) -> Any:
            if not isinstance(value, torch.Tensor) or value.device.type != device:
                return value
            eligible = value.is_floating_point() and value.dtype is not torch.float64
            return value.to(dtype) if eligible else value

        def autocast(*arguments: Any) -> Any:
            dtype = torch.float32 if policy == "float32" else torch.get_autocast_dtype(device)
            with without_autocast():
                return self.operator(
                    *(
                        argument if keep else cast(argument, dtype)
                        for argument, keep in zip(arguments, self._keeps, strict=True)
                    )
                )

        return autocast
