"""A graph exported or compiled for sizes of any number serves them all: no size that decides eagerly is in it."""

import pytest
import torch
from torch.export import Dim, export

import nacre
from nacre.blocks import BLOCKS
from nacre.layers import LAYERS

pytestmark = pytest.mark.usual_sizes

REPLACED = [spec for spec in (*LAYERS.values(), *BLOCKS.values()) if spec.replaces is not None]

_PAIR = ((3, 5, 32),)
# constructor's arguments, shapes of the inputs; in all of them the first size may be any
CALLS = {
    "linear": ((32, 24), ((6, 32),)),
    "layer_norm": ((32,), _PAIR),
    "conv2d": ((4, 8, 3), ((3, 4, 9, 9),)),
    "attention": ((32, 4, 0.0, True, False, False, None, None, True), _PAIR * 3),
    "dropout": ((0.5,), _PAIR),
    "embedding": ((11, 32), (torch.int64,)),
    "softmax": ((-1,), _PAIR),
    "log_softmax": ((-1,), _PAIR),
    **{name: ((), _PAIR) for name in ("gelu", "relu", "silu", "tanh", "sigmoid")},
    "lstm": ((32, 8, 1, True, True), _PAIR),
    "gru": ((32, 8, 1, True, True), _PAIR),
    "cross_entropy": ((), ((6, 11), torch.int64)),
    "linear_cross_entropy": ((32, 11), ((6, 32), torch.int64)),
    "transformer_encoder_layer": ((32, 4, 48, 0.0, "relu", 1e-5, True), _PAIR),
}


def call(spec):
    arguments, shapes = CALLS[spec.name]
    layer = spec.layer(*arguments)
    inputs = tuple(torch.arange(6) if shape is torch.int64 else torch.randn(shape) for shape in shapes)
    return layer, inputs


def larger(inputs):
    return tuple(torch.cat([tensor] * 200) for tensor in inputs)


# strict: the source is read, which takes ten times as long for the layers of many lines, whose parts are here as well
LONG = ("attention", "transformer_encoder_layer", "lstm", "gru")
EXPORTS = [
    pytest.param(spec, strict, id=f"{spec.name}{'-strict' if strict else ''}")
    for spec in REPLACED
    for strict in (False, True)
    if not (strict and spec.name in LONG)
]


@pytest.mark.filterwarnings("ignore:The tensor attributes self._flat_weights:UserWarning")  # of torch's own LSTM, too
@pytest.mark.parametrize(("spec", "strict"), EXPORTS)
def test_export(spec, strict):
    layer, inputs = call(spec)
    rows = Dim("rows")
    with torch._dynamo.config.patch(allow_rnn=True):
        exported = export(layer.eval(), inputs, dynamic_shapes=tuple({0: rows} for _ in inputs), strict=strict)
    for given in (inputs, larger(inputs)):
        torch.testing.assert_close(exported.module()(*given), layer(*given))


def test_compiled_once_for_all_sizes():
    model = torch.nn.Sequential(nacre.Linear(32, 32), nacre.LayerNorm(32), nacre.Softmax(-1), nacre.GELU())
    compiled = torch.compile(model, backend="eager", fullgraph=True, dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for rows in (6, 7, 100, 4000):
            x = torch.randn(rows, 32)
            torch.testing.assert_close(compiled(x), model(x))
