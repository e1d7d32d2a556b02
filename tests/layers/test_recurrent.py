"""What is special to LSTM and GRU: sequences of unlike lengths, states, dropout between levels, long sequences."""

import copy
from functools import partial
from itertools import product

import pytest
import torch
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pack_sequence, pad_packed_sequence
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import nacre
from nacre.core.choice import record_choices
from nacre.layers import LAYERS as SPECS
from tests.layers.recurrent_support import CLOSE, LAYERS, PAIRS, assert_same_results, first_state, pair, states
from tests.support import SavedBytes, assert_as_good_as_torch, run, tensors

# ---- packed sequences


@pytest.mark.parametrize(("bidirectional", "num_layers", "given"), list(product((False, True), (1, 2), (False, True))))
@pytest.mark.parametrize("lengths", [[5, 3, 3, 1], [2, 5, 1, 5], [4, 4, 4], [1, 1], [3], [1, 6]], ids=str)
@pytest.mark.parametrize(("ours", "torchs"), PAIRS)
def test_packed_sequences_match_torch(ours, torchs, lengths, bidirectional, num_layers, given):
    layer, reference = pair(ours, torchs, 3, 4, num_layers=num_layers, bidirectional=bidirectional)
    padded = torch.randn(max(lengths), len(lengths), 3, dtype=torch.float64)
    for enforce_sorted in {False, lengths == sorted(lengths, reverse=True)}:
        packed = pack_padded_sequence(padded, lengths, enforce_sorted=enforce_sorted)
        packed.data.requires_grad_()
        output, _ = layer(packed)
        assert isinstance(output, PackedSequence)
        assert output.batch_sizes is packed.batch_sizes
        assert output.sorted_indices is packed.sorted_indices and output.unsorted_indices is packed.unsorted_indices
        assert_same_results(layer, reference, packed, *([states(layer, len(lengths))] if given else []))


@pytest.mark.parametrize("bias", [True, False])
def test_packed_projections_match_torch(bias):
    layer, reference = pair(nacre.LSTM, torch.nn.LSTM, 3, 4, 2, bias=bias, proj_size=2, bidirectional=True)
    padded = torch.randn(3, 5, 3, dtype=torch.float64)
    packed = pack_padded_sequence(padded, [1, 5, 2], batch_first=True, enforce_sorted=False)
    packed.data.requires_grad_()
    assert_same_results(layer, reference, packed)
    assert_same_results(layer, reference, packed, states(layer, 3))


@pytest.mark.parametrize("layer_class", LAYERS)
def test_packed_sequences_do_not_see_each_other(layer_class):
    torch.manual_seed(0)
    layer = layer_class(3, 4, num_layers=2, bidirectional=True, dtype=torch.float64)
    sequences = [torch.randn(length, 3, dtype=torch.float64) for length in (2, 5, 1, 3)]
    hx = states(layer, 4)
    output, final = layer(pack_sequence(sequences, enforce_sorted=False), hx)
    padded, lengths = pad_packed_sequence(output)
    assert lengths.tolist() == [2, 5, 1, 3]
    for index, sequence in enumerate(sequences):
        own = tuple(state[:, index] for state in hx) if isinstance(hx, tuple) else hx[:, index]
        alone, alone_final = layer(sequence, own)
        torch.testing.assert_close(padded[: len(sequence), index], alone, **CLOSE)
        for one, other in zip(tensors(final), tensors(alone_final), strict=True):
            torch.testing.assert_close(one[:, index], other, **CLOSE)


@pytest.mark.parametrize("layer_class", LAYERS)
def test_final_states_stand_where_sequences_end(layer_class):
    layer = layer_class(3, 4, bidirectional=True)
    lengths = [2, 4, 3]
    output, final = layer(pack_padded_sequence(torch.randn(4, 3, 3), lengths, enforce_sorted=False))
    padded, _ = pad_packed_sequence(output)
    final = first_state(final)
    for index, length in enumerate(lengths):
        assert torch.equal(final[0, index], padded[length - 1, index, :4])
        assert torch.equal(final[1, index], padded[0, index, 4:])


