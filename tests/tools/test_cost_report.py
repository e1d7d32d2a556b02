"""Memory, published architectures, bad input, and the forms of the report."""

import copy
import json
import sys
import time

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils.rnn import pack_sequence

import nacre
from tests.tools.architectures import BERT, GPT2, ViT


def test_what_is_kept_for_the_backward():
    # 10 rows: the input 8 wide, ReLU's output 16 wide, which the second layer's input is too; float32
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    report = nacre.cost(model, torch.zeros(10, 8))
    assert report.saved_bytes == 4 * (80 + 160)
    assert [row.own.saved_bytes for row in report.rows] == [0, 4 * 80, 4 * 160, 0]  # the first that keeps it pays
    assert nacre.cost(model.half(), torch.zeros(10, 8, dtype=torch.float16)).saved_bytes == 2 * 240
    with torch.no_grad():
        model.requires_grad_(False)
    assert nacre.cost(model.float(), torch.zeros(10, 8)).saved_bytes == 0


def test_dropout_keeps_a_mask_in_torch_and_a_seed_in_nacre():
    x = torch.zeros(100, 8, requires_grad=True)
    assert nacre.cost(nacre.Dropout(0.5), x).saved_bytes == 8
    assert nacre.cost(nn.Dropout(0.5), x).saved_bytes >= 800  # a mask of a byte a value at least
    assert nacre.cost(nn.Dropout(0.5).eval(), x).saved_bytes == 0


def test_what_no_backward_will_come_for_is_not_kept():
    class Ignored(nn.Module):
        def forward(self, x):
            (x * x).sum()
            return x * 2

    assert nacre.cost(Ignored(), torch.zeros(10, requires_grad=True)).saved_bytes == 0


def test_most_memory_at_one_time():
    # 1,000 weights; input 100 x 10, output 100 x 100, its gradient; the weight's gradient is there beside all of them
    report = nacre.cost(nn.Linear(10, 100, bias=False), torch.zeros(100, 10))
    assert report.parameter_bytes == 4_000
    assert report.peak_bytes == 4 * (1_000 + 1_000 + 10_000 + 10_000 + 1_000)
    # nothing is kept: three layers hold two activations at a time at most
    model = nn.Sequential(*(nn.Linear(100, 100, bias=False) for _ in range(3))).requires_grad_(False)
    report = nacre.cost(model, torch.zeros(50, 100))
    # the input, which its owner holds, and one layer's input and output
    assert report.peak_bytes == 4 * (3 * 10_000 + 5_000 + 2 * 5_000)


