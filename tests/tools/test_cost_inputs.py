"""What a bill does with inputs and results of other kinds, and with what fake tensors do not know by themselves."""

import copy
import dataclasses
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils.flop_counter import FlopCounterMode

import nacre
from nacre.tools.cost import ceilings
from nacre.tools.cost.speed import predict
from nacre.tools.cost.stage import mapped, tensors
from tests.tools.cost_support import SPEEDS
from tests.tools.test_cost_exact import Function, flops
from tests.tools.test_cost_models import kept


@dataclasses.dataclass(frozen=True)
class Result:
    logits: Any
    loss: Any = None


@dataclasses.dataclass
class Slots:
    __slots__ = ("logits",)
    logits: Any


class Named(NamedTuple):
    logits: Any


class Plain:
    def __init__(self, logits):
        self.logits = logits


@pytest.mark.parametrize(
    "wrapped",
    [
        Result,
        Slots,
        Named,
        Plain,
        lambda x: SimpleNamespace(logits=[x]),
        lambda x: {"deep": [{"logits": Result(None, (x,))}]},
    ],
    ids=["dataclass", "slots", "named tuple", "object", "namespace", "nested"],
)
def test_a_result_is_found_wherever_it_is(wrapped):
    # 10 rows, 6 x 4: 480 forward, 480 for the weight
    layer = nn.Linear(6, 4)
    assert flops(Function(lambda x: wrapped(layer(x)), layer), torch.zeros(10, 6)) == (480, 480)


@pytest.mark.parametrize("wrapped", [Result, Named, lambda x: SimpleNamespace(logits=x)])
def test_inputs_are_replaced_wherever_they_are(wrapped):
    layer = nn.Linear(6, 4)
    model = Function(lambda given: layer(given.logits), layer)
    for x in (torch.zeros(10, 6), torch.zeros(10, 6, device="meta")):
        given = wrapped(x)
        report = nacre.cost(model, given)
        assert (report.flops, report.backward_flops, report.real) == (480, 480, False)
        assert report.rows[0].inputs == ((10, 6),) and given.logits is x
    assert mapped([Slots(x), 3], lambda one: one.numel())[0].logits == 60
    assert len(list(tensors([Slots(x), 3, {"b": x}]))) == 2


class Shifted(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 4)

    def forward(self, x):
        return self.layer(x) + torch.arange(4)


@pytest.mark.parametrize(
    "around", [FakeTensorMode, lambda: torch.device("meta"), lambda: FlopCounterMode(display=False)]
)
def test_a_bill_within_somebodys_mode(around):
    with around():
        report = nacre.cost(Shifted(), torch.empty(10, 6))
        assert (report.flops, report.backward_flops, report.elementwise_flops) == (480, 480, 80)
        predict(report, SPEEDS)
    assert all(row.predicted_seconds > 0 for row in report.rows)
    with around():
        model = Shifted()
    assert nacre.cost(model, torch.empty(10, 6)).flops == 480


def test_factors_of_different_dtypes_are_refused_as_torch_does():
    layer = nn.Linear(6, 4)
    for x in (torch.zeros(2, 6, dtype=torch.int64), torch.zeros(2, 6).double()):
        for given in (x, x.to("meta")):
            with pytest.raises(nacre.CostError, match=r"have the same dtype, but these have torch.float32 and torch"):
                nacre.cost(layer, given)
    with pytest.raises(nacre.CostError, match="not implemented for 'Long'"):
        nacre.cost(nn.GELU(), torch.zeros(2, dtype=torch.int64))


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support")
@pytest.mark.parametrize("layout", ["to_sparse", "to_sparse_csr"])
@pytest.mark.parametrize("product", [torch.matmul, torch.sparse.mm])
def test_a_sparse_matrix_is_billed_for_the_values_it_has(layout, product):
    # the map 2 * 6 * 4 * 3 = 144; 5 values times 3 columns, 30; backward the transposed as many, and the weight's 144
    graph = torch.zeros(6, 6)
    graph[[0, 1, 2, 4, 5], [1, 2, 0, 3, 3]] = 1.0
    layer = nn.Linear(4, 3, bias=False)
    model = Function(lambda x, edges: product(edges, layer(x)), layer)
    assert flops(model, torch.zeros(6, 4), getattr(graph, layout)()) == (144 + 30, 30 + 144)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_packed_sequences_need_no_values(kind):
    # lengths 4 and 2: 6 rows, 4 of them with a state before; gates x 4 x (3 + 4) weights
    gates = {nn.LSTM: 4, nn.GRU: 3, nn.RNN: 1}[kind]
    packed = pack_padded_sequence(torch.zeros(4, 2, 3), [4, 2])
    on_meta = type(packed)(packed.data.to("meta"), *packed[1:])
    with torch.device("meta"):
        empty = kind(3, 4)
    expected = 2 * 6 * 28 * gates, 2 * 6 * 28 * gates + 2 * 4 * 16 * gates
    for model, given in ((kind(3, 4), packed), (empty, on_meta)):
        report = nacre.cost(model, given)
        assert (report.flops, report.backward_flops) == expected and not report.real
        assert report.saved_bytes == kept(kind(3, 4), packed)
    assert "gru" not in vars(torch._VF)  # as it was


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
def test_a_projected_lstm_forms_no_gradient_twice():
    # 10 rows, gates 16 x (3 + 2), projection 2 x 4: 2 * 10 * 88. Backward the weights' as much; the input's
    # 2 * 10 * 48; the state's for 8 rows 2 * 8 * 32; what is projected 2 * 10 * 8. Torch's counter is right here
    layer, x = nn.LSTM(3, 4, proj_size=2), torch.zeros(5, 2, 3, requires_grad=True)
    assert flops(layer, x) == (1_760, 1_760 + 960 + 512 + 160)
    with FlopCounterMode(display=False) as counter:
        torch.autograd.backward(layer(x)[0], torch.ones(5, 2, 2))
    assert counter.get_total_flops() == 1_760 + 3_392
    converted = nacre.convert(copy.deepcopy(layer))
    assert flops(converted, x) == (1_760, 3_392)
    # nacre's keeps the input 10 x 3, gates and cells 10 x 20, projected states 10 x 2, zeros for the states 2 x (2 + 4)
    assert nacre.cost(converted, x).saved_bytes == 4 * (30 + 200 + 20 + 12) == kept(converted, x)


