"""The Dropout layer and its functional form."""

from collections.abc import Sequence

import torch
from torch import Tensor

from nacre.core import check
from nacre.core.choice import cpp_kernel, torch_instead, unserved
from nacre.core.op import Op
from nacre.core.random import dropout_seed
from nacre.core.tracing import Proxy, as_torchs_layer, traced
from nacre.layers.dropout import formula


def _fake(tensor: Tensor, seed: Tensor, p: float, needs: Sequence[bool] = ()) -> Tensor:
    """Shape and strides of the result, with any mask: to trace the generator's rounds would take long."""
    return tensor * tensor.new_empty(tensor.shape, dtype=torch.bool)


_op = Op(
    "dropout(Tensor input, Tensor seed, float p) -> Tensor output",
    forward=formula.forward,
    backward=formula.backward,
    saved=("seed", "p"),
    gradients=("input",),
    fake=_fake,
    fake_backward=_fake,
    kernels=[
        cpp_kernel(),
    ],
)


class Dropout(torch.nn.Dropout):
    r"""Sets elements to 0 at random in training, each with probability p, and scales the others so that the mean stays.

    .. math:: y_i = \frac{m_i x_i}{1 - p}, \qquad m_i \sim \mathrm{Bernoulli}(1 - p)

    In evaluation, and where p is 0, the output is the input itself.

    Args:
        p: probability of an element to be dropped, from 0 to 1. Default: 0.5.
        inplace: write the result into the input. Default: False.

    Shape:
        - input: any
        - output: as the input, with its memory format

    Numerics:
        The mask comes from a counter-based generator whose seed is drawn from torch's generator of the device: the same
        ``torch.manual_seed`` gives the same mask whatever the number of threads and the memory format, though not the
        mask that torch.nn draws. p is met to within 2^-33. NaN or infinity gives NaN when it is dropped, as in
        torch.nn.

    Raises:
        ValueError: p outside 0 to 1.
        RuntimeError: ``inplace`` on a leaf that requires its gradient.

    Cost:
        No parameters, O(N) time; a seed of 8 bytes is kept for the backward, which computes the mask again.

    Paper:
        Srivastava, Hinton, Krizhevsky, Sutskever, Salakhutdinov, "Dropout: A Simple Way to Prevent Neural Networks from
        Overfitting", JMLR 15, 2014.

    Example:
        >>> import torch, nacre
        >>> layer = nacre.Dropout(p=0.5)
        >>> layer(torch.ones(1000)).unique()
        tensor([0., 2.])
        >>> layer.eval()(torch.ones(3))
        tensor([1., 1., 1.])
    """

    __prepare_scriptable__ = as_torchs_layer

    def forward(self, input: Tensor) -> Tensor:
        if type(input) is not Tensor and isinstance(input, Proxy):
            return traced(self, input)
        return dropout(input, self.p, self.training, self.inplace)


def dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """Drops elements at random and scales the others by 1 / (1 - p); see :class:`nacre.Dropout`.

    Args:
        input: values of any shape.
        p: probability of an element to be dropped, from 0 to 1. Default: 0.5.
        training: drop; otherwise the input itself is returned. Default: True.
        inplace: write the result into ``input``. Default: False.

    Raises:
        ValueError: p outside 0 to 1.
        RuntimeError: ``inplace`` on a leaf that requires its gradient.

    Example:
        >>> import torch, nacre
        >>> values = torch.ones(2, 3)
        >>> nacre.functional.dropout(values, training=False) is values
        True
    """
    check.probability("dropout", p)
    if reason := unserved(input):
        return torch_instead("dropout", reason, torch.nn.functional.dropout, input, p, training, inplace)
    seed = dropout_seed(input, p, training)
    if seed is None:
        return input
    output = _op(input, seed, float(p))
    return input.copy_(output) if inplace else output
