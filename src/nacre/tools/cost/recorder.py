"""Watches one run of a model: which module called which operator, forward and backward."""

from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from nacre.core.cost import Cost
from nacre.tools.cost.distances import Event, with_distances
from nacre.tools.cost.graph import meetings
from nacre.tools.cost.layers import spec_of
from nacre.tools.cost.memory import Kept, Memory
from nacre.tools.cost.operators import Work, check_dtypes, touched, work_of
from nacre.tools.cost.stage import fake_tensor, tensors
from nacre.tools.cost.workspace import run, with_workspace
from nacre.tools.formula import sizes_by_letter


@dataclass(eq=False)
class Call:
    """One call of a module, while it is being watched: what it did itself, without the modules that it called."""

    name: str
    module: nn.Module
    parent: "Call | None"
    inputs: tuple[tuple[int, ...], ...] = ()
    outputs: tuple[tuple[int, ...], ...] = ()
    formula: str = ""
    sizes: dict[str, int] = field(default_factory=dict)
    forward: Counter[str] = field(default_factory=Counter)
    backward: Counter[str] = field(default_factory=Counter)
    saved_bytes: int = 0
    unknown: Counter[str] = field(default_factory=Counter)
    forward_work: Counter[Work] = field(default_factory=Counter)
    backward_work: Counter[Work] = field(default_factory=Counter)
    children: list["Call"] = field(default_factory=list)


@dataclass(eq=False)
class _Bill:
    """What a layer's formula says of one call; its backward is paid once any of it has run."""

    cost: Cost
    formula: str
    sizes: dict[str, int]
    paid: bool = False


@dataclass(eq=False)
class _Frame:
    """A module's call on the stack; ``again`` where the backward has called it, to compute anew what was not kept."""

    call: Call
    again: bool
    matched: list[Call] = field(default_factory=list)


_ACCUMULATIONS = frozenset(("aten::add", "aten::add_"))


