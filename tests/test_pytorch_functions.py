"""PyTorch's own operator test data (torch.testing._internal.common_methods_invocations), run on nacre's functions."""

import copy

import pytest
import torch
from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.common_utils import freeze_rng_state

import nacre.functional
from tests.support import assert_as_good_as_torch, fresh, in_dtype, rebuild, tensors

# tanh, sigmoid and the softmaxes have their data under the names of torch's own operators
NAMES = {name: f"nn.functional.{name}" for name in nacre.functional.__all__} | {
    name: name for name in ("tanh", "sigmoid", "softmax", "log_softmax")
}


def embedding(weight, indices, **keywords):
    return nacre.functional.embedding(indices, weight, **keywords)


# PyTorch's data gives the table before the indices
ADAPTED = {"embedding": embedding}
INFOS = [
    pytest.param(
        ADAPTED.get(name, getattr(nacre.functional, name)),
        info,
        id=f"{name}{info.variant_test_name and '-'}{info.variant_test_name}",
    )
    for name, full_name in NAMES.items()
    for info in op_db
    if info.name == full_name
]
# Functions without an entry in PyTorch's data, each with the place of its test.
WITHOUT_DATA = {"softmax_jacobian": "no such function in torch; tests/layers/test_softmax.py"}
RANDOM = ("dropout",)
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def test_the_data_names_our_functions():
    named = {function.__name__ for function, _ in (param.values for param in INFOS)}
    assert set(nacre.functional.__all__) - named == set(WITHOUT_DATA)


def samples(info, dtype, *, requires_grad=True):
    torch.manual_seed(0)
    for sample in info.sample_inputs("cpu", dtype, requires_grad=requires_grad):
        arguments = (sample.input, *sample.args)
        if info.name == "nn.functional.multi_head_attention_forward":
            arguments = (*arguments[:10], 0.0, *arguments[11:])  # every sample with gradients has dropout
        yield arguments, sample.kwargs


def draws(function, arguments, keywords):
    """Whether the call draws a random mask, which equals torch's in distribution only."""
    rate = keywords.get("dropout_p", keywords.get("p", 0.5 if function.__name__ in RANDOM else 0.0))
    return rate not in (0, 1) and keywords.get("training", True)


def results(function, arguments, keywords):
    arguments, keywords = fresh(arguments), fresh(keywords)
    output = function(*arguments, **keywords)
    outputs = list(tensors(output))
    wanted = [t for t in tensors((arguments, keywords)) if t.requires_grad]
    differentiable = [t for t in outputs if t.requires_grad]
    if not (wanted and differentiable):
        return outputs
    cotangents = [torch.linspace(-1, 1, t.numel(), dtype=t.dtype).reshape(t.shape) for t in differentiable]
    return outputs + list(torch.autograd.grad(differentiable, wanted, cotangents, allow_unused=True))


@pytest.mark.filterwarnings("ignore:linear_cross_entropy. ``options`` ignored")  # as torch says of its own function
@pytest.mark.parametrize(
    ("function", "info", "dtype"),
    [
        pytest.param(*param.values, dtype, id=f"{param.id}-{str(dtype).removeprefix('torch.')}")
        for param in INFOS
        for dtype in FLOATS
        if dtype in param.values[1].dtypes
    ],
)
def test_values_and_gradients(function, info, dtype):
    compared = 0
    for arguments, keywords in samples(info, dtype):
        if draws(function, arguments, keywords):
            continue
        ours, torchs = results(function, arguments, keywords), results(info.op, arguments, keywords)
        judge_arguments, judge_keywords = in_dtype((arguments, keywords), torch.float64)
        judge_keywords.pop("options", None)  # how the loss is computed, not what
        judge = results(info.op, judge_arguments, judge_keywords)
        # PyTorch's data have scores of some hundreds, whose rounding errors the exponential takes over: one element's
        # is luck there, and test_attention_kernel.py compares the errors of many draws
        slack = 16 if "attention" in info.name else 1
        for index, triple in enumerate(zip(ours, torchs, judge, strict=True)):
            assert_as_good_as_torch(*triple, dtype, f"result {index} of {keywords}", slack)
        compared += 1
    assert compared


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")  # said where PyTorch makes the data
@pytest.mark.filterwarnings("ignore:Casting complex values to real")  # log_softmax(dtype=...), torch's too
@pytest.mark.parametrize(("function", "info"), INFOS)
def test_other_dtypes(function, info):
    """Complex numbers and integers give what torch gives."""
    for dtype in sorted(set(info.dtypes) - set(FLOATS), key=str):
        for arguments, keywords in samples(info, dtype, requires_grad=False):
            if not draws(function, arguments, keywords):
                for ours, torchs in zip(
                    tensors(function(*arguments, **keywords)), tensors(info.op(*arguments, **keywords)), strict=True
                ):
                    assert torch.equal(ours, torchs) or torch.allclose(ours, torchs, equal_nan=True)
    assert info.dtypes


