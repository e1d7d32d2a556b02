"""A residual block: what it computes is added to what it was given."""

from functools import partial

import torch
from torch import Tensor, nn

from nacre.blocks.parts import letters_of, sizes, sum_of_parts
from nacre.core.spec import Case, LayerSpec, Letters, Normal
from nacre.layers.activation import GELU
from nacre.layers.layer_norm import LayerNorm
from nacre.layers.linear import Linear


class ResidualBlock(nn.Module):
    r"""Adds a small learned change to its input, so that deep stacks still pass the input and its gradient through.

    .. math:: y = x + \mathrm{Linear}(\mathrm{GELU}(\mathrm{LayerNorm}(x)))

    Args:
        dim: features of a row, D.
        bias: whether the linear layer and the normalisation learn biases. Default: True.
        eps: added to the variance in the normalisation. Default: 1e-5.
        device: where the parameters are made. Default: torch's default device.
        dtype: of the parameters. Default: torch's default dtype.

    Shape:
        - input: (\*, D), any leading dimensions
        - output: as the input

    Numerics:
        Those of its parts; the sum is rounded once.

    Raises:
        RuntimeError: the input's last dimension is not ``dim``, or dtypes or devices do not match.

    Cost:
        D^2 + 3 D parameters, the sum of its parts and one addition an element.

    Paper:
        He, Zhang, Ren, Sun, "Identity Mappings in Deep Residual Networks", 2016, arXiv:1603.05027.

    Example:
        >>> import torch, nacre
        >>> nacre.ResidualBlock(8)(torch.ones(2, 8)).shape
        torch.Size([2, 8])
    """

    def __init__(
        self,
        dim: int,
        bias: bool = True,
        eps: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.norm = LayerNorm(dim, eps=eps, bias=bias, device=device, dtype=dtype)
        self.activation = GELU()
        self.linear = Linear(dim, dim, bias=bias, device=device, dtype=dtype)

    def forward(self, input: Tensor) -> Tensor:
        return input + self.linear(self.activation(self.norm(input)))


CASES = (
    Case("rows", {"dim": 6}, (Normal((3, 6)),)),
    Case("tokens", {"dim": 5}, (Normal((2, 3, 5)),)),
    Case("one row", {"dim": 4}, (Normal((4,)),)),
    Case("no bias", {"dim": 4, "bias": False}, (Normal((3, 4)),)),
    Case("large eps", {"dim": 4, "eps": 0.1}, (Normal((3, 4)),)),
    Case("no rows", {"dim": 4}, (Normal((0, 4)),)),
    Case("frozen input", {"dim": 4}, (Normal((3, 4), gradient=False),)),
    Case("transposed", {"dim": 4}, (Normal((2, 3, 4), layout="transposed"),)),
    Case("text", {"dim": 512}, (Normal((8, 256, 512)),), bench=True),
)


def _inputs(block: ResidualBlock, size: int) -> tuple[Tensor]:
    return (block.linear.weight.new_empty(size, block.linear.in_features, device="meta", requires_grad=True),)


SPEC = LayerSpec(
    name="residual_block",
    layer=ResidualBlock,
    replaces=None,
    purpose="adds a learned change to its input",
    complexity="time O(N D^2), saved O(N D)",
    operators=("layer_norm", "gelu", "linear"),
    sizes=sizes,
    cost=partial(sum_of_parts, 1),
    cases=CASES,
    letters=Letters(lambda sizes: letters_of(sizes, "N", lambda width: "D"), _inputs),
)
