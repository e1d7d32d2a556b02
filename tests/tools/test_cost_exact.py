"""The bill against numbers derived by hand; a multiply-add is 2 FLOPs, and every comparison is for equality."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import nacre
from nacre.blocks import BLOCKS
from nacre.core.op import OPS
from nacre.layers import LAYERS


def given(*shape, gradient=True):
    return torch.empty(*shape, device="meta").requires_grad_(gradient)


class Function(nn.Module):
    """A user's own module, which calls functions."""

    def __init__(self, function, *parts):
        super().__init__()
        self.function = function
        self.parts = nn.ModuleList(parts)

    def forward(self, *inputs):
        return self.function(*inputs)


def flops(model, *inputs, **keywords):
    report = nacre.cost(model, *inputs, **keywords)
    assert not report.unknown
    return report.flops, report.backward_flops


BOTH = pytest.mark.parametrize("layers", [nn, nacre], ids=["torch", "nacre"])


@BOTH
def test_linear(layers):
    # 10 rows, 6 in, 4 out: 2 * 10 * 6 * 4 = 480, and as much for either gradient
    assert flops(layers.Linear(6, 4), given(10, 6)) == (480, 960)
    assert flops(layers.Linear(6, 4, bias=False), given(2, 5, 6)) == (480, 960)
    assert flops(layers.Linear(6, 4), given(2, 5, 6)) == (480, 960)
    assert flops(layers.Linear(6, 4), given(2, 5, 6, gradient=False)) == (480, 480)  # as the first layer
    report = nacre.cost(layers.Linear(6, 4), given(10, 6))
    assert (report.params, report.trainable_params) == (6 * 4 + 4, 28)
    assert (report.elementwise_flops, report.backward_elementwise_flops) == (40, 40)  # the bias, and its gradient
    assert report.bytes == 4 * (60 + 28 + 40)
    assert nacre.cost(layers.Linear(6, 4, bias=False), given(10, 6)).elementwise_flops == 0


@BOTH
def test_convolution(layers):
    # 8 channels of 9 x 9 to 12; 3 x 3 taps, stride 2, padding 1: 5 x 5 outputs; 2 samples:
    # 2 * (2 * 12 * 25) * (8 * 9) = 86,400; either gradient has as many products
    images = given(2, 8, 9, 9)
    assert flops(layers.Conv2d(8, 12, 3, stride=2, padding=1), images) == (86_400, 172_800)
    # dilation 2 reaches over 5: 5 x 5 outputs without padding
    assert flops(layers.Conv2d(8, 12, 3, dilation=2), images) == (86_400, 172_800)
    # four groups: each output sums 8 / 4 channels
    assert flops(layers.Conv2d(8, 12, 3, stride=2, padding=1, groups=4), images) == (21_600, 43_200)
    # depthwise: 2 * (2 * 8 * 25) * 9 = 7,200
    assert flops(layers.Conv2d(8, 8, 3, stride=2, padding=1, groups=8), images) == (7_200, 14_400)
    first = given(2, 8, 9, 9, gradient=False)
    assert flops(layers.Conv2d(8, 8, 3, stride=2, padding=1, groups=8), first) == (7_200, 7_200)


def test_convolutions_of_other_kinds():
    # transposed: each of 2 * 8 * 81 inputs fills (12 / groups) * 9 outputs: 2 * 1,296 * 108 = 279,936
    images = given(2, 8, 9, 9)
    assert flops(nn.ConvTranspose2d(8, 12, 3, stride=2), images) == (279_936, 559_872)
    assert flops(nn.ConvTranspose2d(8, 12, 3, stride=2, dilation=2, groups=4), images) == (69_984, 139_968)
    assert flops(nn.ConvTranspose2d(8, 8, 3, groups=8), images) == (23_328, 46_656)  # 2 * 1,296 * 9
    assert flops(nn.Conv1d(4, 6, 5), given(3, 4, 20)) == (11_520, 23_040)  # 2 * (3 * 6 * 16) * 20
    assert flops(nn.Conv3d(2, 3, 2), given(1, 2, 4, 4, 4)) == (2_592, 5_184)  # 2 * (3 * 27) * 16
    frozen = nn.ConvTranspose2d(8, 12, 3, stride=2)
    frozen.weight.requires_grad_(False)
    assert flops(frozen, images) == (279_936, 279_936)


