"""The contract: every layer and block, every case, every property.

A layer's own test file holds what is special to it.
"""

import copy
import io
import pickle
from itertools import chain

import pytest
import torch

import nacre
from nacre.blocks import BLOCKS
from nacre.core import native
from nacre.core.choice import record_choices
from nacre.core.op import OPS
from nacre.layers import LAYERS
from tests.support import (
    CountProducts,
    SavedBytes,
    assert_as_good_as_torch,
    build,
    build_pair,
    convert_each_once,
    fresh,
    in_dtype,
    rebuild,
    run,
    tensors,
)

SPECS = {**LAYERS, **BLOCKS}
CASES = [pytest.param(spec, case, id=f"{spec.name}-{case.name}") for spec in SPECS.values() for case in spec.cases]
SMALL = [param for param in CASES if not param.values[1].bench]
FIRST = [pytest.param(spec, spec.cases[0], id=spec.name) for spec in SPECS.values()]

# Counts which FlopCounterMode gets wrong over a formula's products, each with its reason.
FLOPS_DIFFER = {"conv2d-one of everything": "einsum multiplies single numbers without a matrix product"}
BACKWARD_FLOPS_DIFFER = {
    "conv2d": "the input gradient's correlation multiplies the zeros between and around a strided gradient",
}


def small(*, smooth=None, random=None):
    return [
        param
        for param in SMALL
        if (smooth is None or param.values[1].smooth is smooth) and (random is None or param.values[1].random is random)
    ]


def float64_results(reference, case, dtype):
    """The torch.nn layer's output and gradients in float64, on the values as rounded to ``dtype``."""
    inputs, keywords = case.make(dtype)
    judge = copy.deepcopy(reference).to(torch.float64)
    return run(judge, *in_dtype((inputs, keywords), torch.float64))


def compare(layer, reference, case, dtype, *, strides=True):
    inputs, keywords = case.make(dtype)
    output, gradients = run(layer, fresh(inputs), fresh(keywords))
    torchs_output, torchs_gradients = run(reference, fresh(inputs), fresh(keywords))
    judge_output, judge_gradients = float64_results(reference, case, dtype)
    outputs = list(zip(tensors(output), tensors(torchs_output), tensors(judge_output), strict=True))
    for index, (ours, torchs, judge) in enumerate(outputs):
        assert_as_good_as_torch(ours, torchs, judge, dtype, f"output {index}")
        if strides and ours.layout is torch.strided and ours.numel():
            assert ours.stride() == torchs.stride(), f"output {index}: strides unlike torch's"
        assert ours.requires_grad == torchs.requires_grad
    for index, (ours, torchs, judge) in enumerate(zip(gradients, torchs_gradients, judge_gradients, strict=True)):
        assert_as_good_as_torch(ours, torchs, judge, dtype, f"gradient {index}")


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16], ids=["float64", "float32", "bfloat16"]
)
@pytest.mark.parametrize(("spec", "case"), small(random=False))
def test_forward_and_gradients_match_torch(spec, case, dtype):
    layer, reference = build_pair(spec, case, dtype)
    compare(layer, reference, case, dtype)


@pytest.mark.parametrize(("spec", "case"), small(random=False))
def test_non_contiguous_inputs(spec, case):
    layer = build(spec, case, torch.float32)
    inputs, keywords = case.make(torch.float32)
    expected, expected_gradients = run(layer, fresh(inputs), fresh(keywords))
    scattered = convert_each_once((inputs, keywords), scatter)
    output, gradients = run(layer, *scattered)
    pairs = zip(chain(tensors(output), gradients), chain(tensors(expected), expected_gradients), strict=True)
    for one, other in pairs:
        # float32 sums of a few dozen terms, in an order that may depend on the strides
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5, equal_nan=True)


def scatter(tensor):
    """The same values, every element two places from the next."""
    wide = torch.zeros(*tensor.shape, 2, dtype=tensor.dtype)
    wide[..., 1] = tensor.detach()
    return wide[..., 1].requires_grad_(tensor.requires_grad)


