"""Bills of small models of today's kinds against numbers derived by hand; what they keep against what autograd says."""

import pytest
import torch
from torch import nn
from torch.func import vmap
from torch.nn import functional

import nacre
from tests.tools.test_cost_exact import Function, flops


def kept(model, *inputs):
    """Bytes of the storages that autograd holds after a real forward, without parameters and buffers."""
    own = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())}
    living = {}

    class Held:
        def __init__(self, tensor):
            self.tensor = tensor
            living[id(self)] = tensor

        def __del__(self):
            living.pop(id(self))

    with torch.autograd.graph.saved_tensors_hooks(Held, lambda held: held.tensor):
        result = model(*inputs)
        storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in living.values()}
        del result
    return sum(size for key, size in storages.items() if key not in own)


def given(*shape):
    return torch.randn(*shape, requires_grad=True)


def convolved(in_channels, out_channels):
    convolution = nn.Conv2d(in_channels, out_channels, 3, padding=1)
    return nn.Sequential(convolution, nn.BatchNorm2d(out_channels), nn.ReLU(inplace=True))


class UNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.fine, self.coarse, self.last = convolved(3, 8), convolved(8, 16), convolved(16, 8)
        self.pool, self.up, self.out = nn.MaxPool2d(2), nn.ConvTranspose2d(16, 8, 2, stride=2), nn.Conv2d(8, 2, 1)

    def forward(self, images):
        fine = self.fine(images)
        return self.out(self.last(torch.cat([self.up(self.coarse(self.pool(fine))), fine], 1)))


def test_a_unet():
    # 2 images of 8 x 8: 128 places, 32 after pooling. 2 * 128 * 8 * 27 = 55,296; 2 * 32 * 16 * 72 = 73,728; upwards
    # 2 * (2 * 16 * 16) * 8 * 4 = 32,768; 2 * 128 * 8 * 144 = 294,912; 2 * 128 * 2 * 8 = 4,096. The images need none
    model, images = UNet(), torch.randn(2, 3, 8, 8)
    report = nacre.cost(model, images)
    assert (report.flops, report.backward_flops) == (460_800, 2 * 460_800 - 55_296)
    # weights and biases 224, 1,168, 520, 1,160 and 18; scale and shift of 8, 16 and 8 channels
    assert report.params == 224 + 1_168 + 520 + 1_160 + 18 + 2 * 32
    # images 384 values; before and after each normalisation 2 * 1,024, 2 * 512, 2 * 1,024; pooled 256; joined 2,048; 2
    # statistics of 32 channels; and where each of 256 maxima was, 8 bytes
    assert report.saved_bytes == 4 * (384 + 5_120 + 256 + 2_048 + 64) + 8 * 256 == kept(model, images)


class SqueezeExcite(nn.Module):
    def __init__(self):
        super().__init__()
        self.depth = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False)
        self.point = nn.Conv2d(8, 16, 1, bias=False)
        self.down, self.up = nn.Linear(16, 4), nn.Linear(4, 16)

    def forward(self, images):
        values = functional.relu6(self.point(self.depth(images)))
        weights = self.up(self.down(values.mean((2, 3))).relu()).sigmoid()
        return values * weights[:, :, None, None]


def test_a_separable_convolution_with_squeeze_and_excitation():
    # 2 x 36 places: 2 * 72 * 8 * 9 = 10,368; 2 * 72 * 16 * 8 = 18,432; two maps of 2 * 2 * 16 * 4 = 256
    model, images = SqueezeExcite(), torch.randn(2, 8, 6, 6)
    assert flops(model, images) == (29_312, 2 * 29_312 - 10_368)
    assert nacre.cost(model, images).params == 72 + 128 + 68 + 80
    assert nacre.cost(model, images).saved_bytes == kept(model, images)