@pytest.mark.parametrize("layer_class", LAYERS)
def test_packed_equal_lengths_are_a_plain_batch(layer_class):
    layer = layer_class(3, 4, bidirectional=True, dtype=torch.float64)
    values = torch.randn(4, 2, 3, dtype=torch.float64)
    output, final = layer(pack_padded_sequence(values, [4, 4]))
    plain, plain_final = layer(values)
    torch.testing.assert_close(output.data, plain.flatten(0, 1), **CLOSE)
    torch.testing.assert_close(final, plain_final, **CLOSE)


# ---- forms of input and states


@pytest.mark.parametrize("layer_class", LAYERS)
def test_forms_of_one_batch_agree(layer_class):
    torch.manual_seed(0)
    layer = layer_class(3, 4, num_layers=2, bidirectional=True, dtype=torch.float64)
    values = torch.randn(5, 2, 3, dtype=torch.float64)
    hx = states(layer, 2)
    output, final = layer(values, hx)
    batch_first = copy.deepcopy(layer)
    batch_first.batch_first = True
    swapped, swapped_final = batch_first(values.transpose(0, 1), hx)
    assert torch.equal(swapped.transpose(0, 1), output)
    torch.testing.assert_close(swapped_final, final, rtol=0, atol=0)
    for module in (layer, batch_first):  # batch_first says nothing of an unbatched input
        own = tuple(state[:, 1] for state in hx) if isinstance(hx, tuple) else hx[:, 1]
        alone, alone_final = module(values[:, 1], own)
        torch.testing.assert_close(alone, output[:, 1], **CLOSE)
        for one, other in zip(tensors(alone_final), tensors(final), strict=True):
            torch.testing.assert_close(one, other[:, 1], **CLOSE)


@pytest.mark.parametrize("layer_class", LAYERS)
def test_a_sequence_in_two_halves(layer_class):
    layer = layer_class(3, 4, num_layers=2, dtype=torch.float64)
    values = torch.randn(6, 2, 3, dtype=torch.float64)
    output, final = layer(values)
    first, between = layer(values[:4])
    second, end = layer(values[4:], between)
    torch.testing.assert_close(torch.cat([first, second]), output, **CLOSE)
    torch.testing.assert_close(end, final, **CLOSE)


@pytest.mark.parametrize("layer_class", LAYERS)
def test_initial_states_default_to_zeros(layer_class):
    layer = layer_class(3, 4, num_layers=2)
    values = torch.randn(3, 2, 3)
    zeros = torch.zeros(2, 2, 4)
    given = layer(values, (zeros, zeros) if layer.mode == "LSTM" else zeros)
    torch.testing.assert_close(layer(values), given, rtol=0, atol=0)


@pytest.mark.parametrize(("ours", "torchs"), PAIRS)
def test_gradients_from_each_result_alone(ours, torchs):
    layer, reference = pair(ours, torchs, 3, 4, num_layers=2, bidirectional=True)
    packed = pack_padded_sequence(torch.randn(4, 3, 3, dtype=torch.float64), [2, 4, 1], enforce_sorted=False)
    for inputs in ((packed,), (torch.randn(4, 3, 3, dtype=torch.float64),)):
        results = [list(tensors(module(*inputs))) for module in (layer, reference)]
        for one, other in zip(*results, strict=True):
            if not one.requires_grad:
                continue
            found, expected = (
                torch.autograd.grad(result.sum(), module.parameters(), retain_graph=True, materialize_grads=True)
                for result, module in ((one, layer), (other, reference))
            )
            torch.testing.assert_close(found, expected, **CLOSE)


@pytest.mark.parametrize("layer_class", LAYERS)
def test_results_may_be_written_into(layer_class):
    layer = layer_class(3, 4)
    values = torch.randn(4, 2, 3)
    output, final = layer(values)
    expected = torch.autograd.grad(2 * output.sum() + 3 * first_state(final).sum(), list(layer.parameters()))
    output, final = layer(values)
    output.mul_(2)
    first_state(final).mul_(3)
    found = torch.autograd.grad(output.sum() + first_state(final).sum(), list(layer.parameters()))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("layer_class", LAYERS)