def float64_function(spec, case):
    """A function of the tensors which can have gradients, and their values, in float64."""
    layer = build(spec, case, torch.float64)
    inputs, keywords = case.make(torch.float64)
    free = [t for t in tensors((inputs, keywords)) if t.requires_grad]
    names = [name for name, _ in layer.named_parameters()]

    def function(*values):
        replacements = iter(values)
        given = rebuild(
            (inputs, keywords),
            (next(replacements) if t.requires_grad else t for t in tensors((inputs, keywords))),
        )
        parameters = dict(zip(names, replacements, strict=True))
        torch.manual_seed(7)  # the same random mask at every evaluation
        output = torch.func.functional_call(layer, parameters, given[0], given[1])
        return tuple(t for t in tensors(output) if t.is_floating_point())

    values = [t.detach().clone().requires_grad_() for t in chain(free, layer.parameters())]
    return function, values


@pytest.mark.parametrize(("spec", "case"), small(smooth=True))
def test_gradcheck(spec, case):
    function, values = float64_function(spec, case)
    if not values:
        assert not case.inputs or not any(t.requires_grad for t in tensors(case.make(torch.float64)))
        return
    # random layers draw their seed inside, which vmap over the backward and dual numbers do not change; a random
    # direction stands for all of them where there are more than a few, since each would take a call of its own
    settings = {"check_batched_grad": not case.random, "fast_mode": sum(value.numel() for value in values) > 12}
    assert torch.autograd.gradcheck(function, values, check_forward_ad=True, **settings)


@pytest.mark.parametrize(("spec", "case"), small(smooth=True))
def test_gradgradcheck(spec, case):
    function, values = float64_function(spec, case)
    if values:
        assert torch.autograd.gradgradcheck(function, values, fast_mode=True, check_fwd_over_rev=True)
    else:
        assert all(not t.requires_grad for t in function())


@pytest.mark.parametrize(("spec", "case"), SMALL)
def test_same_bits_every_time(spec, case):
    layer = build(spec, case, torch.float32)
    inputs, keywords = case.make(torch.float32)
    first = run(layer, fresh(inputs), fresh(keywords))
    second = run(layer, fresh(inputs), fresh(keywords))
    for one, other in zip(tensors(first), tensors(second), strict=True):
        if one.layout is not torch.strided:
            one, other = one.to_dense(), other.to_dense()
        assert torch.equal(one.nan_to_num(), other.nan_to_num()) if one.is_floating_point() else torch.equal(one, other)


@pytest.mark.parametrize(("spec", "case"), SMALL)
def test_copies_and_checkpoints(spec, case):
    layer, reference = build_pair(spec, case, torch.float32)
    inputs, keywords = case.make(torch.float32)
    layer.eval()
    expected = list(tensors(layer(*inputs, **keywords)))
    stored = io.BytesIO()
    torch.save(layer.state_dict(), stored)
    stored.seek(0)
    other = spec.layer(**case.arguments).eval()
    other.load_state_dict(torch.load(stored, weights_only=True))
    for copied in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), other):
        assert type(copied) is spec.layer
        found = list(tensors(copied(*inputs, **keywords)))
        assert len(found) == len(expected)
        for one, same in zip(found, expected, strict=True):
            torch.testing.assert_close(one, same, rtol=0, atol=0, equal_nan=True)
    assert list(layer.state_dict()) == list(reference.state_dict())
    reference.load_state_dict(layer.state_dict())
    layer.load_state_dict(reference.state_dict())


@pytest.mark.parametrize(("spec", "case"), SMALL)
def test_class_repr_and_conversion(spec, case):
    layer, reference = build_pair(spec, case, torch.float32)
    assert repr(layer) == repr(reference)
    if spec.replaces is None:
        return
    assert isinstance(layer, spec.replaces)
    parameters, hooks = list(reference.parameters()), reference._forward_hooks
    assert nacre.convert(reference) is reference
    assert type(reference) is spec.layer
    assert all(one is other for one, other in zip(reference.parameters(), parameters, strict=True))
    assert reference._forward_hooks is hooks
    assert vars(reference).keys() == vars(layer).keys(), "a converted layer differs from a constructed one"
    nacre.convert(reference, to="torch")
    assert type(reference) is spec.replaces


