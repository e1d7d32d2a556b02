"""Softmax, log-softmax and the Jacobian: what is special to them beyond the contract."""

import math
import warnings

import numpy
import pytest
import torch
import torch.nn.functional as F

import nacre
from nacre.core import native
from nacre.core.choice import record_choices
from nacre.functional import softmax_jacobian
from tests.support import assert_as_good_as_torch

PAIRS = [
    pytest.param(nacre.functional.softmax, F.softmax, id="softmax"),
    pytest.param(nacre.functional.log_softmax, F.log_softmax, id="log_softmax"),
]
both = pytest.mark.parametrize(("ours", "torchs"), PAIRS)
INFINITE = {
    "all -inf": [-math.inf] * 3,
    "some -inf": [-math.inf, 0.0, 1.0],
    "one finite": [-math.inf, -math.inf, 5.0],
    "+inf": [math.inf, 0.0, 1.0],
    "two +inf": [math.inf, math.inf, 1.0],
    "both": [math.inf, -math.inf, 1.0],
    "nan": [math.nan, 0.0, 1.0],
    "large": [1e4, -1e4, 0.0],
    "equal and large": [1e4, 1e4, 1e4],
    "equal and far below": [-1e4, -1e4, -1e4],
    "largest": [torch.finfo(torch.float32).max, torch.finfo(torch.float32).min, 0.0],
}


@both
@pytest.mark.parametrize("row", INFINITE.values(), ids=INFINITE)
def test_special_rows(ours, torchs, row):
    results = []
    for function in (ours, torchs):
        input = torch.tensor([row, [1.0, 2.0, 3.0]], requires_grad=True)
        output = function(input, -1)
        results.append((output, *torch.autograd.grad(output, input, torch.tensor([[1.0, 2.0, 4.0]] * 2))))
    for one, other in zip(*results, strict=True):
        # float32: exp and log of two implementations
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6, equal_nan=True)


def test_stable_far_from_0():
    scores = torch.randn(50, 7, dtype=torch.float64) * 1e4
    probabilities = nacre.functional.softmax(scores, 1)
    # float64: seven roundings
    torch.testing.assert_close(probabilities.sum(1), torch.ones(50, dtype=torch.float64), rtol=0, atol=1e-15)
    shifted = nacre.functional.softmax(scores - 1e4, 1)
    # the shift itself rounds scores of 1e4 to 2e-12
    torch.testing.assert_close(shifted, probabilities, rtol=0, atol=1e-11)


def test_log_softmax_keeps_what_softmax_rounds_to_0():
    scores = torch.tensor([0.0, -200.0])
    assert nacre.functional.softmax(scores, 0)[1] == 0
    assert nacre.functional.log_softmax(scores, 0).tolist() == [0.0, -200.0]


@both
@pytest.mark.parametrize("dimensions", range(5))
def test_implicit_dimension(ours, torchs, dimensions):
    input = torch.randn([2, 3, 4, 2][:dimensions])
    with pytest.warns(UserWarning, match=f"Implicit dimension choice for {ours.__name__}") as ours_warned:
        output = ours(input)
    with pytest.warns(UserWarning) as torchs_warned:
        expected = torchs(input)
    torch.testing.assert_close(output, expected)
    assert str(ours_warned[0].message) == str(torchs_warned[0].message)
    assert ours_warned[0].filename == torchs_warned[0].filename == __file__


@pytest.mark.parametrize("kinds", [(nacre.Softmax, torch.nn.Softmax), (nacre.LogSoftmax, torch.nn.LogSoftmax)])
def test_implicit_dimension_of_the_layers(kinds):
    input = torch.randn(2, 3)
    warned = []
    for kind in kinds:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            kind()(input)
        warned.append([(str(w.message), w.filename, w.lineno, w.category) for w in caught])
    assert warned[0] == warned[1] and len(warned[0]) == 1


BAD = {
    "too high": ((2, 3), {"dim": 2}),
    "too low": ((2, 3), {"dim": -3}),
    "of one number": ((), {"dim": 1}),
    "of no rows": ((0, 3), {"dim": 2}),
    "a string": ((2, 3), {"dim": "a"}),
    "a float": ((2, 3), {"dim": 1.0}),
    "a bool": ((2, 3), {"dim": True}),
    "a list": ((2, 3), {"dim": [0]}),
    "to integers": ((2, 3), {"dim": 0, "dtype": torch.int64}),
    "to complex": ((2, 3), {"dim": 0, "dtype": torch.complex64}),
}


