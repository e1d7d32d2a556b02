"""The C++ kernels of LSTM and GRU: sizes around tiles, who shares what, packed rows, layouts, what they refuse."""

import copy
import functools
import itertools

import pytest
import torch
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import nacre
from nacre.core import native
from nacre.core.choice import record_choices
from tests.layers.recurrent_support import CLOSE, LAYERS, PAIRS, pair, states
from tests.support import assert_as_good_as_torch, fresh, in_dtype, run, tensors

pytestmark = pytest.mark.skipif(native.unavailable() != "", reason="the kernels were not built")


PROJECTED_LSTM = pytest.param(functools.partial(nacre.LSTM, proj_size=6), id="projected lstm")


def kernel_results(layer, *inputs):
    with record_choices() as choices:
        results = run(layer, inputs, {})
    assert {choice.implementation for choice in choices} == {"C++ kernel"}
    return list(tensors(results))


# T, B, D, H: around a tile of 6 rows, vectors of 4, 8 and 16, panels of 64, a depth block of 384; one of everything;
# more steps than a thread begins at once; few sequences with weights of 4 MiB and more, or fewer with 1 MiB and more,
# whose columns are shared; from 65 rows T B on weights are packed
SIZES = [
    (1, 1, 1, 1), (2, 1, 3, 65), (7, 6, 15, 17), (5, 13, 63, 16), (3, 23, 1, 63), (9, 5, 65, 101), (150, 17, 3, 31),
    (10, 7, 400, 130), (11, 6, 5, 661), (33, 2, 5, 331), (3, 6, 5, 661), (3, 2, 5, 331),
]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize(("ours", "torchs"), PAIRS)
def test_error_is_at_most_twice_torchs(ours, torchs, sizes, dtype):
    steps, batch, features, hidden = sizes
    layer, reference = pair(ours, torchs, features, hidden, dtype=dtype, bidirectional=True)
    inputs = torch.randn(steps, batch, features, dtype=dtype).requires_grad_(), states(layer, batch, dtype)
    found, expected = kernel_results(layer, *inputs), tensors(run(reference, fresh(inputs), {}))
    exact = tensors(run(copy.deepcopy(reference).double(), in_dtype(inputs, torch.float64), {}))
    for index, compared in enumerate(zip(found, expected, exact, strict=True)):
        assert_as_good_as_torch(*compared, dtype, f"result {index}")


# T, B, D, H, R: around vectors, a tile and a panel; one of everything; columns of both products shared
PROJECTED = [
    (1, 1, 1, 2, 1), (5, 7, 17, 15, 1), (4, 13, 63, 65, 17), (3, 23, 3, 101, 64), (40, 9, 5, 31, 16),
    (11, 6, 5, 1023, 300), (33, 2, 5, 331, 330), (3, 2, 5, 331, 330),
]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("sizes", PROJECTED, ids=str)
def test_error_with_a_projection_is_at_most_twice_torchs(sizes, dtype):
    steps, batch, features, hidden, width = sizes
    arguments = {"dtype": dtype, "proj_size": width, "bidirectional": True}
    layer, reference = pair(nacre.LSTM, torch.nn.LSTM, features, hidden, **arguments)
    inputs = torch.randn(steps, batch, features, dtype=dtype).requires_grad_(), states(layer, batch, dtype)
    found, expected = kernel_results(layer, *inputs), tensors(run(reference, fresh(inputs), {}))
    exact = tensors(run(copy.deepcopy(reference).double(), in_dtype(inputs, torch.float64), {}))
    for index, compared in enumerate(zip(found, expected, exact, strict=True)):
        assert_as_good_as_torch(*compared, dtype, f"result {index}")


@pytest.mark.parametrize("hidden", [9, 420])
@pytest.mark.parametrize(
    "lengths", [[1], [3, 1, 1], [5, 5, 4, 2, 2, 2, 1], [40, 40, 3], [9, *[8] * 12, *[1] * 11]], ids=str
)
@pytest.mark.parametrize(
    ("ours", "torchs", "arguments"),
    [(nacre.LSTM, torch.nn.LSTM, {}), (nacre.LSTM, torch.nn.LSTM, {"proj_size": 5}), (nacre.GRU, torch.nn.GRU, {})],
    ids=["lstm", "projected lstm", "gru"],
)
def test_packed_rows(ours, torchs, arguments, lengths, hidden):
    layer, reference = pair(ours, torchs, 7, hidden, bidirectional=True, **arguments)
    packed = pack_padded_sequence(torch.randn(max(lengths), len(lengths), 7, dtype=torch.float64), lengths)
    inputs = packed, states(layer, len(lengths))
    packed.data.requires_grad_()
    for one, other in zip(kernel_results(layer, *inputs), tensors(run(reference, fresh(inputs), {})), strict=True):
        torch.testing.assert_close(one, other, **CLOSE)


