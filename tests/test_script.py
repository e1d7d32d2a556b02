"""torch.jit.script compiles a model with nacre's layers as it compiles torch.nn's."""

import io

import pytest
import torch
from torch import Tensor, nn

import nacre
from nacre.blocks import BLOCKS
from nacre.layers import LAYERS

REPLACED = [spec for spec in (*LAYERS.values(), *BLOCKS.values()) if spec.replaces is not None]
# torch's compiler of source is deprecated; torch's own containers tell why they will not take their fused path
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:enable_nested_tensor is True:UserWarning"),
]


class Reader(nn.Module):
    """Every layer that torch.jit.script compiles as torch.nn's."""

    def __init__(self, layers) -> None:
        super().__init__()
        self.embedding = layers.Embedding(9, 8)
        self.pixels = layers.Conv2d(1, 1, 3, padding=1)
        self.lstm = layers.LSTM(8, 8, batch_first=True, bidirectional=True)
        self.gru = layers.GRU(16, 8, batch_first=True)
        self.attention = layers.MultiheadAttention(8, 2, batch_first=True)
        self.encoder = layers.TransformerEncoderLayer(8, 2, 12, batch_first=True)
        self.elements = nn.Sequential(
            *(layers.LayerNorm(8), layers.Linear(8, 5), layers.Dropout(0.5), layers.GELU(), layers.ReLU()),
            *(layers.SiLU(), layers.Tanh(), layers.Sigmoid(), layers.Softmax(-1), layers.LogSoftmax(-1)),
        )
        self.loss = layers.CrossEntropyLoss()

    def forward(self, tokens: Tensor, target: Tensor) -> Tensor:
        x = self.embedding(tokens)
        x = self.pixels(x.unsqueeze(1)).squeeze(1)
        x = self.gru(self.lstm(x)[0])[0]
        x = self.encoder(x) + self.attention(x, x, x)[0]
        return self.loss(self.elements(x).flatten(0, 1), target)


def pair():
    torch.manual_seed(0)
    model, reference = Reader(nacre).eval(), Reader(nn).eval()
    reference.load_state_dict(model.state_dict())
    return model, reference


TOKENS, TARGET = torch.arange(12).reshape(4, 3) % 9, torch.arange(12) % 5


def test_the_test_names_every_layer():
    kinds = {type(module) for module in Reader(nacre).modules()}
    # torch.nn's own LinearCrossEntropyLoss is not compiled either
    assert {spec.layer for spec in REPLACED} - kinds == {nacre.LinearCrossEntropyLoss}


def test_script_save_and_load():
    model, reference = pair()
    expected = torch.jit.script(reference)
    scripted = torch.jit.script(model)
    assert scripted.code == expected.code
    file = io.BytesIO()
    torch.jit.save(scripted, file)
    file.seek(0)
    for compiled in (scripted, torch.jit.load(file), torch.jit.freeze(scripted)):
        assert torch.equal(compiled(TOKENS, TARGET), expected(TOKENS, TARGET))


def test_the_model_keeps_its_objects_and_parameters_and_comes_back():
    model, reference = pair()
    modules, parameters = list(model.modules()), list(model.parameters())
    torch.jit.script(model)
    assert all(one is other for one, other in zip(modules, model.modules(), strict=True))
    assert all(one is other for one, other in zip(parameters, model.parameters(), strict=True))
    assert type(model.gru) is nn.GRU
    nacre.convert(model)
    assert type(model.gru) is nacre.GRU
    torch.testing.assert_close(model(TOKENS, TARGET), reference(TOKENS, TARGET))


def test_a_subclass_stays_as_it_is():
    class Doubled(nacre.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * torch.nn.functional.linear(input, self.weight, self.bias)

    model = nn.Sequential(Doubled(3, 2))
    x = torch.ones(4, 3)
    assert torch.equal(torch.jit.script(model)(x), model(x))
    assert type(model[0]) is Doubled