def test_one_operator_for_each_level_and_direction(layer_class):
    layer = layer_class(3, 4, num_layers=3, bidirectional=True)
    with record_choices() as choices:
        layer(torch.randn(50, 2, 3))[0].sum().backward()
    name = layer.mode.lower()
    assert [choice.operator for choice in choices] == [name] * 6 + [f"{name}_backward"] * 6


@pytest.mark.parametrize("layer_class", LAYERS)
def test_weights_are_those_of_the_moment(layer_class):
    layer = layer_class(3, 4)
    values = torch.randn(4, 2, 3)
    before = layer(values)[0]
    doubled = {name: 2 * parameter for name, parameter in layer.named_parameters()}
    called = torch.func.functional_call(layer, doubled, (values,))[0]
    assert torch.equal(layer(values)[0], before)
    layer.weight_hh_l0 = torch.nn.Parameter(2 * layer.weight_hh_l0)
    assert not torch.equal(layer(values)[0], before)
    layer.load_state_dict(doubled)
    assert torch.equal(layer(values)[0], called)
    assert layer.double()(values.double())[0].dtype is torch.float64
    assert layer.flatten_parameters() is None


# ---- dropout between levels


class InputsOf(TorchDispatchMode):
    """Keeps what each call of an operator reads first."""

    def __init__(self, name):
        super().__init__()
        self.name, self.inputs = f"nacre::{name}", []

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        if function._schema.name == self.name:
            self.inputs.append(arguments[0].detach())
        return function(*arguments, **(keywords or {}))


def levels_read(layer, values):
    with InputsOf(layer.mode.lower()) as mode:
        output = layer(values)[0]
    return mode.inputs, output.detach()


@pytest.mark.parametrize("layer_class", LAYERS)
def test_dropout_falls_between_levels(layer_class):
    torch.manual_seed(0)
    layer = layer_class(8, 32, num_layers=3, dropout=0.25)
    values = torch.randn(20, 10, 8)
    (read, *between), output = levels_read(layer, values)
    assert torch.equal(read, values)
    assert output.count_nonzero() == output.numel()
    plain = copy.deepcopy(layer).eval()
    (_, first, _), _ = levels_read(plain, values)
    dropped = between[0] == 0
    # 6400 elements: 0.25 within five standard deviations, 5 sqrt(0.25 0.75 / 6400) = 0.027
    for inputs in between:
        assert abs((inputs == 0).double().mean().item() - 0.25) < 0.027
    torch.testing.assert_close(between[0][~dropped], first[~dropped] / 0.75)
    assert not torch.equal(dropped, between[1] == 0), "one mask for all levels"


@pytest.mark.parametrize("layer_class", LAYERS)
def test_dropout_follows_the_seed(layer_class):
    layer = layer_class(3, 4, num_layers=2, dropout=0.5)
    values = torch.randn(5, 2, 3)

    def results(seed):
        torch.manual_seed(seed)
        output = layer(values)[0]
        return output, *torch.autograd.grad(output.sum(), list(layer.parameters()))

    for one, other in zip(results(1), results(1), strict=True):
        assert torch.equal(one, other)
    assert not torch.equal(results(1)[0], results(2)[0])


@pytest.mark.parametrize("layer_class", LAYERS)
def test_evaluation_and_no_dropout_draw_nothing(layer_class):
    evaluated = layer_class(3, 4, num_layers=2, dropout=0.5).eval()
    plain = layer_class(3, 4, num_layers=2)
    everything = layer_class(3, 4, num_layers=2, dropout=1.0)
    for layer in (evaluated, plain, everything):
        state = torch.random.get_rng_state()
        layer(torch.ones(5, 2, 3))
        assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize(("ours", "torchs"), PAIRS)
def test_dropout_of_everything_keeps_nan_as_torch_does(ours, torchs):
    layer, reference = pair(ours, torchs, 3, 4, num_layers=2, dropout=1.0)
    values = torch.full((2, 1, 3), torch.nan, dtype=torch.float64)
    assert torch.equal(layer(values)[0].isnan(), reference(values)[0].isnan())


