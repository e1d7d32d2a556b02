"""nacre.gradcheck on all that can come in and go wrong: inputs, parameters, references, misbehaving functions."""

import copy
import dataclasses
import random
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from nacre.tools.gradcheck import GradientError, gradcheck
from tests.tools.gradcheck_support import (
    LINEAR,
    function,
    linear_with,
    only_failure,
    problem,
    randn,
    relu_with_slope,
)

F = nn.functional


# ------------------------------------------------------------------------------------- problems that are not one entry


class Counter(nn.Module):
    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return x * self.calls


def test_a_result_that_changes_from_call_to_call():
    assert "the forward is not deterministic" in problem(Counter(), randn(3))
    state = random.Random(0)
    assert "not deterministic" in problem(lambda x: x[: state.randint(1, 100)], randn(100))
    noisy = function(torch.sin, lambda g, x: g * x.cos() * state.random())
    assert "the backward is not deterministic" in problem(noisy, randn(3))


def test_every_kind_of_random_number_is_drawn_anew():
    numpy = pytest.importorskip("numpy")
    generator = torch.Generator().manual_seed(4)

    def noisy(x, generator):
        noise = torch.rand(3) + random.random() + numpy.random.rand()
        return x * (noise + torch.rand(3, generator=generator))

    before = generator.get_state()
    assert gradcheck(noisy, randn(3), generator)
    assert torch.equal(generator.get_state(), before)


def test_a_backward_that_draws_from_numpy_leaves_its_generator_as_it_was():
    numpy = pytest.importorskip("numpy")
    jitter = function(torch.sin, lambda g, x: g * x.cos() * (1 + 1e-12 * numpy.random.rand()))
    numpy.random.seed(5)
    before = numpy.random.get_state()
    assert gradcheck(jitter, randn(3))
    after = numpy.random.get_state()
    assert after[2:] == before[2:] and numpy.array_equal(after[1], before[1])


def test_what_the_users_code_raises_is_reported():
    def broken(*_):
        raise KeyError("no such thing")

    assert problem(broken, randn(3)) == "the forward raised KeyError: 'no such thing'"
    assert "the backward raised KeyError" in problem(function(torch.sin, broken), randn(3))


def test_a_gradient_of_the_wrong_shape():
    short = linear_with(weight=lambda g, x, w, b: x.t() @ g)
    assert "invalid gradient at index 1 - got [4, 3] but expected shape compatible with [3, 4]" in problem(
        short, *LINEAR
    )


