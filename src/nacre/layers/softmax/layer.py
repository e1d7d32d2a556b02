"""The Softmax and LogSoftmax layers, their functional forms, and the Jacobian of softmax."""

import warnings
from collections.abc import Callable

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from nacre.core import check, choice
from nacre.core.choice import cpp_kernel, small, torch_instead, unserved
from nacre.core.op import Op
from nacre.core.tracing import Proxy, as_torchs_layer, traced
from nacre.layers.softmax import formula
from nacre.layers.softmax.cost import implicit_dim

_TORCH_BELOW = 65536
_AUTOCAST = {"cuda": "float32", "xpu": "float32", "mps": "float32"}
_KERNELS = (cpp_kernel(),)

_softmax = Op(
    "softmax(Tensor input, int dim) -> Tensor output",
    forward=formula.softmax_forward,
    backward=formula.softmax_backward,
    saved=("output", "dim"),
    gradients=("input",),
    autocast=_AUTOCAST,
    kernels=_KERNELS,
)
_log_softmax = Op(
    "log_softmax(Tensor input, int dim) -> Tensor output",
    forward=formula.log_softmax_forward,
    backward=formula.log_softmax_backward,
    saved=("output", "dim"),
    gradients=("input",),
    autocast=_AUTOCAST,
    kernels=_KERNELS,
)


class Softmax(torch.nn.Softmax):
    r"""Makes probabilities of scores: positive, summing to 1, each in proportion to the score's exponential.

    .. math:: s_i = \frac{e^{x_i}}{\sum_j e^{x_j}}

    Args:
        dim: the dimension along which the probabilities sum to 1. Default: None, which is 0 for an input of 0, 1 or 3
            dimensions and else 1, with a warning, as in torch.nn.

    Shape:
        - input: any
        - output: as the input, contiguous

    Numerics:
        The maximum is subtracted before the exponential, so no score overflows. float16 and bfloat16 are computed in
        float32 and rounded once. A score of -inf has probability 0; scores that are all -inf, or among which is +inf
        or NaN, give NaN. Under autocast on a GPU it runs in float32.

    Raises:
        IndexError: the input has no dimension ``dim``.
        NotImplementedError: the input is not of a floating-point dtype.

    Cost:
        No parameters, O(N D) time for N slices of D values; the output is kept for the backward.

    Paper:
        Bridle, "Probabilistic Interpretation of Feedforward Classification Network Outputs", 1990.

    Example:
        >>> import torch, nacre
        >>> nacre.Softmax(dim=-1)(torch.tensor([[0.0, 0.0], [10000.0, -10000.0]]))
        tensor([[0.5000, 0.5000],
                [1.0000, 0.0000]])
    """

    __prepare_scriptable__ = as_torchs_layer

    def forward(self, input: Tensor) -> Tensor:
        usual = type(input) is Tensor and choice.unwatched and not is_dynamo_compiling()
        if usual and type(self.dim) is int and input.numel() < _TORCH_BELOW:
            return input.softmax(self.dim)
        if type(input) is not Tensor and isinstance(input, Proxy):
            return traced(self, input)
        return softmax(input, self.dim, _stacklevel=5)


class LogSoftmax(torch.nn.LogSoftmax):
    r"""Makes logarithms of probabilities of scores, without ever taking the logarithm of a rounded probability.

    .. math:: l_i = x_i - \log \sum_j e^{x_j}

    Args:
        dim: the dimension along which the probabilities sum to 1. Default: None, which is 0 for an input of 0, 1 or 3
            dimensions and else 1, with a warning, as in torch.nn.

    Shape:
        - input: any
        - output: as the input, contiguous

    Numerics:
        The maximum is subtracted before the exponential, so no score overflows and the sum is at least 1. float16 and
        bfloat16 are computed in float32 and rounded once. A score of -inf gives -inf; scores that are all -inf, or
        among which is +inf or NaN, give NaN. Under autocast on a GPU it runs in float32.

    Raises:
        IndexError: the input has no dimension ``dim``.
        NotImplementedError: the input is not of a floating-point dtype.

    Cost:
        No parameters, O(N D) time for N slices of D values; the output is kept for the backward.

    Paper:
        Bridle, "Probabilistic Interpretation of Feedforward Classification Network Outputs", 1990.

    Example:
        >>> import torch, nacre
        >>> nacre.LogSoftmax(dim=-1)(torch.tensor([[0.0, 0.0], [10000.0, -10000.0]]))
        tensor([[-6.9315e-01, -6.9315e-01],
                [ 0.0000e+00, -2.0000e+04]])
    """

    __prepare_scriptable__ = as_torchs_layer

    def forward(self, input: Tensor) -> Tensor:
        usual = type(input) is Tensor and choice.unwatched and not is_dynamo_compiling()
        if usual and type(self.dim) is int and input.numel() < _TORCH_BELOW:
            return input.log_softmax(self.dim)
        if type(input) is not Tensor and isinstance(input, Proxy):
            return traced(self, input)
        return log_softmax(input, self.dim, _stacklevel=5)


