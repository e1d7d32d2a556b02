"""The models on which predicted times are checked: small and large, of every kind that people train."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nacre.tools.convert import convert


@dataclass(frozen=True)
class Model:
    """A model with its inputs.

    Args:
        name: of it, and the size of its input.
        build: makes both.
    """

    name: str
    build: Callable[[], tuple[nn.Module, Tensor]]


class _Residual(nn.Module):
    """The sum of two branches."""

    def __init__(self, branch: nn.Module, shortcut: nn.Module | None = None) -> None:
        super().__init__()
        self.branch, self.shortcut = branch, shortcut or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.branch(x) + self.shortcut(x)
        return result


class _First(nn.Module):
    """The first of a recurrent layer's results."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.layer(x)[0]
        return result


class _Mean(nn.Module):
    """The mean over the steps, (N, T, D) to (N, D)."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1)


class _Turned(nn.Module):
    """A layer that runs along the other axis."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.layer(x.transpose(1, 2)).transpose(1, 2)
        return result


class _Positions(nn.Module):
    """Adds a learned row to each position."""

    def __init__(self, length: int, features: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.zeros(length, features))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.table


class _Patches(nn.Module):
    """An image in patches, (N, C, H, W) to (N, T, D)."""

    def __init__(self, features: int, side: int) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, features, side, stride=side)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.layer(x).flatten(2).transpose(1, 2)
        return result


class _Causal(nn.Module):
    """A transformer whose tokens see those before them."""

    def __init__(self, layers: nn.Module, length: int) -> None:
        super().__init__()
        self.layers = layers
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(length))

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.layers(x, mask=self.mask, is_causal=True)
        return result


class _Skip(nn.Module):
    """A level of a U-Net: down, what lies below, up, and beside it what was there before."""

    def __init__(self, channels: int, below: nn.Module) -> None:
        super().__init__()
        self.before, self.below = _two(channels, channels), below
        self.down = nn.Sequential(nn.MaxPool2d(2), _two(channels, 2 * channels))
        self.up = nn.ConvTranspose2d(2 * channels, channels, 2, stride=2)
        self.after = _two(2 * channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        kept = self.before(x)
        result: Tensor = self.after(torch.cat((kept, self.up(self.below(self.down(kept)))), 1))
        return result


def _two(channels: int, outputs: int) -> nn.Module:
    return nn.Sequential(_convolved(channels, outputs), _convolved(outputs, outputs))


def _convolved(channels: int, outputs: int, area: int = 3, stride: int = 1, groups: int = 1) -> nn.Module:
    layer = nn.Conv2d(channels, outputs, area, stride, area // 2, groups=groups, bias=False)
    return nn.Sequential(layer, nn.BatchNorm2d(outputs), nn.ReLU())


def _mlp(*features: int) -> nn.Module:
    layers: list[nn.Module] = []
    for one, other in itertools.pairwise(features):
        layers += [nn.Linear(one, other), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def _lenet() -> nn.Module:
    first = [nn.Conv2d(1, 6, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)]
    second = [nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()]
    return nn.Sequential(*first, *second, _mlp(400, 120, 84, 10))


def _resnet18() -> nn.Module:
    layers: list[nn.Module] = [_convolved(3, 64, 7, 2), nn.MaxPool2d(3, 2, 1)]
    inputs = 64
    for channels in (64, 128, 256, 512):
        for place in range(2):
            stride = 2 if place == 0 and channels > 64 else 1
            last = nn.Sequential(nn.Conv2d(channels, channels, 3, 1, 1, bias=False), nn.BatchNorm2d(channels))
            layers += [_block(nn.Sequential(_convolved(inputs, channels, 3, stride), last), inputs, channels, stride)]
            inputs = channels
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 1000))


def _resnet50() -> nn.Module:
    layers: list[nn.Module] = [_convolved(3, 64, 7, 2), nn.MaxPool2d(3, 2, 1)]
    inputs = 64
    for inner, count in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for place in range(count):
            stride = 2 if place == 0 and inner > 64 else 1
            narrow = nn.Sequential(_convolved(inputs, inner, 1), _convolved(inner, inner, 3, stride))
            wide = nn.Sequential(nn.Conv2d(inner, 4 * inner, 1, bias=False), nn.BatchNorm2d(4 * inner))
            layers += [_block(nn.Sequential(narrow, wide), inputs, 4 * inner, stride)]
            inputs = 4 * inner
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2048, 1000))


