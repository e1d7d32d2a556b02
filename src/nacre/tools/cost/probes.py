"""What is run to learn how long each kind of operator takes.

A probe is a small piece of a model at one point of a grid of sizes. It runs forward and backward once, while its
operators are noted; then each of the kinds that it is for is called again by itself, many times, on the same tensors.
They lie near the processor then: what the way from memory costs is known from copies.
"""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import nacre.functional as nacre_functions
from nacre.blocks.residual import ResidualDropoutLayerNorm
from nacre.core.choice import kernels_at_any_size
from nacre.layers import LAYERS
from nacre.layers.linear.feed_forward import feed_forward
from nacre.tools.cost.grid import Grid, Measured, Point, measured
from nacre.tools.cost.operators import Work, work_of

SECONDS = 0.003
"""Of a row of calls of one kind at one point; at least one call."""

Step = Callable[[], Any]


@dataclass(frozen=True)
class Probe:
    """Kinds that are measured together.

    Args:
        kinds: their names.
        axes: the points of the grid.
        build: makes what is run at a point, from a dtype and the sizes.
    """

    kinds: tuple[str, ...]
    axes: tuple[tuple[int, ...], ...]
    build: Callable[..., Step]

    def grids(self, dtype: torch.dtype) -> dict[str, Grid]:
        """A table for each of the kinds."""

        def at(point: Point) -> dict[str, Measured]:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                found = _calls(self.build(dtype, *point), point)
                times = {}
                with torch.no_grad():
                    for kind in self.kinds:
                        if kind in found:
                            work, call = found[kind]
                            times[kind] = (least(call), float(work.flops or work.bytes))
                return times

        with torch.enable_grad(), kernels_at_any_size():
            return measured(self.axes, at)