def test_a_forward_that_changes_its_input_behind_autograds_back():
    class Scale(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.mul_(2).clone()

        @staticmethod
        def backward(ctx, g):
            return 2 * g

    x = randn(3)
    before = x.clone()
    assert "modifies input 0 in place without autograd knowing" in problem(Scale, x)
    assert "modifies x in place without autograd knowing" in problem(lambda x: x.data.mul_(2) * x, x=x)
    layer = nn.Embedding(3, 4, max_norm=0.5)
    assert "modifies weight in place without" in problem(layer, torch.tensor([1, 2]))
    assert torch.equal(x, before)


def test_an_honest_modification_of_an_input_passes_and_is_said():
    x = randn(6)
    before = x.clone()
    for called in (nn.ReLU(inplace=True), nn.Dropout(0.5, inplace=True), lambda x: x.mul_(3).sin()):
        report = gradcheck(called, x)
        assert report and "the forward modifies input 0 in place" in report.notes
    assert torch.equal(x, before)


def test_a_backward_that_changes_its_incoming_gradient():
    careless = function(lambda x: 2 * x, lambda g, x: g.mul_(2))
    assert "modifies its incoming gradient in place" in problem(careless, randn(3))


def test_values_that_are_not_finite():
    assert problem(torch.log, torch.tensor([1.0, -1.0])) == "output is nan at (1,); choose an input where it is not"
    assert "infinite everywhere" in problem(torch.log, torch.zeros(2))
    failure = only_failure(gradcheck(torch.sqrt, torch.tensor([0.0, 1.0])))
    assert (failure.index, failure.wrong) == ((0,), 1)


def test_masks_of_minus_infinity():
    mask = torch.tensor([[0.0, -torch.inf], [0.0, 0.0]])
    report = gradcheck(lambda x, mask: (x + mask).log_softmax(-1), randn(2, 2), mask)
    assert report, report
    assert "input 1: entries which are not finite are left as they are and not compared" in report.notes
    assert "output: its infinite entries are left out" in report.notes


def test_an_output_whose_shape_depends_on_the_values():
    x = torch.tensor([0.0, 1.0, 2.0])
    assert "change their number or shapes" in problem(lambda x: x[x >= 0] * 2, x)


# ------------------------------------------------------------------------------------------------ inputs and outputs


class Pair(NamedTuple):
    left: Tensor
    right: Tensor


@dataclasses.dataclass
class Result:
    value: Tensor
    count: int


def test_nested_inputs_and_outputs_are_named():
    def called(x, state, *, scale, options):
        product = x * state["a"] * scale
        return {"first": Pair(product, state["b"][0].sin()), "rest": [Result(product.sum() * options["gain"], 3), None]}

    report = gradcheck(
        called, randn(2), {"a": randn(2, seed=1), "b": (randn(3), 5)}, scale=randn(1), options={"gain": 2.0}
    )
    assert report, report
    assert {result.name for result in report.results} == {"input 0", "input 1['a']", "input 1['b'][0]", "scale"}
    assert {result.output for result in report.results} == {
        "output['first'].left", "output['first'].right", "output['rest'][0].value",
    }  # fmt: skip


def test_dataclasses_and_named_tuples_as_inputs():
    report = gradcheck(
        lambda pair, result: pair.left * pair.right * result.value, Pair(randn(2), randn(2)), Result(randn(2), 1)
    )
    assert report and [r.name for r in report.results] == ["input 0.left", "input 0.right", "input 1.value"]


def test_packed_sequences():
    packed = nn.utils.rnn.pack_padded_sequence(randn(3, 2, 2), [3, 1])
    assert gradcheck(nn.GRU(2, 2), packed)


def test_integers_booleans_and_other_values_pass_through():
    seen = []

    def called(x, index, mask, text, nothing):
        seen.append((index.dtype, mask.dtype, text, nothing))
        return torch.where(mask, x, 0.0)[index], index + 1

    report = gradcheck(called, torch.randn(4), torch.tensor([0, 2]), torch.tensor([True, False, True, True]), "t", None)
    assert report and [result.name for result in report.results] == ["input 0"]
    assert set(seen) == {(torch.int64, torch.bool, "t", None)}


def test_every_floating_dtype_is_checked_in_float64():
    seen = set()

    def called(*tensors):
        seen.update(x.dtype for x in tensors)
        return sum(x @ torch.eye(3) for x in tensors)  # a product with a float32 matrix made inside would raise

    assert gradcheck(called, *(torch.randn(3).to(d) for d in (torch.float16, torch.bfloat16, torch.float32)))
    assert seen == {torch.float64}
    assert torch.get_default_dtype() == torch.float32


def test_where_an_input_asks_for_its_gradient_the_others_are_constants():
    x, y = randn(3).requires_grad_(), randn(3)
    report = gradcheck(lambda x, y: x * y.detach(), x, y)
    assert report and [result.name for result in report.results] == ["input 0"]
    assert "input 1 is not checked: it has requires_grad=False and other inputs have True" in report.notes
    assert not gradcheck(lambda x, y: x * y.detach(), x.detach(), y)


def test_scalars_and_tensors_without_entries():
    report = gradcheck(lambda x, y, s: (x @ y) * s, randn(0, 3), randn(3, 2), randn())
    assert report, report
    assert [(r.compared, r.index) for r in report.results] == [(0, None), (6, (0, 0)), (1, ())]
    assert gradcheck(nn.Linear(3, 2), randn(0, 3))
    assert gradcheck(lambda x: x[:0], randn(3))


def test_strides_of_inputs_are_kept():
    seen = set()

    def called(x):
        seen.add(x.stride())
        return x.sin()

    for x in (randn(3, 4).t(), randn(4, 6)[:, ::2], randn(1, 2, 3, 3).to(memory_format=torch.channels_last)):
        seen.clear()
        assert gradcheck(called, x.float() if x.is_contiguous() else x)
        assert seen == {x.stride()}
    assert gradcheck(called, randn(1, 3).expand(4, 3))
    assert gradcheck(called, randn(6).unfold(0, 3, 1))


def test_the_same_tensor_given_twice_is_two_inputs():
    x = randn(3)
    wrong_in_the_second = function(torch.mul, lambda g, x, y: (g * y, 3 * g * x))
    assert only_failure(gradcheck(wrong_in_the_second, x, x)).name == "input 1"


def test_what_is_not_supported_is_refused_by_name():
    with pytest.raises(
        TypeError, match=r"real derivatives; got input 0 of dtype torch.complex64\. Check .*view_as_real"
    ):
        gradcheck(torch.abs, torch.ones(2, dtype=torch.complex64))
    with pytest.raises(TypeError, match=r"output of dtype torch\.complex128"):
        gradcheck(torch.fft.fft, randn(3))
    with pytest.raises(TypeError, match=r"dense tensors; got x of layout torch.sparse_coo"):
        gradcheck(torch.sum, x=torch.eye(2).to_sparse())
    with pytest.raises(TypeError, match=r"got the class Linear. Did you mean an instance, Linear\(\.\.\.\)\?"):
        gradcheck(nn.Linear, randn(3))
    with pytest.raises(TypeError, match="got a int"):
        gradcheck(3, randn(3))
    with pytest.raises(ValueError, match=r"floating-point input, or a parameter .* got inputs of dtype torch.int64"):
        gradcheck(torch.abs, torch.ones(2, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"got no tensor input\. Pass the inputs of forward after the module"):
        gradcheck(nn.ReLU())
    with pytest.raises(ValueError, match="needs a floating-point output"):
        gradcheck(lambda x: x > 0, randn(3))
    with pytest.raises(ValueError, match=r"weight, uninitialised\. Call the module once"):
        gradcheck(nn.LazyLinear(3), randn(2, 3))


@pytest.mark.parametrize("option", ["rtol", "atol", "max_entries", "samples", "directions"])
def test_options_out_of_range(option):
    for value in (-1, float("nan")):
        with pytest.raises(ValueError, match=f"{option} is at least .* got {option} = {value}"):
            gradcheck(torch.sin, randn(3), **{option: value})


def test_a_module_that_cannot_be_copied():
    layer = nn.Linear(2, 2)
    layer.product = layer.weight * 2  # not a leaf: copy.deepcopy refuses it
    with pytest.raises(TypeError, match=r"deep copy of the module; got a Linear which copy\.deepcopy refuses"):
        gradcheck(layer, randn(1, 2))


# --------------------------------------------------------------------------------------------------------- parameters


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
        self.decoder.weight = self.encoder.weight

    def forward(self, x):
        return self.decoder(self.encoder(x).tanh())


def test_tied_parameters_are_one():
    report = gradcheck(Tied(), randn(2, 3))
    assert report and [result.name for result in report.results] == ["input 0", "encoder.weight"]
    assert "encoder.weight is also decoder.weight (tied): one gradient, summed over its uses" in report.notes


def test_parameters_that_share_memory_are_checked_apart():
    layer = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    layer[1].weight = nn.Parameter(layer[0].weight.detach())
    report = gradcheck(layer, randn(2, 3))
    assert report and [result.name for result in report.results] == ["input 0", "0.weight", "1.weight"]
    assert "0.weight and 1.weight share memory but are separate parameters: each is checked on its own" in report.notes


def test_frozen_parameters_are_skipped_and_said():
    layer = nn.Linear(3, 2)
    layer.weight.requires_grad_(False)
    report = gradcheck(layer, randn(2, 3))
    assert report and [result.name for result in report.results] == ["input 0", "bias"]
    assert report.notes == ("weight is not checked: it is frozen (requires_grad=False)",)


def test_an_unused_parameter_is_said():
    layer = nn.Linear(3, 2)
    layer.register_parameter("spare", nn.Parameter(torch.ones(2)))
    report = gradcheck(layer, randn(2, 3))
    assert report and any(note.startswith("spare: the gradient is zero, as are") for note in report.notes)


def test_constants_kept_as_plain_attributes():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.matrix = torch.randn(3, 3)

        def forward(self, x):
            return x @ self.matrix

    assert gradcheck(Scaled(), randn(2, 3))


def test_sparse_gradients():
    assert gradcheck(nn.Embedding(4, 2, sparse=True), torch.tensor([0, 2, 2]))


def test_buffers_start_anew_in_each_evaluation():
    class RunningScale(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("scale", torch.ones(()))

        def forward(self, x):
            self.scale = self.scale * 2
            return x * self.scale

    layer = RunningScale()
    assert gradcheck(layer, randn(3))
    assert layer.scale == 1


# -------------------------------------------------------------------------------------- nothing of the user's changes


def test_nothing_of_the_users_is_touched():
    numpy = pytest.importorskip("numpy")
    layer = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.ReLU(inplace=True), nn.Linear(4, 2))
    layer[4].eval()
    x = torch.randn(5, 3, requires_grad=True)
    layer(x).sum().backward()
    state = copy.deepcopy(layer.state_dict())
    gradients = [parameter.grad.clone() for parameter in layer.parameters()]
    values, gradient = x.detach().clone(), x.grad.clone()
    versions = [tensor._version for tensor in (x, *layer.parameters(), *layer.buffers())]
    modes = [module.training for module in layer.modules()]
    random_state, python_state, numpy_state = (
        torch.get_rng_state(),
        random.getstate(),
        numpy.random.get_state()[1].copy(),
    )

    for options in ({"raise_on_failure": True}, {"second_order": True}):
        assert gradcheck(layer, x, **options)
    with pytest.raises(GradientError):
        gradcheck(
            lambda x: x * x.detach() * torch.rand(()) * random.random() * numpy.random.rand(), x, raise_on_failure=True
        )
    with torch.no_grad():
        assert gradcheck(layer, x)
        assert not torch.is_grad_enabled()

    assert all(torch.equal(state[name], value) for name, value in layer.state_dict().items())
    assert all(parameter.dtype == torch.float32 for parameter in layer.parameters())
    assert all(torch.equal(p.grad, before) for p, before in zip(layer.parameters(), gradients, strict=True))
    assert torch.equal(x, values) and torch.equal(x.grad, gradient) and x.dtype == torch.float32
    assert versions == [tensor._version for tensor in (x, *layer.parameters(), *layer.buffers())]
    assert modes == [module.training for module in layer.modules()]
    assert torch.equal(torch.get_rng_state(), random_state)
    assert random.getstate() == python_state
    assert (numpy.random.get_state()[1] == numpy_state).all()
    assert torch.get_default_dtype() == torch.float32


def test_inference_tensors_can_be_checked():
    with torch.inference_mode():
        x = torch.randn(3)
        assert gradcheck(nn.Tanh(), x)
        assert torch.is_inference_mode_enabled()


# -------------------------------------------------------------------------------------------------------- references


def test_a_reference_module_takes_the_parameters_of_the_checked_one():
    layer, reference = nn.Linear(3, 2), nn.Linear(3, 2)
    report = gradcheck(layer, randn(4, 3), reference=reference)
    assert report, report
    assert [r.name for r in report.results if r.comparison == "reference"] == ["input 0", "weight", "bias"]
    assert not torch.equal(layer.weight, reference.weight)


def test_a_reference_sees_errors_too_small_for_finite_differences():
    class Slightly(nn.Linear):
        def forward(self, x):
            exact = F.linear(x, self.weight, self.bias)
            return wobble.apply(exact)

    wobble = function(lambda y: y.clone(), lambda g, y: g * (1 + 3e-9))
    assert gradcheck(Slightly(3, 2), randn(4, 3))
    report = gradcheck(Slightly(3, 2), randn(4, 3), reference=nn.Linear(3, 2))
    assert {failure.comparison for failure in report.failures} == {"reference"} and len(report.failures) == 3
    assert "where the reference gives" in report.summary()


def test_float32_inside_a_backward_is_named():
    rounded = function(torch.sin, lambda g, x: (g * x.cos()).float().double())
    failure = only_failure(gradcheck(rounded, randn(6), reference=torch.sin))
    assert "computed in float32" in failure.hint


def test_a_reference_function_takes_parameters_by_name():
    assert gradcheck(nn.Linear(3, 2), randn(4, 3), reference=lambda x, weight, bias: x @ weight.t() + bias)
    report = gradcheck(nn.Linear(3, 2), randn(4, 3), reference=lambda x, weight, bias: x @ weight.t() + 2 * bias)
    assert "output differs from the reference's by" in report.problems[0]
    assert gradcheck(nn.Tanh(), randn(3), reference=torch.tanh)


def test_a_recurrent_reference_whose_weights_are_kept_in_a_list_too():
    assert gradcheck(nn.LSTM(2, 2), randn(3, 1, 2), reference=nn.LSTM(2, 2))


def test_a_reference_shares_mode_buffers_and_random_state():
    layer = nn.Sequential(nn.BatchNorm1d(3), nn.Dropout(0.5))
    layer(torch.randn(8, 3))
    for mode in (True, False):
        assert gradcheck(layer.train(mode), randn(4, 3), reference=nn.Sequential(nn.BatchNorm1d(3), nn.Dropout(0.5)))


def test_a_reference_that_does_not_fit():
    with pytest.raises(ValueError, match=r"weight of shape \(5, 3\) in the reference, \(2, 3\) in the module"):
        gradcheck(nn.Linear(3, 2), randn(4, 3), reference=nn.Linear(3, 5))
    assert "returns other outputs" in problem_of_reference(torch.sin, lambda x: (x.sin(), x))
    assert "output differs from the reference's by" in problem_of_reference(torch.sin, torch.cos)
    assert "the forward raised" in problem_of_reference(torch.sin, lambda: 1)
    report = gradcheck(nn.Tanh(), randn(2, 3), reference=nn.Sequential(nn.Linear(3, 3), nn.Tanh()))
    assert "0.weight of the reference is not in what is checked, and keeps its own values" in report.notes


def problem_of_reference(called, reference) -> str:
    return gradcheck(called, randn(3), reference=reference).problems[0]


def test_a_reference_may_choose_another_subgradient():
    report = gradcheck(relu_with_slope(0.5), torch.tensor([-1.0, 0.0, 2.0]), reference=torch.relu)
    assert report, report
