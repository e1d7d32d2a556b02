"""LSTM and GRU under autocast, compilation and transforms, and given bad input."""

import pytest
import torch
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import nacre
from nacre.core.choice import record_choices
from tests.layers.recurrent_support import CLOSE, LAYERS, PAIRS, assert_same_results, pair, states
from tests.support import tensors

# ---- autocast


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")  # said of torch's own layer
@pytest.mark.parametrize("packed", [False, True, "equal lengths"])
@pytest.mark.parametrize("projected", [False, True])
@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize(("ours", "torchs"), PAIRS)
def test_autocast_gives_torchs_dtypes(ours, torchs, given, projected, packed):
    if projected and ours is nacre.GRU:
        return  # a GRU has no projection
    arguments = {"num_layers": 2, "bidirectional": True} | ({"proj_size": 2} if projected else {})
    layer, reference = pair(ours, torchs, 3, 4, dtype=torch.float32, **arguments)
    values = torch.randn(3, 2, 3)
    if packed:
        lengths = [1, 3] if packed is True else [3, 3]
        values = pack_padded_sequence(values, lengths, enforce_sorted=False)
    inputs = (values, states(layer, 2, torch.float32)) if given else (values,)
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = layer(*inputs), reference(*inputs)
        for one, other in zip(tensors(found), tensors(expected), strict=True):
            assert one.dtype is other.dtype
    sum(t.float().sum() for t in tensors(found) if t.requires_grad).backward()
    assert all(parameter.grad.dtype is torch.float32 for parameter in layer.parameters())


# ---- compilation


@pytest.mark.parametrize("layer_class", LAYERS)
def test_a_compiled_layer_reads_sequences_of_any_length(layer_class):
    torch._dynamo.reset()
    layer = layer_class(3, 4, num_layers=2)
    graphs = []

    def backend(graph, inputs):
        graphs.append([str(node.target) for node in graph.graph.nodes])
        return graph

    with torch._dynamo.config.patch(allow_rnn=True):
        compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=backend)
        for steps, batch in ((5, 2), (9, 3), (300, 4)):
            values = torch.randn(steps, batch, 3)
            torch.testing.assert_close(compiled(values), layer(values))
    assert len(graphs) == 1
    assert graphs[0].count(f"nacre.{layer.mode.lower()}.default") == 2


@pytest.mark.parametrize("enforce_sorted", [True, False])
@pytest.mark.parametrize("layer_class", LAYERS)
def test_packed_sequences_compile(layer_class, enforce_sorted):
    torch._dynamo.reset()
    layer = layer_class(3, 4, bidirectional=True)
    with torch._dynamo.config.patch(allow_rnn=True):
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        for hx in (None, states(layer, 2, torch.float32)):
            packed = pack_padded_sequence(torch.randn(4, 2, 3), [4, 2], enforce_sorted=enforce_sorted)
            packed.data.requires_grad_()
            inputs = (packed,) if hx is None else (packed, hx)
            assert_same_results(compiled, layer, *inputs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("layer_class", LAYERS)
def test_an_exported_layer_reads_sequences_of_any_length(layer_class):
    layer = layer_class(3, 4, batch_first=True)
    sizes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("steps")}
    with pytest.warns(UserWarning, match="_flat_weights"):  # torch.nn's own layers export with the same warning
        exported = torch.export.export(layer, (torch.randn(2, 5, 3),), dynamic_shapes=(sizes,))
    values = torch.randn(3, 11, 3)
    torch.testing.assert_close(exported.module()(values), layer(values))


@pytest.mark.parametrize("layer_class", LAYERS)
def test_gradients_of_each_sample(layer_class):
    layer = layer_class(3, 4, dtype=torch.float64)
    values = torch.randn(5, 4, 3, dtype=torch.float64)
    parameters = {name: parameter.detach() for name, parameter in layer.named_parameters()}

    def loss(parameters, sequence):
        return torch.func.functional_call(layer, parameters, (sequence,))[0].pow(2).sum()

    found = torch.vmap(torch.func.grad(loss), in_dims=(None, 1))(parameters, values)
    for index in range(4):
        gradients = torch.autograd.grad(layer(values[:, index])[0].pow(2).sum(), list(layer.parameters()))
        for gradient, name in zip(gradients, parameters, strict=True):
            torch.testing.assert_close(found[name][index], gradient, **CLOSE)


# ---- bad input


def packed(features=3, dtype=torch.float32):
    return pack_padded_sequence(torch.randn(5, 2, features, dtype=dtype), [5, 3])


def both(make):
    """The same bad states for an LSTM and a GRU."""
    return lambda layer: (make(), make()) if layer.mode == "LSTM" else make()