@pytest.mark.parametrize(("function", "info"), INFOS)
def test_finite_differences(function, info):
    checked = 0
    for arguments, keywords in samples(info, torch.float64):
        free = [t for t in tensors((arguments, keywords)) if t.requires_grad]
        if not free or sum(t.numel() for t in free) > 600:
            continue

        def call(*values, arguments=arguments, keywords=keywords):
            replacements = iter(values)
            given, named = rebuild(
                (arguments, keywords),
                (next(replacements) if t.requires_grad else t for t in tensors((arguments, keywords))),
            )
            with freeze_rng_state():
                torch.manual_seed(3)
                return tuple(t for t in tensors(function(*given, **named)) if t.is_floating_point())

        values = [t.detach().clone().requires_grad_() for t in free]
        assert torch.autograd.gradcheck(call, values, fast_mode=True, check_forward_ad=True)
        if info.supports_gradgrad:
            assert torch.autograd.gradgradcheck(call, values, fast_mode=True)
        checked += 1
    assert checked


@pytest.mark.parametrize(("function", "info"), [p for p in INFOS if p.values[1].error_inputs_func])
def test_errors(function, info):
    """Torch's type of exception for torch's own bad inputs; the messages are nacre's."""
    found = 0
    for item in info.error_inputs("cpu"):
        sample = item.sample_input
        with pytest.raises(item.error_type):
            function(sample.input, *sample.args, **sample.kwargs)
        found += 1
    assert found or info.error_inputs_func


@pytest.mark.parametrize(("function", "info"), INFOS)
def test_arguments_stay_as_they_were(function, info):
    for arguments, keywords in samples(info, torch.float32, requires_grad=False):
        if keywords.get("inplace") or keywords.get("max_norm") is not None:
            continue
        before = [t.clone() for t in tensors((arguments, keywords))]
        function(*arguments, **keywords)
        for one, other in zip(tensors((arguments, keywords)), before, strict=True):
            assert torch.equal(one, other) or torch.allclose(one, other, equal_nan=True)
    assert callable(function)


UNARY = (
    *(nacre.Linear(3, 2), nacre.Conv2d(1, 1, 1), nacre.LayerNorm(3), nacre.Embedding(3, 2), nacre.Dropout(0.5)),
    *(nacre.Dropout(0.5, inplace=True), nacre.Softmax(-1), nacre.LogSoftmax(-1), nacre.GELU(), nacre.Tanh()),
    *(nacre.Sigmoid(), nacre.ReLU(), nacre.ReLU(inplace=True), nacre.SiLU(), nacre.SiLU(inplace=True)),
)


@pytest.mark.parametrize("layer", UNARY, ids=repr)
@pytest.mark.parametrize("given", [None, "a word", 3, [1.0]], ids=repr)
def test_what_is_no_tensor_raises_what_torch_raises(layer, given):
    outcomes = []
    for module in (layer, nacre.convert(copy.deepcopy(layer), to="torch")):
        with pytest.raises((TypeError, AttributeError)) as raised:
            module(given)
        outcomes.append(raised.type)
    assert outcomes[0] is outcomes[1]
