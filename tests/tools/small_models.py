"""Small models of many kinds, whose bills are derived by hand."""

import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint, checkpoint_sequential


class Tied(nn.Module):
    """One table of three modules."""

    def __init__(self):
        super().__init__()
        self.table, self.first, self.second = nn.Embedding(11, 6), nn.Linear(6, 11, False), nn.Linear(6, 11, False)
        self.first.weight = self.second.weight = self.table.weight

    def forward(self, tokens):
        x = self.table(tokens)
        return self.first(x) + self.second(x * 2)


def frozen_middle():
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6))
    model[2].requires_grad_(False)
    return model


class Nested(nn.Module):
    """A checkpoint within a checkpoint."""

    def __init__(self, **options):
        super().__init__()
        self.inner, self.outer, self.options = nn.Linear(6, 6), nn.Linear(6, 6), options

    def _inside(self, x):
        return self.inner(x).relu()

    def _outside(self, x):
        return self.outer(checkpoint(self._inside, x, **self.options)).relu()

    def forward(self, x):
        return checkpoint(self._outside, x, **self.options)


class Halves(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(*(nn.Linear(6, 6) for _ in range(4)))

    def forward(self, x):
        return checkpoint_sequential(self.layers, 2, x, use_reentrant=False)


class Doubled(nn.Module):
    """A layer whose parameters are computed, and called by torch.func."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x):
        return functional_call(self.layer, {name: 2 * one for name, one in self.layer.named_parameters()}, (x,))


class Loop(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x):
        for _ in range(4):
            x = self.layer(x).tanh()
        return x


class InPlace(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x):
        y = self.second(self.first(x).add_(1).relu_())
        y += x
        return y


class Rotation(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("matrix", torch.randn(6, 6))
        self.layer = nn.Linear(6, 6, bias=False)

    def forward(self, x):
        return self.layer(x) @ self.matrix


class Gated(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(8, 12, False), nn.Linear(8, 12, False), nn.Linear(12, 8, False)

    def forward(self, x):
        return self.down(functional.silu(self.gate(x)) * self.up(x))


class Distances(nn.Module):
    """Attention by hand with a slope for each head's distances."""

    def __init__(self):
        super().__init__()
        self.maps, self.out = nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x):
        batch, length, _ = x.shape
        q, k, v = self.maps(x).view(batch, length, 3, 2, 4).permute(2, 0, 3, 1, 4)
        places = torch.arange(length, device=x.device)
        slopes = torch.tensor([0.5, 0.25], device=x.device)[:, None, None]
        weights = (q @ k.transpose(-1, -2) / 2 - (places[:, None] - places).abs() * slopes).softmax(-1)
        return self.out((weights @ v).transpose(1, 2).reshape(batch, length, 8))


class Relative(nn.Module):
    """Attention with a learned bias for each distance, as T5 has."""

    def __init__(self):
        super().__init__()
        self.bias, self.map = nn.Embedding(8, 2), nn.Linear(8, 8, bias=False)

    def forward(self, x):
        batch, length, _ = x.shape
        heads = self.map(x).view(batch, length, 2, 4).transpose(1, 2)
        places = torch.arange(length, device=x.device)
        bias = self.bias((places[:, None] - places).clamp(-4, 3) + 4).permute(2, 0, 1)
        return functional.scaled_dot_product_attention(heads, heads, heads, bias.expand(batch, -1, -1, -1))


class Scan(nn.Module):
    """A state-space model, step by step."""

    def __init__(self):
        super().__init__()
        self.decay = nn.Parameter(torch.rand(4, 3))
        self.enter, self.read = nn.Linear(4, 4), nn.Linear(4, 6)

    def forward(self, x):
        u = self.enter(x)
        b, c = self.read(u).chunk(2, -1)
        state, out = x.new_zeros(len(x), 4, 3), []
        for t in range(x.shape[1]):
            state = state * torch.exp(-self.decay) + u[:, t, :, None] * b[:, t, None]
            out.append((state * c[:, t, None]).sum(-1))
        return torch.stack(out, 1)


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.norm1 = nn.Conv2d(4, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8)
        self.second, self.norm2 = nn.Conv2d(8, 8, 3, 1, 1, bias=False), nn.BatchNorm2d(8)
        self.past = nn.Sequential(nn.Conv2d(4, 8, 1, 2, bias=False), nn.BatchNorm2d(8))

    def forward(self, x):
        y = self.norm1(self.first(x)).relu()
        return (self.norm2(self.second(y)) + self.past(x)).relu()


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(8), nn.LayerNorm(8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.maps = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8))

    def forward(self, x):
        y, mask = self.norm1(x), nn.Transformer.generate_square_subsequent_mask(x.shape[1])
        x = x + self.attention(y, y, y, attn_mask=mask, is_causal=True, need_weights=False)[0]
        return x + self.maps(self.norm2(x))


class Language(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.places = nn.Embedding(11, 8), nn.Parameter(torch.zeros(5, 8))
        self.blocks, self.norm = nn.Sequential(Block(), Block()), nn.LayerNorm(8)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.table.weight

    def forward(self, tokens):
        return self.head(self.norm(self.blocks(self.table(tokens) + self.places)))


class Vision(nn.Module):
    """4 patches of 4 x 4 pixels and a class, one encoder layer, a head."""

    def __init__(self):
        super().__init__()
        self.patches, self.kind = nn.Conv2d(3, 8, 4, stride=4), nn.Parameter(torch.zeros(1, 1, 8))
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True, norm_first=True)
        self.head = nn.Linear(8, 5)

    def forward(self, images):
        patches = self.patches(images).flatten(2).transpose(1, 2)
        return self.head(self.layer(torch.cat([self.kind.expand(len(images), -1, -1), patches], 1))[:, 0])


class Grouped(nn.Module):
    """Experts whose rows are sorted, as torch multiplies them in one call."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Parameter(torch.randn(3, 8, 4)), nn.Parameter(torch.randn(3, 4, 8))

    def forward(self, x, ends):
        return torch._grouped_mm(torch._grouped_mm(x, self.up, offs=ends).relu(), self.down, offs=ends)


class Symmetric(nn.Module):
    def forward(self, weight):
        return weight.triu() + weight.triu(1).T


def symmetric():
    layer = nn.Linear(6, 6)
    parametrize.register_parametrization(layer, "weight", Symmetric())
    return layer


class Product(torch.autograd.Function):
    """A user's own derivative."""

    @staticmethod
    def forward(context, x, weight):
        context.save_for_backward(x, weight)
        return x @ weight

    @staticmethod
    def backward(context, gradient):
        x, weight = context.saved_tensors
        return gradient @ weight.T, x.T @ gradient


class Own(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 4))

    def forward(self, x):
        return Product.apply(x, self.weight)


class Penalty(nn.Module):
    """The squared gradient of a network, which is differentiated once more."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 1)

    def forward(self, x):
        x = x.detach().requires_grad_()
        (slope,) = torch.autograd.grad(self.layer(x).tanh().sum(), x, create_graph=True)
        return (slope**2).sum()


class Lowered(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return self.layer(x)


class Weighted(nn.Module):
    def __init__(self):
        super().__init__()
        self.bags = nn.EmbeddingBag(11, 6, mode="sum")

    def forward(self, tokens, weights):
        return self.bags(tokens, per_sample_weights=weights)