LAYOUTS = {
    "unaligned": lambda tensor: torch.cat([tensor.new_zeros(1), tensor.flatten()])[1:].view(tensor.shape),
    "batch before time": lambda tensor: tensor.transpose(0, 1).contiguous().transpose(0, 1),
    "features first": lambda tensor: tensor.permute(2, 0, 1).contiguous().permute(1, 2, 0),
    "every second": lambda tensor: tensor.repeat_interleave(2, -1)[..., ::2],
    "one half of two": lambda tensor: torch.cat([tensor, tensor], -1)[..., : tensor.shape[-1]],
    "one step for all": lambda tensor: tensor[:1].expand(tensor.shape),
    "one sequence for all": lambda tensor: tensor[:, :1].expand(tensor.shape),
    "one number": lambda tensor: tensor.flatten()[0].expand(tensor.shape),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("layer_class", LAYERS)
def test_any_layout_of_input_and_gradient(layer_class, layout):
    layer = layer_class(5, 19, dtype=torch.float64)
    values, grad = (LAYOUTS[layout](torch.randn(8, 11, size, dtype=torch.float64)) for size in (5, 19))
    results = []
    for input, cotangent in ((values, grad), (values.contiguous(), grad.contiguous())):
        leaf = input.detach().requires_grad_()
        output = layer(leaf)[0]
        with record_choices() as choices:
            gradients = torch.autograd.grad(output, [leaf, *layer.parameters()], cotangent)
        assert [choice.implementation for choice in choices] == ["C++ kernel"]
        results.append([output, *gradients])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, **CLOSE)


