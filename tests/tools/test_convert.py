"""nacre.convert: in place, exact types only, there and back."""

import copy

import pytest
import torch

import nacre
from nacre.layers import LAYERS


def small_model():
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3, padding=1),
        torch.nn.ReLU(),
        torch.nn.Flatten(2),
        torch.nn.LayerNorm(16),
        torch.nn.Linear(16, 12),
        torch.nn.GELU(),
        torch.nn.Dropout(0.0),
        torch.nn.BatchNorm1d(8),
        torch.nn.LSTM(12, 6, batch_first=True),
    )


def test_every_layer_is_swapped_and_swapped_back():
    model = small_model()
    before = [type(module) for module in model.modules()]
    parameters = list(model.parameters())
    x = torch.randn(2, 3, 4, 4)
    expected = model(x)[0]
    assert nacre.convert(model) is model
    assert [type(m) for m in model][:2] == [nacre.Conv2d, nacre.ReLU]
    assert type(model[7]) is torch.nn.BatchNorm1d
    # float32: a few layers of sums in another order
    torch.testing.assert_close(model(x)[0], expected, rtol=1e-4, atol=1e-5)
    assert all(one is other for one, other in zip(model.parameters(), parameters, strict=True))
    nacre.convert(model, to="torch")
    assert [type(module) for module in model.modules()] == before
    torch.testing.assert_close(model(x)[0], expected, rtol=0, atol=0)


def test_an_optimizer_made_before_goes_on():
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    nacre.convert(model)
    before = [p.detach().clone() for p in model.parameters()]
    model(torch.randn(2, 3, 4, 4))[0].square().sum().backward()
    optimizer.step()
    assert all(not torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True) if p.grad.any())


def test_hooks_and_tied_weights_stay():
    model = torch.nn.ModuleDict({"table": torch.nn.Embedding(11, 6), "head": torch.nn.Linear(6, 11, bias=False)})
    model["head"].weight = model["table"].weight
    called = []
    model["head"].register_forward_hook(lambda *_: called.append("head"))
    nacre.convert(model)
    assert model["head"].weight is model["table"].weight
    model["head"](model["table"](torch.tensor([1, 2]))).sum().backward()
    assert called == ["head"]
    assert model["table"].weight.grad is not None


def test_a_subclass_stays_as_it_is():
    class Scaled(torch.nn.Linear):
        def forward(self, input):
            return 2 * super().forward(input)

    model = torch.nn.Sequential(Scaled(3, 3), torch.nn.Linear(3, 3))
    report = nacre.ConversionReport()
    nacre.convert(model, report=report)
    assert type(model[0]) is Scaled and type(model[1]) is nacre.Linear
    assert report.converted == {"1": ("torch.nn.Linear", "nacre.Linear")}
    assert "subclass of torch.nn.Linear" in report.kept["0"][1]


def test_a_layer_used_twice_is_swapped_once():
    shared = torch.nn.Linear(4, 4)
    model = torch.nn.Sequential(shared, torch.nn.Tanh(), shared)
    report = nacre.ConversionReport()
    nacre.convert(model, report=report)
    assert model[0] is model[2] is shared
    assert len(report.converted) == 2


def test_the_model_itself_may_be_a_layer():
    layer = torch.nn.Softmax(dim=-1)
    assert nacre.convert(layer) is layer
    assert type(layer) is nacre.Softmax


def test_frozen_parametrised_and_quantised_dtypes():
    model = torch.nn.Sequential(
        torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(3, 3)), torch.nn.Linear(3, 3)
    )
    model[1].weight.requires_grad_(False)
    nacre.convert(model.double())
    assert not isinstance(model[0], nacre.Linear), "a parametrised layer is a class of its own"
    assert type(model[1]) is nacre.Linear and not model[1].weight.requires_grad
    assert model(torch.randn(2, 3, dtype=torch.float64)).dtype is torch.float64


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")  # torch.nn.TransformerEncoder's own
def test_a_transformer_encoder_gives_the_same_result_in_training_and_evaluation():
    torch.manual_seed(0)
    layer = torch.nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    model = torch.nn.TransformerEncoder(layer, 2)
    converted = nacre.convert(copy.deepcopy(model))
    assert type(converted.layers[0]) is nacre.TransformerEncoderLayer
    assert type(converted.layers[0].self_attn) is nacre.MultiheadAttention
    x = torch.randn(3, 5, 16)
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2, [False] * 4 + [True]])
    for training in (True, False):
        model.train(training), converted.train(training)
        with torch.set_grad_enabled(training):
            expected = model(x, src_key_padding_mask=padding)
            found = converted(x, src_key_padding_mask=padding)
        # float32, two blocks of sums in another order
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_the_report_reads_well():
    report = nacre.ConversionReport()
    nacre.convert(torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2)), report=report)
    assert str(report).splitlines() == [
        "converted 1 modules, kept 1",
        "  0: torch.nn.Linear -> nacre.Linear",
        "  1: torch.nn.BatchNorm1d kept, nacre has no such layer",
    ]