def _block(branch: nn.Module, inputs: int, outputs: int, stride: int) -> nn.Module:
    shortcut = None
    if inputs != outputs:
        shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
    return nn.Sequential(_Residual(branch, shortcut), nn.ReLU())


def _mobilenet() -> nn.Module:
    sizes = ((32, 64, 1), (64, 128, 2), (128, 128, 1), (128, 256, 2), (256, 256, 1), (256, 512, 2))
    layers = [_convolved(3, 32, 3, 2)]
    for inputs, outputs, stride in (*sizes, (512, 512, 1), (512, 512, 1), (512, 1024, 2)):
        layers += [_convolved(inputs, inputs, 3, stride, groups=inputs), _convolved(inputs, outputs, 1)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(1024, 1000))


def _vgg() -> nn.Module:
    layers: list[nn.Module] = []
    inputs = 3
    for outputs, count in ((64, 1), (128, 1), (256, 2), (512, 2)):
        for _ in range(count):
            layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU()]
            inputs = outputs
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(512 * 4, 1024), nn.ReLU(), nn.Dropout(), nn.Linear(1024, 100))


def _encoder(features: int, heads: int, count: int, activation: str = "gelu", dropout: float = 0.1) -> nn.Module:
    layer = nn.TransformerEncoderLayer(features, heads, 4 * features, dropout, activation, batch_first=True)
    return nn.TransformerEncoder(layer, count, enable_nested_tensor=False)


def _vit() -> nn.Module:
    encoder = _encoder(192, 3, 6, dropout=0.0)
    return nn.Sequential(_Patches(192, 16), _Positions(196, 192), encoder, _Mean(), nn.Linear(192, 1000))


def _bert() -> nn.Module:
    embedding = nn.Sequential(nn.Embedding(30522, 256), _Positions(128, 256), nn.LayerNorm(256), nn.Dropout(0.1))
    return nn.Sequential(embedding, _encoder(256, 4, 4), _Mean(), nn.Linear(256, 2))


def _gpt(features: int, heads: int, count: int, length: int, words: int) -> nn.Module:
    layers = _Causal(_encoder(features, heads, count, dropout=0.0), length)
    embedding = nn.Sequential(nn.Embedding(words, features), _Positions(length, features))
    return nn.Sequential(embedding, layers, nn.LayerNorm(features), nn.Linear(features, words))


def _lstm() -> nn.Module:
    lstm = nn.LSTM(256, 256, 2, batch_first=True)
    return nn.Sequential(nn.Embedding(5000, 256), _First(lstm), nn.Linear(256, 5000))


def _gru() -> nn.Module:
    gru = nn.GRU(64, 128, bidirectional=True, batch_first=True)
    return nn.Sequential(nn.Embedding(10000, 64), _First(gru), _Mean(), nn.Linear(256, 4))


def _tables() -> nn.Module:
    return nn.Sequential(nn.Embedding(200000, 64), nn.Flatten(), _mlp(26 * 64, 256, 64, 1))


def _unet() -> nn.Module:
    below = _Skip(32, _Skip(64, nn.Identity()))
    return nn.Sequential(_two(3, 16), _Skip(16, below), nn.Conv2d(16, 1, 1))


def _mixer() -> nn.Module:
    def mixed(features: int, inner: int) -> nn.Module:
        return nn.Sequential(nn.Linear(features, inner), nn.GELU(), nn.Linear(inner, features))

    layers: list[nn.Module] = []
    for _ in range(6):
        layers += [_Residual(nn.Sequential(nn.LayerNorm(256), _Turned(mixed(64, 128))))]
        layers += [_Residual(nn.Sequential(nn.LayerNorm(256), mixed(256, 1024)))]
    return nn.Sequential(_Patches(256, 4), *layers, nn.LayerNorm(256), _Mean(), nn.Linear(256, 10))


