"""Tensors which answer operators themselves: nacre leaves them to torch, whose operators they know."""

import pytest
import torch
from torch.utils._pytree import tree_map, tree_map_only

import nacre
from nacre.blocks import BLOCKS
from nacre.core.choice import record_choices
from nacre.layers import LAYERS
from tests.support import build_pair, run

REPLACED = [spec for spec in (*LAYERS.values(), *BLOCKS.values()) if spec.replaces is not None]


class Wrapped(torch.Tensor):
    """Holds a tensor as sharded and quantised ones hold theirs, and knows torch's own operators alone."""

    inner: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner):
        wrapped = torch.Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            requires_grad=inner.requires_grad,
        )
        wrapped.inner = inner.detach()
        return wrapped

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function.namespace == "nacre":
            raise NotImplementedError(f"{cls.__name__} does not know {function}")
        args, kwargs = tree_map_only(cls, lambda wrapped: wrapped.inner, (args, kwargs or {}))
        return tree_map(
            lambda value: cls(value) if isinstance(value, torch.Tensor) else value, function(*args, **kwargs)
        )


class Noted(torch.Tensor):
    """Sees torch's functions, as masked tensors and those with units do."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if isinstance(function, torch._ops.OpOverload):
            raise NotImplementedError(f"{cls.__name__} does not know {function}")
        return super().__torch_function__(function, types, args, kwargs or {})


def noted(tensor):
    return tensor.as_subclass(Noted)


@pytest.mark.parametrize("spec", REPLACED, ids=lambda spec: spec.name)
@pytest.mark.parametrize(
    ("kind", "of_inputs"),
    [(Wrapped, Wrapped), (noted, noted), (Wrapped, torch.Tensor.detach)],
    ids=["dispatch", "function", "parameters"],
)
def test_every_layer_leaves_them_to_torch(spec, kind, of_inputs):
    case = next(case for case in spec.cases if not case.random and not case.bench)
    layer, reference = build_pair(spec, case, torch.float32)
    inputs, keywords = case.make(torch.float32)
    expected, _ = run(reference, inputs, keywords)
    for module in layer.modules():
        for name, parameter in module.named_parameters(recurse=False):
            setattr(module, name, torch.nn.Parameter(kind(parameter.detach())))
    inputs, keywords = tree_map_only(torch.Tensor, lambda tensor: of_inputs(tensor.detach()), (inputs, keywords))
    with record_choices() as choices:
        found = layer(*inputs, **keywords)
    if of_inputs is kind:
        assert choices and all(choice.implementation == "torch" for choice in choices)
    found = tree_map_only(Wrapped, lambda wrapped: wrapped.inner, found)
    found, expected = (
        tree_map_only(torch.Tensor, lambda tensor: tensor.detach().as_subclass(torch.Tensor), each)
        for each in (found, expected)
    )
    torch.testing.assert_close(found, expected)


def test_a_class_without_operators_of_its_own_is_served():
    class Named(torch.Tensor):
        pass

    layer = nacre.Linear(4, 3)
    with record_choices() as choices:
        output = layer(torch.ones(2, 4).as_subclass(Named))
    assert type(output) is Named and choices[0].implementation != "torch"


def test_quantised_weights_of_a_large_layer():
    layer = nacre.Linear(64, 48)
    x = torch.randn(5, 64)
    expected = layer(x)
    layer.weight = torch.nn.Parameter(Wrapped(layer.weight.detach()))
    torch.testing.assert_close(layer(x).inner, expected.detach())