def test_what_connectionist_temporal_classification_keeps():
    # log-probabilities 10 x 2 x 5 of 4 bytes; targets 2 x 3 of 8; a loss for each sequence; sums for each of 10 steps
    # and of 2 * 3 + 1 places of labels and blanks; the lengths as numbers, for the mean
    x = torch.zeros(10, 2, 5).log_softmax(-1).requires_grad_()
    inputs = x, torch.ones(2, 3, dtype=torch.int64), torch.tensor([10, 8]), torch.tensor([3, 2])
    report = nacre.cost(nn.CTCLoss(), *inputs)
    assert report.saved_bytes == 400 + 48 + 8 + 4 * 2 * 10 * 7 + 8 == kept(nn.CTCLoss(), *inputs)
    assert report.unknown == {"aten::_ctc_loss": 1, "aten::_ctc_loss_backward": 1}


def test_what_the_letters_stand_for_is_in_the_rows():
    report = nacre.cost(nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Conv1d(1, 1, 1)), torch.zeros(10, 1, 6))
    assert [row.sizes for row in report.rows] == [{}, {"N": 10, "D": 6, "E": 4}, {"N": 40}, {}]
    assert report.to_json()["rows"][1]["sizes"] == {"N": 10, "D": 6, "E": 4}


def test_rare_operators():
    # the product of each value's gradient and the table's row, and their sum: 2 * 10 * 6
    bags = nn.EmbeddingBag(11, 6, mode="sum")
    model = Function(lambda tokens, weights: bags(tokens, per_sample_weights=weights), bags)
    tokens = torch.zeros(2, 5, dtype=torch.int64)
    report = nacre.cost(model, tokens, torch.ones(2, 5, requires_grad=True))
    assert not report.unknown and report.backward_elementwise_flops == 60 + 120
    padded = nacre.cost(nn.ReplicationPad3d(1), torch.zeros(1, 2, 4, 4, 4, requires_grad=True))
    assert not padded.unknown
    # product with the target, exponential, addition, logarithm, sum; backward product, exponential, product, addition,
    # division, product
    report = nacre.cost(nn.SoftMarginLoss(), torch.zeros(6, 4, requires_grad=True), torch.ones(6, 4))
    assert (report.elementwise_flops, report.backward_elementwise_flops) == (5 * 24, 6 * 24)


@pytest.fixture
def speeds(monkeypatch):
    monkeypatch.setattr(ceilings, "machine_speeds", lambda needed: SPEEDS)


def test_what_writes_into_its_input_is_measured(speeds):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True))
    report = nacre.cost(model, torch.zeros(2, 3, 8, 8), measure=True)
    assert all(row.measured_forward_seconds > 0 and row.measured_backward_seconds > 0 for row in report.rows)


def test_without_gradients_no_backward_is_measured(speeds):
    for without in (torch.no_grad(), torch.inference_mode()):
        with without:
            report = nacre.cost(nn.Sequential(nn.Linear(6, 4)), torch.zeros(10, 6), measure=True)
        assert all(row.measured_forward_seconds > 0 and row.measured_backward_seconds == 0 for row in report.rows)


def test_what_autograd_asks_at_every_turn_is_not_asked_of_fake_tensors(monkeypatch):
    # torch.nn.GRU on a CPU runs step by step: about 50 operators a step, forward and backward, beside which autograd
    # asks for the device of a tensor 100 times
    calls = []
    dispatch = FakeTensorMode.dispatch
    monkeypatch.setattr(FakeTensorMode, "dispatch", lambda *given: calls.append(given[1]) or dispatch(*given))
    report = nacre.cost(nn.GRU(3, 4), torch.empty(20, 2, 3, device="meta"))
    # by hand: 20 steps of 2 sequences, 3 gates of 4, each with 3 + 4 weights; no gradient of the input nor of h_0
    assert report.flops == 2 * 40 * 12 * 7
    assert report.backward_flops == 2 * 40 * 12 * 7 + 2 * 38 * 12 * 4
    assert torch.ops.aten.addmm.default in calls
    assert calls.count(torch.ops.prim.device.default) < 40  # those of fake tensors' own decompositions, of 2,000
