"""ResidualBlock against a plain rewriting of its formula with torch.nn."""

import pytest
import torch
from torch import nn

import nacre
from nacre.core.choice import record_choices


class Plain(nn.Module):
    """x + Linear(GELU(LayerNorm(x))), with torch.nn's layers."""

    def __init__(self, dim, bias=True, eps=1e-5):
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=eps, bias=bias)
        self.activation = nn.GELU()
        self.linear = nn.Linear(dim, dim, bias=bias)

    def forward(self, x):
        return x + self.linear(self.activation(self.norm(x)))


@pytest.mark.parametrize("shape", [(7,), (3, 7), (2, 3, 7), (0, 7)])
@pytest.mark.parametrize("options", [{}, {"bias": False}, {"eps": 0.1}], ids=["default", "no bias", "eps"])
def test_equals_the_formula(shape, options):
    block, plain = nacre.ResidualBlock(7, **options).double(), Plain(7, **options).double()
    plain.load_state_dict(block.state_dict())
    x, y = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for _ in range(2))
    y.data.copy_(x.data)
    found, expected = block(x), plain(y)
    # float64 sums of seven terms
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)
    found.pow(2).sum().backward(), expected.pow(2).sum().backward()
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-11, atol=1e-13)
    for ours, theirs in zip(block.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-11, atol=1e-13)


def test_runs_on_nacre_and_after_conversion_on_torch():
    block, x = nacre.ResidualBlock(7), torch.randn(3, 7)
    with record_choices() as choices:
        ours = block(x)
    assert [choice.operator for choice in choices] == ["layer_norm", "gelu", "linear"]
    nacre.convert(block, to="torch")
    assert [type(child) for child in block.children()] == [nn.LayerNorm, nn.GELU, nn.Linear]
    with record_choices() as choices:
        torchs = block(x)
    assert choices == []
    # float32 sums of seven terms
    torch.testing.assert_close(ours, torchs, rtol=1e-5, atol=1e-6)


def test_parameters_and_options():
    dim = 16
    assert sum(p.numel() for p in nacre.ResidualBlock(dim).parameters()) == dim**2 + 3 * dim
    assert sum(p.numel() for p in nacre.ResidualBlock(dim, bias=False).parameters()) == dim**2 + dim
    block = nacre.ResidualBlock(dim, device="meta", dtype=torch.bfloat16)
    assert all(p.is_meta and p.dtype is torch.bfloat16 for p in block.parameters())


def test_a_block_that_has_learned_nothing_yet_can_pass_its_input_through():
    block = nacre.ResidualBlock(5)
    torch.nn.init.zeros_(block.linear.weight), torch.nn.init.zeros_(block.linear.bias)
    x = torch.randn(3, 5)
    assert torch.equal(block(x), x)


def test_errors_are_of_torchs_type():
    with pytest.raises(RuntimeError, match="LayerNorm"):
        nacre.ResidualBlock(5)(torch.randn(3, 4))
    with pytest.raises(RuntimeError):
        Plain(5)(torch.randn(3, 4))