def test_attention_is_reported_as_one_layer():
    report = nacre.ConversionReport()
    nacre.convert(torch.nn.MultiheadAttention(8, 2), report=report)
    assert report.kept == {}, "out_proj belongs to the attention, which reads its weights"


@pytest.mark.parametrize(("bad", "kind"), [(3, TypeError), (torch.ones(2), TypeError), (torch.nn.Linear, TypeError)])
def test_not_a_module(bad, kind):
    with pytest.raises(kind, match=r"takes a torch\.nn\.Module; got"):
        nacre.convert(bad)


def test_unknown_target():
    with pytest.raises(ValueError, match="to 'nacre' or to 'torch'"):
        nacre.convert(torch.nn.Linear(2, 2), to="jax")


def test_every_torch_class_is_replaced_by_one_layer():
    replaced = [spec.replaces for spec in LAYERS.values() if spec.replaces is not None]
    assert len(set(replaced)) == len(replaced)


class Layers(torch.nn.Module):
    """One of each layer, called as a model calls it."""

    def __init__(self):
        super().__init__()
        self.embedding = torch.nn.Embedding(9, 8)
        self.pixels = torch.nn.Conv2d(1, 1, 1)
        self.norm = torch.nn.LayerNorm(8)
        self.attention = torch.nn.MultiheadAttention(8, 2)
        self.encoder = torch.nn.TransformerEncoderLayer(8, 2, 8)
        self.lstm, self.gru = torch.nn.LSTM(8, 8), torch.nn.GRU(8, 8)
        self.elements = torch.nn.Sequential(
            *(torch.nn.GELU(), torch.nn.ReLU(), torch.nn.SiLU(), torch.nn.Tanh(), torch.nn.Sigmoid()),
            *(torch.nn.Softmax(-1), torch.nn.LogSoftmax(-1), torch.nn.Dropout(0.5), torch.nn.Linear(8, 5)),
        )
        self.loss = torch.nn.CrossEntropyLoss()

    def forward(self, tokens, target):
        x = self.norm(self.embedding(tokens))
        x = self.pixels(x.unsqueeze(1)).squeeze(1)
        x = self.encoder(x, is_causal=False) + self.attention(x, x, value=x, need_weights=False)[0]
        x, _ = self.gru(self.lstm(x)[0])
        return self.loss(self.elements(x).flatten(0, 1), target)


def test_the_symbolic_tracer_takes_each_layer_for_a_whole():
    torch.manual_seed(0)
    model = Layers()
    wanted = [(node.op, node.target) for node in torch.fx.symbolic_trace(model).graph.nodes]
    graph = torch.fx.symbolic_trace(nacre.convert(model))
    assert [(node.op, node.target) for node in graph.graph.nodes] == wanted
    assert type(graph.lstm) is nacre.LSTM
    given = torch.randint(9, (4, 3)), torch.randint(5, (12,))
    # traced while it trains, the dropout follows the mode of the graph all the same
    torch.testing.assert_close(graph.eval()(*given), model.eval()(*given), rtol=0, atol=0)


def test_the_symbolic_tracer_looks_into_a_subclass():
    class Twice(nacre.Linear):
        def forward(self, input):
            return 2 * super().forward(input)

    model = torch.nn.Sequential(Twice(3, 2))
    x = torch.randn(4, 3)
    graph = torch.fx.symbolic_trace(model)
    assert [node.op for node in graph.graph.nodes].count("call_module") == 0
    torch.testing.assert_close(graph(x), model(x))  # the graph holds torch's product, which rounds in another order


def test_the_symbolic_tracer_looks_into_a_layer_that_is_all_there_is():
    layer = nacre.Linear(3, 2)
    x = torch.randn(4, 3)
    torch.testing.assert_close(torch.fx.symbolic_trace(layer)(x), layer(x))  # torch's product, as above
