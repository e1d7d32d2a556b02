"""The activation layers and their functional forms."""

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from nacre.core import check, choice
from nacre.core.choice import cpp_kernel, small, torch_instead, unserved
from nacre.core.op import Op
from nacre.core.tracing import Proxy, as_torchs_layer, traced
from nacre.layers.activation import formula

# the number of values from which nacre's kernel is faster, where two calls of each were measured equal
_TORCH_BELOW = 65536
_TANH_BELOW = 8192
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


class GELU(torch.nn.GELU):
    r"""Gates every element by the chance that a standard normal value lies below it.

    .. math::
        y = x \Phi(x) = \frac{x}{2} \left(1 + \mathrm{erf}\frac{x}{\sqrt 2}\right)
        \quad\text{or, approximately,}\quad
        y = \frac{x}{2} \left(1 + \tanh\left(\sqrt{2 / \pi}\, (x + 0.044715 x^3)\right)\right)

    Args:
        approximate: ``"none"`` for the first, with erf; ``"tanh"`` for the second, at most 0.0005 away.
            Default: ``"none"``.

    Shape:
        - input: any
        - output: as the input, with its memory format

    Numerics:
        float16 and bfloat16 are computed in float32 and rounded once. NaN gives NaN.

    Raises:
        RuntimeError: ``approximate`` is another word; raised by the call, as in torch.nn.

    Cost:
        No parameters, O(N) time; the input of N values is kept for the backward.

    Paper:
        Hendrycks, Gimpel, "Gaussian Error Linear Units (GELUs)", 2016, arXiv:1606.08415.

    Example:
        >>> import torch, nacre
        >>> nacre.GELU()(torch.tensor([-1.0, 0.0, 1.0]))
        tensor([-0.1587,  0.0000,  0.8413])
        >>> nacre.GELU(approximate="tanh")(torch.tensor([-1.0, 0.0, 1.0]))
        tensor([-0.1588,  0.0000,  0.8412])
    """

    __prepare_scriptable__ = as_torchs_layer

    def forward(self, input: Tensor) -> Tensor:
        if type(input) is not Tensor and isinstance(input, Proxy):
            return traced(self, input)
        return gelu(input, approximate=self.approximate)


class ReLU(torch.nn.ReLU):
    r"""Keeps what is positive.

    .. math:: y = \max(x, 0)

    Args:
        inplace: write the result into the input. Default: False.

    Shape:
        - input: any
        - output: as the input, with its memory format

    Numerics:
        Exact. NaN gives NaN; the derivative at 0 counts as 0.

    Raises:
        RuntimeError: ``inplace`` on a leaf that requires its gradient.

    Cost:
        No parameters, O(N) time; the output of N values is kept for the backward.

    Paper:
        Nair, Hinton, "Rectified Linear Units Improve Restricted Boltzmann Machines", ICML 2010.

    Example:
        >>> import torch, nacre
        >>> nacre.ReLU()(torch.tensor([-2.0, 0.0, 3.0]))
        tensor([0., 0., 3.])
    """

    __prepare_scriptable__ = as_torchs_layer

    def forward(self, input: Tensor) -> Tensor:
        if type(input) is Tensor and choice.unwatched and not is_dynamo_compiling() and input.numel() < _TORCH_BELOW:
            return torch.relu_(input) if self.inplace else torch.relu(input)
        if type(input) is not Tensor and isinstance(input, Proxy):
            return traced(self, input)
        return relu(input, inplace=self.inplace)


class SiLU(torch.nn.SiLU):
    r"""Gates every element by its own sigmoid; also known as swish.

    .. math:: y = \frac{x}{1 + e^{-x}}

    Args:
        inplace: write the result into the input. Default: False.

    Shape:
        - input: any
        - output: as the input, with its memory format

    Numerics:
        float16 and bfloat16 are computed in float32 and rounded once. NaN gives NaN.

    Raises:
        RuntimeError: ``inplace`` on a leaf that requires its gradient.

    Cost:
        No parameters, O(N) time; the input of N values is kept for the backward, of ``inplace`` a copy of it.

    Paper:
        Elfwing, Uchibe, Doya, "Sigmoid-Weighted Linear Units for Neural Network Function Approximation in
        Reinforcement Learning", 2017, arXiv:1702.03118.

    Example:
        >>> import torch, nacre
        >>> nacre.SiLU()(torch.tensor([-1.0, 0.0, 1.0]))
        tensor([-0.2689,  0.0000,  0.7311])
    """

    __prepare_scriptable__ = as_torchs_layer

    def forward(self, input: Tensor) -> Tensor:
        if type(input) is Tensor and choice.unwatched and not is_dynamo_compiling() and input.numel() < _TORCH_BELOW:
            return torch._C._nn.silu_(input) if self.inplace else torch._C._nn.silu(input)
        if type(input) is not Tensor and isinstance(input, Proxy):
            return traced(self, input)
        return silu(input, inplace=self.inplace)


class Tanh(torch.nn.Tanh):
    r"""Squashes every element into -1 to 1.

    .. math:: y = \tanh(x) = \frac{e^x - e^{-x}}{e^x + e^{-x}}

    Shape:
        - input: any
        - output: as the input, with its memory format

    Numerics:
        float16 and bfloat16 are computed in float32 and rounded once. NaN gives NaN.

    Cost:
        No parameters, O(N) time; the output of N values is kept for the backward.

    Paper:
        LeCun, Bottou, Orr, Müller, "Efficient BackProp", 1998, section 4.4.

    Example:
        >>> import torch, nacre
        >>> nacre.Tanh()(torch.tensor([-1.0, 0.0, 100.0]))
        tensor([-0.7616,  0.0000,  1.0000])
    """

    __prepare_scriptable__ = as_torchs_layer

    def forward(self, input: Tensor) -> Tensor:
        if type(input) is Tensor and choice.unwatched and not is_dynamo_compiling() and input.numel() < _TANH_BELOW:
            return torch.tanh(input)
        if type(input) is not Tensor and isinstance(input, Proxy):
            return traced(self, input)
        return tanh(input)


class Sigmoid(torch.nn.Sigmoid):
    r"""Squashes every element into 0 to 1.

    .. math:: y = \frac{1}{1 + e^{-x}}

    Shape:
        - input: any
        - output: as the input, with its memory format

    Numerics:
        float16 and bfloat16 are computed in float32 and rounded once. NaN gives NaN.

    Cost:
        No parameters, O(N) time; the output of N values is kept for the backward.

    Paper:
        Rumelhart, Hinton, Williams, "Learning representations by back-propagating errors", Nature 323, 1986.

    Example:
        >>> import torch, nacre
        >>> nacre.Sigmoid()(torch.tensor([-1.0, 0.0, 100.0]))
        tensor([0.2689, 0.5000, 1.0000])
    """

    __prepare_scriptable__ = as_torchs_layer

    def forward(self, input: Tensor) -> Tensor:
        if type(input) is Tensor and choice.unwatched and not is_dynamo_compiling() and input.numel() < _TORCH_BELOW:
            return torch.sigmoid(input)
        if type(input) is not Tensor and isinstance(input, Proxy):
            return traced(self, input)
        return sigmoid(input)


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
    if small("relu", input, _TORCH_BELOW):
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
    if small("silu", input, _TORCH_BELOW):
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
    if small("tanh", input, _TANH_BELOW):
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
    if small("sigmoid", input, _TORCH_BELOW):
        return torch.sigmoid(input)
    if reason := unserved(input):
        return torch_instead("sigmoid", reason, torch.sigmoid, input)
    return _sigmoid(input)