def test_products_called_by_hand():
    a, b, c = given(3, 4), given(4, 5), given(3, 5)
    assert flops(Function(torch.matmul), a, b) == (120, 240)  # 2 * 3 * 4 * 5
    assert flops(Function(torch.addmm), c, a, b) == (120, 240)
    assert nacre.cost(Function(torch.addmm), c, a, b).elementwise_flops == 15
    assert flops(Function(torch.baddbmm), given(7, 3, 5), given(7, 3, 4), given(7, 4, 5)) == (840, 1680)
    assert flops(Function(torch.addbmm), c, given(7, 3, 4), given(7, 4, 5)) == (840, 1680)
    assert flops(Function(torch.mv), a, given(4)) == (24, 12 * 2)  # the outer product is elementwise; W'g is 2 * 12
    assert flops(Function(torch.dot), given(9), given(9)) == (18, 0)  # both gradients are scaled vectors
    # bhld,bhsd->bhls: 2 * 2 * 3 * 5 * 6 * 4 = 1,440
    attend = Function(lambda q, k: torch.einsum("bhld,bhsd->bhls", q, k))
    assert flops(attend, given(2, 3, 5, 4), given(2, 3, 6, 4)) == (1_440, 2_880)
    # the batch of the left reaches over all: 2 * (2 * 3 * 4) * 4 * 5; one gradient alone is half of both
    assert flops(Function(torch.matmul), given(2, 3, 4, 4), given(4, 5, gradient=False)) == (960, 960)


@BOTH
def test_attention(layers):
    # 2 sequences of 5 tokens, 8 wide, 2 heads. Projections: 4 * 2 * 10 * 8 * 8 = 5,120; scores and their product with
    # the values: 2 * 2 * (2 * 5 * 5 * 8) = 1,600. Backward: projections twice, and five products of 800 (the scores
    # once more, and dV, dW, dQ, dK)
    x = given(2, 5, 8)
    for training in (True, False):
        for batch_first, tokens in ((True, x), (False, given(5, 2, 8))):
            for need_weights in (True, False):
                layer = layers.MultiheadAttention(8, 2, batch_first=batch_first).train(training)
                assert flops(layer, tokens, tokens, tokens, need_weights=need_weights) == (6_720, 14_240)
    # cross: 3 keys of width 6, values of width 7: projections 2 * (2 * 5 * 8 * 8 + 2 * 3 * 6 * 8 + 2 * 3 * 7 * 8) for
    # Q, K and V, 2 * 2 * 5 * 8 * 8 for the output; products 2 * 2 * (2 * 5 * 3 * 8); backward twice and 5 of 480
    layer = layers.MultiheadAttention(8, 2, kdim=6, vdim=7, batch_first=True)
    forward = 1_280 + 576 + 672 + 1_280 + 960
    assert flops(layer, x, given(2, 3, 6), given(2, 3, 7)) == (forward, 2 * 3_808 + 5 * 480)


def test_grouped_query_attention():
    # 2 sequences, 8 heads of 4 features ask 2 heads of keys: 6 queries, 9 keys. Forward 2 * 2 * (2 * 8 * 6 * 9 * 4)
    def attend(q, k, v):
        return functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)

    inputs = given(2, 8, 6, 4), given(2, 2, 9, 4), given(2, 2, 9, 4)
    forward, backward = flops(Function(attend), *inputs)
    assert forward == 13_824
    # on a CPU torch recomputes the scores in its fused kernel: five products of 6,912
    assert backward == 5 * 6_912
    ours = Function(lambda q, k, v: nacre.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True))
    assert flops(ours, *inputs) == (13_824, 5 * 6_912)


@BOTH
def test_recurrence(layers):
    # 5 steps of 2 sequences, 3 wide, hidden 4. LSTM: 4 gates of 4 x (3 + 4) weights, 2 * 10 * 112 = 2,240.
    # Backward: the weights' as forward; the input's 2 * 10 * 48; the state's 2 * 10 * 64, but none for the first step
    # of either sequence, whose state is zero by default: - 2 * 2 * 64
    x = given(5, 2, 3)
    assert flops(layers.LSTM(3, 4), x) == (2_240, 2_240 + 960 + 1_280 - 256)
    # GRU: 3 gates, 2 * 10 * 84 = 1,680; input 720, state 960 - 192
    assert flops(layers.GRU(3, 4), x) == (1_680, 1_680 + 720 + 960 - 192)
    # both directions are two of them
    assert flops(layers.LSTM(3, 4, bidirectional=True), x) == (4_480, 2 * 4_224)
    # projected to 2: gates read 3 + 2, and the projection 2 x 4: 2 * 10 * (80 + 8) = 1,760
    assert flops(layers.LSTM(3, 4, proj_size=2), x)[0] == 1_760
    # packed, 4 and 2 steps: 6 rows instead of 10
    packed = pack_padded_sequence(torch.zeros(4, 2, 3), [4, 2])
    assert flops(layers.LSTM(3, 4), packed)[0] == 2 * 6 * 112


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens):
        return self.head(self.embedding(tokens))