def _autoencoder() -> nn.Module:
    down = [nn.Conv2d(3, 32, 4, 2, 1), nn.ReLU(), nn.Conv2d(32, 64, 4, 2, 1), nn.ReLU(), nn.Conv2d(64, 128, 4, 2, 1)]
    up = [nn.ConvTranspose2d(128, 64, 4, 2, 1), nn.ReLU(), nn.ConvTranspose2d(64, 32, 4, 2, 1), nn.ReLU()]
    return nn.Sequential(*down, nn.ReLU(), *up, nn.ConvTranspose2d(32, 3, 4, 2, 1), nn.Sigmoid())


def _numbers(build: Callable[[], nn.Module], *shape: int) -> Callable[[], tuple[nn.Module, Tensor]]:
    return lambda: (build(), torch.randn(shape))


def _tokens(build: Callable[[], nn.Module], words: int, *shape: int) -> Callable[[], tuple[nn.Module, Tensor]]:
    return lambda: (build(), torch.randint(words, shape))


def _small_gpt() -> nn.Module:
    return _gpt(128, 4, 4, 64, 96)


def _words_gpt() -> nn.Module:
    return _gpt(256, 8, 4, 128, 8000)


_TORCH: dict[str, Callable[[], tuple[nn.Module, Any]]] = {
    "small MLP, 32x64": _numbers(lambda: _mlp(64, 128, 128, 10), 32, 64),
    "large MLP, 256x1024": _numbers(lambda: _mlp(1024, 2048, 2048, 2048, 1000), 256, 1024),
    "LeNet, 64x1x28x28": _numbers(_lenet, 64, 1, 28, 28),
    "ResNet-18, 4x3x128x128": _numbers(_resnet18, 4, 3, 128, 128),
    "ResNet-50, 2x3x160x160": _numbers(_resnet50, 2, 3, 160, 160),
    "MobileNet, 8x3x128x128": _numbers(_mobilenet, 8, 3, 128, 128),
    "VGG, 16x3x32x32": _numbers(_vgg, 16, 3, 32, 32),
    "ViT, 4x3x224x224": _numbers(_vit, 4, 3, 224, 224),
    "BERT, 8x128 tokens": _tokens(_bert, 30522, 8, 128),
    "GPT of characters, 12x64 tokens": _tokens(_small_gpt, 96, 12, 64),
    "GPT of words, 4x128 tokens": _tokens(_words_gpt, 8000, 4, 128),
    "LSTM of words, 16x32 tokens": _tokens(_lstm, 5000, 16, 32),
    "GRU both ways, 32x40 tokens": _tokens(_gru, 10000, 32, 40),
    "embeddings, 128x26 tokens": _tokens(_tables, 200000, 128, 26),
    "U-Net, 4x3x96x96": _numbers(_unet, 4, 3, 96, 96),
    "MLP-Mixer, 16x3x32x32": _numbers(_mixer, 16, 3, 32, 32),
    "autoencoder, 32x3x64x64": _numbers(_autoencoder, 32, 3, 64, 64),
}

_CONVERTED = (
    "large MLP, 256x1024",
    "ResNet-18, 4x3x128x128",
    "ViT, 4x3x224x224",
    "BERT, 8x128 tokens",
    "LSTM of words, 16x32 tokens",
    "GRU both ways, 32x40 tokens",
)


def _nacre(build: Callable[[], tuple[nn.Module, Any]]) -> Callable[[], tuple[nn.Module, Any]]:
    def converted() -> tuple[nn.Module, Any]:
        model, x = build()
        return convert(model), x

    return converted


MODELS = (
    *(Model(name, build) for name, build in _TORCH.items()),
    *(Model(f"{name}, nacre", _nacre(_TORCH[name])) for name in _CONVERTED),
)