# sequences shared in parts of 4 and more; a packed batch; columns shared, of packed weights and of others
@pytest.mark.parametrize(
    ("steps", "batch", "hidden", "packed"),
    [(30, 23, 37, False), (30, 23, 37, True), (22, 3, 603, False), (4, 3, 603, False)],
)
@pytest.mark.parametrize("layer_class", [*LAYERS, PROJECTED_LSTM])
def test_same_bits_for_any_number_of_threads_and_from_run_to_run(layer_class, steps, batch, hidden, packed):
    layer = layer_class(40, hidden, bidirectional=True)
    values = torch.randn(steps, batch, 40)
    if packed:
        values = pack_padded_sequence(values, [steps - index for index in range(batch)])
    (values.data if packed else values).requires_grad_()
    torch.set_num_threads(1)
    expected = kernel_results(layer, values)
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        for one, other in zip(kernel_results(layer, values), expected, strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("layer_class", [*LAYERS, PROJECTED_LSTM])
def test_only_the_gradients_asked_for(layer_class, bias):
    layer = layer_class(5, 7, bias=bias)
    values, hx = torch.randn(4, 9, 5, requires_grad=True), states(layer, 9, torch.float32)
    leaves = [values, *tensors(hx), *layer.parameters()]
    expected = torch.autograd.grad(layer(values, hx)[0].square().sum(), leaves)
    for wanted in range(len(leaves)):
        for index, leaf in enumerate(leaves):
            leaf.requires_grad_(index == wanted)
        found = torch.autograd.grad(layer(values, hx)[0].square().sum(), leaves[wanted])[0]
        assert torch.equal(found, expected[wanted])


@pytest.mark.parametrize("layer_class", [*LAYERS, PROJECTED_LSTM])
def test_nan_stays_in_its_sequence(layer_class):
    layer = layer_class(5, 70)
    values = torch.randn(6, 9, 5)
    expected = layer(values)[0]
    values[2, 4, 0] = torch.nan
    output = layer(values)[0]
    others = [sequence for sequence in range(9) if sequence != 4]
    assert torch.equal(output[:, others], expected[:, others])
    assert torch.equal(output[:2], expected[:2]) and output[2:, 4].isnan().all()


@pytest.mark.parametrize(
    ("layer", "values", "reason"),
    [
        (nacre.LSTM(3, 4).bfloat16(), torch.zeros(2, 1, 3).bfloat16(), "float32 or float64"),
        (nacre.GRU(3, 4).half(), torch.zeros(2, 1, 3).half(), "float32 or float64"),
    ],
    ids=["bfloat16", "float16"],
)
def test_the_formula_serves_the_rest(layer, values, reason):
    with record_choices() as choices:
        layer(values)[0].float().sum().backward()
    assert {choice.implementation for choice in choices} == {"formula"}
    assert all(reason in choice.reason for choice in choices)


def good(layer, steps=4, batch=3):
    """The arguments of a good call of the op, as a list."""
    given = [torch.zeros(steps, batch, 5), None, *itertools.repeat(torch.zeros(batch, 7), 2 if layer == "lstm" else 1)]
    sums = 7 * (4 if layer == "lstm" else 3)
    weights = [torch.zeros(sums, 5), torch.zeros(sums, 7), torch.zeros(sums), torch.zeros(sums)]
    return [*given, *weights, *([None] if layer == "lstm" else []), False]


BAD = {
    "input of 2 dimensions": (0, torch.zeros(3, 5)),
    "no step": (0, torch.zeros(0, 3, 5)),
    "other batch": (0, torch.zeros(4, 2, 5)),
    "other features": (0, torch.zeros(4, 3, 6)),
    "other dtype": (0, torch.zeros(4, 3, 5).double()),
    "bfloat16": (0, torch.zeros(4, 3, 5).bfloat16()),
    "packed rows in 3 dimensions": (1, torch.tensor([3, 3, 3, 3])),
    "state of 1 dimension": (2, torch.zeros(7)),
    "other hidden size": (2, torch.zeros(3, 8)),
    "weight of one dimension": (-6, torch.zeros(28)),
    "one bias": (-2, None),
}


@pytest.mark.parametrize("change", BAD)
@pytest.mark.parametrize("name", ["lstm", "gru"])
def test_the_kernels_themselves_refuse_what_does_not_fit(name, change):
    arguments = good(name)
    kernel = getattr(torch.ops.nacre, name).kernel
    assert kernel(*arguments)[0].shape == (4, 3, 7)
    at, value = BAD[change]
    last = len(arguments) - (2 if name == "lstm" else 1)  # behind the biases
    arguments[at if at >= 0 else last + at + (2 if at == -6 else 1)] = value
    with pytest.raises(RuntimeError, match=r"recurrence: |lstm: |gru: "):
        kernel(*arguments)


@pytest.mark.parametrize(
    ("at", "value"),
    [
        (2, torch.zeros(3, 7)),
        (3, torch.zeros(3, 2)),
        (3, torch.zeros(7)),
        (5, torch.zeros(28, 7)),
        (8, torch.zeros(7, 2)),
        (8, torch.zeros(14)),
        (8, torch.zeros(2, 7).double()),
        (8, None),
    ],
)
def test_the_kernel_itself_refuses_a_projection_that_does_not_fit(at, value):
    arguments = good("lstm")
    arguments[2], arguments[5], arguments[8] = torch.zeros(3, 2), torch.zeros(28, 2), torch.zeros(2, 7)
    assert torch.ops.nacre.lstm.kernel(*arguments)[0].shape == (4, 3, 2)
    arguments[at] = value
    with pytest.raises(RuntimeError, match=r"recurrence: |lstm: "):
        torch.ops.nacre.lstm.kernel(*arguments)


@pytest.mark.parametrize("sizes", [[2, 3], [4, 1], [3, 3], [3, -1, 3]], ids=str)
@pytest.mark.parametrize("name", ["lstm", "gru"])
def test_the_kernels_themselves_refuse_bad_batch_sizes(name, sizes):
    arguments = good(name)
    arguments[:2] = torch.zeros(5, 5), torch.tensor(sizes)
    with pytest.raises(RuntimeError, match="recurrence: "):
        getattr(torch.ops.nacre, name).kernel(*arguments)


@pytest.mark.parametrize(
    ("name", "index"),
    [(name, index) for name, kept in (("lstm", (-4, -3)), ("gru", (-3, -2))) for index in (0, 1, *kept, -1)],
)
def test_the_backward_kernels_refuse_what_does_not_fit(name, index):
    input, _, *others = good(name)
    *others, reverse = others
    output, *rest = getattr(torch.ops.nacre, name).kernel(input, None, *others, reverse)
    last_states = {"lstm": 2, "gru": 1}[name]
    ends, kept = rest[:last_states], rest[last_states:]
    needs = [True] * (1 + len(others))
    arguments = [output, *ends, input, *others, None, reverse, *kept, needs]
    backward = getattr(torch.ops.nacre, f"{name}_backward").kernel
    assert backward(*arguments)[0].shape == input.shape
    arguments[index] = needs[1:] if index == -1 else arguments[index][:-1]
    with pytest.raises(RuntimeError, match=r"recurrence: |lstm: |gru: "):
        backward(*arguments)


def test_a_backward_asks_for_the_projected_states():
    h0, c0, weights = torch.zeros(2, 2), torch.zeros(2, 4), [torch.zeros(size) for size in ((16, 3), (16, 2), (2, 4))]
    given = torch.zeros(5, 2, 3), h0, c0, *weights[:2], None, None, weights[2]
    output, *rest = torch.ops.nacre.lstm.kernel(given[0], None, *given[1:], False)
    ends, kept = rest[:2], rest[2:]
    assert kept[-1].shape == output.shape and kept[-1].data_ptr() != output.data_ptr()
    for wrong in (kept[-1][:-1], kept[-1][..., :1], kept[-1].double(), torch.zeros(0)):
        with pytest.raises(RuntimeError, match="recurrence: "):
            torch.ops.nacre.lstm_backward.kernel(output, *ends, *given, None, False, *kept[:-1], wrong, [True] * 8)


def test_a_packed_sequence_of_one_row():
    layer = nacre.GRU(3, 4)
    packed = PackedSequence(torch.randn(1, 3), torch.tensor([1]))
    assert torch.equal(layer(packed)[0].data, layer(packed.data)[0])