@both
@pytest.mark.parametrize(("shape", "keywords"), BAD.values(), ids=BAD)
def test_errors(ours, torchs, shape, keywords):
    input = torch.zeros(shape)
    with pytest.raises(Exception) as expected:
        torchs(input, **keywords)
    with pytest.raises(expected.type):
        ours(input, **keywords)


@both
def test_message(ours, torchs):
    with pytest.raises(IndexError) as raised:
        ours(torch.zeros(2, 3), 2)
    rule = f"{ours.__name__} runs along one dimension of its input"
    assert str(raised.value) == f"{rule}; got dim = 2 for an input of shape (2, 3). Its dimensions are -2 to 1."


@both
def test_integers_need_a_dtype(ours, torchs):
    for function in (ours, torchs):
        with pytest.raises(NotImplementedError):
            function(torch.ones(3, dtype=torch.int64), 0)
    converted = ours(torch.tensor([1, 2, 3]), 0, dtype=torch.float64)
    torch.testing.assert_close(converted, torchs(torch.tensor([1, 2, 3]), 0, dtype=torch.float64))


@both
@pytest.mark.parametrize("source", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("target", [torch.bfloat16, torch.float32, torch.float64])
def test_dtype(ours, torchs, source, target):
    values = torch.linspace(-3, 3, 12).reshape(3, 4).to(source)
    grad = torch.linspace(0, 1, 12).reshape(3, 4).to(target)
    results = []
    for function, input, dtype in (
        (ours, values.clone(), target),
        (torchs, values.clone(), target),
        (torchs, values.to(target).double(), torch.float64),
    ):
        output = function(input.requires_grad_(), 1, dtype=dtype)
        results.append((output.detach(), *torch.autograd.grad(output, input, grad.to(dtype))))
    assert results[0][0].dtype == target and results[0][1].dtype == source
    for triple in zip(*results, strict=True):
        assert_as_good_as_torch(*triple, triple[0].dtype, f"{source} to {target}")


@both
def test_whole_numbers_of_other_types_are_dimensions_too(ours, torchs):
    input = torch.randn(2, 3)
    for dim in (numpy.int64(1), torch.tensor(1)):
        with record_choices() as choices:
            output = ours(input, dim)
        assert [choice.implementation for choice in choices] == ["torch"]
        assert torch.equal(output, torchs(input, 1))


@both
def test_one_number_and_none(ours, torchs):
    for shape, dim in (((), 0), ((), -1), ((0,), 0), ((0, 3), 0), ((0, 3), 1), ((2, 0, 3), 1)):
        input = torch.full(shape, 2.5, requires_grad=True)
        output = ours(input, dim)
        assert torch.equal(output, torchs(input, dim))
        (gradient,) = torch.autograd.grad(output.sum(), input)
        assert torch.equal(gradient, torch.zeros(shape))


@both
def test_output_is_contiguous_as_in_torch(ours, torchs):
    inputs = (
        torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last),
        torch.randn(4, 3).t(),
        torch.randn(4, 6)[:, ::2],
        torch.randn(3, 1).expand(3, 4),
    )
    for input in inputs:
        assert ours(input, 1).stride() == torchs(input, 1).stride()


@both
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_once(ours, torchs, dtype):
    scores = (torch.randn(20, 30) * 4).to(dtype)
    assert torch.equal(ours(scores, 1), ours(scores.float(), 1).to(dtype))


@both
def test_keeps_the_output_alone(ours, torchs):
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        output = ours(torch.randn(3, 4, requires_grad=True), 1)
    assert [tensor.data_ptr() for tensor in kept] == [output.data_ptr()]


