"""The LayerNorm layer and its functional form."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from nacre.core import check, choice
from nacre.core.choice import cpp_kernel, small, torch_instead, unserved
from nacre.core.op import Op
from nacre.core.tracing import Proxy, as_torchs_layer, traced
from nacre.layers.layer_norm import formula

_TORCH_BELOW = 65536

_op = Op(
    "layer_norm(Tensor input, SymInt[] normalized_shape, Tensor? weight, Tensor? bias, float eps)"
    " -> (Tensor output, Tensor mean, Tensor rstd)",
    forward=formula.forward,
    backward=formula.backward,
    saved=("input", "normalized_shape", "weight", "mean", "rstd"),
    gradients=("input", "weight", "bias"),
    autocast={"cuda": "float32"},
    kernels=[
        cpp_kernel(),
    ],
)


class LayerNorm(torch.nn.LayerNorm):
    r"""Normalises each row of features to mean 0 and variance 1, then scales and shifts it as learned.

    .. math:: y = \frac{x - \mathrm{mean}(x)}{\sqrt{\mathrm{var}(x) + \epsilon}} \cdot w + b

    Mean and (biased) variance run over the last ``len(normalized_shape)`` dimensions.

    Args:
        normalized_shape: sizes of the last dimensions, which are normalised together; an int for one dimension.
        eps: added to the variance. Default: 1e-5.
        elementwise_affine: learn ``weight`` (starts at 1) and ``bias`` (starts at 0). Default: True.
        bias: learn ``bias`` where ``elementwise_affine``. Default: True.
        device: where the parameters are made. Default: torch's default device.
        dtype: of the parameters. Default: torch's default dtype.

    Shape:
        - input: (*, normalized_shape), any leading dimensions
        - output: as the input

    Numerics:
        float16 and bfloat16 are computed in float32 and rounded once. The variance is the mean of squared distances
        from the mean, never E[x^2] - E[x]^2.

    Raises:
        RuntimeError: the input does not end in ``normalized_shape``, or dtypes or devices do not match.

    Cost:
        2 D parameters, O(N D) time, N D values and 2 N statistics kept for the backward.

    Paper:
        Ba, Kiros, Hinton, "Layer Normalization", 2016, arXiv:1607.06450.

    Example:
        >>> import torch, nacre
        >>> layer = nacre.LayerNorm(4)
        >>> layer(torch.tensor([[1.0, 1.0, 3.0, 3.0]]))
        tensor([[-1.0000, -1.0000,  1.0000,  1.0000]], grad_fn=<...>)
    """

    __prepare_scriptable__ = as_torchs_layer

    def forward(self, input: Tensor) -> Tensor:
        if type(input) is Tensor and choice.unwatched and not is_dynamo_compiling() and input.numel() < _TORCH_BELOW:
            try:
                return torch.layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps)
            except RuntimeError:
                pass  # what follows says more clearly what is wrong
        if type(input) is not Tensor and isinstance(input, Proxy):
            return traced(self, input)
        return layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps)


def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """Normalises over the last dimensions; see :class:`nacre.LayerNorm`.

    Args:
        input: values of shape (*, normalized_shape).
        normalized_shape: sizes of the dimensions normalised together.
        weight: scale of shape ``normalized_shape``. Default: none.
        bias: shift of shape ``normalized_shape``. Default: none.
        eps: added to the variance. Default: 1e-5.

    Raises:
        RuntimeError: shapes, dtypes or devices do not match.

    Example:
        >>> import torch, nacre
        >>> nacre.functional.layer_norm(torch.tensor([0.0, 2.0]), (2,))
        tensor([-1.0000,  1.0000])
    """
    if small("layer_norm", input, _TORCH_BELOW):
        try:
            return torch.layer_norm(input, normalized_shape, weight, bias, eps)
        except RuntimeError:
            pass  # what follows says more clearly what is wrong
    if reason := unserved(input, weight, bias):
        return torch_instead(
            "layer_norm", reason, torch.nn.functional.layer_norm, input, normalized_shape, weight, bias, eps
        )
    normalized_shape = tuple(normalized_shape)
    validate(input, normalized_shape, weight, bias)
    return _op(input, normalized_shape, weight, bias, eps)


def validate(input: Tensor, normalized_shape: tuple[int, ...], weight: Tensor | None, bias: Tensor | None) -> None:
    """Raises RuntimeError unless the four fit together."""
    shape, dtype = input.shape, input.dtype
    if (
        weight is not None
        and bias is not None
        and normalized_shape
        and shape[-len(normalized_shape) :] == weight.shape == bias.shape == normalized_shape
        and weight.dtype is bias.dtype is dtype
        and input.device == weight.device == bias.device
    ):
        return  # as nearly always, found without the questions that follow
    dimensions = len(normalized_shape)
    if dimensions == 0:
        raise check.error(RuntimeError, "LayerNorm normalises at least one dimension", "normalized_shape = ()")
    if tuple(input.shape[-dimensions:]) != normalized_shape:
        sizes = normalized_shape[0] if dimensions == 1 else normalized_shape
        last = "dimension, of size" if dimensions == 1 else "dimensions, of sizes"
        fitting = tuple(input.shape[-dimensions:])
        meant = fitting[0] if len(fitting) == 1 else fitting
        raise check.error(
            RuntimeError,
            f"LayerNorm({sizes}) normalises the last {dimensions} {last} {sizes}",
            f"an input of shape {check.shape(input)}",
            f"Did you mean LayerNorm({meant})?" if fitting else "",
        )
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter is None:
            continue
        if tuple(parameter.shape) != normalized_shape:
            raise check.error(
                RuntimeError,
                f"the {name} of layer_norm has the shape normalized_shape, {normalized_shape}",
                f"a {name} of shape {check.shape(parameter)}",
            )
        if parameter.dtype != input.dtype and not (
            parameter.dtype is torch.float32 and input.dtype in (torch.bfloat16, torch.float16)
        ):
            check.same_dtype("layer_norm", input=input, **{name: parameter})
    check.same_device("layer_norm", input=input, weight=weight, bias=bias)