def test_tied_weights_count_once():
    report = nacre.cost(Tied(), torch.zeros(2, 5, dtype=torch.int64, device="meta"))
    assert report.params == report.trainable_params == 66
    assert (report.flops, report.backward_flops) == (2 * 10 * 6 * 11, 2 * 1_320)
    assert [row.total.parameters for row in report.rows] == [66, 66, 66]
    # the two gradients of the one table are added: 66; the embedding's own has 60 additions
    assert report.rows[0].own.backward_elementwise_flops == 66


def test_a_module_called_twice_has_two_rows():
    layer = nn.Linear(6, 6, bias=False)
    report = nacre.cost(Function(lambda x: layer(layer(x)), layer), given(10, 6, gradient=False))
    first, second = report.rows[1:]
    assert report.params == 36 and first.name == second.name == "parts.0"
    assert (first.own.flops, first.own.backward_flops) == (720, 720)  # its input has no gradient
    assert (second.own.flops, second.own.backward_flops) == (720, 1_440)
    assert report.backward_flops == 2_160


def test_functional_calls_belong_to_their_module():
    weight = nn.Parameter(torch.zeros(4, 6))
    inner = Function(lambda x: functional.linear(x, weight).relu())
    inner.weight = weight
    report = nacre.cost(nn.Sequential(nn.Linear(6, 6, bias=False), inner), given(10, 6, gradient=False))
    assert [row.name for row in report.rows] == ["", "0", "1"]
    assert (report.rows[2].own.flops, report.rows[2].own.backward_flops) == (480, 960)
    assert report.rows[2].own.elementwise_flops == 40  # relu, one a value
    assert report.rows[0].own.flops == 0


def test_frozen_layers():
    # backward: the last layer's two products; through the middle one its input's gradient; the first needs none
    model = nn.Sequential(*(nn.Linear(6, 6, bias=False) for _ in range(3)))
    model[0].weight.requires_grad_(False)
    model[1].weight.requires_grad_(False)
    report = nacre.cost(model, given(10, 6, gradient=False))
    assert [row.own.backward_flops for row in report.rows] == [0, 0, 0, 720]
    assert (report.params, report.trainable_params) == (108, 36)
    model[0].weight.requires_grad_(True)
    model[2].weight.requires_grad_(False)
    report = nacre.cost(model, given(10, 6, gradient=False))
    assert [row.own.backward_flops for row in report.rows] == [0, 720, 720, 720]


@BOTH
def test_what_nothing_depends_on_costs_nothing_backward(layers):
    used, unused = layers.Linear(6, 6), layers.Linear(6, 6)
    for ignore in (lambda x: unused(x).detach(), lambda x: unused(x).argmax(), torch.no_grad()(unused)):

        def forward(x, ignore=ignore):
            ignore(x)
            return used(x)

        report = nacre.cost(Function(forward, used, unused), given(10, 6))
        assert (report.flops, report.backward_flops) == (2 * 720, 1_440)


@pytest.mark.parametrize("options", [{"use_reentrant": True}, {"use_reentrant": False, "early_stop": False}])
@BOTH
def test_checkpointing_pays_the_forward_twice(layers, options):
    model = nn.Sequential(layers.Linear(6, 6), layers.ReLU(), layers.Linear(6, 6))
    report = nacre.cost(Function(lambda x: checkpoint(model, x, **options), model), given(10, 6))
    assert (report.flops, report.backward_flops) == (1_440, 1_440 + 2 * 1_440)
    assert [row.own.backward_flops for row in report.rows[2:]] == [720 + 1_440, 0, 720 + 1_440]
    assert report.backward_elementwise_flops == 2 * (60 + 60 + 60)  # biases and ReLU, forward again and backward
    assert report.saved_bytes == 4 * 60  # the input alone