@pytest.mark.parametrize(("spec", "case"), FIRST)
def test_hooks(spec, case):
    layer = build(spec, case, torch.float32)
    inputs, keywords = case.make(torch.float32)
    called = []
    layer.register_forward_pre_hook(lambda *_: called.append("forward pre"))
    layer.register_forward_hook(lambda *_: called.append("forward"))
    differentiable = any(t.requires_grad for t in tensors((inputs, keywords)))
    if differentiable:
        layer.register_full_backward_hook(lambda *_: called.append("backward"))
    for name, parameter in layer.named_parameters():
        parameter.register_hook(lambda grad, name=name: called.append(name))
        parameter.register_post_accumulate_grad_hook(lambda _, name=name: called.append(f"accumulated {name}"))
    total = sum(t.sum() for t in tensors(layer(*fresh(inputs), **fresh(keywords))) if t.requires_grad)
    total.backward()
    expected = {"forward pre", "forward"} | ({"backward"} if differentiable else set())
    names = [name for name, parameter in layer.named_parameters() if parameter.grad is not None]
    assert expected | set(names) | {f"accumulated {name}" for name in names} == set(called)
    assert len(names) == len(list(layer.parameters()))


@torch._dynamo.config.patch(allow_rnn=True)  # the compiler leaves recurrent modules alone by default
def compiled_results(spec, case, backend):
    torch._dynamo.reset()
    layer = build(spec, case, torch.float32)
    inputs, keywords = case.make(torch.float32)
    eager = run(copy.deepcopy(layer), fresh(inputs), fresh(keywords))
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    return eager, run(compiled, fresh(inputs), fresh(keywords))


def assert_same_results(first, second, exact=False):
    for ours, theirs in zip(tensors(first), tensors(second), strict=True):
        assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
        # the compiler may fuse a multiplication and an addition into one rounding
        tolerance = {"rtol": 0, "atol": 0} if exact else {"rtol": 1e-4, "atol": 1e-5}
        torch.testing.assert_close(ours, theirs, equal_nan=True, **tolerance)


@torch._dynamo.config.patch(allow_rnn=True)  # the compiler leaves recurrent modules alone by default
def compiles_with_torch(spec, case):
    """Whether torch.nn's own layer compiles for this case: what torch cannot trace is not asked of nacre."""
    _, reference = build_pair(spec, case, torch.float32)
    inputs, keywords = case.make(torch.float32)
    torch._dynamo.reset()
    try:
        run(torch.compile(reference, fullgraph=True, backend="aot_eager"), fresh(inputs), fresh(keywords))
    except Exception:  # any failure of torch's own compiler, of whichever kind
        return False
    return True


@pytest.mark.parametrize(("spec", "case"), small(random=False))
def test_compile(spec, case):
    try:
        eager, compiled = compiled_results(spec, case, "aot_eager")
    except Exception:
        assert not compiles_with_torch(spec, case), "torch.nn's own layer compiles"
        return
    assert_same_results(compiled, eager)


@pytest.mark.parametrize(("spec", "case"), [p for p in FIRST if not p.values[1].random])
def test_compile_with_inductor(spec, case):
    eager, compiled = compiled_results(spec, case, "inductor")
    assert_same_results(compiled, eager)


@pytest.mark.parametrize(("spec", "case"), small(random=False))
def test_export(spec, case):
    layer, reference = build_pair(spec, case, torch.float32)
    inputs, keywords = case.make(torch.float32)
    try:
        exported = torch.export.export(layer, inputs, keywords)
    except Exception:
        with pytest.raises(Exception):  # noqa: B017  where torch.nn's own layer exports, ours must
            torch.export.export(reference, inputs, keywords)
        return
    assert_same_results(exported.module()(*inputs, **keywords), layer(*inputs, **keywords))


@pytest.mark.parametrize(("spec", "case"), small(random=False))
def test_autocast(spec, case):
    layer, reference = build_pair(spec, case, torch.float32)
    inputs, keywords = case.make(torch.float32)
    results = []
    for module in (layer, reference):
        try:
            with torch.autocast("cpu", torch.bfloat16):
                results.append(run(module, fresh(inputs), fresh(keywords)))
        except RuntimeError as error:
            results.append(error)
    ours, torchs = results
    if isinstance(torchs, RuntimeError):
        return  # torch.nn's own layer does not run under autocast here
    assert not isinstance(ours, RuntimeError), ours
    for one, other in zip(tensors(ours), tensors(torchs), strict=True):
        assert one.dtype == other.dtype
        if one.is_floating_point() and one.numel():
            one, other = (t.to_dense() if t.layout is not torch.strided else t for t in (one, other))
            scale = max(other.float().nan_to_num(0, 0, 0).abs().max().item(), 1.0)
            # bfloat16 keeps 8 bits; a handful of roundings of intermediate values, taken at the largest value
            torch.testing.assert_close(one.float(), other.float(), rtol=0.05, atol=0.05 * scale, equal_nan=True)