class Llama(nn.Module):
    """A block 16 wide: 4 heads of queries, 2 of keys and values, gated feed-forward step of 24."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.RMSNorm(16), nn.RMSNorm(16)
        widths = {"q": (16, 16), "k": (16, 8), "v": (16, 8), "o": (16, 16), "gate": (16, 24), "up": (16, 24)}
        self.maps = nn.ModuleDict({name: nn.Linear(*width, bias=False) for name, width in widths.items()})
        self.down = nn.Linear(24, 16, bias=False)

    def forward(self, x):
        batch, length, width = x.shape
        maps, y = self.maps, self.first(x)
        q, k, v = (maps[name](y).view(batch, length, -1, 4).transpose(1, 2) for name in "qkv")
        q, k = turned(q), turned(k)
        attended = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + maps["o"](attended.transpose(1, 2).reshape(batch, length, width))
        y = self.second(x)
        return x + self.down(functional.silu(maps["gate"](y)) * maps["up"](y))


def turned(x):
    """Rotary positions."""
    angles = torch.arange(x.shape[-2])[:, None] * torch.ones(2)
    a, b = x.chunk(2, -1)
    return torch.cat([a * angles.cos() - b * angles.sin(), a * angles.sin() + b * angles.cos()], -1)


@pytest.mark.parametrize("batch", [1, 2])
def test_a_llama_block(batch):
    # 6 tokens each; weights 16 * (16 + 8 + 8 + 16 + 24 + 24 + 24) = 1,920; products of attention 2 * 2 * 4 * 36 * 4 a
    # sequence. All maps' inputs need a gradient, for the norms' weights are before them; attention has 5 products
    products, attention = 2 * batch * 6 * 1_920, 2 * 2 * batch * 4 * 36 * 4
    model, x = Llama(), torch.randn(batch, 6, 16)
    assert flops(model, x) == (products + attention, 2 * products + 5 * attention // 2)
    report = nacre.cost(model, x)
    assert report.params == 1_920 + 32 and report.saved_bytes == kept(model, x)


class Adapted(nn.Module):
    def __init__(self):
        super().__init__()
        self.base = nn.Linear(8, 6).requires_grad_(False)
        self.down, self.up = nn.Linear(8, 2, bias=False), nn.Linear(2, 6, bias=False)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


def test_a_frozen_layer_with_an_adapter():
    # 5 rows: 2 * 5 * (48 + 16 + 12) forward; the adapter's backward: 160 for the first weight, 2 * 120 for the other
    model, x = Adapted(), torch.randn(5, 8)
    report = nacre.cost(model, x)
    assert (report.params, report.trainable_params) == (54 + 28, 28)
    assert (report.flops, report.backward_flops) == (760, 160 + 240)
    assert report.saved_bytes == 4 * (40 + 10) == kept(model, x)  # the input, and what is between the two small maps


def test_bilinear():
    # 6 rows, 3 and 4 values in, 5 out: x A first, 2 * 6 * 5 * 3 * 4 = 720, then that with y, 2 * 6 * 5 * 4 = 240.
    # Backward: A's as 720, with 90 products of x and the gradient before; y's as forward, 960; x's sums the outputs
    # first, 720, then y, 2 * 6 * 3 * 4 = 144
    layer = nn.Bilinear(3, 4, 5)
    assert flops(layer, torch.randn(6, 3), torch.randn(6, 4)) == (960, 720)
    assert nacre.cost(layer, torch.randn(6, 3), torch.randn(6, 4)).backward_elementwise_flops == 90 + 30
    assert flops(layer, given(6, 3), given(6, 4)) == (960, 720 + 960 + 864)


def test_plain_recurrence():
    # 5 steps of 2 sequences, 3 wide, hidden 4: 2 * 10 * 4 * 7 = 560; backward the weights' as much, the input's 240,
    # the state's 320 without the first step's 64; both directions are two, and tanh or ReLU does not matter
    for options, places in (({}, 1), ({"bidirectional": True}, 2), ({"nonlinearity": "relu"}, 1)):
        layer = nn.RNN(3, 4, **options)
        assert flops(layer, given(5, 2, 3)) == (560 * places, (560 + 240 + 320 - 64) * places)


def test_normalisation_in_training_and_evaluation():
    # 2 x 4 channels of 25 values. Training keeps the input, and mean and inverse deviation of each channel
    x = given(2, 4, 5, 5)
    assert nacre.cost(nn.BatchNorm2d(4), x).saved_bytes == 4 * (200 + 8)
    assert nacre.cost(nn.BatchNorm2d(4).eval(), x).saved_bytes == 4 * 200
    assert nacre.cost(nn.GroupNorm(2, 4), x).saved_bytes == 4 * (200 + 2 * 4)  # of each of 2 samples' 2 groups


def test_parts_without_gradient():
    # 5 rows of 8: each map 640; the teacher has no backward, the student's first map one product, its second two
    teacher, student = nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 8), nn.ReLU(inplace=True), nn.Linear(8, 8))

    def loss(x):
        with torch.no_grad():
            target = teacher(x)
        return functional.mse_loss(student(x), target)

    model, x = Function(loss, teacher, student), torch.randn(5, 8)
    assert flops(model, x) == (3 * 640, 3 * 640)
    report = nacre.cost(model, x)
    assert report.saved_bytes == 4 * 4 * 40 == kept(model, x)  # the input, the hidden values, result and target
    assert report.elementwise_flops == 3 * 40 + 40 + 3 * 40  # biases, ReLU; subtract, square and add
    detached = Function(lambda x: student[2](student[0](x).detach()), student)
    assert flops(detached, x) == (2 * 640, 640)


def test_a_parameter_that_a_function_reaches_by_itself():
    weight = nn.Parameter(torch.randn(8, 8))
    model = Function(lambda x: x @ weight @ weight.T + functional.linear(x, weight))
    model.weight = weight
    x = torch.randn(5, 8)
    # three products of 640; backward three for the weight, and one for what lies between
    report = nacre.cost(model, x)
    assert (report.params, report.flops, report.backward_flops) == (64, 3 * 640, 4 * 640)
    assert report.saved_bytes == 4 * 2 * 40 == kept(model, x)  # the input and what lies between
    assert weight.grad is None


def test_layers_that_are_mapped_over_an_axis():
    layer = nn.Linear(8, 4)
    assert flops(Function(lambda x: vmap(layer)(x), layer), torch.randn(5, 8)) == (320, 320)  # 2 * 5 * 8 * 4


@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True}])
def test_torchs_lstm_keeps_the_workspace_of_its_library(options):
    layer, x = nn.LSTM(3, 4, **options), torch.randn(5, 2, 3)
    assert nacre.cost(layer, x).saved_bytes == kept(layer, x)


def elementwise(function, *inputs):
    report = nacre.cost(Function(function), *inputs)
    assert not report.unknown
    return report.elementwise_flops


def test_decompositions_and_transforms():
    matrix = given(4, 4)
    # elimination of 4 rows: 3 + 2 + 1 divisions, 2 * (9 + 4 + 1) multiplications and subtractions
    assert elementwise(torch.linalg.solve, matrix, given(4, 2)) == 34 + 2 * 4 * 4 * 2  # and 2 triangles for 2 columns
    assert elementwise(torch.linalg.det, matrix) == 34 + 4
    assert elementwise(torch.linalg.cholesky, matrix) == 1 + 4 + 9 + 16
    # 8 values: 3 times 4 butterflies of 10 operations
    values = torch.randn(3, 8, dtype=torch.complex64)
    assert elementwise(torch.fft.fft, values) == 3 * 120
    assert elementwise(torch.fft.rfft, given(3, 8)) == elementwise(torch.fft.irfft, values[:, :5]) == 3 * 60
    assert nacre.cost(Function(torch.fft.fft), torch.randn(6)).unknown == {"aten::_fft_r2c": 1}


def test_other_operators():
    # 4 products of a weight's two factors, 4 with the values, 3 additions; 2 and 1 along one axis
    assert elementwise(nn.Upsample(scale_factor=2, mode="bilinear"), given(1, 2, 4, 4)) == 11 * 128
    assert elementwise(nn.Upsample(scale_factor=2, mode="linear"), given(1, 2, 4)) == 3 * 16
    assert elementwise(torch.searchsorted, torch.arange(5.0), torch.randn(7)) == 7 * 3
    assert elementwise(torch.cdist, given(5, 4), given(6, 4)) == 30 * (3 * 4 + 1)
    # of a nearest neighbour, every value of the gradient is read once
    assert nacre.cost(nn.Upsample(scale_factor=2), given(1, 2, 4, 4)).backward_elementwise_flops == 128
    assert elementwise(lambda x: x.clone().unsqueeze_(0).transpose_(0, 1), given(3, 4)) == 0
    assert elementwise(nn.Hardswish(), given(3, 4)) == 12


@pytest.mark.parametrize("name", ["sort", "topk", "unique", "kthvalue", "svdvals"])
def test_what_sizes_do_not_decide_is_named(name):
    further = (2,) if name in ("topk", "kthvalue") else ()
    function = getattr(torch, name, None) or getattr(torch.linalg, name)
    assert len(nacre.cost(Function(lambda x: function(x, *further)), torch.randn(4, 4)).unknown) == 1


class Experts(nn.Module):
    """Two experts, each with every second row."""

    def __init__(self):
        super().__init__()
        self.gate, self.experts = nn.Linear(8, 2), nn.ModuleList(nn.Linear(8, 8) for _ in range(2))

    def forward(self, x):
        shares, out = self.gate(x).softmax(-1), torch.zeros_like(x)
        for place, expert in enumerate(self.experts):
            rows = torch.arange(place, len(x), 2)
            share = shares.index_select(0, rows)[:, place : place + 1]
            out = out.index_add(0, rows, expert(x.index_select(0, rows)) * share)
        return out


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.map, self.scale = nn.LayerNorm(8), nn.Linear(8, 8), nn.Parameter(torch.ones(8))

    def forward(self, x):
        return x + self.scale * self.map(self.norm(x))


TOKENS, STARTS = torch.tensor([1, 2, 3, 4, 5]), torch.tensor([0, 3])


@pytest.mark.parametrize(
    ("model", "inputs", "forward", "backward"),
    [
        # gate 2 * 6 * 16, experts 2 * 3 * 64 each; backward the weights', and no input asks
        (Experts(), (torch.zeros(6, 8),), 192 + 768, 192 + 768),
        # one map of 2 * 6 * 64; backward its weights', and its input's for the normalisation's parameters
        (Scaled(), (torch.zeros(6, 8),), 768, 1536),
        (nn.utils.parametrizations.weight_norm(nn.Linear(8, 6)), (torch.zeros(5, 8),), 480, 480),
        # and in training one step of power iteration: three products of 2 * 48, one of 2 * 6
        (nn.utils.parametrizations.spectral_norm(nn.Linear(8, 6)), (torch.zeros(5, 8),), 480 + 300, 480),
        (nn.Linear(4, 3), (torch.zeros(5, 4),), 120, 120),
        # groups of 2 channels in and 3 out: 2 * 2 * 4 * 25 * 3 * 9
        (nn.ConvTranspose2d(4, 6, 3, 2, dilation=2, groups=2), (torch.zeros(2, 4, 5, 5),), 10_800, 10_800),
        (nn.Conv2d(4, 4, 3, groups=4), (torch.zeros(2, 4, 8, 8),), 5_184, 5_184),
        (nn.EmbeddingBag(10, 4), (TOKENS, STARTS), 0, 0),
        (nn.EmbeddingBag(10, 4, mode="max"), (TOKENS, STARTS), 0, 0),
        # 16 steps of 2 sequences, 3 gates: 2 * 32 * 84; backward without the first step's state and the input
        (nn.GRU(3, 4), (torch.zeros(16, 2, 3),), 5_376, 5_376 + 2 * 15 * 2 * 48),
        (nn.RNN(3, 4), (torch.zeros(16, 2, 3),), 1_792, 1_792 + 2 * 15 * 2 * 16),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else None,
)
def test_what_is_kept_is_what_a_real_run_keeps(model, inputs, forward, backward):
    report = nacre.cost(model, *inputs)
    assert (report.flops, report.backward_flops) == (forward, backward)
    assert report.saved_bytes == kept(model, *inputs) and not report.unknown


def test_the_bill_of_an_lstm_is_the_same_each_time():
    model, x = torch.nn.LSTM(4, 8), torch.zeros(5, 2, 4)
    first, second = (nacre.cost(model, x) for _ in range(2))
    assert first.total == second.total and first.peak_bytes == second.peak_bytes
