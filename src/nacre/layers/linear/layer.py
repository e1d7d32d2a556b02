"""The Linear layer and its functional form."""

import math

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from nacre.core import check, choice
from nacre.core.choice import FLOATS, cpp_kernel, sizes_decide, torch_instead, torch_is_ahead, unserved
from nacre.core.dispatch import PLAIN
from nacre.core.flop_counter import count_flops
from nacre.core.op import Op
from nacre.core.tracing import Proxy, as_torchs_layer, traced
from nacre.layers.linear import formula

_op = Op(
    "linear(Tensor input, Tensor weight, Tensor? bias) -> Tensor output",
    forward=formula.forward,
    backward=formula.backward,
    saved=("input", "weight"),
    gradients=("input", "weight", "bias"),
    autocast={"cpu": "lower", "cuda": "lower", "xpu": "lower", "mps": "lower"},
    kernels=[cpp_kernel(dtypes=(torch.float32, torch.float64))],
)
count_flops(_op)

_torchs_linear = torch._C._nn.linear  # what torch.nn.functional.linear is
_TORCH_BELOW = 1 << 23  # multiply-adds
_TOO_FEW = f"{_TORCH_BELOW:,} multiply-adds without a backward"
_FEW_ROWS = 8  # which a kernel of their own multiplies (core/cpu_few_rows.h)
_WEIGHTS_OF_FEW = 1 << 18  # from which on that kernel is the faster one
_TOO_SMALL = f"{_WEIGHTS_OF_FEW:,} weights without a backward"


class Linear(torch.nn.Linear):
    r"""Makes every output feature a learned weighted sum of all input features.

    .. math:: y = x W^\top + b

    Args:
        in_features: size of the input's last dimension, D.
        out_features: size of the output's last dimension, E.
        bias: learn a bias of E values. Default: True.
        device: where the parameters are made. Default: torch's default device.
        dtype: of the parameters. Default: torch's default dtype.

    ``weight`` (E, D) and ``bias`` (E) start uniform in :math:`\pm 1 / \sqrt{D}`.

    Shape:
        - input: (\*, D), any leading dimensions, also none
        - output: (\*, E)

    Numerics:
        One matrix product with the bias in it; float16 and bfloat16 are accumulated in float32 and rounded once. Under
        autocast it runs in the lower precision.

    Raises:
        RuntimeError: the input's last dimension is not ``in_features``, or dtypes or devices do not match.

    Cost:
        D E + E parameters, 2 N D E FLOPs for N rows, twice that backward, N D values kept for the backward.

    Paper:
        Rumelhart, Hinton, Williams, "Learning representations by back-propagating errors", Nature 323, 1986.

    Example:
        >>> import torch, nacre
        >>> layer = nacre.Linear(512, 256)
        >>> layer(torch.ones(3, 512)).shape
        torch.Size([3, 256])
        >>> sum(parameter.numel() for parameter in layer.parameters())
        131328
    """

    __prepare_scriptable__ = as_torchs_layer

    def forward(self, input: Tensor) -> Tensor:
        if (
            type(input) is Tensor
            and choice.unwatched
            and not is_dynamo_compiling()
            and not (torch.is_grad_enabled() and self.weight.requires_grad)
            and (values := input.numel()) * self.out_features < _TORCH_BELOW
            and (values > _FEW_ROWS * self.in_features or self.in_features * self.out_features < _WEIGHTS_OF_FEW)
            and not (torch.is_grad_enabled() and input.requires_grad)
        ):
            try:
                return _torchs_linear(input, self.weight, self.bias)
            except RuntimeError:
                pass  # what follows says more clearly what is wrong
        if type(input) is not Tensor and isinstance(input, Proxy):
            return traced(self, input)
        return linear(input, self.weight, self.bias)


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Multiplies rows by a weight matrix and adds a bias; see :class:`nacre.Linear`.

    Args:
        input: values of shape (*, D).
        weight: of shape (E, D); or (D) for a single weighted sum, without the last dimension of the output.
        bias: of shape (E). Default: none.

    Raises:
        RuntimeError: shapes, dtypes or devices do not match.

    Example:
        >>> import torch, nacre
        >>> nacre.functional.linear(torch.tensor([1.0, 2.0]), torch.tensor([[3.0, 4.0]]), torch.tensor([0.5]))
        tensor([11.5000])
    """
    if sizes_decide(input) and (under := _short_of(input, weight)) and torch_is_ahead("linear", under):
        try:
            return torch.nn.functional.linear(input, weight, bias)
        except RuntimeError:
            pass  # what follows says more clearly what is wrong
    if not _fits(input, weight, bias):
        if reason := unserved(input, weight, bias) or _unusual(weight, bias):
            return torch_instead("linear", reason, torch.nn.functional.linear, input, weight, bias)
        _validate(input, weight, bias)
    return _op(input, weight, bias)


def _short_of(input: Tensor, weight: Tensor) -> str:
    """What a call lacks to be faster by nacre's kernel; empty if it lacks nothing, as where a backward will follow."""
    if not (isinstance(input, Tensor) and isinstance(weight, Tensor)) or weight.dim() != 2:
        return ""
    if torch.is_grad_enabled() and (weight.requires_grad or input.requires_grad):
        return ""
    out_features, in_features = weight.shape
    if input.numel() <= _FEW_ROWS * in_features:
        return _TOO_SMALL if in_features * out_features < _WEIGHTS_OF_FEW else ""
    if input.numel() * out_features < _TORCH_BELOW:
        return _TOO_FEW
    return "8 features out and 2 features in without a backward" if out_features < 8 or in_features < 2 else ""


