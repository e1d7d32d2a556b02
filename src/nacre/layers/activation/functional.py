"""The activations as functions, and the operators which they call."""

import torch
from torch import Tensor

from nacre.core import check
from nacre.core.choice import cpp_kernel, small, torch_instead, unserved
from nacre.core.op import Op
from nacre.layers.activation import formula

# the number of values from which nacre's kernel is faster, where two calls of each were measured equal
TORCH_BELOW = 65536
TANH_BELOW = 8192
_GELU_BELOW = {"none": 0, "tanh": 4096}
_torchs_gelu = torch._C._nn.gelu  # what torch.nn.functional.gelu is
_KERNELS = [
    cpp_kernel(),
]

_gelu = Op(
    "gelu(Tensor input, str approximate) -> Tensor output",
    forward=formula.gelu_forward,
    backward=formula.gelu_backward,
    saved=("input", "approximate"),
    gradients=("input",),
    kernels=_KERNELS,
)
_relu = Op(
    "relu(Tensor input) -> Tensor output",
    forward=formula.relu_forward,
    backward=formula.relu_backward,
    saved=("output",),
    gradients=("input",),
    kernels=_KERNELS,
)
_silu = Op(
    "silu(Tensor input) -> Tensor output",
    forward=formula.silu_forward,
    backward=formula.silu_backward,
    saved=("input",),
    gradients=("input",),
    kernels=_KERNELS,
)
_tanh = Op(
    "tanh(Tensor input) -> Tensor output",
    forward=formula.tanh_forward,
    backward=formula.tanh_backward,
    saved=("output",),
    gradients=("input",),
    kernels=_KERNELS,
)
_sigmoid = Op(
    "sigmoid(Tensor input) -> Tensor output",
    forward=formula.sigmoid_forward,
    backward=formula.sigmoid_backward,
    saved=("output",),
    gradients=("input",),
    kernels=_KERNELS,
)


def gelu(input: Tensor, *, approximate: str = "none") -> Tensor:
    """x times the chance that a standard normal value lies below x; see :class:`nacre.GELU`.

    Args:
        input: values of any shape.
        approximate: ``"none"`` (erf) or ``"tanh"``. Default: ``"none"``.

    Raises:
        RuntimeError: ``approximate`` is another word.

    Example:
        >>> import torch, nacre
        >>> nacre.functional.gelu(torch.tensor([-3.0, 3.0]), approximate="tanh")
        tensor([-0.0036,  2.9964])
    """
    if small("gelu", input, _GELU_BELOW.get(approximate, 0)):
        return _torchs_gelu(input, approximate=approximate)
    if reason := unserved(input):
        return torch_instead("gelu", reason, torch.nn.functional.gelu, input, approximate=approximate)
    if approximate not in ("none", "tanh"):
        raise check.error(
            RuntimeError, 'approximate of gelu is "none", for erf, or "tanh"', f"approximate = {approximate!r}"
        )
    return _gelu(input, approximate)


def relu(input: Tensor, inplace: bool = False) -> Tensor:
    """The positive part; see :class:`nacre.ReLU`.

    Args:
        input: values of any shape.
        inplace: write the result into ``input``. Default: False.

    Raises:
        RuntimeError: ``inplace`` on a leaf that requires its gradient.

    Example:
        >>> import torch, nacre
        >>> values = torch.tensor([-1.0, 1.0])
        >>> nacre.functional.relu(values, inplace=True) is values
        True
        >>> values
        tensor([0., 1.])
    """
    if small("relu", input, TORCH_BELOW):
        return torch.relu_(input) if inplace else torch.relu(input)
    if reason := unserved(input):
        return torch_instead("relu", reason, torch.nn.functional.relu, input, inplace)
    return input.copy_(_relu(input)) if inplace else _relu(input)


def silu(input: Tensor, inplace: bool = False) -> Tensor:
    """x times its sigmoid; see :class:`nacre.SiLU`.

    Args:
        input: values of any shape.
        inplace: write the result into ``input``. Default: False.

    Raises:
        RuntimeError: ``inplace`` on a leaf that requires its gradient.

    Example:
        >>> import torch, nacre
        >>> nacre.functional.silu(torch.tensor([-20.0, 20.0]))
        tensor([-4.1223e-08,  2.0000e+01])
    """
    if small("silu", input, TORCH_BELOW):
        return torch._C._nn.silu_(input) if inplace else torch._C._nn.silu(input)
    if reason := unserved(input):
        return torch_instead("silu", reason, torch.nn.functional.silu, input, inplace)
    # the backward reads the input as it was, so what is overwritten must not be what was saved
    return input.copy_(_silu(input.clone())) if inplace else _silu(input)


def tanh(input: Tensor) -> Tensor:
    """The hyperbolic tangent; see :class:`nacre.Tanh`.

    Args:
        input: values of any shape.

    Example:
        >>> import torch, nacre
        >>> nacre.functional.tanh(torch.tensor([0.5]))
        tensor([0.4621])
    """
    if small("tanh", input, TANH_BELOW):
        return torch.tanh(input)
    if reason := unserved(input):
        return torch_instead("tanh", reason, torch.tanh, input)
    return _tanh(input)


def sigmoid(input: Tensor) -> Tensor:
    """The logistic function 1 / (1 + exp(-x)); see :class:`nacre.Sigmoid`.

    Args:
        input: values of any shape.

    Example:
        >>> import torch, nacre
        >>> nacre.functional.sigmoid(torch.tensor([0.5]))
        tensor([0.6225])
    """
    if small("sigmoid", input, TORCH_BELOW):
        return torch.sigmoid(input)
    if reason := unserved(input):
        return torch_instead("sigmoid", reason, torch.sigmoid, input)
    return _sigmoid(input)
