"""Residual blocks: what they compute, or what they are given beside it, is added to a stream that passes through."""

import torch
from torch import Tensor, nn

from nacre.blocks.fused import residual_dropout, residual_dropout_layer_norm
from nacre.layers.activation import GELU
from nacre.layers.dropout import Dropout
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


class ResidualDropout(nn.Module):
    r"""Adds a branch to the stream that it left, with dropout on the branch, in one pass.

    .. math:: y = r + \mathrm{Dropout}(x)

    Args:
        p: probability of an element of the branch to be dropped, from 0 to 1. Default: 0.5.

    Shape:
        - residual: any
        - branch: as the residual
        - output: as the residual

    Numerics:
        The mask is that of :class:`nacre.Dropout` from the same generator. float16 and bfloat16 are computed in float32
        and rounded once.

    Raises:
        ValueError: p outside 0 to 1.

    Cost:
        No parameters, O(N) time; a seed of 8 bytes is kept for the backward, which passes the residual's gradient on as
        it is, without a copy.

    Paper:
        He, Zhang, Ren, Sun, "Deep Residual Learning for Image Recognition", 2015, arXiv:1512.03385.

    Example:
        >>> import torch, nacre
        >>> layer = nacre.ResidualDropout(p=0.5).eval()
        >>> layer(torch.tensor([1.0, 2.0]), torch.tensor([10.0, 20.0]))
        tensor([11., 22.])
    """

    def __init__(self, p: float = 0.5) -> None:
        super().__init__()
        self.dropout = Dropout(p)

    def forward(self, residual: Tensor, branch: Tensor) -> Tensor:
        return residual_dropout(residual, branch, self.dropout)


class ResidualDropoutLayerNorm(nn.Module):
    r"""Adds a branch to the stream that it left, with dropout on the branch, and normalises the sum; in one pass.

    .. math:: s = r + \mathrm{Dropout}(x), \qquad y = \mathrm{LayerNorm}(s)

    A block that normalises first feeds y to its next branch and s is the stream; in one that normalises last y is.

    Args:
        dim: features of a row, D.
        p: probability of an element of the branch to be dropped, from 0 to 1. Default: 0.5.
        eps: added to the variance. Default: 1e-5.
        bias: whether the normalisation learns a bias. Default: True.
        device: where the parameters are made. Default: torch's default device.
        dtype: of the parameters. Default: torch's default dtype.

    Shape:
        - residual: (\*, D), any leading dimensions
        - branch: as the residual
        - output: y and s, each as the residual

    Numerics:
        The mask is that of :class:`nacre.Dropout` from the same generator. float16 and bfloat16 are computed in
        float32, s is rounded once, and y is the LayerNorm of the rounded s.

    Raises:
        ValueError: p outside 0 to 1.
        RuntimeError: the residual does not end in ``dim`` features, or dtypes or devices do not match.

    Cost:
        2 D parameters, O(N D) time; the N D values of s are kept for the backward, and a seed.

    Paper:
        Ba, Kiros, Hinton, "Layer Normalization", 2016, arXiv:1607.06450.

    Example:
        >>> import torch, nacre
        >>> layer = nacre.ResidualDropoutLayerNorm(2, p=0.1).eval()
        >>> normalised, stream = layer(torch.tensor([1.0, 2.0]), torch.tensor([0.0, 2.0]))
        >>> stream
        tensor([1., 4.])
        >>> normalised
        tensor([-1.0000,  1.0000], grad_fn=<...>)
    """

    def __init__(
        self,
        dim: int,
        p: float = 0.5,
        eps: float = 1e-5,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.dropout = Dropout(p)
        self.norm = LayerNorm(dim, eps=eps, bias=bias, device=device, dtype=dtype)

    def forward(self, residual: Tensor, branch: Tensor) -> tuple[Tensor, Tensor]:
        return residual_dropout_layer_norm(residual, branch, self.dropout, self.norm)