# ---- numbers


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("ours", "torchs"), PAIRS)
def test_long_sequences_stay_as_close_to_float64_as_torch(ours, torchs, dtype):
    layer, reference = pair(ours, torchs, 4, 8, dtype=dtype)
    values = torch.randn(700, 2, 4).to(dtype).requires_grad_()
    judge = copy.deepcopy(reference).double()
    found, expected = run(layer, (values,), {}), run(reference, (values,), {})
    exact = run(judge, (values.detach().double().requires_grad_(),), {})
    for index, compared in enumerate(zip(tensors(found), tensors(expected), tensors(exact), strict=True)):
        assert_as_good_as_torch(*compared, dtype, f"result {index}")


@pytest.mark.parametrize("layer_class", LAYERS)
def test_a_memory_over_a_thousand_steps_in_bfloat16(layer_class):
    """Half precision must not stall a slow memory: its updates are far below the spacing of bfloat16."""
    layer = layer_class(1, 1)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.zero_()
        # LSTM: i and g small, f near 1; GRU: z near 1, so that each step moves the state by a thousandth
        if layer.mode == "LSTM":
            layer.bias_ih_l0.copy_(torch.tensor([-6.0, 9.0, 1.0, 2.0]))
        else:
            layer.bias_ih_l0.copy_(torch.tensor([0.0, 7.0, 1.0]))
    values = torch.zeros(1000, 1, 1)
    exact = layer.double()(values.double())[0][-1].item()
    found = layer.bfloat16()(values.bfloat16())[0][-1].item()
    # one rounding to 8 bits, and the parameters are exact in bfloat16
    assert abs(found - exact) <= 2**-8 * abs(exact)


@pytest.mark.parametrize("layer_class", LAYERS)
def test_extreme_sums_give_finite_results_and_gradients(layer_class):
    layer = layer_class(2, 3, dtype=torch.float32)
    values = torch.tensor([[[1e30, -1e30]], [[0.0, 3e38]]], requires_grad=True)
    output, gradients = run(layer, (values,), {})
    assert all(t.isfinite().all() for t in tensors(output))
    assert all(gradient.isfinite().all() for gradient in gradients[1:])


# ---- the bill of what is frozen

FROZEN = ["weight_ih", "weight_hh", "weight", "bias", "bias_ih", "hr", "l0", "l1", "l0_reverse", "reverse", ""]


@pytest.mark.parametrize("given", ["states", "input", "nothing"])
@pytest.mark.parametrize("frozen", FROZEN)
@pytest.mark.parametrize("layer_class", [*LAYERS, partial(nacre.LSTM, proj_size=2)], ids=["lstm", "gru", "projected"])
def test_the_bill_of_a_layer_that_is_partly_frozen(layer_class, frozen, given):
    layer = layer_class(3, 4, 2, bidirectional=True, dropout=0.5)
    for name, parameter in layer.named_parameters():
        parameter.requires_grad_(frozen not in name)
    values = torch.randn(5, 2, 3, requires_grad=given == "input")
    arguments = (values, states(layer, 2, torch.float32)) if given == "states" else (values,)
    spec = SPECS[layer.mode.lower()]
    bill = spec.cost(**spec.sizes(layer, *arguments))
    with SavedBytes(layer) as saved:
        results = [result for result in tensors(layer(*arguments)) if result.requires_grad]
    assert bill.saved_bytes == saved.bytes
    with FlopCounterMode(display=False) as counter:
        if results:
            torch.autograd.backward(results, [torch.ones_like(result) for result in results])
    assert bill.backward_flops == counter.get_total_flops()


def test_the_sums_of_frozen_biases_are_not_billed():
    # 10 rows; an LSTM's two biases have one sum of 4 H = 16 values, a GRU's have two of 3 H = 12
    for layer, both, one in ((nacre.LSTM(3, 4), 160, 0), (nacre.GRU(3, 4), 240, 120)):
        spec, values = SPECS[layer.mode.lower()], torch.randn(5, 2, 3)
        trained = spec.cost(**spec.sizes(layer, values)).backward_elementwise_flops
        layer.bias_ih_l0.requires_grad_(False)
        assert spec.cost(**spec.sizes(layer, values)).backward_elementwise_flops == trained - one
        layer.bias_hh_l0.requires_grad_(False)
        assert spec.cost(**spec.sizes(layer, values)).backward_elementwise_flops == trained - both