@pytest.mark.parametrize(("shape", "dim"), [((5,), -1), ((3, 5), -1), ((3, 5), 0), ((2, 3, 4), 1), ((2, 1), 1)])
def test_jacobian(shape, dim):
    input = torch.randn(shape, dtype=torch.float64)
    jacobian = softmax_jacobian(input, dim)
    rows = input.movedim(dim, -1).reshape(-1, input.shape[dim])
    expected = torch.stack([torch.func.jacrev(lambda row: F.softmax(row, -1))(row) for row in rows])
    others = [size for index, size in enumerate(shape) if index != dim % len(shape)]
    assert jacobian.shape == (*others, shape[dim], shape[dim])
    # float64: the same products in another order
    torch.testing.assert_close(jacobian, expected.reshape(jacobian.shape), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(jacobian.sum(-1), torch.zeros_like(jacobian.sum(-1)), rtol=0, atol=1e-14)
    assert torch.equal(jacobian, jacobian.transpose(-1, -2))


def test_jacobian_is_what_the_backward_multiplies_by():
    input = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(4, 6, dtype=torch.float64)
    (gradient,) = torch.autograd.grad(nacre.functional.softmax(input, -1), input, grad)
    product = (grad.unsqueeze(-2) @ softmax_jacobian(input)).squeeze(-2)
    # float64: the same products in another order
    torch.testing.assert_close(gradient, product, rtol=1e-12, atol=1e-14)


def test_jacobian_of_extremes():
    assert torch.equal(softmax_jacobian(torch.tensor([1e4, -1e4, 0.0])), torch.zeros(3, 3))
    assert softmax_jacobian(torch.full((2,), -math.inf)).isnan().all()
    assert softmax_jacobian(torch.empty(3, 0)).shape == (3, 0, 0)
    assert softmax_jacobian(torch.empty(0, 3)).shape == (0, 3, 3)
    half = torch.randn(3, 4).bfloat16()
    assert torch.equal(softmax_jacobian(half), softmax_jacobian(half.float()).bfloat16())


def test_jacobian_is_differentiable():
    input = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(softmax_jacobian, input, check_forward_ad=True, check_batched_grad=True)
    assert torch.equal(torch.vmap(softmax_jacobian)(input), softmax_jacobian(input))


def test_jacobian_errors():
    with pytest.raises(IndexError, match=r"got dim = 2 for an input of shape \(3, 4\)"):
        softmax_jacobian(torch.zeros(3, 4), 2)
    with pytest.raises(IndexError, match="one dimension"):
        softmax_jacobian(torch.tensor(1.0))
    with pytest.raises(TypeError, match=r"dtype torch\.int64"):
        softmax_jacobian(torch.ones(3, dtype=torch.int64))


# ---- the C++ kernels

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
# rows around one vector and around four, primes; columns the same, for tiles of whole and partial vectors
SHAPES = [((5, size), -1) for size in (1, 2, 15, 16, 17, 63, 64, 65, 197, 1023, 5003)]
SHAPES += [((3, 7, 5), 1), ((17, 65), 0), ((2, 1023, 33), 1), ((3, 2, 1031), 1), ((2, 5, 3, 7), -3), ((2, 1, 3), 1)]
# many short rows, which are columns to the kernel; columns of several outer positions in a tile; several tiles in one
SHAPES += [
    ((16, 1), -1),
    ((517, 2), -1),
    ((1037, 8), 1),
    ((37, 9), 1),
    ((150, 3, 31), 1),
    ((300, 21, 2), 1),
    ((2, 21, 1000), 1),
]


def results(function, input, dim, grad):
    leaf = input.detach().requires_grad_()
    output = function(leaf, dim)
    return output.detach(), torch.autograd.grad(output, leaf, grad)[0]


def kernel_results(*arguments):
    with record_choices() as choices:
        found = results(*arguments)
    if not native.unavailable():
        assert [choice.implementation for choice in choices] == ["C++ kernel", "C++ kernel"]
    return found


@both
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "dim"), SHAPES)
def test_error_is_at_most_twice_torchs(ours, torchs, shape, dim, dtype):
    input, grad = (torch.randn(shape) * 3).to(dtype), torch.randn(shape).to(dtype)
    found, torchs_found = kernel_results(ours, input, dim, grad), results(torchs, input, dim, grad)
    exact = results(torchs, input.double(), dim, grad.double())
    for one, two, judge in zip(found, torchs_found, exact, strict=True):
        assert one.stride() == two.stride()
        assert_as_good_as_torch(one, two, judge, dtype, f"{shape}, {dim}")


