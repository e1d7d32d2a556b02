"""The activation layers: the functions of functional.py as modules."""

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from nacre.core import choice
from nacre.core.tracing import Proxy, as_torchs_layer, traced
from nacre.layers.activation.functional import TANH_BELOW, TORCH_BELOW, gelu, relu, sigmoid, silu, tanh


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
        if type(input) is Tensor and choice.unwatched and not is_dynamo_compiling() and input.numel() < TORCH_BELOW:
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
        if type(input) is Tensor and choice.unwatched and not is_dynamo_compiling() and input.numel() < TORCH_BELOW:
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
        if type(input) is Tensor and choice.unwatched and not is_dynamo_compiling() and input.numel() < TANH_BELOW:
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
        if type(input) is Tensor and choice.unwatched and not is_dynamo_compiling() and input.numel() < TORCH_BELOW:
            return torch.sigmoid(input)
        if type(input) is not Tensor and isinstance(input, Proxy):
            return traced(self, input)
        return sigmoid(input)