class Recorder(TorchDispatchMode):
    """The watch itself: a dispatch mode for the operators, and two patches for the calls of modules.

    Args:
        model: the model, for the names of its modules.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self.memory = Memory()
        self.root = Call("", model, None)
        self._names: dict[nn.Module, list[str]] = {}
        for name, module in model.named_modules(remove_duplicate=False):
            self._names.setdefault(module, []).append(name)
        self._stack: list[_Frame] = []
        self._bill: _Bill | None = None  # of the layer whose forward runs now
        self._observed: Counter[str] | None = None
        self._paused = False
        self._starts: list[int] = []
        self._owners: list[tuple[Call, _Bill | None]] = []
        self._again: set[Call] = set()
        self._finished = -1
        self._places: list[tuple[Call, bool]] = []
        self.in_backward = False

    # ---- operators

    def __torch_dispatch__(self, operator: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        if operator is torch.ops.prim.device.default and isinstance(arguments[0], fake_tensor()):
            return arguments[0].fake_device  # autograd asks for it at every turn
        check_dtypes(operator, arguments)
        node = torch._C._current_autograd_node()
        result = with_workspace(operator, arguments, run(operator, arguments, keywords or {}))
        if self._paused or operator.namespace in ("prim", "profiler"):
            return result
        call, bill, backward, counts = self._whose(operator, node)
        for tensor in tensors(result):
            self.memory.sees(tensor, call.name, operator.namespace == "nacre")
        if bill is not None and self.in_backward and not counts and not bill.paid and not self._stack:
            self._pay_backward(call, bill)
        work = work_of(operator, arguments, keywords or {}, result)
        self.memory.runs(len(self._places), work, touched(operator, arguments, keywords or {}, result))
        self._places.append((call, backward))
        if counts:
            _add(call.backward if backward else call.forward, work.flops, work.elementwise_flops, work.bytes)
            if not work.known:
                call.unknown[operator._schema.name] += 1
        elif self._observed is not None:
            _add(self._observed, work.flops, work.elementwise_flops, work.bytes)
        return result

    def _whose(self, operator: Any, node: Any) -> tuple[Call, _Bill | None, bool, bool]:
        """The call an operator belongs to, the bill that covers it, its direction, and whether it counts itself."""
        if self._stack:
            frame = self._stack[-1]
            return frame.call, self._bill, frame.again, self._bill is None
        if node is None or not self.in_backward:
            return self.root, None, self.in_backward, True
        number = node._sequence_nr()
        call, bill = self._owner(number)
        name = operator._schema.name
        if torch.is_grad_enabled() or (operator.namespace == "nacre" and not name.endswith("_backward")):
            return call, None, True, True  # a forward that the backward runs again, outside of any module
        if number == self._finished and name in _ACCUMULATIONS:
            return call, None, True, False  # gradients that meet are counted where they meet
        if number >= _LAST:
            return call, None, True, name in _ACCUMULATIONS  # a parameter takes its gradient as it is, or a copy
        return call, bill, True, bill is None

    def _owner(self, number: int) -> tuple[Call, _Bill | None]:
        place = bisect_right(self._starts, number) - 1
        if place < 0 or number >= _LAST:
            return self.root, None
        return self._owners[place]

    def _mark(self) -> None:
        """From here on, what autograd records belongs to the call on top of the stack."""
        self._starts.append(torch._C._autograd._get_sequence_nr())
        self._owners.append((self._stack[-1].call if self._stack else self.root, self._bill))

    def _pay_backward(self, call: Call, bill: _Bill) -> None:
        bill.paid = True
        cost = bill.cost
        _add(call.backward, cost.backward_flops, cost.backward_elementwise_flops, cost.backward_bytes)

    def watch_graph(self, results: list[Tensor]) -> None:
        """Looks at the graph before the backward: counts the additions where gradients meet."""
        for number, additions, size in meetings(results, lambda node: self._owner(node._sequence_nr())[1], self._ends):
            _add(self._owner(number)[0].backward, 0, additions, 3 * size)

    def share_work(self, log: Sequence[Event]) -> None:
        """Gives every call the work of its operators, by the log of what they did."""
        for place, work in with_distances(log).items():
            call, backward = self._places[place]
            (call.backward_work if backward else call.forward_work)[work] += 1

    def _ends(self, number: int) -> None:
        self._finished = number

    # ---- modules

    def enter(self, module: nn.Module, arguments: Any, keywords: Any) -> _Frame:
        """A module is called."""
        above = self._stack[-1] if self._stack else None
        if self.in_backward:
            frame = _Frame(self._called_before(module, above), True)
        else:
            parent = above.call if above else None
            call = self.root if parent is None and module is self.root.module and not self.calls else None
            call = call or Call(self._name(module, parent), module, parent or self.root)
            call.inputs = _shapes((arguments, keywords))
            if call is not self.root:
                (parent or self.root).children.append(call)
            self.calls.append(call)
            frame = _Frame(call, False)
        self._stack.append(frame)
        self._mark()
        return frame

    def leave(self, frame: _Frame, result: Any) -> None:
        """The module's call is over."""
        if not frame.again:
            frame.call.outputs = _shapes(result)
        self._stack.pop()
        self._mark()

    def _name(self, module: nn.Module, parent: Call | None) -> str:
        names = self._names.get(module)
        if names is None:
            return f"{parent.name + '.' if parent and parent.name else ''}<{type(module).__name__}>"
        prefix = parent.name + "." if parent is not None and parent.name else ""
        return next((name for name in names if name.startswith(prefix)), names[0])

    def _called_before(self, module: nn.Module, above: _Frame | None) -> Call:
        """The call in the forward which the backward repeats."""
        if above is not None and above.again:
            for call in above.call.children:
                if call.module is module and call not in above.matched:
                    above.matched.append(call)
                    return call
        of_module = [call for call in self.calls if call.module is module]
        fresh = [call for call in of_module if call not in self._again]
        found = (fresh or of_module or [self.root])[-1]  # a backward goes from the end to the start
        self._again.add(found)
        return found

    def billed(self, module: nn.Module, arguments: Any, keywords: Any, forward: Any) -> Any:
        """Runs a layer's forward; its formula pays for it."""
        bill = self._bill_of(module, arguments, keywords)
        if bill is None:
            return forward(module, *arguments, **keywords)
        frame = self._stack[-1]
        frame.call.formula, frame.call.sizes = bill.formula, bill.sizes
        self._bill, self._observed = bill, Counter()
        self._mark()
        try:
            result = forward(module, *arguments, **keywords)
        except BaseException:
            # the backward stops a second forward as soon as it has what it needs: what ran so far is paid
            frame.call.backward.update(self._observed)
            raise
        else:
            cost = bill.cost
            paid = frame.call.backward if frame.again else frame.call.forward
            _add(paid, cost.flops, cost.elementwise_flops, cost.bytes)
        finally:
            self._bill = self._observed = None
            self._mark()
        return result

    def _bill_of(self, module: nn.Module, arguments: Any, keywords: Any) -> _Bill | None:
        spec = spec_of(module)
        if spec is None or any(_has_no_plain_shape(tensor) for tensor in tensors((arguments, keywords))):
            return None
        self._paused = True
        try:
            sizes = spec.sizes(module, *arguments, **keywords)
            return _Bill(spec.cost(**sizes), spec.name, sizes_by_letter(spec, sizes))
        except Exception:  # a call that the formula does not know; the layer itself says whether it is a bad one
            return None
        finally:
            self._paused = False

    @property
    def in_layer(self) -> bool:
        """Whether a layer runs whose formula pays for everything in it."""
        return self._bill is not None or self._paused

    def calls_now(self, module: nn.Module) -> bool:
        """Whether the innermost call is the module's."""
        return bool(self._stack) and self._stack[-1].call.module is module

    def keep(self, tensor: Tensor) -> Kept:
        """Autograd keeps a tensor."""
        return self.memory.keeps(tensor, self._stack[-1].call if self._stack else self.root)


_LAST = 2**63  # the number of nodes that add to a parameter's gradient is the largest there is


def _add(counts: Counter[str], flops: int, elementwise: int, size: int) -> None:
    counts["flops"] += flops
    counts["elementwise_flops"] += elementwise
    counts["bytes"] += size


def _has_no_plain_shape(tensor: Tensor) -> bool:
    """Nested and sparse tensors, and those of which ``vmap`` hides an axis: operators say what they cost."""
    wrapped: bool = torch._C._functorch.is_functorch_wrapped_tensor(tensor)
    return wrapped or tensor.is_nested or tensor.layout is not torch.strided


def _shapes(value: Any) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(tensor.shape) for tensor in tensors(value))