def test_checkpointing_stops_when_it_has_what_it_needs():
    # the last layer's input is all that its backward needs: its product is not computed again
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6))
    wrapped = Function(lambda x: checkpoint(model, x, use_reentrant=False), model)
    assert flops(wrapped, given(10, 6)) == (1_440, 720 + 2 * 1_440)
    with FlopCounterMode(display=False) as counter:
        wrapped(torch.zeros(10, 6, requires_grad=True)).sum().backward()
    assert counter.get_total_flops() == 1_440 + 720 + 2 * 1_440


def test_checkpointed_functions_are_paid_where_they_ran():
    weight = nn.Parameter(torch.zeros(6, 6))

    def inside(x):
        return functional.linear(functional.linear(x, weight), weight)

    wrapped = Function(lambda x: checkpoint(inside, x, use_reentrant=False, early_stop=False))
    wrapped.weight = weight
    assert flops(wrapped, given(10, 6)) == (1_440, 1_440 + 2 * 1_440)


ENCODER = {"d_model": 8, "nhead": 2, "dim_feedforward": 16, "dropout": 0.0, "batch_first": True}


@pytest.mark.parametrize("training", [True, False])
def test_encoder_layer(training):
    # attention as above 6,720; two maps of 2 * 10 * 8 * 16 = 2,560 each. In evaluation torch's layer is one operator,
    # which hides its work from hooks; the bill does not change
    for layer in (nn.TransformerEncoderLayer(**ENCODER), nacre.TransformerEncoderLayer(**ENCODER)):
        assert flops(layer.train(training), given(2, 5, 8)) == (11_840, 14_240 + 4 * 2_560)
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter.requires_grad_(False)
        assert flops(layer, given(2, 5, 8, gradient=False)) == (11_840, 0)


def test_a_stack_of_encoder_layers_in_evaluation():
    stack = nn.TransformerEncoder(nn.TransformerEncoderLayer(**ENCODER), 3).eval()
    padding = torch.zeros(2, 5, dtype=torch.bool)
    assert flops(stack, given(2, 5, 8, gradient=False), src_key_padding_mask=padding)[0] == 3 * 11_840


def convertible():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.GELU(),
        nn.Flatten(2),
        nn.LayerNorm(36),
        nn.TransformerEncoderLayer(36, 4, 20, batch_first=True, activation="gelu"),
        nn.Dropout(0.1),
        nn.Linear(36, 7),
        nn.LogSoftmax(-1),
    )


def test_a_converted_model_has_the_same_bill():
    images = given(2, 3, 6, 6)
    before = nacre.cost(convertible(), images)
    after = nacre.cost(nacre.convert(convertible()), images)
    assert all(row.kind.startswith("nacre.") for row in after.rows if row.formula)
    # a block of nacre does dropout, addition and normalisation in one pass, and what stands between two linear maps in
    # theirs: they have no rows of their own there
    rows = {row.name: row.total for row in after.rows}
    inside = {"4.dropout1", "4.norm1", "4.linear1", "4.dropout", "4.linear2", "4.dropout2", "4.norm2"}
    assert {row.name for row in before.rows} - set(rows) == inside
    for row in before.rows:
        for name in ("parameters", "flops", "backward_flops", "elementwise_flops"):
            if row.name in rows:
                assert getattr(row.total, name) == getattr(rows[row.name], name), (name, row.name)
    for layers in (nn, nacre):
        layer = layers.TransformerEncoderLayer(36, 4, 20, batch_first=True, activation="gelu")
        assert not nacre.cost(layer, given(2, 5, 36)).unknown
    assert after.saved_bytes < before.saved_bytes and after.peak_bytes < before.peak_bytes  # nacre keeps less


@pytest.mark.parametrize("spec", LAYERS.values(), ids=list(LAYERS))
def test_a_layer_alone_is_billed_by_its_own_cost(spec):
    case = spec.cases[0]
    for kind in (spec.layer, *([spec.replaces] if spec.replaces else [])):
        layer = kind(**case.arguments).train(case.training)
        inputs, keywords = case.make()
        report, bill = nacre.cost(layer, *inputs, **keywords), spec.cost(**spec.sizes(layer, *inputs, **keywords))
        for name in ("parameters", "flops", "backward_flops", "elementwise_flops", "backward_elementwise_flops"):
            assert getattr(report.total, name) == getattr(bill, name), name
        assert report.bytes == bill.bytes and report.backward_bytes == bill.backward_bytes
        if kind is spec.layer:  # what torch.nn's keep is torch's affair
            assert report.saved_bytes == bill.saved_bytes


