"""What the tests of LSTM and GRU share."""

import pytest
import torch

import nacre
from tests.support import fresh, run, tensors

PAIRS = [pytest.param(nacre.LSTM, torch.nn.LSTM, id="lstm"), pytest.param(nacre.GRU, torch.nn.GRU, id="gru")]
LAYERS = [pytest.param(nacre.LSTM, id="lstm"), pytest.param(nacre.GRU, id="gru")]

# float64, sums of a handful of terms in another order, through a few steps of a contracting recurrence
CLOSE = {"rtol": 1e-10, "atol": 1e-12}


def pair(ours, torchs, *sizes, dtype=torch.float64, **arguments):
    """A layer and torch.nn's with the same parameters."""
    torch.manual_seed(0)
    reference = torchs(*sizes, **arguments, dtype=dtype)
    layer = ours(*sizes, **arguments, dtype=dtype)
    layer.load_state_dict(reference.state_dict())
    return layer, reference


def states(layer, batch, dtype=torch.float64):
    """Initial states which ask for their gradient, for a layer."""
    count = layer.num_layers * (2 if layer.bidirectional else 1)
    made = [torch.randn(count, batch, layer.proj_size or layer.hidden_size, dtype=dtype, requires_grad=True)]
    if layer.mode == "GRU":
        return made[0]
    return made[0], torch.randn(count, batch, layer.hidden_size, dtype=dtype, requires_grad=True)


def assert_same_results(layer, reference, *inputs, **tolerance):
    found, expected = run(layer, fresh(inputs), {}), run(reference, fresh(inputs), {})
    for one, other in zip(tensors(found), tensors(expected), strict=True):
        torch.testing.assert_close(one, other, **(tolerance or CLOSE))


def first_state(hx):
    return hx[0] if isinstance(hx, tuple) else hx
