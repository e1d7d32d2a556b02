"""What several test files need: building a layer beside its torch.nn counterpart, walking through nested results."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from nacre.core.op import OPS
from nacre.core.spec import Case, LayerSpec


def tensors(value: Any) -> Iterator[torch.Tensor]:
    """The tensors in nested tuples, lists and dicts, in order; a PackedSequence is a tuple."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors(item)


def rebuild(value: Any, replacements: Iterator[torch.Tensor]) -> Any:
    """The same nested structure with its tensors replaced, in order."""
    if isinstance(value, torch.Tensor):
        return next(replacements)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(rebuild(item, replacements) for item in value))
    if isinstance(value, (tuple, list)):
        return type(value)(rebuild(item, replacements) for item in value)
    if isinstance(value, dict):
        return {key: rebuild(item, replacements) for key, item in value.items()}
    return value


def fresh(value: Any) -> Any:
    """The same values in new leaf tensors with the same strides, and the same wish for gradients."""
    return convert_each_once(value, _fresh_tensor)


def convert_each_once(value: Any, convert: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """The same nested structure with its tensors converted; what was one tensor in two places stays one."""
    converted = {id(tensor): convert(tensor) for tensor in tensors(value)}
    return rebuild(value, (converted[id(tensor)] for tensor in tensors(value)))


def _fresh_tensor(tensor: torch.Tensor) -> torch.Tensor:
    copied = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype).copy_(tensor.detach())
    return copied.requires_grad_(tensor.requires_grad)


def in_dtype(value: Any, dtype: torch.dtype) -> Any:
    """The same nested structure with its floating-point tensors in another dtype, as new leaves."""

    def convert(tensor: torch.Tensor) -> torch.Tensor:
        if not tensor.is_floating_point():
            return tensor
        return _fresh_tensor(tensor).detach().to(dtype).requires_grad_(tensor.requires_grad)

    return convert_each_once(value, convert)


def build(spec: LayerSpec, case: Case, dtype: torch.dtype) -> torch.nn.Module:
    """The layer of a case, initialised from a fixed seed, with every parameter away from special values."""
    torch.manual_seed(1)
    layer = spec.layer(**case.arguments)
    with torch.no_grad():
        for parameter in layer.parameters():
            # a fresh LayerNorm has weight 1 and bias 0, which would hide a forgotten factor
            parameter.add_(torch.randn(parameter.shape, dtype=torch.float32) * 0.1)
    return layer.to(dtype).train(case.training)


def build_pair(spec: LayerSpec, case: Case, dtype: torch.dtype) -> tuple[torch.nn.Module, torch.nn.Module]:
    """The layer of a case and its torch.nn counterpart with the same state."""
    import nacre

    layer = build(spec, case, dtype)
    if spec.replaces is None:
        return layer, nacre.convert(copy.deepcopy(layer), to="torch")
    reference = spec.replaces(**case.arguments).to(dtype).train(case.training)
    reference.load_state_dict(layer.state_dict())
    return layer, reference


def run(layer: torch.nn.Module, inputs: tuple, keywords: dict, seed: int = 5) -> tuple[Any, list[torch.Tensor | None]]:
    """Output and gradients: of every input that asks for one, then of every parameter."""
    torch.manual_seed(seed)
    output = layer(*inputs, **keywords)
    wanted = [t for t in tensors((inputs, keywords)) if t.requires_grad] + [
        p for p in layer.parameters() if p.requires_grad
    ]
    results = [t for t in tensors(output) if t.requires_grad]
    if not results or not wanted:
        return output, [None] * len(wanted)
    generator = torch.Generator().manual_seed(3)
    cotangents = [torch.randn(t.shape, dtype=torch.float64, generator=generator).to(t.dtype) for t in results]
    return output, list(torch.autograd.grad(results, wanted, cotangents, allow_unused=True))


# How far two correct computations may lie apart beyond torch's own error, relative to the largest value: float64 judges
# itself, so torch's error is 0 there and cancellation needs room; values below 1 count as 1, since inputs are about 1;
# float32 sums a few thousand terms in another order; bfloat16 and float16 round a float32 result once, which is half a
# unit, and a second time at most.
SLACK = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}


def assert_as_good_as_torch(ours, torchs, judge, dtype, what, slack=1):
    """Our distance from float64 is at most twice torch's own, plus the slack: neither of two correct ways of
    computing one sum is the other's judge."""
    assert (ours is None) == (torchs is None), f"{what}: {ours} against torch's {torchs}"
    if ours is None:
        return
    assert (ours.shape, ours.dtype, ours.layout) == (torchs.shape, torchs.dtype, torchs.layout), what
    if ours.layout is not torch.strided:
        ours, torchs, judge = ours.to_dense(), torchs.to_dense(), judge.to_dense()
    if not ours.is_floating_point():
        assert torch.equal(ours, torchs), what
        return
    assert torch.equal(ours.isfinite(), torchs.isfinite()), f"{what}: finite in other places than torch's"
    assert torch.equal(ours.isnan(), torchs.isnan()), f"{what}: NaN in other places than torch's"
    finite = torchs.isfinite() & judge.isfinite()
    if finite.any():
        ours, torchs, judge = ours[finite].double(), torchs[finite].double(), judge[finite].double()
        slack *= SLACK[dtype] * max(judge.abs().max().item(), 1.0)
        error, torchs_error = (ours - judge).abs().max().item(), (torchs - judge).abs().max().item()
        assert error <= 2 * torchs_error + slack, f"{what}: error {error:.3g}, torch's {torchs_error:.3g}"


class CountProducts(TorchDispatchMode):
    """Counts the FLOPs of the matrix products inside the formulas, as torch.utils.flop_counter counts each of them."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        if function.namespace == "nacre":
            name = function._schema.name.removeprefix("nacre::")
            with self:
                if name in OPS:
                    return OPS[name]._formula_apart(*arguments)
                return OPS[name.removesuffix("_backward")]._formula_backward_apart(*arguments)
        if function._overloadpacket not in flop_registry:
            with self:  # matmul arrives whole; the products inside it count
                parts = function.decompose(*arguments, **(keywords or {}))
            if parts is not NotImplemented:
                return parts
        result = function(*arguments, **(keywords or {}))
        if function._overloadpacket in flop_registry:
            self.flops += flop_registry[function._overloadpacket](*arguments, **(keywords or {}), out_val=result)
        return result


class SavedBytes:
    """Bytes of the tensors kept for the backward, each storage once, parameters not counted."""

    def __init__(self, layer: torch.nn.Module) -> None:
        self._parameters = {p.untyped_storage().data_ptr() for p in layer.parameters() if p.numel()}
        self._seen: dict[int, torch.Tensor] = {}
        self._alive: list[torch.Tensor] = []
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda packed: packed)

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if tensor.numel() and storage.data_ptr() not in self._parameters:
            # which bytes the views of one storage hold together: query, key and value may be parts of one projection
            seen = self._seen.setdefault(storage.data_ptr(), torch.zeros(storage.nbytes(), dtype=torch.bool))
            size = tensor.element_size()
            strides = [stride * size for stride in tensor.stride()]
            seen.as_strided((*tensor.shape, size), (*strides, 1), tensor.storage_offset() * size).fill_(True)
            self._alive.append(tensor)  # keeps its address from being given to another tensor
        return tensor

    def __enter__(self) -> "SavedBytes":
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._hooks.__exit__(*error)

    @property
    def bytes(self) -> int:
        return sum(int(seen.sum()) for seen in self._seen.values())