@both
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_memory_of_any_layout(ours, torchs, dtype):
    inputs = {
        "unaligned": torch.randn(5 * 33 + 1).to(dtype)[1:].view(5, 33),
        "a window": torch.randn(5, 40).to(dtype)[:, 3:36],
        "every second": torch.randn(5, 66).to(dtype)[:, ::2],
        "transposed": torch.randn(33, 5).to(dtype).T,
        "one row for all": torch.randn(1, 33).to(dtype).expand(5, 33),
    }
    for layout, input in inputs.items():
        grad = torch.randn(33, 5).to(dtype).T
        plain = [tensor.clone(memory_format=torch.contiguous_format) for tensor in (input, grad)]
        for dim in (0, 1):
            found, expected = kernel_results(ours, input, dim, grad), kernel_results(ours, plain[0], dim, plain[1])
            for one, two in zip(found, expected, strict=True):
                assert torch.equal(one, two), layout
                assert one.is_contiguous()


@both
@pytest.mark.parametrize("size", [3, 16, 70])
@pytest.mark.parametrize("row", INFINITE.values(), ids=INFINITE)
def test_special_values_among_others(ours, torchs, row, size):
    """In a row and in a column, at the start and at the end, beside others which they must not disturb."""
    for start in (0, size - 3):
        values, grad = torch.randn(5, size), torch.randn(5, size)
        values[2] = row[0] if len(set(row)) == 1 else values[2]
        values[2, start : start + 3] = torch.tensor(row)
        for input, cotangent, dim in ((values, grad, 1), (values.T.contiguous(), grad.T.contiguous(), 0)):
            for one, two in zip(
                kernel_results(ours, input, dim, cotangent), results(torchs, input, dim, cotangent), strict=True
            ):
                # float32: exp and log of two implementations, sums of 70 terms
                torch.testing.assert_close(one, two, rtol=2e-6, atol=2e-6, equal_nan=True)


@pytest.mark.usual_algorithms
@both
def test_same_bits_for_any_number_of_threads(ours, torchs):
    for shape, dim in (((1003, 197), -1), ((3, 21, 5003), 1), ((30_011, 7), -1), ((1003, 21, 11), 1)):
        input, grad = torch.randn(shape), torch.randn(shape)
        found = []
        for threads in (1, 2, 3, 1):
            torch.set_num_threads(threads)
            found.append(kernel_results(ours, input, dim, grad))
        for result in found[1:]:
            assert all(torch.equal(one, two) for one, two in zip(found[0], result, strict=True))


@both
def test_what_is_written_past_the_cache(ours, torchs):
    for shape in ((2100, 4096), (2100, 5, 800)):
        input, grad = torch.randn(shape), torch.randn(shape)
        found, torchs_found = kernel_results(ours, input, 1, grad), results(torchs, input, 1, grad)
        few = kernel_results(ours, input[:9], 1, grad[:9])
        for one, two, same in zip(found, torchs_found, few, strict=True):
            # float32 sums of 4096 terms
            torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-5)
            assert torch.equal(one[:9], same)


@both
def test_short_rows_that_are_not_finite_stay_apart(ours, torchs):
    for shape, dim in (((40, 3), -1), ((40, 3, 5), 1)):
        for row in INFINITE.values():
            input, grad = torch.randn(shape), torch.randn(shape)
            input[17].movedim(dim - 1 if dim > 0 else -1, -1)[..., :3] = torch.tensor(row)
            pairs = zip(kernel_results(ours, input, dim, grad), results(torchs, input, dim, grad), strict=True)
            for one, two in pairs:
                # float32: exp and log of two implementations
                torch.testing.assert_close(one, two, rtol=2e-6, atol=2e-6, equal_nan=True)


def test_the_kernels_themselves_refuse_what_does_not_fit():
    if reason := native.unavailable():
        pytest.skip(reason)
    x = torch.randn(4, 6)
    for name in ("softmax", "log_softmax"):
        forward, backward = (getattr(torch.ops.nacre, n).kernel for n in (name, f"{name}_backward"))
        for message, call in {
            "one dimension": lambda forward=forward: forward(x, 2),
            "float32, float64": lambda forward=forward: forward(x.int(), 1),
            "shape of the output": lambda backward=backward: backward(x[:2], x, 1, [True]),
            "one gradient": lambda backward=backward: backward(x, x, 1, [True, True]),
        }.items():
            with pytest.raises(RuntimeError, match=message):
                call()