@pytest.mark.parametrize(("spec", "case"), small(random=False))
def test_vmap(spec, case):
    """A batch of two different calls at once equals the two calls; where torch.nn's layer fails, ours may raise."""
    layer, reference = build_pair(spec, case, torch.float64)
    first, second = (case.make(torch.float64, seed=seed) for seed in (0, 1))
    pairs = list(zip(tensors(first), tensors(second), strict=True))
    if not pairs or any(one.shape != other.shape for one, other in pairs):
        return
    stacked = [torch.stack([one.detach(), other.detach()]) for one, other in pairs]

    def call(module):
        def function(*values):
            inputs, keywords = rebuild(first, iter(values))
            return tuple(tensors(module(*inputs, **keywords)))

        return function

    try:
        torchs = torch.vmap(call(reference))(*stacked)
    except Exception:
        torchs = None
    try:
        ours = torch.vmap(call(layer))(*stacked)
    except Exception:
        assert torchs is None, "torch.nn's own layer can be batched by vmap"
        return
    each = [call(layer)(*(value[index] for value in stacked)) for index in (0, 1)]
    for batched, one, other in zip(ours, *each, strict=True):
        # float64; a batched product may sum in another order
        torch.testing.assert_close(batched, torch.stack([one, other]), rtol=1e-9, atol=1e-11, equal_nan=True)


@pytest.mark.parametrize(("spec", "case"), small(random=False, smooth=True))
def test_functional_gradients(spec, case):
    """torch.func: per-sample gradients of parameters and inputs, and Jacobian-vector products, against torch.nn's."""
    layer, reference = build_pair(spec, case, torch.float64)
    inputs, keywords = case.make(torch.float64)
    free = [t.detach() for t in tensors((inputs, keywords)) if t.requires_grad]

    def loss(module):
        def function(parameters, *values):
            replacements = iter(values)
            given = rebuild(
                (inputs, keywords),
                (next(replacements) if t.requires_grad else t.detach() for t in tensors((inputs, keywords))),
            )
            output = torch.func.functional_call(module, parameters, given[0], given[1])
            return sum(t.pow(3).sum() for t in tensors(output) if t.is_floating_point())

        return function

    arguments = ({name: p.detach() for name, p in layer.named_parameters()}, *free)
    tangents = torch.utils._pytree.tree_map(lambda t: torch.ones_like(t) * 0.3, arguments)
    places = tuple(range(len(arguments)))
    for transform in (
        lambda module: torch.func.grad(loss(module), argnums=places)(*arguments),
        lambda module: torch.func.jvp(loss(module), arguments, tangents),
    ):
        try:
            expected = transform(reference)
        except Exception:
            expected = None
        try:
            found = transform(layer)
        except Exception:
            assert expected is None, "torch.nn's own layer supports this transform"
            continue
        if expected is None:
            continue
        for one, other in zip(tensors(found), tensors(expected), strict=True):
            # float64; cubes of sums taken in another order
            torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-10, equal_nan=True)


@pytest.mark.parametrize(("spec", "case"), SMALL)
def test_inference_mode(spec, case):
    layer, _ = build_pair(spec, case, torch.float32)
    inputs, keywords = case.make(torch.float32)
    torch.manual_seed(2)
    expected = list(tensors(layer(*inputs, **keywords)))
    torch.manual_seed(2)
    with torch.inference_mode():
        found = list(tensors(layer(*inputs, **keywords)))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other.detach(), rtol=1e-5, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize(("spec", "case"), SMALL)
def test_meta_device(spec, case):
    """Shapes, dtypes and strides without values, wherever torch.nn's own layer gives them."""
    layer, reference = build_pair(spec, case, torch.float32)
    inputs, keywords = case.make(torch.float32)
    expected = list(tensors(layer(*inputs, **keywords)))
    given = torch.utils._pytree.tree_map(to_meta, (inputs, keywords), is_leaf=is_packed)
    try:
        found = list(tensors(layer.to("meta")(*given[0], **given[1])))
    except (RuntimeError, NotImplementedError):
        with pytest.raises((RuntimeError, NotImplementedError)):
            reference.to("meta")(*given[0], **given[1])
        return
    for one, other in zip(found, expected, strict=True):
        assert one.is_meta or not one.is_floating_point()  # batch_sizes of a PackedSequence stay on the CPU
        assert (one.shape, one.dtype, one.stride()) == (other.shape, other.dtype, other.stride())