def softmax(input: Tensor, dim: int | None = None, _stacklevel: int = 3, dtype: torch.dtype | None = None) -> Tensor:
    """Probabilities in proportion to the exponential of each value; see :class:`nacre.Softmax`.

    Args:
        input: values of any shape.
        dim: the dimension along which the results sum to 1. Default: None, the first or second with a warning.
        _stacklevel: how many calls up the warning points. Default: 3, the caller.
        dtype: convert the input to this first, and return it. Default: the input's.

    Raises:
        IndexError: the input has no dimension ``dim``.
        NotImplementedError: the dtype is not a floating-point one.

    Example:
        >>> import torch, nacre
        >>> nacre.functional.softmax(torch.tensor([1, 1]), dim=0, dtype=torch.float32)
        tensor([0.5000, 0.5000])
    """
    if dim is None:
        dim = _warned_dim("softmax", input.dim(), _stacklevel)
    return _run(_softmax, torch.nn.functional.softmax, input, dim, dtype)


def log_softmax(
    input: Tensor, dim: int | None = None, _stacklevel: int = 3, dtype: torch.dtype | None = None
) -> Tensor:
    """Logarithms of the probabilities that softmax gives; see :class:`nacre.LogSoftmax`.

    Args:
        input: values of any shape.
        dim: the dimension along which the probabilities sum to 1. Default: None, the first or second with a warning.
        _stacklevel: how many calls up the warning points. Default: 3, the caller.
        dtype: convert the input to this first, and return it. Default: the input's.

    Raises:
        IndexError: the input has no dimension ``dim``.
        NotImplementedError: the dtype is not a floating-point one.

    Example:
        >>> import torch, nacre
        >>> nacre.functional.log_softmax(torch.tensor([0.0, 1000.0]), dim=0)
        tensor([-1000.,     0.])
    """
    if dim is None:
        dim = _warned_dim("log_softmax", input.dim(), _stacklevel)
    return _run(_log_softmax, torch.nn.functional.log_softmax, input, dim, dtype)


def softmax_jacobian(input: Tensor, dim: int = -1) -> Tensor:
    r"""The derivative of each probability that softmax gives with respect to each value it was given.

    .. math:: J_{ij} = \frac{\partial s_i}{\partial x_j} = s_i (\delta_{ij} - s_j),
        \qquad J = \mathrm{diag}(s) - s s^\top

    Args:
        input: values of any shape, as given to softmax.
        dim: the dimension along which softmax runs. Default: -1, the last.

    Shape:
        - input: n values in dimension ``dim``, any other dimensions \*
        - output: (\*, n, n), the other dimensions in their order; row i is the derivative of probability i

    Numerics:
        float16 and bfloat16 are computed in float32 and rounded once. Every matrix is symmetric, and its rows and
        columns sum to 0.

    Raises:
        IndexError: the input has no dimension ``dim``; one number alone has none.
        TypeError: the input is not a dense tensor of a floating-point dtype.

    Cost:
        n^2 values for every n: for backpropagation use the product that softmax's own backward computes in O(n).

    Example:
        >>> import torch, nacre
        >>> nacre.functional.softmax_jacobian(torch.tensor([0.0, 0.0]))
        tensor([[ 0.2500, -0.2500],
                [-0.2500,  0.2500]])
    """
    if reason := unserved(input):
        raise check.error(TypeError, "softmax_jacobian takes a dense tensor of a floating-point dtype", reason)
    if not -input.dim() <= dim < input.dim():
        raise _no_dimension("softmax_jacobian", input, dim)
    return formula.softmax_jacobian(input.movedim(dim, -1))


def _run(op: Op, torchs: Callable[..., Tensor], input: Tensor, dim: int, dtype: torch.dtype | None) -> Tensor:
    if dtype is not None:
        input = input.to(dtype)
    if type(dim) is int and small(op.name, input, _TORCH_BELOW):
        return torchs(input, dim)
    if reason := unserved(input) or ("" if type(dim) is int else f"a dim of type {type(dim).__name__}"):
        return torch_instead(op.name, reason, torchs, input, dim)
    # one number alone counts as one dimension of size 1
    if not -max(input.dim(), 1) <= dim < max(input.dim(), 1):
        raise _no_dimension(op.name, input, dim)
    output = op(input, dim)
    # autocast may have computed in float32 all the same
    return output if dtype is None else output.to(dtype)


def _no_dimension(name: str, input: Tensor, dim: int) -> Exception:
    return check.error(
        IndexError,
        f"{name} runs along one dimension of its input",
        f"dim = {dim} for an input of shape {check.shape(input)}",
        f"Its dimensions are {-input.dim()} to {input.dim() - 1}." if input.dim() else "",
    )


def _warned_dim(name: str, dimensions: int, stacklevel: int) -> int:
    warnings.warn(
        f"Implicit dimension choice for {name} has been deprecated. Change the call to include dim=X as an argument.",
        stacklevel=stacklevel,
    )
    return implicit_dim(dimensions)