@pytest.mark.parametrize("name", [name for name in OPS if name not in ("lstm", "gru")])
def test_every_operator_of_nacre_has_a_cost(name):
    spec = next(spec for spec in {**LAYERS, **BLOCKS}.values() if name in spec.operators or name == spec.name)
    inputs, keywords = spec.cases[0].make()
    report = nacre.cost(spec.layer(**spec.cases[0].arguments), *inputs, **keywords)
    works = [work for row in report.rows for work in (*row.forward_work, *row.backward_work)]
    assert any(work.own for work in works) and all(work.known for work in works)


class Doubled(nn.Linear):
    def forward(self, input):
        return super().forward(input) * 2


class Other(nn.Linear):
    def forward(self, input):
        return input * self.bias


def test_subclasses_are_billed_for_what_they_do():
    doubled = nacre.cost(Doubled(6, 6), given(10, 6))
    assert (doubled.flops, doubled.backward_flops) == (720, 1_440)
    assert doubled.elementwise_flops == 60 + 60  # bias and factor
    assert nacre.cost(Other(6, 6), given(10, 6)).flops == 0
    weighted = nn.utils.parametrizations.weight_norm(nn.Linear(6, 6))
    # the bias, and the norms of the weight's 6 rows: square, sum and scale
    assert nacre.cost(weighted, given(10, 6)).elementwise_flops == 60 + 3 * 36
    called = Function(lambda x: doubled_layer.forward(x))
    doubled_layer = called.layer = nn.Linear(6, 6)
    assert flops(called, given(10, 6)) == (720, 1_440)


def test_torchs_counter_agrees_where_it_is_right():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(128, 10))
    for images in (torch.randn(2, 3, 6, 6), torch.randn(2, 3, 6, 6, requires_grad=True)):
        with FlopCounterMode(display=False) as counter:
            model(images).sum().backward()
        report = nacre.cost(model, images)
        assert report.flops + report.backward_flops == counter.get_total_flops()


def test_torchs_counter_is_wrong_for_grouped_convolutions_and_attention_on_a_cpu():
    images = torch.randn(2, 8, 9, 9, requires_grad=True)
    depthwise = nn.Conv2d(8, 8, 3, stride=2, padding=1, groups=8)
    with FlopCounterMode(display=False) as counter:
        depthwise(images).sum().backward()
    # 7,200 forward and as much for either gradient; torch's formula takes the weight's gradient for one that every
    # channel has with every other
    assert flops(depthwise, images) == (7_200, 14_400)
    assert counter.get_total_flops() != 21_600
    query = torch.randn(2, 2, 5, 4, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        functional.scaled_dot_product_attention(query, query, query).sum().backward()
    # 2 * 2 * (2 * 2 * 5 * 5 * 4) = 1,600 forward and five products of 800 backward; torch's counter does not know the
    # operator that runs on a CPU
    assert flops(Function(functional.scaled_dot_product_attention), query, query, query) == (1_600, 4_000)
    assert counter.get_total_flops() != 5_600


def test_unknown_operators_are_named():
    report = nacre.cost(Function(lambda x: torch.linalg.inv(x) @ x), given(4, 4))
    assert report.unknown == {"aten::linalg_inv_ex": 1}
    assert report.flops == 2 * 64 and "linalg_inv_ex" in report.table()
    assert report.rows[0].unknown == report.unknown


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_a_feed_forward_step_costs_what_its_two_maps_do(activation, dropout):
    """4 x 8 rows through 16 -> 32 -> 16: 2 * 32 * 16 * 32 = 32,768 FLOPs each; backward two products of each map."""
    layer = nacre.TransformerEncoderLayer(16, 2, 32, dropout, activation=activation, batch_first=True)
    reference = nacre.convert(copy.deepcopy(layer), to="torch")
    input = torch.randn(4, 8, 16, requires_grad=True)
    ours, torchs = nacre.cost(layer, input), nacre.cost(reference, input)
    # projections 2 * 32 * 16 * 16 * 4 = 65,536; scores and weighted sums 2 * 4 * 2 * 8 * 8 * 8 each = 8,192
    assert ours.flops == torchs.flops == 2 * 32_768 + 65_536 + 2 * 8_192
    # the scores are computed once more in the backward
    assert ours.backward_flops == torchs.backward_flops == 4 * 32_768 + 2 * 65_536 + 5 * 8_192
