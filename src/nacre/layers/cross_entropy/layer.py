"""The cross-entropy loss of given logits, and its functional form."""

from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling
from torch.nn._reduction import get_enum

from nacre.core import choice
from nacre.core.choice import cpp_kernel, sizes_decide, small, torch_instead, unserved
from nacre.core.op import Op
from nacre.core.tracing import Proxy, as_torchs_layer, traced
from nacre.layers.cross_entropy import formula, targets

# the number of logits from which nacre's kernel is faster, where two calls of each were measured equal
_TORCH_BELOW = 32768
_MANY_ROWS, _SHORT_ROW = 512, 16  # torch takes as long for a row of few classes as for one of many
_torchs: Any = torch._C._nn.cross_entropy_loss  # what torch.nn.functional.cross_entropy is
# torch rounds every logarithm of half precision
_TORCHS_DTYPES = (torch.float32, torch.float64)
_ERRORS = (IndexError, RuntimeError, ValueError)

_op = Op(
    "cross_entropy(Tensor input, Tensor target, Tensor? weight, str reduction, SymInt ignore_index,"
    " float label_smoothing) -> (Tensor loss, Tensor maximum, Tensor log_sum)",
    forward=targets.explain_bad_index(formula.forward),
    backward=formula.backward,
    saved=("input", "target", "weight", "reduction", "ignore_index", "label_smoothing", "maximum", "log_sum"),
    gradients=("input", "target", "weight"),
    autocast={"cpu": "float32", "cuda": "float32"},
    kernels=[
        cpp_kernel(
            {
                "class indices": lambda _, target, *__: not target.is_floating_point(),
                "class weights of the logits' dtype, without a gradient": lambda input, _, weight, *__: (
                    weight is None or (weight.dtype is input.dtype and not weight.requires_grad)
                ),
            }
        ),
    ],
)


class CrossEntropyLoss(torch.nn.CrossEntropyLoss):
    r"""Measures how far the distributions given by logits are from their targets: the loss of every classifier.

    .. math:: \ell = -\sum_c w_c\, t_c \log \frac{e^{x_c}}{\sum_k e^{x_k}}, \qquad t_c = (1 - s)\, q_c + s / C

    A target is the index y of a class (q_c is then 1 for c = y, else 0) or the probabilities q of all C classes.

    Args:
        weight: of each class, shape (C,). Default: 1 for every class.
        size_average: deprecated, see ``reduction``.
        ignore_index: the target whose tokens count for nothing; class indices only. Default: -100.
        reduce: deprecated, see ``reduction``.
        reduction: ``"mean"`` (the sum divided by the total weight of the target classes; for probabilities by the
            number of tokens), ``"sum"`` or ``"none"``. Default: ``"mean"``.
        label_smoothing: s, the share of each target that is spread evenly over all classes, 0 to 1. Default: 0.

    Shape:
        - input: (C,), (N, C) or (N, C, d_1, ..., d_K), logits
        - target: class indices of shape (), (N,) or (N, d_1, ..., d_K); or probabilities in the shape of the input
        - output: a scalar; with ``reduction="none"`` the shape of class indices

    Numerics:
        The largest logit is subtracted first, so logits of any size are safe. float16 and bfloat16 are computed in
        float32 and rounded once. The mean over no tokens is NaN.

    Raises:
        IndexError: a target is neither a class nor ``ignore_index``.
        ValueError: the batch sizes of input and target differ, or there is no such reduction.
        RuntimeError: another shape, dtype or device does not fit, or ``label_smoothing`` exceeds 1.

    Cost:
        No parameters, O(N C) time; the input, the target and 2 numbers a token are kept for the backward. Under 32,768
        logits of float32 or float64, but for 512 and more tokens of under 16 classes, torch's own operator is faster
        and runs: it keeps the logarithms of the probabilities in place of the input and of those numbers.

    Paper:
        Bridle, "Training Stochastic Model Recognition Algorithms as Networks can lead to Maximum Mutual Information
        Estimation of Parameters", NeurIPS 1989; label smoothing: Szegedy et al., "Rethinking the Inception
        Architecture for Computer Vision", 2015, arXiv:1512.00567.

    Example:
        >>> import torch, nacre
        >>> loss = nacre.CrossEntropyLoss()
        >>> loss(torch.zeros(3, 4), torch.tensor([0, 2, 3]))  # log(4), as no class is preferred
        tensor(1.3863)
    """

    __prepare_scriptable__ = as_torchs_layer

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        usual = type(input) is Tensor and choice.unwatched and not is_dynamo_compiling()
        if usual and _few(input) and input.dtype in _TORCHS_DTYPES:
            try:
                reduction = get_enum(self.reduction)
                return _torchs(input, target, self.weight, reduction, self.ignore_index, self.label_smoothing)
            except _ERRORS:
                pass  # what follows says more clearly what is wrong
        if type(input) is not Tensor and isinstance(input, Proxy):
            return traced(self, input, target)
        return cross_entropy(
            input,
            target,
            weight=self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
        )


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """The cross entropy between logits and targets; see :class:`nacre.CrossEntropyLoss`.

    Args:
        input: logits of shape (C,), (N, C) or (N, C, d_1, ..., d_K).
        target: class indices of shape (), (N,) or (N, d_1, ..., d_K), or probabilities in the shape of the input.
        weight: of each class, shape (C,). Default: 1 for every class.
        size_average: deprecated, see ``reduction``.
        ignore_index: the target whose tokens count for nothing; class indices only. Default: -100.
        reduce: deprecated, see ``reduction``.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``. Default: ``"mean"``.
        label_smoothing: the share of each target that is spread evenly over all classes, 0 to 1. Default: 0.

    Raises:
        IndexError: a target is neither a class nor ``ignore_index``.
        ValueError: the batch sizes of input and target differ, or there is no such reduction.
        RuntimeError: another shape, dtype or device does not fit, or ``label_smoothing`` exceeds 1.

    Example:
        >>> import torch, nacre
        >>> nacre.functional.cross_entropy(torch.zeros(4), torch.tensor([0.5, 0.5, 0.0, 0.0]))
        tensor(1.3863)
    """
    reduction = targets.reduction_name(reduction, size_average, reduce)
    torchs = sizes_decide(input) and not input.is_nested and _few(input) and input.dtype in _TORCHS_DTYPES
    if torchs and small("cross_entropy", input, _TORCH_BELOW):
        try:
            return _torchs(input, target, weight, get_enum(reduction), ignore_index, label_smoothing)
        except _ERRORS:
            pass  # what follows says more clearly what is wrong
    if not targets.plain(input, target, weight, label_smoothing):
        if reason := _unserved(input, target, weight):
            return torch_instead(
                "cross_entropy",
                reason,
                torch.nn.functional.cross_entropy,
                input,
                target,
                weight,
                ignore_index=ignore_index,
                reduction=reduction,
                label_smoothing=label_smoothing,
            )
        target = targets.validated("cross_entropy", input.shape, input, target, weight, ignore_index, label_smoothing)
    return _op(input, target, weight, reduction, ignore_index, max(label_smoothing, 0.0))


def _few(input: Tensor) -> bool:
    count = input.numel()
    if count < _MANY_ROWS:
        return True
    return count < _TORCH_BELOW and (len(input) < _MANY_ROWS or input.shape[-1] >= _SHORT_ROW)


def _unserved(input: Tensor, target: Tensor, weight: Tensor | None) -> str:
    if input.dim() == 0:
        return "logits without a dimension"
    if input.shape[1 if input.dim() > 1 else 0] == 0:
        return "no classes"
    return unserved(input, weight, target if target.is_floating_point() else None)