def to_meta(value):
    if not isinstance(value, torch.Tensor):
        return value.to("meta") if is_packed(value) else value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")


def is_packed(value):
    return isinstance(value, torch.nn.utils.rnn.PackedSequence)


@pytest.mark.parametrize(("spec", "case"), SMALL)
def test_which_implementation_ran(spec, case):
    layer = build(spec, case, torch.float32)
    inputs, keywords = case.make(torch.float32)
    given = fresh((inputs, keywords))
    with record_choices() as choices:
        output, gradients = run(layer, *given)
    ran = {choice.operator for choice in choices}
    if case.arguments.get("p") != 0 and case.training:
        assert set(spec.operators) <= ran
    identity = all(any(result is value for value in tensors(given)) for result in tensors(output))
    if any(gradient is not None for gradient in gradients) and not identity:
        assert any(operator.endswith("_backward") for operator in ran), "torch's own backward ran"
    for choice in choices:
        op = OPS[choice.operator.removesuffix("_backward")]
        kernels = op.kernels if choice.operator == op.name else op.backward_kernels
        possible = {f"{k.language} kernel" for k in kernels if k.device == "cpu" and not k.unavailable()}
        if choice.implementation not in possible:
            assert choice.implementation == "formula", choice
            assert not possible or "asks for" in choice.reason, choice
            assert not native.unavailable() or not kernels or "not built" in choice.reason, choice


@pytest.mark.parametrize(("spec", "case"), CASES)
def test_parameters_cost(spec, case):
    with torch.device("meta"):
        layer = spec.layer(**case.arguments)
    with torch.device("cpu"):
        inputs, keywords = case.make(torch.float32) if not case.bench else shapes_only(case)
    bill = spec.cost(**spec.sizes(layer, *inputs, **keywords))
    assert bill.parameters == sum(p.numel() for p in layer.parameters())
    assert all(type(value) is int and value >= 0 for value in vars(bill).values()), bill


def shapes_only(case):
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True):
        return case.make(torch.float32)


@pytest.mark.parametrize(("spec", "case"), SMALL)
def test_flops_and_saved_bytes(spec, case):
    layer = build(spec, case, torch.float32)
    inputs, keywords = case.make(torch.float32)
    inputs, keywords = fresh(inputs), fresh(keywords)
    bill = spec.cost(**spec.sizes(layer, *inputs, **keywords))
    parameters = [p for p in layer.parameters() if p.requires_grad]
    wanted = [t for t in tensors((inputs, keywords)) if t.requires_grad] + parameters
    with SavedBytes(layer) as saved, CountProducts() as forward:
        output = layer(*inputs, **keywords)
    results = [t for t in tensors(output) if t.requires_grad]
    assert bill.saved_bytes == saved.bytes
    if f"{spec.name}-{case.name}" not in FLOPS_DIFFER:
        assert bill.flops == forward.flops
    if results and spec.name not in BACKWARD_FLOPS_DIFFER:
        with CountProducts() as backward:
            torch.autograd.grad(results, wanted, [torch.ones_like(t) for t in results], allow_unused=True)
        assert bill.backward_flops == backward.flops


@pytest.mark.parametrize(("spec", "case"), SMALL)
def test_opcheck(spec, case):
    """torch's own check of a custom operator: its schema tells the truth, its fake tensors have the right strides."""
    layer = build(spec, case, torch.float32)
    inputs, keywords = case.make(torch.float32)
    calls = []

    class Recorder(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
            if function.namespace == "nacre":
                calls.append((function, arguments))
            return function(*arguments, **(keywords or {}))

    with Recorder():
        run(layer, fresh(inputs), fresh(keywords))
    checks = ("test_schema", "test_faketensor")
    for function, arguments in calls:
        arguments = torch.utils._pytree.tree_map_only(torch.Tensor, lambda t: t.detach(), arguments)
        assert set(torch.library.opcheck(function, arguments, test_utils=checks).values()) == {"SUCCESS"}