class _Noting(TorchDispatchMode):
    """Keeps the operators that run, with their arguments: of each kind one, of the sizes in question if there is one."""

    def __init__(self, sizes: Point) -> None:
        super().__init__()
        self.sizes = sizes
        self.found: dict[str, tuple[Work, Step]] = {}

    def __torch_dispatch__(self, operator: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        keywords = keywords or {}
        result = operator(*arguments, **keywords)
        work = work_of(operator, arguments, keywords, result)
        if work.kind not in self.found or work.sizes == self.sizes:
            self.found[work.kind] = (work, lambda: operator(*arguments, **keywords))
        return result


def _calls(step: Step, sizes: Point) -> dict[str, tuple[Work, Step]]:
    with _Noting(sizes) as noting:
        result = step()
        results = [one for one in (result if isinstance(result, tuple) else (result,)) if one.requires_grad]
        if results:
            torch.autograd.backward(results, [torch.ones_like(one) for one in results])
    return noting.found


def least(call: Step) -> float:
    """Seconds of one call, in the fastest of some rows of calls: others' work on the machine only adds to it."""
    call()
    start = time.perf_counter()
    call()
    second = time.perf_counter() - start
    count = max(1, min(200, int(SECONDS / max(second, 1e-6))))
    rows = [second]
    for _ in range(4 if second < 10 * SECONDS else 2):
        start = time.perf_counter()
        for _ in range(count):
            call()
        rows.append((time.perf_counter() - start) / count)
    return min(rows)


def _values(dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float32).to(dtype).requires_grad_()


def _both(kind: str, backward: str | None = None) -> tuple[str, str]:
    return kind, backward or kind + "_backward"


def _layer(make: Callable[..., nn.Module], shape: Callable[..., tuple[int, ...]]) -> Callable[..., Step]:
    """Runs a layer which is made of the sizes, on values of a shape which follows from them."""

    def build(dtype: torch.dtype, *point: int) -> Step:
        layer, x = make(*point).to(dtype), _values(dtype, *shape(*point))
        return lambda: layer(x)

    return build


def _function(function: Callable[[Tensor], Any], shape: Callable[..., tuple[int, ...]]) -> Callable[..., Step]:
    def build(dtype: torch.dtype, *point: int) -> Step:
        x = _values(dtype, *shape(*point))
        return lambda: function(x)

    return build


# ---- products

SIDES = (1, 8, 32, 128, 512, 2048)


def _products(dtype: torch.dtype, rows: int, inner: int, columns: int) -> Step:
    x, weight, bias = _values(dtype, rows, inner), _values(dtype, columns, inner), _values(dtype, columns)
    plain = _values(dtype, inner, columns)
    turned = _values(dtype, inner, rows + 8)[:, :rows].detach()
    return lambda: (F.linear(x, weight, bias), _mm(x, plain), _mm(turned.t(), plain))


def _mm(left: Tensor, right: Tensor) -> Tensor:
    return torch.mm(left.detach(), right.detach())


def _batched(dtype: torch.dtype, batch: int, rows: int, inner: int, columns: int) -> Step:
    left, right = _values(dtype, batch, rows, inner).detach(), _values(dtype, batch, inner, columns).detach()
    return lambda: torch.bmm(left, right)


def _feed_forward(dtype: torch.dtype, rows: int, inner: int, hidden: int) -> Step:
    x, first, second = _values(dtype, rows, inner), _values(dtype, hidden, inner), _values(dtype, inner, hidden)
    bias, last = _values(dtype, hidden), _values(dtype, inner)
    return lambda: feed_forward(x, first, bias, second, last, "gelu", 0.0, True)


# ---- convolutions: images of a batch of 4


def _image(positions: int, batch: int = 4) -> tuple[int, int, int]:
    side = max(math.isqrt(positions // batch), 1)
    return batch, side, max(positions // batch // side, 1)


def _convolved(kind: Any, area: int, **options: Any) -> Callable[..., Step]:
    def build(dtype: torch.dtype, positions: int, channels: int, outputs: int) -> Step:
        batch, height, width = _image(positions)
        layer = kind(channels, outputs, area, padding=area // 2, **options).to(dtype)
        x = _values(dtype, batch, channels, height, width)
        return lambda: layer(x)

    return build


def _transposed(area: int) -> Callable[..., Step]:
    """To twice the height and width."""

    def build(dtype: torch.dtype, positions: int, channels: int, outputs: int) -> Step:
        batch, height, width = _image(positions)
        layer = nn.ConvTranspose2d(channels, outputs, area, stride=2, padding=area // 2 - 1).to(dtype)
        x = _values(dtype, batch, channels, height, width)
        return lambda: layer(x)

    return build


def _depthwise(kind: Any) -> Callable[..., Step]:
    def build(dtype: torch.dtype, planes: int, positions: int) -> Step:
        channels, side = planes // 4, math.isqrt(positions)
        layer = kind(channels, channels, 3, padding=1, groups=channels).to(dtype)
        x = _values(dtype, 4, channels, side, side)
        return lambda: layer(x)

    return build


# ---- attention and recurrence


def _attended(function: Callable[..., Tensor], causal: bool) -> Callable[..., Step]:
    def build(dtype: torch.dtype, heads: int, tokens: int, features: int) -> Step:
        query, key, value = (_values(dtype, 1, heads, tokens, features) for _ in range(3))
        return lambda: function(query, key, value, is_causal=causal)

    return build


def _repeated(kind: Any) -> Callable[..., Step]:
    def build(dtype: torch.dtype, steps: int, batch: int, hidden: int) -> Step:
        layer, x = kind(hidden, hidden).to(dtype), _values(dtype, steps, batch, hidden)
        return lambda: layer(x)[0]

    return build


# ---- rows, planes, bytes


def _residual(dtype: torch.dtype, rows: int, features: int) -> Step:
    block = ResidualDropoutLayerNorm(features, 0.1).to(dtype)
    x, branch = _values(dtype, rows, features), _values(dtype, rows, features)
    return lambda: block(x, branch)


def _looked_up(kind: Any) -> Callable[..., Step]:
    def build(dtype: torch.dtype, values: int, table: int) -> Step:
        layer = kind(max(table // 64, 1), 64).to(dtype)
        tokens = torch.randint(layer.num_embeddings, (max(values // 64, 1),))
        return lambda: layer(tokens)

    return build


def _classified(loss: Any) -> Callable[..., Step]:
    def build(dtype: torch.dtype, rows: int, classes: int) -> Step:
        x, target = _values(dtype, rows, classes), torch.randint(classes, (rows,))
        return lambda: loss(x, target)

    return build


def _elements(size: int, tensors: int, itemsize: int = 4) -> int:
    return max(size // (tensors * itemsize), 1)


def _pointwise(tensors: int, function: Callable[[Tensor], Any]) -> Callable[..., Step]:
    """An operator which reads and writes so many tensors of one size."""

    def build(dtype: torch.dtype, size: int) -> Step:
        x = _values(dtype, _elements(size, tensors, dtype.itemsize))
        return lambda: function(x)

    return build


def _rearranged(dtype: torch.dtype, size: int) -> Step:
    count = _elements(size, 2, dtype.itemsize)
    x = _values(dtype, max(count // 64, 2), 64).detach()
    return lambda: x.view(-1, 8, 8).transpose(0, 1).contiguous()


def _summed(dtype: torch.dtype, rows: int, features: int) -> Step:
    x = _values(dtype, rows, features).detach()
    return lambda: x.sum(0, keepdim=True)


ROWS = ((1, 32, 1024, 4096), (8, 128, 1024))
PLANES = ((8, 128, 1024), (16, 256, 4096))
BYTES = ((2**6, 2**12, 2**16, 2**18, 2**20, 2**24),)
TABLE = ((2**6, 2**12, 2**18), (2**6, 2**12, 2**18, 2**22))
POSITIONS, CHANNELS = (64, 1024, 16384), (1, 3, 16, 64, 256)
HEADS = ((1, 8, 64), (16, 64, 256, 1024), (16, 64))
RECURRENT = ((1, 16, 64), (1, 8, 64), (32, 128, 512))


def _probes() -> Iterator[Probe]:
    sides = (SIDES, SIDES, SIDES)
    own = LAYERS
    yield Probe(("aten::addmm", "aten::mm", "aten::mm of a transposed"), sides, _products)
    yield Probe(("aten::bmm",), ((1, 16, 128), (8, 64, 512), (8, 64, 512), (8, 64, 512)), _batched)
    linear = _layer(lambda rows, inner, columns: own["linear"].layer(inner, columns), lambda rows, inner, _: (rows, inner))
    yield Probe(_both("nacre::linear"), ((1, 8, 64, 512, 2048),) * 3, linear)
    yield Probe(_both("nacre::feed_forward"), ((8, 64, 512, 2048),) * 3, _feed_forward)
    convolutions = (("aten::convolution", nn.Conv2d), ("nacre::conv2d", own["conv2d"].layer))
    for name, kind in convolutions:
        wide, few = (3, 16, 64, 256, 1024), (1, 3, 16, 64)
        for words, area, channels in (("1x1", 1, wide), ("3x3", 3, CHANNELS), ("larger", 5, few)):
            kinds = _both(f"{name}, {words}", f"{name}_backward, {words}")
            yield Probe(kinds, (POSITIONS, channels, channels), _convolved(kind, area))
        kinds = _both(f"{name}, depthwise", f"{name}_backward, depthwise")
        yield Probe(kinds, ((32, 256, 2048), (16, 256, 4096)), _depthwise(kind))
    for words, area in (("transposed", 2), ("transposed, overlapping", 4)):
        kinds = _both(f"aten::convolution, {words}", f"aten::convolution_backward, {words}")
        yield Probe(kinds, (POSITIONS, CHANNELS[1:], CHANNELS[1:]), _transposed(area))
    flash = "aten::_scaled_dot_product_flash_attention_for_cpu"
    for causal in (False, True):
        words = ", causal" * causal
        attended = _attended(F.scaled_dot_product_attention, causal)
        yield Probe(_both(flash + words, f"{flash}_backward{words}"), HEADS, attended)
        attended = _attended(nacre_functions.scaled_dot_product_attention, causal)
        yield Probe(_both(f"nacre::attention{words}", f"nacre::attention_backward{words}"), HEADS, attended)
    yield Probe(_both("aten::mkldnn_rnn_layer"), RECURRENT, _repeated(nn.LSTM))
    for name in ("lstm", "gru"):
        yield Probe(_both(f"nacre::{name}"), RECURRENT, _repeated(own[name].layer))

    for name, softmax in (("_softmax", F.softmax), ("_log_softmax", F.log_softmax)):
        apply = _function(lambda x, softmax=softmax: softmax(x, -1), lambda *shape: shape)
        yield Probe(_both(f"aten::{name}", f"aten::{name}_backward_data"), ROWS, apply)
    layer_norm = _layer(lambda rows, features: nn.LayerNorm(features), lambda *shape: shape)
    yield Probe(_both("aten::native_layer_norm"), ROWS, layer_norm)
    for name in ("softmax", "log_softmax"):
        softmax_layer = _layer(lambda rows, features, name=name: own[name].layer(-1), lambda *shape: shape)
        yield Probe(_both(f"nacre::{name}"), ROWS, softmax_layer)
    own_norm = _layer(lambda rows, features: own["layer_norm"].layer(features), lambda *shape: shape)
    yield Probe(_both("nacre::layer_norm"), ROWS, own_norm)
    yield Probe(_both("nacre::residual_dropout_layer_norm"), ROWS, _residual)
    yield Probe(_both("nacre::cross_entropy"), ROWS, _classified(own["cross_entropy"].layer()))
    yield Probe(("aten::sum over rows",), ROWS, _summed)
    yield Probe(("aten::sum",), BYTES, _pointwise(1, lambda x: x.detach().sum()))

    def plane(planes: int, positions: int) -> tuple[int, ...]:
        side = math.isqrt(positions)
        return 8, planes // 8, side, side

    batch_norm = _layer(lambda planes, _: nn.BatchNorm2d(planes // 8), plane)
    yield Probe(_both("aten::native_batch_norm"), PLANES, batch_norm)
    max_pool = _function(lambda x: F.max_pool2d(x, 2), plane)
    yield Probe(_both("aten::max_pool2d_with_indices", "aten::max_pool2d_with_indices_backward"), PLANES, max_pool)
    yield Probe(_both("aten::avg_pool2d"), PLANES, _function(lambda x: F.avg_pool2d(x, 2), plane))
    for mode in ("nearest", "bilinear"):
        upsampled = _function(lambda x, mode=mode: F.interpolate(x, scale_factor=2, mode=mode), plane)
        yield Probe(_both(f"aten::upsample_{mode}2d"), PLANES, upsampled)

    for name, embedding in (("aten::embedding", nn.Embedding), ("nacre::embedding", own["embedding"].layer)):
        backward = "aten::embedding_dense_backward" if embedding is nn.Embedding else "nacre::embedding_backward"
        yield Probe((backward,), TABLE, _looked_up(embedding))
        lookup = _looked_up(embedding)
        yield Probe((name,), BYTES, lambda dtype, size, lookup=lookup: lookup(dtype, _elements(size, 2), 2**18))
    for name in ("gelu", "silu", "tanh", "sigmoid"):
        unary = getattr(F, name)
        yield Probe((f"aten::{name}",), BYTES, _pointwise(2, unary))
        yield Probe((f"aten::{name}_backward",), BYTES, _pointwise(3, unary))
    yield Probe(("aten::relu",), BYTES, _pointwise(2, F.relu))
    yield Probe(("aten::threshold_backward",), BYTES, _pointwise(3, F.relu))
    for name in ("relu", "gelu", "silu", "tanh", "sigmoid"):
        yield Probe((f"nacre::{name}",), BYTES, _pointwise(2, own[name].layer()))
        yield Probe((f"nacre::{name}_backward",), BYTES, _pointwise(3, own[name].layer()))
    dropout = own["dropout"].layer(0.1)
    yield Probe(_both("nacre::dropout"), BYTES, _pointwise(2, dropout))
    yield Probe(("aten::add",), BYTES, _pointwise(3, lambda x: x.detach() + x.detach()))
    yield Probe((POINTWISE,), BYTES, _pointwise(3, lambda x: x.detach() * x.detach()))
    yield Probe(("aten::bernoulli",), BYTES, _pointwise(1, lambda x: x.detach().bernoulli_(0.9)))
    yield Probe(("aten::ones_like",), BYTES, _pointwise(1, torch.ones_like))
    yield Probe(("aten::cat",), BYTES, _pointwise(4, lambda x: torch.cat((x.detach(), x.detach()))))
    yield Probe((COPY,), BYTES, _pointwise(2, lambda x: x.detach().clone()))
    yield Probe((f"{COPY}, rearranged",), BYTES, _rearranged)


COPY, POINTWISE = "aten::clone", "aten::mul"
"""The kinds of what has no table of its own: what moves values, and what computes each by itself."""

SAME = {
    "nacre::linear_cross_entropy": "nacre::linear",
    "nacre::linear_cross_entropy_backward": "nacre::linear_backward",
    "nacre::residual_dropout": "nacre::dropout",
    "nacre::residual_dropout_backward": "nacre::dropout_backward",
    "aten::baddbmm": "aten::bmm",
    "aten::stack": "aten::cat",
    "aten::mean": "aten::sum",
    "aten::exp": "aten::tanh",
    "aten::_safe_softmax": "aten::_softmax",
    **dict.fromkeys(("aten::fill", "aten::zero", "aten::zeros", "aten::zeros_like", "aten::ones"), "aten::ones_like"),
}
"""Kinds which have the table of another one."""

PROBES: dict[str, Probe] = {kind: probe for probe in _probes() for kind in probe.kinds}
"""The probe of each kind that has one."""