BAD = {
    "one dimension": lambda layer: (torch.ones(3),),
    "four dimensions": lambda layer: (torch.ones(5, 2, 1, 3),),
    "no step": lambda layer: (torch.ones(0, 2, 3),),
    "other features": lambda layer: (torch.ones(5, 2, 4),),
    "other dtype": lambda layer: (torch.ones(5, 2, 3).double(),),
    "integers": lambda layer: (torch.ones(5, 2, 3, dtype=torch.int64),),
    "other device": lambda layer: (torch.ones(5, 2, 3, device="meta"),),
    "a list": lambda layer: ([torch.ones(2, 3)],),
    "states of another batch": lambda layer: (torch.ones(5, 2, 3), both(lambda: torch.ones(1, 3, 4))(layer)),
    "states of another size": lambda layer: (torch.ones(5, 2, 3), both(lambda: torch.ones(1, 2, 5))(layer)),
    "states of more levels": lambda layer: (torch.ones(5, 2, 3), both(lambda: torch.ones(2, 2, 4))(layer)),
    "states of another dtype": lambda layer: (torch.ones(5, 2, 3), both(lambda: torch.ones(1, 2, 4).double())(layer)),
    "integer states": lambda layer: (torch.ones(5, 2, 3), both(lambda: torch.ones(1, 2, 4, dtype=torch.int64))(layer)),
    "unbatched states": lambda layer: (torch.ones(5, 2, 3), both(lambda: torch.ones(1, 4))(layer)),
    "batched states": lambda layer: (torch.ones(5, 3), both(lambda: torch.ones(1, 1, 4))(layer)),
    "the other layer's states": lambda layer: (
        torch.ones(5, 2, 3),
        torch.ones(1, 2, 4) if layer.mode == "LSTM" else (torch.ones(1, 2, 4), torch.ones(1, 2, 4)),
    ),
    "packed, other features": lambda layer: (packed(features=4),),
    "packed, other dtype": lambda layer: (packed(dtype=torch.float64),),
    "packed, other states": lambda layer: (packed(), both(lambda: torch.ones(1, 1, 4))(layer)),
    "packed, wide states": lambda layer: (packed(), both(lambda: torch.ones(1, 2, 5))(layer)),
    "packed, no step": lambda layer: (PackedSequence(torch.ones(0, 3), torch.zeros(0, dtype=torch.int64)),),
    "packed, growing": lambda layer: (PackedSequence(torch.ones(5, 3), torch.tensor([2, 3])),),
    "packed, too few rows": lambda layer: (PackedSequence(torch.ones(3, 3), torch.tensor([2, 2])),),
    "packed, int32": lambda layer: (PackedSequence(torch.ones(4, 3), torch.tensor([2, 2], dtype=torch.int32)),),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize(("ours", "torchs"), PAIRS)
def test_bad_input_raises_torchs_type(ours, torchs, name):
    layer, reference = pair(ours, torchs, 3, 4, dtype=torch.float32)
    inputs = BAD[name](layer)
    with pytest.raises(Exception) as expected:
        reference(*inputs)
    with pytest.raises(expected.type) as found:
        layer(*inputs)
    assert type(found.value) is expected.type


@pytest.mark.parametrize(("ours", "torchs"), PAIRS)
@pytest.mark.parametrize(
    "arguments",
    [{"hidden_size": 0}, {"num_layers": 0}, {"dropout": 1.5}, {"proj_size": 4}, {"bias": 1}, {"hidden_size": 2.0}],
    ids=str,
)
def test_bad_sizes_raise_torchs_type(ours, torchs, arguments):
    with pytest.raises((TypeError, ValueError)) as expected:
        torchs(**{"input_size": 3, "hidden_size": 4, **arguments})
    with pytest.raises(expected.type):
        ours(**{"input_size": 3, "hidden_size": 4, **arguments})


@pytest.mark.parametrize("layer_class", LAYERS)
def test_messages_name_the_rule_and_what_came(layer_class):
    layer = layer_class(3, 4, num_layers=2)
    with pytest.raises(RuntimeError, match=r"sequences of one step or more; got an input of shape \(0, 2, 3\)"):
        layer(torch.ones(0, 2, 3))
    with pytest.raises(RuntimeError, match=r"3 dimensions; got h_0 of shape \(2, 4\)"):
        layer(torch.ones(5, 2, 3), both(lambda: torch.ones(2, 4))(layer))
    # torch.nn.GRU reads the first rows of such a PackedSequence and forgets the others without a word
    with pytest.raises(RuntimeError, match=r"sum to the rows of its data; got torch.int64 \[2, 2\] for 5 rows"):
        layer(PackedSequence(torch.ones(5, 3), torch.tensor([2, 2])))
    # torch.nn.LSTM reads beyond the end of such a weight
    weight = {"weight_hh_l1": torch.ones(7, 5)}
    with pytest.raises(RuntimeError, match=r"weight_hh_l1 of this \w+ has the shape .*; got \(7, 5\)"):
        torch.func.functional_call(layer, weight, (torch.ones(5, 2, 3),))
    layer.weight_hh_l1 = torch.nn.Parameter(weight["weight_hh_l1"])
    with pytest.raises(RuntimeError, match=r"weight_hh_l1 of this \w+ has the shape .*; got \(7, 5\)"):
        layer(torch.ones(5, 2, 3))


@pytest.mark.parametrize(("ours", "torchs"), PAIRS)
def test_complex_numbers_are_left_to_torch(ours, torchs):
    layer, reference = pair(ours, torchs, 3, 4, dtype=torch.complex64)
    values = torch.randn(5, 2, 3, dtype=torch.complex64)
    with record_choices() as choices:
        found = layer(values)
    assert [choice.implementation for choice in choices] == ["torch"]
    torch.testing.assert_close(found, reference(values))