def test_nothing_is_left_behind():
    class Remembers(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.lstm, self.seen = nn.BatchNorm1d(4), nn.LSTM(4, 4), []

        def forward(self, x):
            self.last = self.norm(x)
            self.seen.append(self.last)
            return self.lstm(self.last)[0]

    model = Remembers()
    state, flat = copy.deepcopy(model.state_dict()), list(model.lstm._flat_weights)
    call, forward = nn.Module.__call__, nn.Linear.forward
    x = torch.ones(3, 4, requires_grad=True)
    report = nacre.cost(model, x)
    assert not report.real and report.params == 8 + 160
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert model.seen == [] and not hasattr(model, "last")
    assert all(one is other for one, other in zip(model.lstm._flat_weights, flat, strict=True))
    assert x.grad is None and all(parameter.grad is None for parameter in model.parameters())
    with pytest.raises(ValueError):
        nacre.cost(model, torch.ones(3, 5))
    assert (nn.Module.__call__, nn.Linear.forward) == (call, forward)
    assert torch.backends.mha.get_fastpath_enabled()
    assert type(model(x)) is torch.Tensor


# ---- published architectures, by hand: V vocabulary, P positions, D width, L layers, F = 4 D; B sequences of T tokens


def layer_flops(tokens, length, width, inner):
    """Four projections, two maps, and two products of queries with keys and weights with values."""
    return 2 * tokens * (4 * width * width + 2 * width * inner) + 4 * tokens * length * width


def test_gpt2():
    # (V + P) D + L (12 D^2 + 13 D) + 2 D = 124,439,808; the head is the embedding's weight
    with torch.device("meta"):
        model = GPT2(vocabulary=50257, positions=1024, width=768, heads=12, layers=12)
    report = nacre.cost(model, torch.zeros(2, 128, dtype=torch.int64, device="meta"))
    assert report.params == 124_439_808
    assert report.flops == 12 * layer_flops(256, 128, 768, 3072) + 2 * 256 * 768 * 50257
    # backward: every product twice, and the scores once more, since torch's attention does not keep them
    assert report.backward_flops == 2 * report.flops + 12 * 2 * 256 * 128 * 768
    assert not report.unknown


def test_bert():
    # (V + P + 2) D + 2 D + L (12 D^2 + 13 D) + D^2 + D = 109,482,240 with the pooler
    with torch.device("meta"):
        model = BERT(vocabulary=30522, positions=512, width=768, heads=12, layers=12)
    report = nacre.cost(model, torch.zeros(4, 64, dtype=torch.int64, device="meta"))
    assert report.params == 109_482_240
    assert report.flops == 12 * layer_flops(256, 64, 768, 3072) + 2 * 4 * 768 * 768


def test_vit():
    # patches 16 x 16 x 3 D + D, D for the class, 197 D positions, L (12 D^2 + 13 D), 2 D, and 1000 D + 1000
    with torch.device("meta"):
        model = ViT(image=224, patch=16, width=768, heads=12, layers=12, classes=1000)
    report = nacre.cost(model, torch.zeros(2, 3, 224, 224, device="meta"))
    assert report.params == 86_567_656
    patches = 2 * (2 * 196) * 768 * (3 * 16 * 16)
    assert report.flops == patches + 12 * layer_flops(2 * 197, 197, 768, 3072) + 2 * 2 * 768 * 1000
    converted = nacre.cost(nacre.convert(model), torch.zeros(2, 3, 224, 224, device="meta"))
    assert (converted.flops, converted.backward_flops) == (report.flops, report.backward_flops)
    assert converted.elementwise_flops == report.elementwise_flops


def test_a_model_of_seventy_billion_parameters():
    # 80 layers of 12 * 8192^2 weights and their biases, 13 * 8192: more than 64 billion; 256 GB in float32
    with torch.device("meta"):
        layer = nn.TransformerEncoderLayer(8192, 64, 4 * 8192, batch_first=True)
        model = nn.TransformerEncoder(layer, 80).requires_grad_(False)
    start = time.process_time()
    report = nacre.cost(model, torch.zeros(1, 2048, 8192, device="meta"))
    assert time.process_time() - start < 60  # seconds; it takes 2
    assert report.params == 80 * (12 * 8192**2 + 13 * 8192) > 64e9
    assert report.flops == 80 * layer_flops(2048, 2048, 8192, 4 * 8192)


# ---- bad input


def test_other_inputs_are_asked_for():
    model = nn.Sequential(nn.Linear(8, 4))
    with pytest.raises(nacre.CostError, match=r"Sequential .* shape \(10, 6\), and it said: .* takes \(input"):
        nacre.cost(model, torch.zeros(10, 6))
    with pytest.raises(nacre.CostError, match=r"got no input, and it said: .*missing 1 required"):
        nacre.cost(model)
    with pytest.raises(TypeError, match=r"takes a torch.nn.Module; got a builtin_function"):
        nacre.cost(torch.relu)
    with pytest.raises(ValueError, match=r"has its parameters; LazyLinear has not.*Call the model once"):
        nacre.cost(nn.LazyLinear(3), torch.zeros(2, 2))


class Decides(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        return self.layer(x) if x.sum() > 0 else self.layer(self.layer(x))


def test_control_flow_by_values():
    with pytest.raises(nacre.CostError, match=r"decides by values.*Give real tensors"):
        nacre.cost(Decides(), torch.ones(3, 4, device="meta"))
    model = Decides()
    report = nacre.cost(model, torch.ones(3, 4))
    assert report.real and report.flops == 2 * 3 * 16
    assert nacre.cost(model, -torch.ones(3, 4)).flops == 2 * 2 * 3 * 16
    assert all(parameter.grad is None for parameter in model.parameters())


def test_whole_numbers_keep_their_values():
    class Loss(nn.Module):
        def forward(self, x, target, lengths):
            return functional.cross_entropy(x[: int(lengths.max())], target)

    x, target, lengths = torch.zeros(5, 4, requires_grad=True), torch.tensor([0, 1, 3]), torch.tensor([2, 3])
    report = nacre.cost(Loss(), x, target, lengths)
    # logits of 3 rows: log-softmax 5 a value and 1 a row, the loss 2 a row; the larger of two lengths takes two
    assert not report.real and report.elementwise_flops == 5 * 12 + 3 + 2 * 3 + 2
    packed = pack_sequence([torch.zeros(3, 4), torch.zeros(2, 4)])
    assert not nacre.cost(nacre.LSTM(4, 4), packed).real


def test_without_gradients_there_is_no_backward():
    model = nn.Linear(4, 4)
    for without in (torch.no_grad(), torch.inference_mode()):
        with without:
            report = nacre.cost(model, torch.zeros(3, 4))
        assert (report.flops, report.backward_flops, report.saved_bytes) == (96, 0, 0)


# ---- forms


class Functional(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.weight = nn.Parameter(torch.zeros(4, 2))

    def forward(self, x):
        return self.layer(x) @ self.weight


def test_table_and_json():
    report = nacre.cost(Functional(), torch.zeros(3, 4))
    text = report.table()
    lines = [line.split()[0] for line in text.splitlines()[:4]]
    assert lines == ["module", "(model)", "(own:", "layer"]
    assert "28, of which 28 are trained" in text and "144 forward" in text
    assert "layer" not in report.table(depth=0)
    values = json.loads(json.dumps(report.to_json()))
    assert values["flops"] == 144 and values["rows"][1]["parent"] == 0
    assert values["rows"][1]["inputs"] == [[3, 4]] and values["rows"][1]["formula"] == "linear"
    assert sum(row["own"]["flops"] for row in values["rows"]) == values["flops"]
    assert values["rows"][0]["total"]["parameters"] == values["params"] == 28
    assert report.rows[0].share == 1.0 and 0 < report.rows[1].share < 1


def test_dataframe(monkeypatch):
    class Frame(list):
        pass

    monkeypatch.setitem(sys.modules, "pandas", type(sys)("pandas"))
    sys.modules["pandas"].DataFrame = Frame
    frame = nacre.cost(Functional(), torch.zeros(3, 4)).to_dataframe()
    assert [line["flops"] for line in frame] == [144, 96] and frame[0]["own_flops"] == 48


def test_what_a_block_does_itself_is_named():
    block = nacre.TransformerEncoderLayer(8, 2, 16, dropout=0.1)
    report = nacre.cost(block, torch.zeros(5, 2, 8))
    assert report.rows[0].own_operations == ("feed-forward maps", "residual + dropout + norm")
    assert "(own: feed-forward maps, residual + dropout + norm)" in report.table()
    assert report.to_json()["rows"][0]["own_operations"] == ["feed-forward maps", "residual + dropout + norm"]