def _fits(input: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether this is plainly a call that nacre serves; if not, the reason is yet to be found."""
    if not (type(input) in PLAIN and type(weight) in PLAIN) or input.dtype not in FLOATS:
        return False
    if input.layout is not torch.strided or input.is_nested or weight.layout is not torch.strided:
        return False
    if bias is not None and (
        type(bias) not in PLAIN
        or bias.dtype != input.dtype
        or bias.shape != weight.shape[:1]
        or bias.device != input.device
    ):
        return False
    return (
        weight.dtype == input.dtype
        and weight.dim() == 2
        and input.dim() > 0
        and input.shape[-1] == weight.shape[1]
        and weight.device == input.device
    )


def _unusual(weight: Tensor, bias: Tensor | None) -> str:
    """Why a call with parameters that no Linear has is left to torch; empty where they have their usual shapes."""
    if weight.dim() != 2:
        return f"a weight of {weight.dim()} dimensions"
    if bias is not None and bias.dim() != 1:
        return f"a bias of {bias.dim()} dimensions"
    if bias is not None and bias.shape[0] == 1 != weight.shape[0]:
        return "a bias of one value for all features"
    return ""


def _validate(input: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    out_features, in_features = weight.shape
    name = f"Linear({in_features}, {out_features})"
    if input.dim() == 0:
        raise check.error(
            RuntimeError,
            f"both arguments to linear need to be at least 1D, and {name} takes {in_features} features",
            f"an input of shape {check.shape(input)}",
            "Give the input at least one dimension, as input.reshape(1) does.",
        )
    if input.shape[-1] != in_features:
        rows = f"{input.shape[:-1].numel()}x{input.shape[-1]}"
        raise check.error(
            RuntimeError,
            f"mat1 and mat2 shapes cannot be multiplied ({rows} and {in_features}x{out_features}): {name} takes inputs"
            f" whose last dimension is {in_features}",
            f"an input of shape {check.shape(input)}",
            _likely_fix(input, in_features, out_features),
        )
    if bias is not None and bias.shape[0] != out_features:
        raise check.error(
            RuntimeError,
            f"the bias of {name} has one value for each of the {out_features} output features",
            f"a bias of shape {check.shape(bias)}",
        )
    check.same_dtype(name, input=input, weight=weight, bias=bias)
    check.same_device(name, input=input, weight=weight, bias=bias)


def _likely_fix(input: Tensor, in_features: int, out_features: int) -> str:
    if input.dim() > 1 and input.shape[-2] == in_features:
        return "Did you mean input.transpose(-1, -2)?"
    if math.prod(input.shape[1:]) == in_features:
        return "Did you mean input.flatten(1)?"
    return f"Did you mean Linear({input.shape[-1]}, {out_features})?"
